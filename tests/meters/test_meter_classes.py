"""Every meter through every invariant of a torchmetrics meter."""

from __future__ import annotations

import copy
import pickle
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_gradmetrics import meters as M
from lightning_gradmetrics.meters import functional as F
from tests.meters.meter_cases import CASES, MODES, SIZE, assert_same, data, expected, made

matplotlib.use("Agg")
both_modes = pytest.mark.parametrize(("name", "bins"), MODES)


@both_modes
@pytest.mark.parametrize("batch", [1, 7, SIZE])
def test_any_batching_equals_the_function(name, bins, batch):
    case = CASES[name]
    rows, meter = data(case.inputs), made(case, bins)
    for parts in zip(*(row.split(batch) for row in rows), strict=True):
        meter.update(*parts)
    assert_same(meter.compute(), expected(case, rows))


@both_modes
def test_torchmetrics_life(name, bins):
    case = CASES[name]
    rows, meter = data(case.inputs), made(case, bins)
    wanted = expected(case, rows)
    assert meter.higher_is_better is case.higher_is_better
    assert meter.full_state_update is False
    assert meter.is_differentiable is False
    first, second = [[row[part] for row in rows] for part in (slice(0, 60), slice(60, None))]
    assert_same(meter(*first), expected(case, tuple(first)))
    assert_same(meter(*second), expected(case, tuple(second)))
    assert_same(meter.compute(), wanted)
    for other in (meter.clone(), pickle.loads(pickle.dumps(meter)), copy.deepcopy(meter)):
        assert_same(other.compute(), wanted)
    meter.persistent(True)
    loaded = made(case, bins)
    loaded.update(*first)
    loaded.compute()
    loaded.load_state_dict(meter.state_dict(), strict=False)
    assert_same(loaded.compute(), wanted)
    other = made(case, bins)
    other.update(*second)
    merged = made(case, bins)
    merged.update(*first)
    merged.compute()
    merged.merge_state(other)
    assert_same(merged.compute(), wanted)
    meter.reset()
    meter.update(*second)
    assert_same(meter.compute(), expected(case, tuple(second)))


def test_merging_refuses_other_bins():
    with pytest.raises(ValueError, match="bins=1024 cannot be merged into one with bins=None"):
        M.AUROC().merge_state(M.AUROC(bins=1024))


@both_modes
def test_plot(name, bins):
    import matplotlib.pyplot as plt

    case = CASES[name]
    meter = made(case, bins)
    meter.update(*data(case.inputs))
    _, ax = meter.plot()
    assert ax.has_data()
    _, other_ax = plt.subplots()
    _, ax2 = meter.plot(meter.compute(), ax=other_ax)
    assert ax2 is other_ax
    assert other_ax.has_data()
    plt.close("all")


def test_collection_shares_the_samples():
    pair = [name for name, case in CASES.items() if case.inputs == "scores target" and not name.endswith("Curve")]
    scalars = [name for name in pair if CASES[name].make is not M.ROC and "Curve" not in name]
    collection = MetricCollection({name.replace(" ", "_"): made(CASES[name], None) for name in scalars})
    rows = data("scores target")
    for parts in zip(*(row.split(20) for row in rows), strict=True):
        collection.update(*parts)
    assert len(collection.compute_groups) == 1
    for name, value in collection.compute().items():
        assert_same(value, expected(CASES[name.replace("_", " ")], rows))


def test_constant_memory_is_constant():
    meter = M.AUROC(bins=1024)
    before = sum(state.numel() * state.element_size() for state in meter.metric_state.values())
    for _ in range(20):
        meter.update(torch.randn(5000), torch.randint(2, (5000,)))
    after = list(meter.metric_state.values())
    assert before == sum(state.numel() * state.element_size() for state in after) == 256 * 1024
    assert all(state.dtype == torch.int64 for state in after)


def test_bounds():
    scores, target = torch.randn(50_000), torch.randint(2, (50_000,))
    exact, small = M.AUROC(), M.AUROC(bins=1024)
    for meter in (exact, small):
        meter.update(scores, target)
    low, high = small.bounds()
    assert low < exact.compute().double() < high
    assert high - low < 0.01
    assert exact.bounds()[0] == exact.bounds()[1]


def test_without_samples_there_is_a_value_and_a_warning():
    for name, bins in MODES:
        case = CASES[name]
        if case.higher_is_better is None:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert made(case, bins).compute().isnan()
        # The first is torchmetrics' own, for compute before update.
        assert [warning.category for warning in caught] == [UserWarning, UserWarning]
        assert "undefined" in str(caught[1].message)


def test_an_empty_batch_changes_nothing():
    for name, bins in MODES:
        case = CASES[name]
        rows, meter = data(case.inputs), made(case, bins)
        meter.update(*(row[:0] for row in rows))
        meter.update(*rows)
        assert_same(meter.compute(), expected(case, rows))


@both_modes
def test_a_refused_batch_leaves_the_state(name, bins):
    case = CASES[name]
    rows, meter = data(case.inputs), made(case, bins)
    meter.update(*rows)
    if name != "ScoreDistribution":
        with pytest.raises(ValueError, match="NaN"):
            meter.update(rows[0] * torch.nan, *rows[1:])
    if len(rows) > 1:
        with pytest.raises(ValueError, match="0 or 1"):
            meter.update(rows[0], rows[1] + 5, *rows[2:])
    assert_same(meter.compute(), expected(case, rows))


def test_every_public_meter_and_function_has_a_row():
    metrics = {name for name in M.__all__ if name != "functional"}
    functions = set(F.__all__)
    assert {case.make.__name__ for case in CASES.values()} == metrics
    assert {case.twin.__name__ for case in CASES.values()} == functions


