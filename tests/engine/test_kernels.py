"""Kernels against autograd, one sample at a time, over random shapes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradmetrics.engine import kernels
from lightning_gradmetrics.engine.kernels import ConvGeometry, gram, library
from lightning_gradmetrics.gradients.statistics import gradient_moments

WANTED = frozenset({"sum", "max", "min", 1.0, 2.0, 3.0})
SUBSETS = [
    WANTED,
    frozenset({"sum", "max", "min", 1.0, 2.0}),
    frozenset({"sum", 2.0}),
    frozenset({"sum"}),
    frozenset({2.0}),
    frozenset({"max"}),
]
SAME = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.fixture(scope="module", params=["compiled", "torch"], autouse=True)
def form(request):
    """Every test once with the compiled kernels, if there is a compiler, and once with plain torch."""
    with library.plain_kernels() if request.param == "torch" else nullcontext():
        yield


def tolerance(dtype: torch.dtype) -> float:
    return 1e-9 if dtype == torch.float64 else 1e-4


def close(actual: dict, gradient: torch.Tensor, wanted: frozenset, dtype: torch.dtype) -> None:
    """Assert that moments equal those of the stored gradient; a sum may lose digits to cancellation."""
    expected = gradient_moments(gradient.double(), {*wanted, 1.0})
    assert set(actual) == set(wanted)
    for key in wanted:
        scale = expected[1.0] if key == "sum" else expected[key].abs()
        error = (actual[key] - expected[key]).abs()
        assert actual[key].dtype == torch.float64 and actual[key].shape == (len(gradient),)
        bound = tolerance(dtype) * scale + tolerance(dtype) * 1e-2 * (
            gradient.double().abs().flatten(1).amax(1) if gradient[:1].numel() else 0
        )
        assert bool((error <= bound + 1e-30).all()), (key, actual[key], expected[key])


def conv_reference(x, weight_shape, g, transposed=False, **options):
    """The weight's gradient for each sample, by autograd in float64."""
    grads = []
    for xn, gn in zip(x.double(), g.double(), strict=True):
        weight = torch.zeros(weight_shape, dtype=torch.float64, requires_grad=True)
        call = (TRANSPOSED if transposed else CONV)[xn.ndim - 1]
        output = call(xn[None], weight, **options)
        grads.append(torch.autograd.grad(output, weight, gn[None])[0])
    return torch.stack(grads) if grads else torch.zeros(0, *weight_shape, dtype=torch.float64)


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_in, per_out = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 5, 17, 40]))
    if draw(st.booleans()) and groups > 1:
        per_in = per_out = 1
    top = {1: 9, 2: 7, 3: 4}[dims]

    def integers(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    geometry = ConvGeometry(integers(1, 3), integers(1, 3), integers(0, 2), integers(1, 2), groups)
    size = []
    for kernel, padding, dilation in zip(geometry.kernel_size, geometry.padding, geometry.dilation, strict=True):
        reach = dilation * (kernel - 1)
        size.append(draw(st.integers(max(1, reach + 1 - 2 * padding), top + reach)))
    return draw(st.sampled_from([0, 1, 2, 3])), per_in, per_out, size, geometry


def options(geometry: ConvGeometry) -> dict:
    """The arguments of torch's convolutions."""
    return {name: getattr(geometry, name) for name in ("stride", "padding", "dilation", "groups")}


@settings(max_examples=80, deadline=None)
@given(
    case=convolutions(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    wanted=st.sampled_from(SUBSETS),
)
def test_convolution(case, seed, dtype, wanted):
    n, per_in, per_out, size, geometry = case
    torch.manual_seed(seed)
    x = torch.randn(n, geometry.groups * per_in, *size, dtype=dtype)
    g = torch.randn(n, geometry.groups * per_out, *geometry.output_size(size), dtype=dtype)
    expected = conv_reference(x, (g.shape[1], per_in, *geometry.kernel_size), g, **options(geometry))
    gradient = kernels.conv_gradient(x, g, geometry)
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype) * 10)
    close(kernels.conv_moments(x, g, geometry, wanted), expected, wanted, dtype)


@settings(max_examples=80, deadline=None)
@given(
    case=convolutions(),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    layout=st.sampled_from(["plain", "last", "strided"]),
    extra=st.integers(0, 1),
)
def test_gram_form(case, seed, dtype, layout, extra):
    """The kernels are right even where they are not faster, and for an input larger than the output gradient covers."""
    n, per_in, per_out, size, geometry = case
    torch.manual_seed(seed)
    x = torch.randn(n, geometry.groups * per_in, *(s + extra for s in size), dtype=dtype)
    g = torch.randn(n, geometry.groups * per_out, *geometry.output_size(size), dtype=dtype)
    gradient = kernels.conv_gradient(x.double(), g.double(), geometry)
    if layout == "last":
        x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
    if layout == "strided":
        x, g = (torch.stack([t, t], -1)[..., 0] for t in (x, g))

    def direct(rows):
        return gradient[rows].flatten(1).square().sum(1)

    moments = gram.conv_square(x, g, geometry, direct)
    close(moments, gradient, frozenset(moments), dtype)


