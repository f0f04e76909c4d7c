"""The stored layout of a model is used again only if the model consists of the same objects."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

from lightning_gradmetrics.classifier.model_layout import layout_of
from lightning_gradmetrics.classifier.preservation import preserved


def small_model() -> Any:
    """Return a model with buffers, and a number and a list among its attributes."""
    model = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.Linear(3, 3)).eval()
    model.scale, model.steps = 1000.0, [1, 2]
    return model


def _swapped(model: Any) -> None:
    model._modules["0"], model._modules["2"] = model._modules["2"], model._modules["0"]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "mode": lambda model: model[1].train(),
    "parameter": lambda model: setattr(model[2], "bias", nn.Parameter(torch.zeros(3))),
    "no parameter": lambda model: setattr(model[2], "bias", None),
    "buffer": lambda model: model.register_buffer("more", torch.zeros(3)),
    "equal number": lambda model: setattr(model, "scale", float("1000")),
    "new attribute": lambda model: setattr(model[0], "extra", 1),
    "deleted attribute": lambda model: delattr(model, "scale"),
    "entry of a list": lambda model: model.steps.append(0),
    "module": lambda model: model.append(nn.Identity()),
    "order": _swapped,
    "hook": lambda model: model[2].register_forward_hook(lambda *_: None),
    "class": lambda model: setattr(model[2], "__class__", type("Other", (nn.Linear,), {})),
    "dictionary": lambda model: setattr(model[2], "__dict__", dict(vars(model[2]))),
    "registered in another dictionary": lambda model: vars(model[2]).update(_parameters=dict(model[2]._parameters)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_has_a_new_layout(name: str) -> None:
    model = small_model()
    before = layout_of(model)
    assert layout_of(model) is before
    CHANGES[name](model)
    after = layout_of(model)
    assert after is not before
    assert after.modules == tuple(model.modules())
    assert after.named_parameters == dict(model.named_parameters())
    assert all(map(lambda one, other: one is other, after.buffers, model.buffers()))


def test_a_stored_layout_restores_the_model_again() -> None:
    model = small_model()
    for _ in range(3):
        with preserved(model):
            model.scale, model.extra = 2.0, 1
            model.steps.append(7)
            model[1].running_mean.add_(1)
            model[1].running_var = torch.zeros(2)
            model[2].weight.requires_grad_(False)
        assert model.scale == 1000.0 and not hasattr(model, "extra")
        assert 7 not in model.steps
        assert not model[1].running_mean.any() and model[1].running_var.all() and model[2].weight.requires_grad


def test_a_stored_layout_keeps_no_model_in_memory() -> None:
    model = small_model()
    layout_of(model)
    model, alive = None, ref(model)
    gc.collect()
    assert alive() is None


def test_a_submodule_that_refers_to_its_model_is_released_once_another_model_is_used() -> None:
    model = small_model()
    layout_of(model)
    vars(model[0])["owner"] = model
    model = ref(model)
    layout_of(small_model())
    gc.collect()
    assert model() is None
