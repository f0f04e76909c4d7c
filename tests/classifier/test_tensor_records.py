"""Models whose forward passes replace or change their own parameters and buffers come back unchanged, with right statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.classifier.forward import call, preserved


class Rescaling(nn.Module):
    """Changes its weight or a buffer in every forward pass, so that a second pass from the changed state has other logits."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.body, self.head = way, nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.full((8,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight
        if self.way == "replaced":
            weight.data = torch.renorm(-weight.data, 2, 0, 0.5)
        elif self.way == "in place":
            weight.data *= 0.9
        elif self.way == "without gradients":
            with torch.no_grad():
                weight.copy_(-F.normalize(weight))
        elif self.way == "buffer replaced":
            self.scale.data = self.scale.data * 0.9
        elif self.way == "buffer in place":
            self.scale.data.mul_(0.9)
        elif self.way == "late" and len(x) == 5:
            with torch.no_grad():
                weight.mul_(0.9)
        return self.head(self.body(x).relu() * self.scale)


WAYS = ["replaced", "in place", "without gradients", "buffer replaced", "buffer in place"]


def made(way: str) -> tuple[Rescaling, Tensor]:
    torch.manual_seed(0)
    return Rescaling(way).double().eval(), torch.randn(9, 6).double()


def state_of(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Return the values and the memory of all parameters and buffers."""
    return {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()}


def assert_same(model: nn.Module, before: dict[str, tuple[Tensor, int]]) -> None:
    for name, (value, place) in state_of(model).items():
        assert torch.equal(value, before[name][0]) and place == before[name][1], name


def norms(model: nn.Module, x: Tensor) -> Tensor:
    """Return the norm of each sample's gradient, each by a copy of the model."""
    found = []
    for sample in x:
        alone = copy.deepcopy(model)
        logits = alone(sample[None])
        F.cross_entropy(logits, logits.argmax(1)).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in alone.parameters()]).norm())
    return torch.stack(found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [3, 9])
def test_each_pass_starts_from_the_model_of_the_user(way: str, size: int) -> None:
    model, x = made(way)
    x = x[:size]
    expected, before = norms(model, x), state_of(model)
    for engine in ("auto", "auto", "auto", "reference"):
        found = lgm.gradient_statistics(model, x, "pseudo_label", engine=engine).norm(2)
        torch.testing.assert_close(found, expected)
        assert_same(model, before)


@pytest.mark.parametrize("way", WAYS)
def test_scores_leave_the_weights_unchanged(way: str) -> None:
    model, x = made(way)
    with torch.no_grad():
        expected = torch.distributions.Categorical(logits=copy.deepcopy(model)(x)).entropy()
    before = state_of(model)
    for _ in range(2):
        found = lgm.score(model, x, ["entropy", "gradnorm", "odin(epsilon=0.1)"])
        torch.testing.assert_close(found["entropy"], expected, check_dtype=False)
        assert_same(model, before)


def test_a_change_that_the_first_pass_does_not_make_is_reported_and_undone_later() -> None:
    model, x = made("late")
    lgm.gradient_statistics(model, x, "pseudo_label")
    changed = pytest.warns(UserWarning, match=r"unlike its first pass; they keep the new values: body\.weight")
    with changed, pytest.raises(ValueError, match="different logits"):
        lgm.gradient_statistics(model, x[:5], "pseudo_label", engine="vmap")
    before = state_of(model)
    lgm.gradient_statistics(model, x[:5], "pseudo_label", engine="vmap")
    assert_same(model, before)


@pytest.mark.parametrize("way", ["in place", "without gradients"])
@pytest.mark.parametrize("part", ["weights", "a new layer"])
def test_a_model_with_other_parameters_is_watched_again(part: str, way: str) -> None:
    model, x = made(way)
    lgm.gradient_statistics(model, x, "pseudo_label")
    if part == "weights":
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    else:
        model.body = copy.deepcopy(model.body)
    expected, before = norms(model, x), state_of(model)
    torch.testing.assert_close(lgm.gradient_statistics(model, x, "pseudo_label").norm(2), expected)
    assert_same(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Conditioned(nn.Module):
    """Moves its weight along the gradient that the user has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.zeroes = nn.Linear(6, 8), nn.Linear(8, 3), False

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight
        moved = weight if weight.grad is None else weight - weight.grad
        if self.zeroes:
            self.zero_grad(set_to_none=False)
        return self.head(F.linear(x, moved, self.body.bias).tanh())


@pytest.mark.filterwarnings("ignore:no fast rule")
@pytest.mark.parametrize("zeroes", [False, True])
def test_a_forward_pass_may_read_the_gradients_of_the_user(zeroes: bool) -> None:
    torch.manual_seed(0)
    model, x = Conditioned().double().eval(), torch.randn(4, 6).double()
    lgm.gradient_statistics(model, x, "pseudo_label")
    gradient = model.body.weight.grad = torch.randn(8, 6).double()
    kept = gradient.clone()
    losses = F.cross_entropy(model(x), model(x).argmax(1), reduction="none")
    expected = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        expected.append(torch.cat([value.flatten() for value in gradients]).norm())
    model.zeroes = zeroes
    for _ in range(3):
        found = lgm.gradient_statistics(model, x, "pseudo_label").norm(2)
        torch.testing.assert_close(found, torch.stack(expected))
        assert model.body.weight.grad is gradient and torch.equal(gradient, kept)


def test_torch_func_refuses_a_model_that_replaces_data() -> None:
    """Otherwise torch crashes the process."""
    model, x = made("buffer replaced")
    with pytest.raises(RuntimeError, match=r"replaces the \.data of a tensor"):
        lgm.gradient_statistics(model, x, "pseudo_label", engine="vmap")


def test_values_are_restored_bit_by_bit() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.register_buffer("first", torch.tensor([float("nan"), -0.0]))
            self.register_buffer("second", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            self.first.data.zero_()
            self.second.data.resize_(4)
            return self.head(x)

    model = Noisy()
    with preserved(model):
        call(model, torch.rand(3, 2))
    assert model.first[0].isnan() and model.first[1].signbit() and model.second.shape == ()
    assert model.second == 3


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_buffers_of_every_kind_are_left_alone() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.nowhere = nn.Linear(6, 3), torch.zeros(3, device="meta")
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("quantised", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
            self.register_buffer("conjugated", torch.ones(3, dtype=torch.complex64).conj())
            self.register_buffer("expanded", torch.ones(1, 3).expand(4, 3))
            self.register_buffer("empty", torch.zeros(0))
            self.register_buffer("eighth", torch.ones(3).to(torch.float8_e4m3fn))

        def forward(self, x: Tensor) -> Tensor:
            self.expanded[0].zero_()
            return self.head(x)

    model, x = Holder(), torch.rand(5, 6)
    for _ in range(2):
        assert lgm.gradient_statistics(model, x, "pseudo_label").norm(2).isfinite().all()
        assert model.expanded.sum() == 12
