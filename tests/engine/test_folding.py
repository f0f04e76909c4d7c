"""Batch norms are folded into the convolutions before them; a model that uses a convolution's output otherwise is noticed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.checks import sample_check
from lightning_gradmetrics.engine.passes import strategy
from lightning_gradmetrics.engine.passes.folding import FoldingTracer
from lightning_gradmetrics.engine.rules import convolution
from tests.engine.cases import worst_difference

SEEN: dict[str, Any] = {}
"""What a model leaves outside of itself."""


class Net(nn.Module):
    """Two blocks of a convolution, a batch norm and an in-place change of the norm's output; ``use`` gets the first output."""

    def __init__(self, first: nn.Module, second: nn.Module, use: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        dims = first.weight.ndim - 2  # type: ignore[operator, union-attr]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        self.first, self.second = first, second
        self.norms = nn.ModuleList([norm(first.out_channels), norm(second.out_channels)])  # type: ignore[arg-type]
        self.head, self.use, self.dims = nn.Linear(second.out_channels, 3), use, dims  # type: ignore[arg-type]
        for each in self.norms:
            for tensor in (each.weight, each.bias, each.running_mean):
                tensor.data.normal_()  # type: ignore[union-attr, operator]
            each.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
        self.norms[0].weight.data[0] = 0  # type: ignore[union-attr, index, operator]

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.use is not None:
            self.use(z)
        h = F.relu(self.norms[0](z), inplace=True)
        z = self.norms[1](self.second(h))
        z += 1 + x.flatten(1).mean(1).view(-1, *[1] * (z.ndim - 1))
        return self.head(z.flatten(2).amax(2))


@pytest.fixture(autouse=True)
def _small_batches_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "MOST_BYTES", 0)


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights of all norms whose output a convolution has returned."""
    names: list[str] = []
    norm = FoldingTracer._norm

    def noted(self: FoldingTracer, layer: Any, *rest: Any) -> Tensor:
        output = norm(self, layer, *rest)
        names.append(layer.fold.weight)
        return output

    monkeypatch.setattr(FoldingTracer, "_norm", noted)
    return names


def compare(
    model: nn.Module, x: Tensor, bound: float = 1e-9, parameters: Any = None, memory: int | None = None
) -> None:
    """Compare the statistics of every parameter with those of the slow reference."""
    found = gradient_statistics(model, x, "pseudo_label", parameters, True, memory=memory)
    expected = gradient_statistics(model, x, "pseudo_label", parameters, True, engine="reference")
    assert worst_difference(found, expected) < bound


def net(use: Callable[[Tensor], None] | None = None) -> Net:
    return Net(nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.Conv2d(20, 9, 3), use).double().eval()


PAIRS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[int, ...]]] = {
    "2d": (lambda: (nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.Conv2d(20, 9, 3)), (12, 12)),
    "1d": (lambda: (nn.Conv1d(3, 6, 5, padding=2, dilation=1), nn.Conv1d(6, 4, 3, padding="same", dilation=2)), (40,)),
    "3d": (lambda: (nn.Conv3d(3, 5, 2), nn.Conv3d(5, 4, 3, padding=1, bias=False)), (5, 6, 7)),
    "groups": (lambda: (nn.Conv2d(3, 40, 3, 2, 1), nn.Conv2d(40, 12, 3, padding=1, groups=2)), (21, 21)),
    "depthwise": (lambda: (nn.Conv2d(3, 36, 3, 2, 1), nn.Conv2d(36, 36, 3, padding=1, groups=36)), (12, 11)),
    "short groups": (lambda: (nn.Conv2d(3, 40, 3, 2, 1), nn.Conv2d(40, 30, 3, groups=10, bias=False)), (13, 12)),
    "same": (lambda: (nn.Conv2d(3, 8, 4, padding="same"), nn.Conv2d(8, 8, 1)), (9, 10)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PAIRS)
def test_folded_layers_have_the_statistics_of_the_reference(name: str, dtype: torch.dtype, folded: list[str]) -> None:
    torch.manual_seed(0)
    pair, size = PAIRS[name]
    model = Net(*pair()).to(dtype).eval()
    compare(model, torch.randn(5, 3, *size, dtype=dtype), 1e-9 if dtype == torch.float64 else 2e-3)
    assert folded == ["norms.0.weight", "norms.1.weight"]


class OverFrames(nn.Module):
    """Adds the results of a network for each frame of ``(N, T, C, *S)``; ``by_frame``: the first frames are the first rows."""

    def __init__(self, frames: Net, by_frame: bool) -> None:
        super().__init__()
        self.frames, self.by_frame = frames, by_frame

    def forward(self, videos: Tensor) -> Tensor:
        if self.by_frame:
            videos = videos.transpose(0, 1)
        results = self.frames(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        return results.tanh().sum(0 if self.by_frame else 1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "by_frame"), [*((name, False) for name in PAIRS), ("2d", True), ("depthwise", True)])
def test_networks_over_several_frames_of_each_sample_are_folded(name: str, by_frame: bool, folded: list[str]) -> None:
    """Also on a known path, and for other numbers of samples and frames; frames of three dimensions are not folded."""
    torch.manual_seed(0)
    pair, size = PAIRS[name]
    model = OverFrames(Net(*pair()), by_frame).double().eval()
    for _ in range(3):
        compare(model, torch.randn(4, 3, 3, *size, dtype=torch.float64))
    assert folded == ["frames.norms.0.weight", "frames.norms.1.weight"] * (2 if name != "3d" else 0)
    for samples, frames in [(2, 5), (1, 4), (5, 1)]:
        compare(model, torch.randn(samples, frames, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("limit", [0, 2**24])
def test_a_batch_has_the_same_results_again(limit: int, folded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds are for large batches."""
    torch.manual_seed(0)
    monkeypatch.setattr(strategy, "MOST_BYTES", limit)
    model, x = net().float(), torch.randn(5, 3, 12, 12)
    first, *others = [gradient_statistics(model, x, "pseudo_label").norm(2) for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)
    assert len(folded) == (0 if limit else 2 * 2)  # later batches repeat them on a known path


