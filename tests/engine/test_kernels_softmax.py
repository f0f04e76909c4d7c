"""The compiled softmax of maps against plain torch in float64, and where it does not apply."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.kernels.library import plain_kernels
from lightning_gradmetrics.engine.kernels.softmax import MOST_CLASSES, MOST_ROW_CLASSES, softmax_of
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.output_gradients import lazy_output_gradient
from lightning_gradmetrics.gradients.softmax import Softmax
from lightning_gradmetrics.gradients.statistics import axis_moments

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)

PARTS = ("top", "odds", "error", "entropy", "second", "impurity", "distance_to_uniform", "log_partition")


def maps(dtype: torch.dtype, scale: float) -> Tensor:
    """Logits with a tie, equal logits and a masked class; the number of positions is not a multiple of the vector's length."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2, 13, 97, 101, generator=generator, dtype=torch.float64)
    logits[0, :, 0, 0] = 1.0
    logits[0, 3, 1, 1] = -torch.inf
    logits[1, 2, 96, 100] = logits[1, 7, 96, 100] = logits[1, :, 96, 100].amax() + 1
    return logits.to(dtype)


def is_compiled(softmax: Softmax) -> bool:
    return type(softmax) is not Softmax


def assert_parts(found: Softmax, logits: Tensor, bound: float, temperature: float = 2.0) -> None:
    """Every part equals that of plain torch in float64."""
    expected = Softmax(logits.double(), temperature)
    assert is_compiled(found)
    assert torch.equal(found.is_top, Softmax(logits, temperature).is_top)
    for name in PARTS:
        value, reference = getattr(found, name).double(), getattr(expected, name)
        error = (value - reference).abs() / reference.abs().clamp_min(1e-30)
        assert float(error.max()) <= bound, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 3e-14)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_part_is_that_of_plain_torch(dtype: torch.dtype, bound: float, scale: float, threads: int) -> None:
    logits, before = maps(dtype, scale), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = softmax_of(logits, 2.0)
    finally:
        torch.set_num_threads(before)
    assert_parts(found, logits, bound)


def test_channels_last_and_slices_have_the_same_parts() -> None:
    logits = maps(torch.float32, 3.0)
    expected = softmax_of(logits).entropy
    wide = torch.stack([logits, logits], -1)[..., 0]
    for other in (logits.contiguous(memory_format=torch.channels_last), wide):
        assert torch.equal(softmax_of(other).entropy, expected)


def test_other_logits_take_plain_torch() -> None:
    logits = maps(torch.float32, 3.0)
    unknown = logits.clone()
    unknown[0, 4, 5, 6] = torch.nan
    many = torch.zeros(1, MOST_CLASSES + 1, 20, 20)
    for other in (unknown, logits[:, :, :9, :9], many, logits.flatten(1)):
        assert not is_compiled(softmax_of(other))
    with plain_kernels():
        assert not is_compiled(softmax_of(logits))
    assert softmax_of(unknown).entropy[0, 5, 6].isnan() and int(softmax_of(unknown).entropy.isnan().sum()) == 1


@pytest.mark.parametrize("name", ["pseudo_label", "uniform"])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_moments_that_need_no_gradient_of_the_logits_are_those_of_the_gradient(name: str, scale: float) -> None:
    logits = maps(torch.float64, scale)[:, :, :9, :9]
    objective = Objective.of(name, temperature=3.0)
    gradient = lazy_output_gradient(objective, logits, lambda: logits, lambda temperature: Softmax(logits, temperature))
    wanted = (0.5, 1.0, 2.0, "max", "min", "sum")
    found, expected = gradient.moments(wanted), axis_moments(gradient.tensor, wanted)
    for key in wanted:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-15)


def test_scores_of_large_maps_do_not_depend_on_the_compiler() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 12, 3, padding=1)).eval()
    images = 5 * torch.randn(1, 3, 250, 230)
    scores = ["max_softmax", "entropy", "margin", "energy", "gradnorm", "pseudo_label", "exgrad", "fisher_trace", "pgn"]
    found = lgm.score(model, images, scores)
    with plain_kernels():
        expected = lgm.score(model.double(), images.double(), scores)
    for name in scores:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 3e-14)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("classes", [64, 1000, 1003])
