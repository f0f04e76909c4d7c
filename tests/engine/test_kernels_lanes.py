"""The compiled kernels of convolutions with many groups, whose vector lanes are channels."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine import kernels
from lightning_gradmetrics.engine.kernels import ConvGeometry, lanes, library
from lightning_gradmetrics.engine.kernels.native import ChannelScale, native_products
from lightning_gradmetrics.gradients.statistics import Moments, gradient_moments
from tests.engine.test_kernels_native import ALL, needs_compiler

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TYPES = [torch.float32, torch.float64]


def _layouts(x: Tensor) -> list[Tensor]:
    """Return a tensor in other layouts: channels last, strided, a part of the channels of another tensor, and read-only rows."""
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    strided = torch.stack([x, x], -1)[..., 0]
    part = torch.cat([x, x], 1)[:, x.shape[1] :]
    wide = torch.cat([last.movedim(1, -1), x.movedim(1, -1)], -1)[..., : x.shape[1]].movedim(-1, 1)
    return [x, last, strided, part, wide, x[:1].expand_as(x)]


def _check(actual: Moments, expected: Moments, exact: float) -> None:
    largest = torch.maximum(expected["max"].abs(), expected["min"].abs())
    scales = {"sum": expected[1.0], "max": largest, "min": largest, **{p: expected[p] for p in (1.0, 2.0)}}
    for key, value in actual.items():
        assert bool(((value - expected[key]).abs() <= exact * scales[key]).all()), key


def _geometry(choose: random.Random, is_depthwise: bool, width: int) -> tuple[ConvGeometry, int, int, list[int]]:
    """Return a random convolution, its numbers of input and output channels, and the size of its input.

    A group has at most as many input channels as a vector.
    """
    dims = choose.choice([1, 2, 2, 2, 3])
    inputs, outputs = (
        (1, 1)
        if is_depthwise
        else (min(choose.choice([1, 2, 3, 4, 5, 7, 8]), width), choose.choice([1, 2, 3, 8, 9, 20]))
    )
    groups = choose.choice([1, 2, 3, 5, 16, 33, 70] if is_depthwise else [1, 2, 3, 5, 9])
    kernel, padding, dilation = (
        tuple(choose.choice(sizes) for _ in range(dims)) for sizes in ([1, 2, 3, 3, 5], [0, 1, 2], [1, 1, 2])
    )
    stride = tuple(choose.choice([1, 1, 2, 3]) for _ in range(dims))
    most = {1: 300, 2: 20, 3: 6}[dims]
    size = []
    for length, step in zip(kernel, dilation, strict=True):
        reach = step * (length - 1) + 1
        size.append(choose.randint(reach, max(reach, most)))
    return ConvGeometry(kernel, stride, padding, dilation, groups), inputs * groups, outputs * groups, size


@needs_compiler
@pytest.mark.parametrize("seed", range(40))
def test_random_convolutions_have_the_moments_and_sums_of_plain_torch(seed):
    """Any groups, strides, dilations, layouts; with the scale of a batch norm and without."""
    torch.manual_seed(seed)
    choose, dtype, is_depthwise = random.Random(seed), TYPES[seed % 2], seed % 4 < 2
    geometry, channels, outputs, size = _geometry(choose, is_depthwise, library.library_for(dtype).lane_width())
    x = torch.randn(choose.choice([1, 2, 5]), channels, *size, dtype=dtype)
    weight = torch.randn(outputs, channels // geometry.groups, *geometry.kernel_size, dtype=dtype)
    scale = torch.randn(outputs, dtype=dtype)
    convolution = CONVOLUTIONS[len(size)]
    where = (None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    exact = 1e-10 if dtype == torch.float64 else 1e-4
    for xs, gs in zip(_layouts(x), _layouts(torch.randn_like(convolution(x, weight, *where))), strict=True):
        gradients = kernels.conv_gradient(xs.double(), gs.double(), geometry)
        factors = scale.double().view(-1, *[1] * (gradients.ndim - 2))
        output, wide_g = convolution(xs.double(), weight.double(), *where), gs.double()
        terms, axes = output * wide_g, tuple(range(2, gs.ndim))
        for wanted in (ALL, frozenset({"sum", 2.0})):
            sums, bias = ChannelScale.for_samples(len(xs), weight, scale), gs.new_empty(len(gs), outputs)
            if is_depthwise:
                plain = lanes.native_depthwise(xs, gs, geometry, wanted)
                scaled = lanes.native_depthwise(xs, gs, geometry, wanted, sums)
            else:
                plain = lanes.native_grouped(xs, gs, geometry, wanted, None, bias)
                scaled = lanes.native_grouped(xs, gs, geometry, wanted, sums)
                torch.testing.assert_close(
                    bias.double(), wide_g.sum(axes), rtol=0, atol=exact * float(wide_g.abs().sum(axes).max())
                )
            _check(plain, gradient_moments(gradients, ALL), exact)
            _check(scaled, gradient_moments(gradients * factors, ALL), exact)
            assert bool(((sums.products - terms.sum(axes)).abs() <= 10 * exact * terms.abs().sum(axes)).all())
            assert bool(((sums.totals - wide_g.sum(axes)).abs() <= exact * wide_g.abs().sum(axes)).all())


@needs_compiler
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "kernel", "is_grouped"),
    [
        (0.5, 0.5, 4, 3, True),
        (0.25, 0.75, 6, 3, True),
        (0.5, 0.5, 4, 1, False),  # too few entries
        (0.5, 0.5, 1, 3, False),  # no groups
        (0.5, 1.0, 4, 3, False),  # whole vectors of output channels
        (1.25, 0.5, 4, 3, False),  # no vector has all input channels of a group
    ],
)
def test_short_groups_share_a_vector(monkeypatch, inputs, outputs, groups, kernel, is_grouped):
    """The kernel that fills its vectors best is chosen; the numbers of channels of a group are parts of a vector."""
    width = library.library_for(torch.float32).lane_width()
    geometry = ConvGeometry((kernel,) * 2, (1, 1), (0, 0), (1, 1), groups)
    x = torch.randn(2, int(inputs * width) * groups, 5, 5)
    g = torch.randn(2, int(outputs * width) * groups, 6 - kernel, 6 - kernel)
    calls = []

    def noted(*args):
        calls.append(args)
        return native_products(*args)

    monkeypatch.setattr(lanes, "native_products", noted)
    moments = lanes.native_convolution(x, g, geometry, ALL)
    assert bool(calls) != is_grouped
    _check(moments, gradient_moments(kernels.conv_gradient(x.double(), g.double(), geometry), ALL), 1e-4)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter_for_scaled_groups(threads):
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 9)
    x, g, before = torch.randn(4, 36, 6, 6), torch.randn(4, 72, 6, 6), torch.get_num_threads()
    weight, scale = torch.randn(72, 4, 3, 3), torch.randn(72)
    found = []
    for count in (1, threads):
        sums = ChannelScale.for_samples(4, weight, scale)
        try:
            torch.set_num_threads(count)
            moments = lanes.native_convolution(x, g, geometry, ALL, sums)
        finally:
            torch.set_num_threads(before)
        found.append([*moments.values(), sums.products, sums.totals])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("groups", [5, 40])
def test_a_non_finite_sample_leaves_the_moments_of_others_unchanged(bad, groups):
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
    x, g = torch.randn(3, 40, 5, 5), torch.randn(3, 40, 5, 5)
    clean = lanes.native_convolution(x, g, geometry, ALL)
    x[1, 4, 2, 3] = bad
    found = lanes.native_convolution(x, g, geometry, ALL)
    for key in ALL:
        assert not bool(found[key][1].isfinite())
        assert torch.equal(found[key][[0, 2]], clean[key][[0, 2]])


@needs_compiler
@pytest.mark.parametrize(
    ("groups", "inputs", "outputs"),
    [
        (5, 8, 8),
        (40, 1, 1),
        (3, 12, 4),  # more input channels than a vector of double precision has lanes; likewise the next, with AVX2
        (3, 6, 2),
    ],
)
@pytest.mark.parametrize("size", [1e-22, 0.0, 1e22])
def test_squares_out_of_range_are_computed_in_double_precision(groups, inputs, outputs, size):
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
    x, g = torch.randn(3, inputs * groups, 5, 5), size * torch.randn(3, outputs * groups, 5, 5)
    weight, scale = torch.randn(outputs * groups, inputs, 3, 3), torch.rand(outputs * groups) + 0.5
    sums = ChannelScale.for_samples(3, weight, scale)
    found = lanes.native_convolution(x, g, geometry, ALL, sums)
    gradients = kernels.conv_gradient(x.double(), g.double(), geometry) * scale.double().view(-1, 1, 1, 1)
    _check(found, gradient_moments(gradients, ALL), 1e-4)


@pytest.mark.parametrize("groups", [5, 40])
def test_moments_without_compiled_kernels_are_the_same(groups):
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 3), (2, 2), (1, 1), (1, 1), groups)
    x, g = torch.randn(3, 40, 7, 7, dtype=torch.float64), torch.randn(3, 40, 4, 4, dtype=torch.float64)
    found = kernels.conv_moments(x, g, geometry, ALL)
    with library.plain_kernels():
        expected = kernels.conv_moments(x, g, geometry, ALL)
    _check(found, expected, 1e-10)