def test_some_parameters_and_other_norms_are_not_folded(folded: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    gradient_statistics(net(), x, "pseudo_label", statistics=["l3"])  # the kernel has no such moment
    model = net()
    model.norms[0].weight.requires_grad_(False)
    model.second.weight.requires_grad_(False)
    compare(model, x, parameters=lambda name: name not in ("norms.0.weight", "second.weight"))
    model = net()
    model.second = nn.Conv2d(20, 20, 3, groups=20).double()
    model.norms[1] = nn.BatchNorm2d(20, affine=False).double().eval()
    model.head = nn.Linear(20, 3).double()
    compare(model, x)
    assert folded == ["norms.0.weight"]  # of the last model


def test_a_convolution_with_two_norms_and_a_norm_of_two_convolutions(folded: list[str]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(self.norm(self.conv(x)).tanh()))
            z = self.conv(h)
            return self.head((self.norm(z) * self.other(z)).mean((2, 3)))

    torch.manual_seed(0)
    model = Shared().double().eval()
    model.other.running_mean.fill_(0.3)  # type: ignore[union-attr]
    compare(model, torch.randn(5, 3, 8, 8, dtype=torch.float64))
    assert folded == ["norm.weight"] * 2  # not of the third convolution


def _stores(z: Tensor) -> None:
    SEEN["left"] = z


def _stores_in_a_list(z: Tensor) -> None:
    SEEN["left"] = [[z]]


def _computes(z: Tensor) -> None:
    SEEN["left"] = F.relu(z)


def _calls_an_operator(z: Tensor) -> None:
    SEEN["left"] = torch.ops.aten.relu(z)


def _reads(z: Tensor) -> None:
    SEEN["left"] = z.flatten()[:3].tolist()


def _reads_directly(z: Tensor) -> None:
    SEEN["left"] = z.detach().numpy().copy()


def _replaces_errors(z: Tensor) -> None:
    try:
        SEEN["left"] = z + 1
    except Exception as error:
        raise RuntimeError("the sum has failed") from error


def _swallows_errors(z: Tensor) -> None:
    try:
        SEEN["left"] = z + 1
    except Exception:
        return


def _uses_a_thread(z: Tensor) -> None:
    thread = Thread(target=lambda: SEEN.update(left=z.sigmoid()))
    thread.start()
    thread.join()
    SEEN["left"] = 2 * SEEN["left"]


def _shape_only(z: Tensor) -> None:
    SEEN.setdefault("shapes", []).append((z.shape, z.dtype, z.size(1), z.dim(), z.requires_grad))


_OF_BATCH = ((5, 20, 12, 12), torch.float64, 20, 4, True)
"""What the model reads from the output of the first convolution in the pass of the batch, which has a graph."""

USES = [
    _stores,
    _stores_in_a_list,
    _computes,
    _calls_an_operator,
    _reads,
    _reads_directly,
    _replaces_errors,
    _swallows_errors,
]


LATER_ONLY = (_reads, _reads_directly)
"""A model that always reads activations runs every sample alone at the end."""


@pytest.mark.parametrize(
    ("use", "later"),
    [
        *((use, later) for use in USES for later in (False, True) if later or use not in LATER_ONLY),
        # The first operation on a tensor without values makes torch import its rules for a second.
        pytest.param(_uses_a_thread, True, marks=pytest.mark.slow),
    ],
)
def test_a_model_that_uses_the_output_of_a_convolution_gets_it(
    use: Callable[[Tensor], None], later: bool, folded: list[str]
) -> None:
    """From the first batch on, or in a later and larger batch only."""
    torch.manual_seed(0)
    SEEN.clear()
    model = net(lambda z: use(z) if not later or len(z) > 5 else None)
    compare(model, torch.randn(5, 3, 12, 12, dtype=torch.float64))
    x = torch.randn(6, 3, 12, 12, dtype=torch.float64)
    found = gradient_statistics(model, x, "pseudo_label", per_parameter=True)
    left = _numbers(SEEN.pop("left"))
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(left, _numbers(SEEN.pop("left")))
    expected = gradient_statistics(model, x, "pseudo_label", per_parameter=True, engine="reference")
    assert worst_difference(found, expected) < 1e-9
    assert "norms.1.weight" in folded


@pytest.mark.parametrize("use", USES)
def test_a_model_uses_the_output_of_a_convolution_on_a_known_path(
    use: Callable[[Tensor], None], folded: list[str]
) -> None:
    torch.manual_seed(0)
    SEEN.clear()
    is_on: list[bool] = []
    model = net(lambda z: use(z) if is_on else _shape_only(z))
    for _ in range(4):
        SEEN.clear()
        compare(model, torch.randn(5, 3, 12, 12, dtype=torch.float64))
        assert _OF_BATCH in SEEN["shapes"]
    assert folded == ["norms.0.weight", "norms.1.weight"] * 2, "no path is known"
    is_on.append(True)
    for _ in range(2):
        compare(model, torch.randn(5, 3, 12, 12, dtype=torch.float64))
        assert not _numbers(SEEN.pop("left")).is_meta


def test_changed_norms_are_noticed_on_a_known_path(folded: list[str]) -> None:
    torch.manual_seed(0)
    model = net()

    def compare_again() -> None:
        for _ in range(3):
            compare(model, torch.randn(5, 3, 12, 12, dtype=torch.float64))

    compare_again()
    norm: Any = model.norms[0]
    norm.running_mean = norm.running_mean + 1
    norm.running_var.mul_(2)
    norm.weight.data = torch.randn_like(norm.weight)
    compare_again()
    assert folded == ["norms.0.weight", "norms.1.weight"] * 2
    norm.eps = 0.5
    compare_again()
    norm.weight = nn.Parameter(torch.randn_like(norm.weight))
    compare_again()


def _numbers(left: Any) -> Tensor:
    while isinstance(left, list) and not isinstance(left[0], float):
        left = left[0]
    return torch.as_tensor(left)


def test_a_plan_is_verified_in_passes_with_the_same_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a sample alone has other active ReLUs: passes of two samples, and then of the batch, run with the same folds and layouts."""
    torch.manual_seed(0)
    model, x = net().float(), torch.randn(5, 3, 12, 12)
    agree, forward, passes = sample_check._agreement, FoldingTracer.forward, []

    def only_batches_agree(
        table: Any, number: int, task: Any, logits: Tensor, row: int, tolerances: Any, *rest: Any
    ) -> list[bool]:
        found = agree(table, number, task, logits, row, tolerances, *rest)
        return found if len(logits) > 2 else [False, *found[1:]]

    def noted(self: FoldingTracer, task: Any) -> Tensor:
        passes.append(forward(self, task))
        return passes[-1]

    monkeypatch.setattr(sample_check, "_agreement", only_batches_agree)
    monkeypatch.setattr(FoldingTracer, "forward", noted)
    monkeypatch.setattr(convolution, "WEIGHT_ENTRIES_PER_INPUT_ENTRY", 0)  # inputs are made contiguous
    compare(model, x, 2e-3)
    assert [len(logits) for logits in passes] == [
        5,
        *[2, 5] * 5,
    ]  # that of the batch, and those that verify its five samples
    assert torch.equal(passes[0], passes[2])


def test_the_shape_of_the_output_may_be_read(folded: list[str]) -> None:
    torch.manual_seed(0)
    SEEN.clear()
    compare(net(_shape_only), torch.randn(5, 3, 12, 12, dtype=torch.float64))
    assert folded == ["norms.0.weight", "norms.1.weight"]
    assert _OF_BATCH in SEEN["shapes"]


def test_a_hook_gets_the_output_of_the_convolution() -> None:
    torch.manual_seed(0)
    model, x, outputs = net(), torch.randn(5, 3, 12, 12, dtype=torch.float64), []
    compare(model, x)
    model.first.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    gradient_statistics(model, x, "pseudo_label")
    torch.testing.assert_close(outputs[-1], model.first(x))


def test_changed_norms_are_noticed() -> None:
    """In a known batch, and in batches of new sizes, for which a fold is used."""
    torch.manual_seed(0)
    model, sizes = net(), iter(range(5, 50))

    def compare_again() -> None:
        for size in (5, next(sizes)):
            compare(model, torch.randn(size, 3, 12, 12, dtype=torch.float64))

    compare_again()
    norm: Any = model.norms[0]
    norm.eps = 0.5
    compare_again()
    norm.running_mean = norm.running_mean + 1
    compare_again()
    norm.running_var.mul_(2)
    compare_again()
    norm.weight = nn.Parameter(torch.randn_like(norm.weight))
    compare_again()
    model.norms[0], model.norms[1] = nn.Identity(), nn.BatchNorm2d(9).double().eval()
    compare_again()


def test_values_that_are_not_finite_stay_in_their_sample() -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(5, 3, 12, 12, dtype=torch.float64)
    expected = gradient_statistics(model, x, "pseudo_label", engine="reference")
    x[1, 0, 3, 3] = float("nan")
    found = gradient_statistics(model, x, "pseudo_label")
    others = [0, 2, 3, 4]
    torch.testing.assert_close(found.norm(2)[others], expected.norm(2)[others])
    assert found.norm(2)[1].isnan()


def test_parts_of_a_batch_and_an_odd_batch(folded: list[str]) -> None:
    torch.manual_seed(0)
    model = net()
    compare(model, torch.randn(9, 3, 12, 12, dtype=torch.float64), memory=400_000)
    for size in (1, 2, 7):
        compare(model, torch.randn(size, 3, 12, 12, dtype=torch.float64))
    assert folded


def test_a_mode_of_the_dispatcher_sees_the_output_of_the_convolution() -> None:
    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default and len(result) == 6:
                seen.append(result.clone())
            return result

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            with Noting() if len(x) == 6 else nullcontext():
                return self.net(x)

    torch.manual_seed(0)
    model, seen = Watched(), list[Tensor]()
    compare(model, torch.randn(5, 3, 12, 12, dtype=torch.float64))
    x = torch.randn(6, 3, 12, 12, dtype=torch.float64)
    gradient_statistics(model, x, "pseudo_label")
    outputs = [output for output in seen if output.shape[1] == 20]
    assert outputs
    for output in outputs:
        torch.testing.assert_close(output, model.net.first(x))


def test_a_convolution_of_more_rows_than_samples_is_noticed() -> None:
    """In a later and larger batch only."""

    class Mirrored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            count = len(x)
            x = torch.cat([x, x.flip(-1)]) if count > 5 else x
            return self.head(self.norm(self.conv(x)).tanh().mean((2, 3))[:count])

    torch.manual_seed(0)
    model = Mirrored().double().eval()
    for size in (5, 6):
        compare(model, torch.randn(size, 3, 8, 8, dtype=torch.float64))