def test_samples_have_the_parts_of_plain_torch(dtype: torch.dtype, bound: float, scale: float, classes: int) -> None:
    """Ties, equal logits, a masked class and strided rows."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(300, 1010, generator=generator, dtype=torch.float64)
    logits[0], logits[1, 3] = 1.0, -torch.inf
    logits[2, 2] = logits[2, 60] = logits[2].amax() + 1
    logits = logits.to(dtype)[:, :classes]
    found = softmax_of(logits, 2.0)
    assert_parts(found, logits, bound)
    expected = Softmax(logits.double(), 2.0)
    torch.testing.assert_close(found.probabilities.double(), expected.probabilities, rtol=10 * bound, atol=1e-30)
    assert_powers(found, expected, 100 * bound)


def assert_powers(found: Softmax, expected: Softmax, bound: float) -> None:
    """Exponents with a power of a power, a whole inverse, a series and a logarithm."""
    for power, complement in ((0.5, 0.0), (0.1, 0.1), (0.3, 0.4), (1.0, 0.5), (3.0, 1.0), (2.0, 2.5)):
        sums = found.powers_of_others(power, complement)
        reference = expected.powers_of_others(power, complement)
        torch.testing.assert_close(sums.double(), reference, rtol=bound, atol=1e-30)


@pytest.mark.parametrize("classes", [64, 1003])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_float32_samples_have_float64_parts(classes: int, scale: float) -> None:
    """The kernel reads the logits in float32: strided rows with ties, equal logits and a masked class."""
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(300, 1010, generator=generator))[:, :classes]
    logits[0], logits[1, 3] = 1.0, -torch.inf
    logits[2, 2] = logits[2, 60] = logits[2].amax() + 1
    found, expected = softmax_of(logits, dtype=torch.float64), Softmax(logits.double())
    with_roots = softmax_of(logits, dtype=torch.float64, roots=True)
    assert "logits" not in vars(found)
    assert_powers(with_roots, expected, 1e-13)
    assert_parts(with_roots, logits, 3e-14, 1.0)
    assert found.entropy.dtype == torch.float64
    assert_powers(found, expected, 1e-13)
    assert_parts(found, logits, 3e-14, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.1, 50.0])
@pytest.mark.parametrize("classes", [2, 10, 32])
def test_many_samples_of_few_classes_have_the_parts_of_plain_torch(
    classes: int, scale: float, dtype: torch.dtype
) -> None:
    logits = scale * torch.randn(2**14 // classes + 1, classes, generator=torch.Generator().manual_seed(0), dtype=dtype)
    logits[0], logits[1, 1] = 1.0, -torch.inf
    found, expected = softmax_of(logits, dtype=torch.float64), Softmax(logits.double())
    assert is_compiled(found)
    for name in ("error", "entropy", "other_squares", "second", "distance_to_uniform"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=3e-13, atol=1e-15)
    assert_powers(found, expected, 1e-12)
    roots = softmax_of(logits, dtype=torch.float64, roots=True).powers_of_others(0.5)
    torch.testing.assert_close(roots, expected.powers_of_others(0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_squared_entropy_gradient_is_that_of_plain_torch(dtype: torch.dtype) -> None:
    """Logits that are nearly equal have a gradient near zero, which must not be a difference of large numbers."""
    rows = torch.randn(300, 1000, dtype=torch.float64) * torch.logspace(-6, 1.5, 300, dtype=torch.float64)[:, None]
    rows[0, 3] = -torch.inf
    for logits in (rows.to(dtype), maps(dtype, 3.0)):
        found, expected = softmax_of(logits), Softmax(logits.double())
        assert is_compiled(found)
        assert "squared_entropy_gradient" in vars(found)
        bound = 1e-3 if dtype == torch.float32 else 1e-9
        reference = expected.squared_entropy_gradient
        torch.testing.assert_close(found.squared_entropy_gradient.double(), reference, rtol=bound, atol=1e-30)


def test_samples_that_the_kernel_does_not_take() -> None:
    logits = torch.randn(300, 1000)
    assert not is_compiled(softmax_of(logits[:3]))
    assert not is_compiled(softmax_of(torch.randn(1000, 300).T))
    assert not is_compiled(softmax_of(torch.randn(1, MOST_ROW_CLASSES + 1)))
    for bad in (float("nan"), float("inf")):
        wrong = logits.clone()
        wrong[7, 999] = bad
        assert not is_compiled(softmax_of(wrong))
