"""The compiled kernels: that they are used, that everything works without them, and how they are built."""

from __future__ import annotations

import shutil
import tempfile

import pytest
import torch

from lightning_gradmetrics.engine import kernels
from lightning_gradmetrics.engine.kernels import gram, native
from lightning_gradmetrics.gradients.statistics import gradient_moments

ALL = frozenset({"sum", "max", "min", 1.0, 2.0})
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine on which nothing was built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native._library.cache_clear()
    yield monkeypatch
    native._library.cache_clear()


def agrees() -> bool:
    """Whether moments of a convolution are right; what computes them is another question."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    spec = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    actual, expected = kernels.conv_moments(x, g, *spec, ALL), gradient_moments(kernels.conv_gradient(x, g, *spec), ALL)
    return all(torch.allclose(actual[key], expected[key], rtol=1e-4, atol=1e-4) for key in ALL)


@needs_compiler
def test_kernels_are_compiled_here():
    assert native.supports(torch.zeros(1), ALL)
    assert not native.supports(torch.zeros(1), {3.0})
    assert not native.supports(torch.zeros(1, dtype=torch.bfloat16), ALL)


@needs_compiler
def test_kernels_are_built_once_and_kept(fresh, tmp_path):
    assert agrees()
    (built,) = (tmp_path / "cache" / "lightning_gradmetrics").iterdir()
    changed = built.stat().st_mtime_ns
    native._library.cache_clear()
    assert agrees()
    assert built.stat().st_mtime_ns == changed


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_obstacle(fresh, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert native.supports(torch.zeros(1), ALL)
    assert agrees()


@pytest.mark.parametrize(
    ("variable", "value"), [(native.VARIABLE, "0"), ("CC", "/bin/false"), ("CC", "/no/such/compiler")]
)
def test_without_kernels_torch_does_the_work(fresh, variable, value):
    fresh.setenv(variable, value)
    assert not native.supports(torch.zeros(1), ALL)
    assert agrees()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 700, 40), (1, 1, 5, 300), (40, 3, 33, 7)])
def test_memory_layouts_give_the_same(dtype, shape):
    """Positions beyond a block, columns beyond a panel, few and many samples; channels first and last."""
    n, groups, positions, width = shape
    torch.manual_seed(0)
    x, g = (torch.randn(n, groups * c, positions, dtype=dtype) for c in (5, width))
    expected = gradient_moments(kernels.conv_gradient(x.double(), g.double(), [1], [1], [0], [1], groups), ALL)
    last = [t.mT.contiguous().mT for t in (x, g)]
    wide = [torch.stack([t, t], -1)[..., 0] for t in (x, g)]
    for xs, gs in ((x, g), last, wide, (x, last[1]), (last[0], g)):
        actual = native.native_products(xs, gs, [1], [1], [0], [1], groups, ALL)
        for key in ALL:
            bound = 1e-9 if dtype == torch.float64 else 1e-4
            scale = expected[1.0] if key == "sum" else expected[key].abs()
            assert bool(((actual[key] - expected[key]).abs() <= bound * scale).all()), key


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(threads):
    torch.manual_seed(0)
    x, g = torch.randn(2, 8, 12, 12), torch.randn(2, 70, 12, 12)
    spec = ((3, 3), (1, 1), (1, 1), (1, 1), 1, ALL)
    expected, before = native.native_products(x, g, *spec), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual, again = native.native_products(x, g, *spec), native.native_products(x, g, *spec)
    finally:
        torch.set_num_threads(before)
    for key in ALL:
        assert torch.equal(actual[key], again[key])
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_extremes_of_bad_rows_are_those_of_torch(bad):
    torch.manual_seed(0)
    for place in (0, 7, 100, 999):
        flat = torch.randn(3, 1000)
        flat[1, place] = bad
        actual, expected = native.native_rows(flat, ALL), gradient_moments(flat, ALL)
        for key in ALL:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-3, equal_nan=True)


def test_gram_sums_that_cancel_are_computed_directly():
    """Two positions whose gradients nearly cancel: the Gram form alone would lose every digit."""
    torch.manual_seed(0)
    a = torch.randn(2, 1, 400).expand(2, 2, 400).contiguous()
    g = torch.randn(2, 1, 500)
    g = torch.cat([g, -g * (1 + 1e-4)], 1)
    expected = (g.double().mT @ a.double()).square().sum((1, 2))
    actual = kernels.linear_moments(a, g, {2.0})[2.0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("native_form", ["1", "0"])
def test_gram_sums_of_a_convolution_that_cancel_are_computed_directly(fresh, native_form):
    fresh.setenv(native.VARIABLE, native_form)
    torch.manual_seed(0)
    x = torch.randn(2, 40, 1, 1).expand(2, 40, 4, 4).contiguous()
    g = torch.randn(2, 50, 4, 4)
    g -= g.mean((2, 3), keepdim=True) * (1 + 1e-4)
    spec = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    expected = kernels.conv_gradient(x.double(), g.double(), *spec).flatten(1).square().sum(1)
    assert bool((expected < 1e-6 * (x[:1].square().sum() * g[:1].square().sum())).all())
    direct = []

    def exactly(rows):
        direct.append(int(rows.sum()))
        return expected[rows]

    found = gram.conv_square(x, g, *spec, exactly)[2.0]
    assert direct == [2]
    torch.testing.assert_close(found, expected)


@needs_compiler
@pytest.mark.parametrize("shape", [(5, 300, 33), (2, 7, 260), (70, 20, 16)])
@pytest.mark.parametrize("threads", [1, 3])
def test_gram_form_over_blocks_and_panels(shape, threads):
    """More channels than a block, more positions than a panel, and any number of threads."""
    n, channels, positions = shape
    torch.manual_seed(0)
    x, g = torch.randn(n, channels, positions), torch.randn(n, channels + 9, positions)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        total, square, bound = native.native_squares(x, g, [3], [1], [1], [1], 1)
    finally:
        torch.set_num_threads(before)
    gradient = kernels.conv_gradient(x.double(), g.double(), [3], [1], [1], [1]).flatten(1)
    torch.testing.assert_close(square[:, 0], gradient.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(total[:, 0], gradient.sum(1), rtol=0, atol=1e-5 * float(gradient.abs().sum(1).max()))
    assert bool((square <= bound).all())


@needs_compiler
def test_gram_form_of_a_bad_sample_keeps_to_its_row():
    torch.manual_seed(0)
    x, g = torch.randn(3, 20, 5, 5), torch.randn(3, 30, 5, 5)
    spec = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    clean = native.native_squares(x, g, *spec)
    for bad in (float("nan"), float("inf")):
        x[1, 4, 2, 3] = bad
        for before, after in zip(clean, native.native_squares(x, g, *spec), strict=True):
            assert not bool(after[1].isfinite().any())
            assert torch.equal(after[[0, 2]], before[[0, 2]])
