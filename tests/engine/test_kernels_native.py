"""The compiled kernels: memory layouts, threads, bad values and cancellation. How they are built: test_kernels_cache."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pytest
import torch

from lightning_gradmetrics.engine import kernels
from lightning_gradmetrics.engine.kernels import (
    ConvGeometry,
    class_residuals,
    gram,
    layers,
    library,
    native,
    segments,
    squares,
)
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.scaling import rescaled_moments, unit_gradient
from lightning_gradmetrics.gradients.statistics import factor_moments, gradient_moments, merged_moments

ALL = frozenset({"sum", "max", "min", 1.0, 2.0})
SAME = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)


@needs_compiler
def test_the_compiled_kernels_support_single_and_double_precision():
    assert native.supports(torch.zeros(1), ALL)
    assert native.supports(torch.zeros(1, dtype=torch.float64), ALL)
    assert not native.supports(torch.zeros(1), {3.0})
    assert not native.supports(torch.zeros(1, dtype=torch.bfloat16), ALL)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 700, 40), (1, 1, 5, 300), (40, 3, 33, 7), (4, 1, 513, 16), (4, 1, 9, 32)])
def test_every_memory_layout_has_the_same_moments(dtype, shape):
    """More positions than a block, more columns than a panel, panels of one vector, panels in place; channels first and last."""
    n, groups, positions, width = shape
    torch.manual_seed(0)
    x, g = (torch.randn(n, groups * c, positions, dtype=dtype) for c in (5 if groups > 1 else 40, width))
    geometry = ConvGeometry((1,), (1,), (0,), (1,), groups)
    expected = gradient_moments(kernels.conv_gradient(x.double(), g.double(), geometry), ALL)
    last = [t.mT.contiguous().mT for t in (x, g)]
    wide = [torch.stack([t, t], -1)[..., 0] for t in (x, g)]
    unaligned = torch.cat([g.new_zeros(1), last[1].mT.flatten()])[1:].view(n, positions, -1).mT
    for xs, gs in ((x, g), last, wide, (x, last[1]), (last[0], g), (x, unaligned)):
        actual = native.native_products(xs, gs, geometry, ALL)
        for key in ALL:
            bound = 1e-9 if dtype == torch.float64 else 1e-4
            scale = expected[1.0] if key == "sum" else expected[key].abs()
            assert bool(((actual[key] - expected[key]).abs() <= bound * scale).all()), key


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [ALL, frozenset({2.0})])
def test_scaled_channels_have_their_moments_and_sums(dtype, wanted):
    """One vector of channels and several panels, groups, strides, many positions; channels first and last."""
    torch.manual_seed(0)
    for channels, outputs, groups, kernel, stride, size in (
        (5, 7, 1, 3, 1, 9),
        (16, 16, 1, 3, 2, 40),
        (12, 80, 2, 3, 1, 7),
        (64, 130, 1, 1, 1, 5),
    ):
        geometry = ConvGeometry((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
        x = torch.randn(3, channels, size, size, dtype=dtype)
        weight, scale = (
            torch.randn(outputs, channels // groups, kernel, kernel).to(dtype),
            torch.randn(outputs).to(dtype),
        )
        y = torch.conv2d(x, weight, None, stride, kernel // 2, 1, groups)
        g = torch.randn_like(y)
        gradients = kernels.conv_gradient(x.double(), g.double(), geometry) * scale.double().view(-1, 1, 1, 1)
        expected = gradient_moments(gradients, wanted)
        for form in (torch.contiguous_format, torch.channels_last):
            sums = native.ChannelScale.for_samples(3, weight, scale)
            tensors = x.contiguous(memory_format=form), g.contiguous(memory_format=form)
            actual = native.native_products(*tensors, geometry, wanted, sums)
            bound = 1e-11 if dtype == torch.float64 else 1e-4
            for key in wanted - {"sum"}:
                torch.testing.assert_close(actual[key], expected[key], rtol=bound, atol=0)
            terms = (y * g).double().abs().sum((2, 3))
            assert bool(((sums.products - (y * g).double().sum((2, 3))).abs() <= 10 * bound * terms).all())
            assert bool(((sums.totals - g.double().sum((2, 3))).abs() <= bound * g.double().abs().sum((2, 3))).all())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(threads):
    torch.manual_seed(0)
    x, g = torch.randn(2, 8, 12, 12), torch.randn(2, 70, 12, 12)
    expected, before = native.native_products(x, g, SAME, ALL), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual, again = native.native_products(x, g, SAME, ALL), native.native_products(x, g, SAME, ALL)
    finally:
        torch.set_num_threads(before)
    for key in ALL:
        assert torch.equal(actual[key], again[key])
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_extremes_of_bad_rows_equal_those_of_torch(bad):
    torch.manual_seed(0)
    for index in (0, 7, 100, 999):
        flat = torch.randn(3, 1000)
        flat[1, index] = bad
        actual, expected = native.native_rows(flat, ALL), gradient_moments(flat, ALL)
        for key in ALL:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-3, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [ALL, frozenset({2.0}), frozenset({"sum", 2.0})])
def test_many_small_matrices_have_the_moments_of_torch(dtype, wanted):
    """Rows of every length around a vector, strided rows, outer products, shared factors, bad values, moments known before."""
    torch.manual_seed(0)
    together, expected = segments.Segments(wanted), {}
    last = torch.randn(19, 3, dtype=dtype)
    for number, columns in enumerate((1, 3, 8, 15, 16, 17, 33, 64, 250, 256, 257, 700)):
        rows = torch.randn(19, 2 * columns, dtype=dtype)[:, :columns]
        rows[3, columns // 2], rows[4, -1] = float("nan"), float("inf")
        assert together.add(f"rows{number}", (rows, None))
        assert together.add(f"product{number}", (rows, last))
        expected[f"rows{number}"] = gradient_moments(rows, wanted)
        expected[f"product{number}"] = factor_moments(rows, last, wanted)
        last = rows
    for number in range(2):
        both = torch.stack(list(gradient_moments(rows.double() + number, wanted).values()), 1)  # columns with a stride
        known = {f"known{number}": dict(zip(wanted, both.unbind(1), strict=True))}
        assert together.add_known(known)
        expected |= known
    undo = 2.0 ** torch.randint(-3, 3, (19,)).double()
    names = sorted(expected)
    statistics = together.statistics(names, undo)
    found = segments.chosen_moments(statistics[:, :-1].mT, wanted)
    merged = segments.chosen_moments(statistics[:, -1], wanted)
    alone = segments.chosen_moments(together.statistics(names, undo, merged=True).squeeze(1), wanted)
    for key in wanted:
        torch.testing.assert_close(alone[key], merged[key], rtol=0, atol=0, equal_nan=True)
        truth = torch.stack([rescaled_moments(expected[name], undo)[key] for name in names], 1)
        bound = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found[key], truth, rtol=bound, atol=bound, equal_nan=True)
        expected_merged = merged_moments({key: found[key]})[key]
        torch.testing.assert_close(merged[key], expected_merged, rtol=1e-12, atol=1e-12, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1.0, 12.0, 60.0, 95.0, 800.0])
def test_residuals_are_those_of_torch(dtype, gap):
    """Near and far logits, equal ones, strided rows, true labels and ignored ones."""
    torch.manual_seed(0)
    logits = torch.randn(23, 9, dtype=dtype)[:, :7]
    logits[::2, 3] += gap
    logits[5] = 2.0
    labels = torch.randint(7, (23,))
    labels[4] = -100
    for objective, targets in ((Objective.of("pseudo_label"), None), (Objective.of("label"), labels)):
        found, undo = class_residuals(logits, targets)
        expected, right = unit_gradient(objective, targets, logits)
        tiny = torch.finfo(dtype).tiny
        assert torch.equal(undo, right) or gap > 80
        torch.testing.assert_close(found * undo[:, None], expected * right[:, None], rtol=1e-5, atol=tiny)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [None, 2])
def test_rows_of_embeddings_and_norm_weights_are_those_of_torch(dtype, padding):
    """Repeated indices, expanded and strided gradients, more channels than are computed at a time."""
    torch.manual_seed(0)
    indices, g = torch.randint(6, (5, 9)), torch.randn(5, 9, 4, dtype=dtype)
    for gradient in (g, g[:, :1].expand(5, 9, 4), g.transpose(0, 1).contiguous().transpose(0, 1)):
        found = layers.looked_up_rows(indices, gradient, padding)
        with library.plain_kernels():
            assert layers.looked_up_rows(indices, gradient, padding) is None
            torch.testing.assert_close(found, kernels.touched_rows(indices, gradient, padding))
    assert layers.looked_up_rows(indices.int(), g, padding) is None
    x, g, mean = (
        torch.randn(6, 600, dtype=dtype)[:, :300],
        torch.randn(6, 300, dtype=dtype),
        torch.randn(300, dtype=dtype),
    )
    expected = (x - mean) / (mean.square() + 1e-5).sqrt() * g
    torch.testing.assert_close(layers.norm_weight_rows(x, g, mean, mean.square(), 1e-5), expected)
    assert layers.norm_weight_rows(x, g, mean.to(torch.bfloat16), mean.square(), 1e-5) is None


@needs_compiler
def test_unusual_logits_and_labels_are_left_to_torch():
    logits = torch.randn(4, 3)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert class_residuals(logits.index_fill(0, torch.tensor(2), bad), None) is None
    assert class_residuals(logits, torch.tensor([0, 1, 3, 0])) is None
    assert class_residuals(logits, torch.tensor([0, 1, -1, 0])) is None
    assert class_residuals(logits.bfloat16(), None) is None
    assert class_residuals(logits[:, :1], None) is None
    assert class_residuals(logits, torch.tensor([0.0, 1, 2, 0])) is None


@needs_compiler
def test_changed_and_unsuitable_matrices_are_noticed():
    together, matrix = segments.Segments({2.0}), torch.ones(2, 3)
    assert not together.add("columns", (torch.ones(3, 2).T, None))
    assert not together.add("half", (matrix.bfloat16(), None))
    assert not together.add_known({"alone": {2.0: torch.ones(2).double()}})
    assert together.add("matrix", (matrix, None))
    assert not together.add("another type", (matrix.double(), None))
    assert not together.add_known({"single": {2.0: torch.ones(2)}})
    assert together.unchanged()
    matrix[0, 0] = 5
    assert not together.unchanged()


def test_gram_sums_that_cancel_are_computed_directly():
    """Two positions whose gradients nearly cancel: the Gram form alone would lose every digit."""
    torch.manual_seed(0)
    a = torch.randn(2, 1, 400).expand(2, 2, 400).contiguous()
    g = torch.randn(2, 1, 500)
    g = torch.cat([g, -g * (1 + 1e-4)], 1)
    expected = (g.double().mT @ a.double()).square().sum((1, 2))
    actual = kernels.linear_moments(a, g, {2.0})[2.0]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", [nullcontext, library.plain_kernels])
def test_gram_sums_of_a_convolution_that_cancel_are_computed_directly(form):
    torch.manual_seed(0)
    x = torch.randn(2, 40, 1, 1).expand(2, 40, 4, 4).contiguous()
    g = torch.randn(2, 50, 4, 4)
    g -= g.mean((2, 3), keepdim=True) * (1 + 1e-4)
    geometry = ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1))
    expected = kernels.conv_gradient(x.double(), g.double(), geometry).flatten(1).square().sum(1)
    assert bool((expected < 1e-6 * (x[:1].square().sum() * g[:1].square().sum())).all())
    direct = []

    def exactly(rows):
        direct.append(int(rows.sum()))
        return expected[rows]

    with form():
        actual = gram.conv_square(x, g, geometry, exactly)[2.0]
    assert direct == [2]
    torch.testing.assert_close(actual, expected)


@needs_compiler
@pytest.mark.parametrize("shape", [(5, 300, 33), (2, 7, 260), (70, 20, 16)])
@pytest.mark.parametrize("threads", [1, 3])
def test_gram_form_over_blocks_and_panels(shape, threads):
    """More channels than a block, more positions than a panel, and any number of threads."""
    n, channels, positions = shape
    torch.manual_seed(0)
    x, g = torch.randn(n, channels, positions), torch.randn(n, channels + 9, positions)
    geometry = ConvGeometry((3,), (1,), (1,), (1,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        total, square, bound = squares.native_squares(x, g, geometry, 0.0).sums.unbind(2)
    finally:
        torch.set_num_threads(before)
    gradient = kernels.conv_gradient(x.double(), g.double(), geometry).flatten(1)
    torch.testing.assert_close(square[:, 0], gradient.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(total[:, 0], gradient.sum(1), rtol=0, atol=1e-5 * float(gradient.abs().sum(1).max()))
    assert bool((square <= bound).all())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 1, 16, 33), (3, 13, 1040, 2065), (2, 270, 37, 21)])
@pytest.mark.parametrize("threads", [1, 3])
def test_gram_form_of_rows(dtype, shape, threads):
    """Rows that fill no vector, more channels than a chunk, more positions than a panel, rows that are not adjacent."""
    samples, positions, inputs, outputs = shape
    torch.manual_seed(0)
    a = torch.randn(samples, positions, inputs, dtype=dtype)
    g = torch.randn(samples, positions, outputs + 3, dtype=dtype)[..., 3:]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        total, square, bound = squares.native_linear_squares(a, g, True, 0.0).sums[:, 0].unbind(1)
    finally:
        torch.set_num_threads(before)
    gradient = (g.double().mT @ a.double()).flatten(1)
    exact = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(square, gradient.square().sum(1), rtol=exact, atol=0)
    torch.testing.assert_close(total, gradient.sum(1), rtol=0, atol=exact * float(gradient.abs().sum(1).max()))
    assert bool((square <= bound * (1 + exact)).all())


@needs_compiler
@pytest.mark.parametrize("channels", ["adjacent", "strided"])
@pytest.mark.parametrize(("left", "right"), [(1e-23, 1e17), (1e15, 1e15), (1e-24, 1e-3), (0.0, 1.0)])
def test_gram_form_of_rows_whose_squares_are_out_of_range(channels, left, right):
    """The squares of rows of one factor overflow or vanish in single precision, and the gradient does neither."""
    torch.manual_seed(0)
    a, g = 1e-5 * torch.randn(2, 5, 40), 1e-5 * torch.randn(2, 5, 50)
    a[1, 3:] *= left / 1e-5
    g[1, 3:] *= right / 1e-5
    expected = (g.double().mT @ a.double()).square().sum((1, 2))
    if channels == "strided":
        a, g = (t.mT.contiguous().mT for t in (a, g))
    torch.testing.assert_close(gram.linear_square(a, g)[2.0], expected, rtol=1e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wanted", [{2.0}, {"sum", 2.0}, ALL])
@pytest.mark.parametrize("shape", [(5, 2, 70, 700), (3, 130, 40, 37), (2, 300, 16, 8)])
def test_sums_of_the_output_gradient_beside_the_moments_of_the_weight(dtype, wanted, shape):
    """Both kernels, and rows that are not adjacent."""
    samples, positions, inputs, outputs = shape
    torch.manual_seed(0)
    a, g = (
        torch.randn(samples, positions, inputs, dtype=dtype),
        torch.randn(samples, positions, outputs + 1, dtype=dtype),
    )
    g, totals = g[..., 1:], kernels.PositionTotals()
    kernels.linear_moments(a, g, wanted, totals)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(totals.value.double(), g.double().sum(1), rtol=0, atol=exact * positions)


@needs_compiler
@pytest.mark.parametrize("groups", [1, 4])
def test_sums_of_the_output_gradient_beside_the_moments_of_a_convolution(groups):
    torch.manual_seed(0)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), groups)
    x, g, totals = torch.randn(3, 8, 20, 20), torch.randn(3, 100, 20, 20), kernels.PositionTotals()
    for form in (torch.contiguous_format, torch.channels_last):
        kernels.conv_moments(x, g.contiguous(memory_format=form), geometry, ALL, totals)
        torch.testing.assert_close(totals.value.double(), g.double().sum((2, 3)), rtol=0, atol=1e-3)


@needs_compiler
def test_a_non_finite_sample_leaves_the_gram_sums_of_others_unchanged():
    torch.manual_seed(0)
    x, g = torch.randn(3, 20, 5, 5), torch.randn(3, 30, 5, 5)
    clean = squares.native_squares(x, g, SAME, 0.0).sums.unbind(2)
    for bad in (float("nan"), float("inf")):
        x[1, 4, 2, 3] = bad
        for before, after in zip(clean, squares.native_squares(x, g, SAME, 0.0).sums.unbind(2), strict=True):
            assert not bool(after[1].isfinite().any())
            assert torch.equal(after[[0, 2]], before[[0, 2]])