@pytest.mark.parametrize(("stride", "wanted"), [(1, {2.0}), (1, {2.0, "sum"}), (2, {2.0})])
def test_gram_form_of_single_positions_of_images(stride, wanted, monkeypatch):
    """In the channels-last layout, rows are read where they are, as in a linear layer."""
    torch.manual_seed(0)
    geometry = ConvGeometry((1, 1), (stride, stride), (0, 0), (1, 1))
    x = torch.randn(3, 80, 4, 4).to(memory_format=torch.channels_last)
    g = torch.randn(3, 70, 4 // stride, 4 // stride).to(memory_format=torch.channels_last)
    linear = []
    monkeypatch.setattr(gram, "linear_square", lambda *args, run=gram.linear_square: linear.append(1) or run(*args))
    close(
        kernels.conv_moments(x, g, geometry, wanted),
        kernels.conv_gradient(x.double(), g.double(), geometry),
        wanted,
        torch.float32,
    )
    has_kernel = library.library_for(torch.float32) is not None
    assert len(linear) == (stride == 1 and has_kernel)


@pytest.mark.parametrize("output_padding", [0, 1])
def test_a_transposed_convolution_is_a_convolution_with_swapped_roles(output_padding):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    geometry = ConvGeometry((3, 2), (2, 3), (1, 0), (1, 2), 2)
    arguments = {"output_padding": output_padding, **options(geometry)}
    shape = (4, 3, 3, 2)
    output = F.conv_transpose2d(x, torch.zeros(shape, dtype=torch.float64), **arguments)
    g = torch.randn_like(output)
    expected = conv_reference(x, shape, g, transposed=True, **arguments)
    torch.testing.assert_close(kernels.conv_gradient(g, x, geometry), expected)
    close(kernels.conv_moments(g, x, geometry, WANTED), expected, WANTED, torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 5]),
    t=st.integers(1, 20),
    i=st.integers(1, 40),
    o=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    wanted=st.sampled_from(SUBSETS),
)
def test_linear(n, t, i, o, dtype, wanted):
    torch.manual_seed(n + t + i + o)
    a, g = torch.randn(n, t, i, dtype=dtype), torch.randn(n, t, o, dtype=dtype)
    expected = torch.einsum("nto,nti->noi", g.double(), a.double())
    torch.testing.assert_close(
        kernels.linear_gradient(a, g).double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype) * 10
    )
    close(kernels.linear_moments(a, g, wanted), expected, wanted, dtype)


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 4]),
    t=st.integers(1, 9),
    rows=st.integers(1, 6),
    width=st.integers(1, 4),
    padding=st.booleans(),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_embedding(n, t, rows, width, padding, shift, seed):
    torch.manual_seed(seed)
    indices, g = torch.randint(rows, (n, t)), torch.randn(n, t, width, dtype=torch.float64) + shift
    padding_idx = rows - 1 if padding else None
    expected = torch.zeros(n, rows, width, dtype=torch.float64)
    for sample in range(n):
        expected[sample].index_add_(0, indices[sample], g[sample])
    if padding:
        expected[:, padding_idx] = 0
    close(kernels.embedding_moments(indices, g, rows, padding_idx, WANTED), expected, WANTED, torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 5),
    d=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    wanted=st.sampled_from(SUBSETS),
)
def test_rows(n, d, dtype, wanted):
    torch.manual_seed(n + d)
    flat = torch.randn(n, d, dtype=dtype) + 0.1
    close(kernels.row_moments(flat, wanted), flat, wanted, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_non_finite_sample_leaves_the_others_unchanged(bad, dtype):
    torch.manual_seed(0)
    x, g = torch.randn(4, 3, 6, 6, dtype=dtype), torch.randn(4, 20, 6, 6, dtype=dtype)
    broken = g.clone()
    broken[1, 2, 3, 4] = bad
    clean, actual = kernels.conv_moments(x, g, SAME, WANTED), kernels.conv_moments(x, broken, SAME, WANTED)
    for key in WANTED:
        assert not bool(actual[key][1].isfinite()), key
        torch.testing.assert_close(actual[key][[0, 2, 3]], clean[key][[0, 2, 3]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    torch.manual_seed(0)
    x, g = torch.randn(3, 4, 9, 9).to(dtype), torch.randn(3, 5, 9, 9).to(dtype)
    expected = conv_reference(x, (5, 4, 3, 3), g, padding=1)
    close(kernels.conv_moments(x, g, SAME, WANTED), expected, WANTED, torch.float32)
    a, b = x.flatten(2), g.flatten(2)
    close(kernels.linear_moments(a.mT, b.mT, WANTED), b.double() @ a.double().mT, WANTED, torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 3]),
    c=st.sampled_from([1, 2, 5, 600]),
    size=st.sampled_from([(), (1,), (7,), (5, 40), (3, 4, 50)]),
    layout=st.sampled_from(["plain", "last", "expanded"]),
    paired=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_position_sums(n, c, size, layout, paired, dtype):
    torch.manual_seed(n + c)
    g, x = (torch.randn(n, c, *size).to(dtype) for _ in range(2))
    if layout == "last":
        g, x = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (g, x))
    if layout == "expanded" and size:
        g = g[..., :1].expand_as(g)
    total, product = kernels.position_sums(g, x if paired else None)
    dims = tuple(range(2, g.ndim))
    expected = [g.double(), g.double() * x.double()]
    for actual, terms in zip([total, product], expected, strict=True):
        if actual is not None:
            reference = terms.sum(dims) if dims else terms
            scale = terms.abs().sum(dims) if dims else terms.abs()
            bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
            assert actual.dtype == torch.float64 and bool(((actual - reference).abs() <= bound * scale).all())
    assert (product is None) == (not paired)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "size"), [(5, (1, 1)), (40, (9, 80)), (530, (3, 5))])
