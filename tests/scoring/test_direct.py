"""``score`` without a Trainer: forms of inputs, labels and models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from tests.callback.runs import mlp, numbers

NAMES = ["energy", "gradnorm", "gradnorm(target=all)", "grand"]
Y = torch.arange(8) % 3


@pytest.mark.parametrize(
    "targets",
    [Y.tolist(), Y.numpy(), Y.int(), Y.byte(), Y[:, None], Y.double(), nn.functional.one_hot(Y, 3)],
    ids=["list", "numpy", "int32", "uint8", "column", "floats", "one-hot"],
)
def test_forms_of_labels(targets: Any) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    torch.testing.assert_close(lgm.score(net, x, "grand", targets), lgm.score(net, x, "grand", Y))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("make", [lambda x: (x,), lambda x: [x], lambda x: {"input": x}, lambda x: {0: x}])
def test_forms_of_inputs_and_contexts(make: Any, context: Any) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5).requires_grad_()
    expected = lgm.score(net, x.detach().clone(), NAMES, Y)
    with context():
        found = lgm.score(net, make(x), NAMES, Y)
    torch.testing.assert_close(found, expected)
    assert x.grad is None and all(parameter.grad is None for parameter in net.parameters())


class Detached(nn.Module):
    """A model whose forward runs without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Forces(nn.Module):
    """Returns the gradient of an energy with respect to its input, as force fields do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        place = x.detach().requires_grad_()
        energy = self.body(place).tanh().square().sum()
        return self.head(torch.autograd.grad(energy, place, create_graph=True)[0])


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_models_that_differentiate_in_their_forward_are_scored_where_gradients_are_disabled() -> None:
    net, x = Forces().double().eval(), numbers(8, 5)
    found = lgm.score(net, x, NAMES, Y)
    expected = lgm.gradient_statistics(net, x, "uniform", engine="reference").norm(1)
    torch.testing.assert_close(found["gradnorm(target=all)"], -expected)
    torch.testing.assert_close(found["energy"], -net(x).detach().logsumexp(1))
    with torch.inference_mode():
        torch.testing.assert_close(lgm.score(net, x, NAMES, Y), found)
    with pytest.raises(
        ValueError, match=r"the logits of Forces do not depend on its inputs by autograd.*Remove detach\(\)"
    ):
        lgm.score(net, x, "odin")


X = numbers(8, 5)
PAIR = TensorDataset(X, Y)
REFUSED: list[tuple[Any, Any, str, str]] = [
    (mlp(5, 3), (X, Y), "energy", r"do not fit Sequential.forward\(input\): too many positional.*labels as targets="),
    (mlp(5, 3), {"input": X, "label": Y}, "energy", r"do not fit Sequential.forward.*'label'.*targets="),
    (mlp(5, 3), {"image": X}, "energy", r"do not fit Sequential.forward\(input\).*'input'.*keyword arguments"),
    (mlp(5, 3), X.numpy(), "energy", r"a ndarray; expected a tensor: pass torch.as_tensor\(inputs\)"),
    (mlp(5, 3), (X.numpy(),), "energy", r"a ndarray; expected a tensor"),
    (mlp(5, 3), {"input": np.zeros((2, 5))}, "energy", r"a ndarray; expected a tensor"),
    (mlp(5, 3), DataLoader(PAIR), "energy", r"a DataLoader; expected a tensor.*call score for each batch"),
    (lambda x: x, X, "energy", r"the model is a function; expected a torch.nn.Module"),
    (mlp(5, 3), X[0], "gradnorm", r"shape \(3,\); expected \(N, C\)"),
    (Detached().double(), X, "gradnorm(target=all)", r"have no gradient: its forward runs under torch.no_grad"),
]


@pytest.mark.parametrize(("model", "inputs", "name", "words"), REFUSED, ids=[words[:40] for *_, words in REFUSED])
def test_refusals_are_explained(model: Any, inputs: Any, name: str, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        lgm.score(model, inputs, name)


def test_a_model_without_gradients_has_logit_and_head_scores() -> None:
    model = Detached().double()
    expected = lgm.score(nn.Sequential(model.body, model.head), X, ["energy", "gradnorm"])
    torch.testing.assert_close(lgm.score(model, X, ["energy", "gradnorm"]), expected)


def test_a_frozen_model_has_gradients() -> None:
    net = mlp(5, 8, 3)
    expected = lgm.score(net, X, "gradnorm(target=all)")
    net.requires_grad_(False)
    torch.testing.assert_close(lgm.score(net, X, "gradnorm(target=all)"), expected)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_active_dropout_causes_a_warning() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.Linear(8, 3)).double()
    with pytest.warns(UserWarning, match=r"the dropout '1' is in train mode.*model.eval\(\)") as caught:
        lgm.score(model, X, ["energy", "pseudo_label(target=all)"])
    assert len(caught) == 1  # the engine's warning of random numbers would repeat it
    lgm.score(model.eval(), X, "energy")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_layers_with_nested_tensors_are_observed() -> None:
    """In eval mode torch's encoder passes nested tensors, which have no shape, between its layers."""
    torch.manual_seed(0)
    model, x = Padded().double().eval(), torch.randn(4, 5, 8, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[5], [2], [3], [5]])
    scores = ["gradnorm", "pseudo_label(target=all)"]
    found = lgm.score(model, {"x": x, "mask": mask}, scores)
    for number in range(4):
        one = slice(number, number + 1)
        for name, value in lgm.score(model, {"x": x[one], "mask": mask[one]}, scores).items():
            torch.testing.assert_close(found[name][one], value)


class Padded(nn.Module):
    """An encoder that drops padding inside."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(x, src_key_padding_mask=mask).masked_fill(mask[..., None], 0)
        return self.head(hidden.sum(1))
