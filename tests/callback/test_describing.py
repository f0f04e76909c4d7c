"""What is compared when a run is resumed."""

from __future__ import annotations

from lightning_gradmetrics.callback.describing import described


def test_two_lambdas_of_one_function_differ() -> None:
    first, same, other = (lambda batch: batch[0]), (lambda batch: batch[0]), (lambda batch: batch[1])
    assert first.__qualname__ == other.__qualname__
    assert described(first) == described(same) != described(other)


def test_named_functions_are_described_by_name() -> None:
    assert described(len) == "len" and described([len, 2.0]) == ["len", 2.0]