@both_modes
def test_forward_on_one_class_loses_nothing(name, bins):
    case = CASES[name]
    rows, meter = data(case.inputs), made(case, bins)
    meter.update(*(row[:60] for row in rows))
    rest = [row[60:] for row in rows]
    order = rest[1].argsort() if len(rest) > 1 else torch.arange(len(rest[0]))
    zeros = int((rest[1] == 0).sum()) if len(rest) > 1 else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (order[:zeros], order[zeros:]):
            meter(*(row[part] for row in rest))
    assert_same(meter.compute(), expected(case, rows))


@both_modes
def test_a_refused_forward_leaves_the_state(name, bins):
    case = CASES[name]
    rows, meter = data(case.inputs), made(case, bins)
    meter.update(*rows)
    for bad in (torch.zeros(2, 2, 2), [0.5], np.zeros(3)):
        with pytest.raises((TypeError, ValueError, IndexError)):
            meter(bad, *rows[1:])
    assert meter._update_count == 1
    meter.update(*rows)
    assert_same(meter.compute(), expected(case, tuple(torch.cat([row, row]) for row in rows)))


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_type_changes_no_value(name, bins, dtype):
    case = CASES[name]
    rows, meter = data(case.inputs), made(case, bins)
    meter.update(*(row[:40] for row in rows))
    meter.set_dtype(dtype)
    torch.nn.Sequential(meter).to(dtype)
    meter.half().float()
    meter.update(*(row[40:] for row in rows))
    assert_same(meter.compute(), expected(case, rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_in_constant_memory(dtype):
    scores, target = data("scores target")
    meter = M.AUROC(bins=1024)
    meter.update(scores.to(dtype), target)
    assert_same(meter.compute(), F.auroc(scores.to(dtype), target))


@both_modes
def test_a_saved_state_loads_as_a_copy(name, bins):
    case = CASES[name]
    rows, saved, loaded = data(case.inputs), made(case, bins), made(case, bins)
    saved.persistent(True)
    saved.update(*(row[:60] for row in rows))
    loaded.load_state_dict(saved.state_dict())
    loaded.update(*(row[60:] for row in rows))
    assert_same(loaded.compute(), expected(case, rows))
    assert_same(saved.compute(), expected(case, tuple(row[:60] for row in rows)))


def test_a_state_of_other_bins_is_refused():
    saved = M.AUROC(bins=2048)
    saved.persistent(True)
    with pytest.raises(RuntimeError, match="saved with bins=2048 and cannot be loaded with bins=1024"):
        M.AUROC(bins=1024).load_state_dict(saved.state_dict())


@both_modes
def test_numpy_is_refused_with_the_remedy(name, bins):
    case = CASES[name]
    with pytest.raises(TypeError, match=r"preds must be a torch\.Tensor, got numpy\.ndarray: use torch\.from_numpy"):
        made(case, bins).update(*(row.numpy() for row in data(case.inputs)))


def test_arguments_are_named_as_torchmetrics_names_them():
    scores, target = data("scores target")
    collection = MetricCollection([M.AUROC(), M.AURC(bins=1024)])
    collection.update(preds=scores, target=target)
    assert_same(collection.compute()["AUROC"], F.auroc(scores, target))


def test_plots_show_chance_area_and_histogram():
    import matplotlib.pyplot as plt

    scores, target = data("scores target")
    roc, distribution = M.ROC(), M.ScoreDistribution()
    roc.update(scores, target)
    distribution.update(scores)
    _, ax = roc.plot()
    assert [line.get_linestyle() for line in ax.lines] == ["-", ":"]
    assert f"{F.auroc(scores, target):.3f}" in ax.get_legend().get_texts()[0].get_text()
    _, ax = distribution.plot()
    assert sum(bar.get_height() for bar in ax.patches) == SIZE
    plt.close("all")


def test_wrong_arguments_are_refused():
    for bins in (0, 10, 1.5, True, "many"):
        with pytest.raises(ValueError, match="bins must be None"):
            M.AUROC(bins=bins)
    with pytest.raises(ValueError, match="rate must be"):
        M.FPRAtTPR(rate=0)
    with pytest.raises(ValueError, match="'out'"):
        M.AveragePrecision(positive="ood")
    with pytest.raises(ValueError, match="coverage must be"):
        M.AccuracyAtCoverage(coverage=2)
    with pytest.raises(ValueError, match="risk must be"):
        M.CoverageAtRisk(risk=0)
    with pytest.raises(ValueError, match="mode must be"):
        M.AUAC(mode="score")
    with pytest.raises(ValueError, match="norm must be"):
        M.CalibrationError(norm="l3")
    with pytest.raises(ValueError, match="n_bins must be"):
        M.CalibrationError(n_bins=0)
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        M.SpearmanCorrelation(["a", "b"]).update(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="quantiles"):
        M.ScoreDistribution(quantiles=[2])


def test_lightning_logs_a_meter(tmp_path):
    import lightning as L

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.exact, self.small = M.AUROC(), M.AUROC(bins=1024)

        def test_step(self, batch, index):
            self.exact.update(*batch)
            self.small.update(*batch)
            self.log("exact", self.exact, sync_dist=True)
            self.log("small", self.small, sync_dist=True)

    rows = data("scores target")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows), batch_size=10)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = trainer.test(Model(), loader, verbose=False)
    assert found == pytest.approx({"exact": F.auroc(*rows).item(), "small": F.auroc(*rows).item()})