def test_gradients_of_a_batch_norm(channels, size, layout):
    torch.manual_seed(0)
    x, g = (torch.randn(3, channels, *size).contiguous(memory_format=layout) for _ in range(2))
    mean, variance, weight = torch.randn(channels), torch.rand(channels) + 0.1, torch.randn(channels)
    if not kernels.describe_kernels().startswith("compiled") or library.library_for(torch.float32) is None:
        pytest.skip("no compiled kernels")
    found = kernels.native_norm(x, g, mean, variance, 0.5, weight)
    normalised = (x.double() - mean.view(-1, 1, 1)) / (variance.double() + 0.5).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(found.bias.double(), g.double().sum((2, 3)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.weight.double(), (g.double() * normalised).sum((2, 3)), rtol=1e-5, atol=1e-4)
    factor = weight.double() / (variance.double() + 0.5).sqrt()
    torch.testing.assert_close(found.product.double(), g * factor.view(-1, 1, 1), rtol=1e-6, atol=0)
    assert kernels.native_norm(x, g, mean, variance, 0.5, None).product is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("groups", "channels", "size"), [(1, 1, (2, 3)), (2, 6, (5, 7)), (3, 3, (33, 41)), (4, 16, ())]
)
def test_gradients_of_a_group_norm(groups, channels, size, dtype):
    """Far from zero, with fewer and more positions than those of a chunk, and without positions."""
    torch.manual_seed(0)
    if library.library_for(dtype) is None:
        pytest.skip("no compiled kernels")
    x, g = 20 + torch.randn(3, channels, *size, dtype=dtype), torch.randn(3, channels, *size, dtype=dtype)
    weight, leaf = torch.randn(channels, dtype=dtype), x.double().requires_grad_()
    normalised = F.group_norm(leaf, groups, eps=0.1)
    along_channels = (-1, *[1] * len(size))
    (product,) = torch.autograd.grad(normalised, leaf, g.double() * weight.double().view(along_channels))
    grouped = x.double().view(3, groups, -1)
    mean, scale = grouped.mean(2), (grouped.var(2, correction=0) + 0.1).rsqrt()
    arguments = x, g, mean.to(dtype), scale.to(dtype), weight
    found = kernels.native_group_norm_gradients(*arguments, True)
    bound = 2e-5 if dtype == torch.float32 else 1e-12
    pairs = (found.bias, g.double()), (found.weight, g.double() * normalised.detach())
    for rows, terms in pairs:
        torch.testing.assert_close(
            rows.double(), terms.flatten(2).sum(2) if size else terms, rtol=bound, atol=20 * bound
        )
    torch.testing.assert_close(found.product.double(), product, rtol=bound, atol=bound)
    assert kernels.native_group_norm_gradients(*arguments, False).product is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("positions", "width"), [(1, 7), (70, 200), (3, 4096)])
def test_gradients_of_a_layer_norm(positions, width, dtype):
    torch.manual_seed(0)
    if library.library_for(dtype) is None:
        pytest.skip("no compiled kernels")
    x, g = 3 * torch.randn(2, positions, width, dtype=dtype) + 5, torch.randn(2, positions, width, dtype=dtype)
    bias, weight = kernels.native_layer_norm(x, g, 0.1)
    products = g.double() * F.layer_norm(x.double(), [width], eps=0.1)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(bias.double(), g.double().sum(1), rtol=bound, atol=10 * bound)
    torch.testing.assert_close(weight.double(), products.sum(1), rtol=bound, atol=10 * bound)
    strided = kernels.native_layer_norm(x.movedim(0, 1).contiguous().movedim(1, 0), g, 0.1)
    assert torch.equal(strided[1], weight)
    transposed = kernels.native_layer_norm(x.mT.contiguous().mT, g, 0.1)  # as after a convolution
    assert torch.equal(transposed[0], bias) and torch.equal(transposed[1], weight)
