"""The fused kernels for CUDA devices, through Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from lightning_gradmetrics.engine.kernels import ConvGeometry, fused
from lightning_gradmetrics.engine.kernels.geometry import POINTWISE
from lightning_gradmetrics.gradients.statistics import gradient_moments

KEYS = ["sum", 1.0, 2.0, "max", "min"]
torch.manual_seed(0)


def weight_gradients(layer, x, g):
    one = torch.func.vmap(lambda a, b: torch.func.grad(
        lambda w: (torch.func.functional_call(layer, {"weight": w}, (a[None],))[0] * b).sum()
    )(layer.weight.detach()))
    return one(x, g)


def check(name, measured, gradients, keys=KEYS):
    exact = gradient_moments(gradients, keys)
    for key in keys:
        worst = (measured[key] - exact[key]).abs() / (exact[key].abs() + 1e-2)
        assert worst.max() < 1e-4, (name, key, worst)


CONVOLUTIONS = [  # inputs, outputs, kernel, stride, padding, dilation, groups, channels last
    (3, 8, 3, 2, 1, 1, 1, False),
    (16, 20, 3, 1, 1, 1, 1, True),
    (40, 24, 1, 1, 0, 1, 1, False),
    (32, 16, 3, 2, 1, 2, 2, True),
    (6, 6, 3, 1, 1, 1, 2, False),
    (20, 130, 1, 2, 0, 1, 1, False),
]
for inputs, outputs, kernel, stride, padding, dilation, groups, last in CONVOLUTIONS:
    layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    x = torch.randn(3, inputs, 9, 9)
    g = torch.randn_like(layer(x))
    if last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    sides = [(value, value) for value in (kernel, stride, padding, dilation)]
    measured = fused.fused_products(x, g.detach(), ConvGeometry(*sides, groups), KEYS)
    check(("conv", inputs, outputs), measured, weight_gradients(layer.double(), x.double(), g.double()))

layer = torch.nn.Linear(33, 20, bias=False)
a, g = torch.randn(3, 7, 33), torch.randn(3, 7, 20)
measured = fused.fused_products(a.mT, g.mT, POINTWISE, KEYS, convolution=False)
check("linear", measured, weight_gradients(layer.double(), a.double(), g.double()))
check("squares alone", fused.fused_products(a.mT, g.mT, POINTWISE, ["sum", 2.0]),
      weight_gradients(layer.double(), a.double(), g.double()), ["sum", 2.0])

layer = torch.nn.Conv2d(10, 10, 3, 2, 1, groups=10, bias=False)
x = torch.randn(2, 10, 8, 8)
g = torch.randn_like(layer(x)).detach()
gradients = weight_gradients(layer.double(), x.double(), g.double()).flatten(2)
geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1), 10)
assert torch.allclose(fused.fused_depthwise(x, g, geometry).double(), gradients, atol=1e-5)

rows = torch.randn(4, 5000)
check("rows", fused.fused_rows(rows, KEYS), rows.double())
check("rows of a transposed matrix", fused.fused_rows(torch.randn(40, 3).mT, KEYS[:1]), torch.zeros(3, 40), [])
parts = [torch.randn(3, size) for size in (1, 700, 10)]
for part, measured in zip(parts, fused.fused_segments(parts, KEYS)):
    check("segments", measured, part.double())

g, x = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
total, product = fused.fused_sums(g, x)
assert torch.allclose(total, g.sum(2), atol=1e-5) and torch.allclose(product, (g * x).sum(2), atol=1e-5)
total, product = fused.fused_sums(g.mT, None)
assert torch.allclose(total, g.sum(1), atol=1e-5) and product is None
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch comes without Triton")
def test_the_fused_kernels_compute_the_moments_of_autograds_gradients() -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
