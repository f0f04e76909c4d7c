"""Splitting batches into inputs and labels."""

from __future__ import annotations

import pytest
import torch

from lightning_gradmetrics.classifier.batches import split_batch

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("batch", "labelled"),
    [
        (X, False),
        ((X, Y), True),
        ([X, Y], True),
        ([X], False),
        ((X, Y, X), True),
        ({"a": X, "labels": Y}, True),
        ({"a": X}, False),
    ],
)
def test_known_kinds(batch, labelled: bool) -> None:
    inputs, labels = split_batch(batch)
    assert inputs is X and (labels.tolist() == Y.tolist() if labelled else labels is None)


@pytest.mark.parametrize("second", [torch.rand(3), torch.ones(3, 5), "path", None])
def test_values_that_are_not_class_indices_are_not_labels(second) -> None:
    assert split_batch((X, second))[1] is None


def test_a_mapping_of_several_inputs_is_preserved() -> None:
    inputs, labels = split_batch({"input_ids": Y, "attention_mask": Y, "labels": Y})
    assert set(inputs) == {"input_ids", "attention_mask"} and torch.equal(labels, Y)


@pytest.mark.parametrize("batch", [None, "text", [], 3, ["a", "b"]])
def test_other_batches_are_refused_with_the_remedy(batch) -> None:
    with pytest.raises(TypeError, match="pass split_batch="):
        split_batch(batch)
