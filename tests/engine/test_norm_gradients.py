"""Norms whose gradients torch computes wrongly: of one row, where the input or the gradient is transposed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.compat.gradient_metrics import GradientMetricCollector
from lightning_gradmetrics.compat.gradient_metrics.metrics import PNorm
from lightning_gradmetrics.engine.task import Task


def _transposed(x: Tensor) -> Tensor:
    """Return images whose memory has the order of a sequence, and the samples within each position."""
    return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


class _Net(nn.Module):
    """A norm of images, or the same arithmetic, whose input or whose output is transposed."""

    def __init__(self, norm: nn.Module, is_transposed: bool, computes_norm: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), norm, nn.Linear(4, 3)
        self.is_transposed, self.computes_norm = is_transposed, computes_norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.is_transposed:
            return self.last(self._normalised(_transposed(x)).tanh().mean((2, 3)))
        return self.last(self._normalised(x).flatten(2).permute(2, 0, 1)).tanh().mean(0)

    def _normalised(self, x: Tensor) -> Tensor:
        if not self.computes_norm:
            out: Tensor = self.norm(x)
            return out
        weight, bias = self.norm.weight[:, None, None], self.norm.bias[:, None, None]
        if isinstance(self.norm, nn.BatchNorm2d):
            return x * weight / (1 + self.norm.eps) ** 0.5 + bias
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * weight + bias


class _FunctionalNorm(nn.Module):
    """An instance norm that is no layer of torch."""

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias)


CASES = {
    "instance norms, transposed gradients": (nn.InstanceNorm2d, False, 3),
    "functional instance norms, transposed gradients": (_FunctionalNorm, False, 3),
    "batch norms of one sample, transposed gradients": (nn.BatchNorm2d, False, 1),
    "batch norms of one sample, transposed inputs": (nn.BatchNorm2d, True, 1),
}


@pytest.mark.parametrize(("kind", "is_transposed", "size"), CASES.values(), ids=CASES)
def test_gradients_of_norms_are_right_for_all_strides(kind: type[nn.Module], is_transposed: bool, size: int) -> None:
    torch.manual_seed(0)
    model = _Net(kind(4, affine=True), is_transposed, False).double().eval()
    other = _Net(model.norm, is_transposed, True).double().eval()
    other.load_state_dict(model.state_dict())
    x, one_by_one = torch.randn(size, 3, 5, 7).double(), []
    for sample in x:
        logits = other(sample[None])
        loss = F.cross_entropy(logits, logits.argmax(1))
        gradients = torch.autograd.grad(loss, list(other.parameters()))
        one_by_one.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    expected = torch.stack(one_by_one)
    for engine in ("auto", "auto", "auto", "reference"):
        found = lgm.gradient_statistics(model, x, "pseudo_label", engine=engine).norm(2)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    maps = [lgm.cosine_similarity_maps(network, x, sign=False) for network in (model, other)]
    torch.testing.assert_close(*maps, rtol=1e-9, atol=1e-12)
    collector, logits = GradientMetricCollector(PNorm(model, p=2)), model(x)
    found = collector(F.cross_entropy(logits, logits.argmax(1), reduction="none"))
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-9, atol=1e-12)


def test_later_batches_without_such_norms_run_without_a_function_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    forward = Task.forward
    monkeypatch.setattr(Task, "forward", lambda task, repairs=True: seen.append(repairs) or forward(task, repairs))
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)),
        torch.randn(3, 3, 5, 5),
    )
    model.eval()(x)
    lgm.gradient_statistics(model, x, "uniform")
    seen.clear()
    lgm.gradient_statistics(model, x, "uniform")
    assert seen == [False]
