"""Scores one model in several threads, and runs out of memory while a model is planned."""

from __future__ import annotations

import threading

import pytest
import torch

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.planning import verification
from tests.models import cnn, images

SCORES = ["energy", "gradnorm", "pseudo_label(target=all)", "gga"]


def test_threads_that_score_one_model_get_the_scores_of_their_samples() -> None:
    torch.manual_seed(0)
    model = cnn()
    inputs = [images(5) for _ in range(4)]
    expected = [lgm.score(model, x, SCORES) for x in inputs]
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(3):
                found = lgm.score(model, inputs[number], SCORES)
                for name, values in expected[number].items():
                    torch.testing.assert_close(found[name], values)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [MemoryError("none left"), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_out_of_memory_error_while_planning_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(verification, "_planned", fail)
    with pytest.raises(type(error), match=str(error)):
        lgm.score(cnn(), images(3), "pseudo_label(target=all)")


@pytest.mark.parametrize("score", ["exgrad", "fisher_trace"])
def test_too_many_classes_for_one_backward_pass_each_are_refused(score: str) -> None:
    model = torch.nn.Linear(3, 10_000)
    with pytest.raises(ValueError, match=r"10000 classes take as many backward passes.*as in classes=10"):
        lgm.score(model, torch.randn(2, 3), f"{score}(target=all)")
    values = lgm.score(model, torch.randn(2, 3), f"{score}(target=all,classes=3)")[f"{score}(target=all,classes=3)"]
    assert values.isfinite().all()
