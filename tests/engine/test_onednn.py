"""Large products of linear layers by oneDNN agree with torch's own, and are left to torch where types or settings differ."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.kernels import onednn
from lightning_gradmetrics.engine.kernels.operators import traced_operators

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not tell who made the processor"
)


@pytest.fixture(autouse=True)
def _on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(16, 8, 257), (3, 41, 300), (128, 260), (5, 13, 2, 300)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_equals_torchs_own(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[-1], 300, bias).requires_grad_(False)
    x, g = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 300)
    assert onednn.computes(x, layer.weight)
    found, expected = onednn.linear(x, layer.weight, layer.bias), layer(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result, x, g)[0] for result in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_products_of_few_rows_equal_torchs_own() -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(16, 512), torch.randn(512, 256)
    torch.testing.assert_close(onednn.product(x, matrix), x @ matrix, rtol=1e-5, atol=1e-4)


def test_other_types_and_settings_are_left_to_torch() -> None:
    x, weight = torch.randn(128, 256), torch.randn(512, 256)
    assert onednn.computes(x, weight)
    assert not onednn.computes(x.double(), weight.double())
    assert not onednn.computes(x[:60], weight)
    assert not onednn.computes(x[:127], weight)  # no number of images divides a prime number of rows
    with torch.autocast("cpu"):
        assert not onednn.computes(x, weight)
    torch.backends.mkldnn.enabled = False
    try:
        assert not onednn.computes(x, weight)
    finally:
        torch.backends.mkldnn.enabled = True
    with traced_operators():
        assert not onednn.computes(x, weight)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not onednn.computes(x, weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert onednn.computes(x, weight)


def test_a_precision_of_all_libraries_is_followed() -> None:
    """The older function for the precision raises an error once this setting is used."""
    code = "import torch; from lightning_gradmetrics.engine.kernels import onednn; onednn._is_faster = lambda: True; "
    code += "torch.backends.fp32_precision = 'tf32'; torch.backends.mkldnn.fp32_precision = 'bf16'; "
    code += "print(onednn.computes(torch.ones(128, 256), torch.ones(512, 256)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


class _Layers(nn.Module):
    """Linear layers, products and sums of products, whose results are changed in place."""

    def __init__(self, use: Callable[[_Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(192, 384), nn.Linear(384, 192), nn.Linear(192, 5)
        self.matrix, self.shift = nn.Parameter(torch.randn(192, 384) / 14), nn.Parameter(torch.randn(384))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, x).mean(1))


def _linear(net: _Layers, x: Tensor) -> Tensor:
    return net.second(net.first(x).relu_()).add_(x)


def _transposed(net: _Layers, x: Tensor) -> Tensor:
    return net.second(F.gelu(net.first(x.mT.contiguous().mT)))


def _product(net: _Layers, x: Tensor) -> Tensor:
    return net.second((x @ net.matrix).mul_(x[..., :1]).tanh_())


def _affine(net: _Layers, x: Tensor) -> Tensor:
    return net.second(torch.addmm(net.shift, x.flatten(0, 1), net.matrix).relu_()).view_as(x)


@pytest.mark.parametrize("use", [_linear, _transposed, _product, _affine])
def test_models_with_large_layers_equal_autograd(use: Callable[[_Layers, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, used = _Layers(use).eval(), []
    original = onednn.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "linear", lambda *args: used.append(1) or original(*args))
        for samples in (8, 8, 6, 1):
            x = torch.randn(samples, 32, 192)
            found = lgm.gradient_statistics(model, x, "pseudo_label", per_parameter=True)
            expected = lgm.gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference")
            for key, value in expected.moments.items():
                torch.testing.assert_close(found.moments[key], value, rtol=1e-4, atol=1e-5)
    assert used
