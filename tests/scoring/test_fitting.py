"""Fitted scores with real Trainers, in bounded memory, and with saved and refused states."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.cli.data import digits
from lightning_gradmetrics.cli.models import digits_cnn
from lightning_gradmetrics.cli.steps.fit import fit
from lightning_gradmetrics.scores import FittedScore, load_fitted, save_fitted
from lightning_gradmetrics.scoring import totals
from lightning_gradmetrics.scoring.registry import make, resolve
from lightning_gradmetrics.scoring.states import fingerprint
from tests.models import Module, assert_same_state, cnn, images, state_of
from tests.scores.fits import fit_batches

META = "oberdiek(target=head)"
BOTH = [META, "confounding_detector(epochs=3)", "max_softmax"]


def trainer(*callbacks, **options) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **options})


def data(model: torch.nn.Module, **options) -> dict[str, DataLoader]:
    """In-distribution samples, half of them predicted wrong, and others."""
    inside, outside = fit_batches(model, images)
    return {
        "mine": DataLoader(TensorDataset(*inside[0]), 7, **options),
        "other": DataLoader(TensorDataset(*outside[0]), 7, **options),
    }


ROLES = {"mine": "id", "other": "far"}


def assert_same_fit(first, second, tolerance: float = 1e-6) -> None:
    assert first.state.keys() == second.state.keys() and first.model == second.model and first.recipe is second.recipe
    for key, value in first.state.items():
        torch.testing.assert_close(value, second.state[key], rtol=tolerance, atol=tolerance)


def fitted_of(callback: lgm.GradientMetrics) -> list[FittedScore]:
    return [score for score in callback.scorer.scores if isinstance(score, FittedScore)]


def test_a_fit_under_a_trainer_equals_one_without() -> None:
    """Other batches, another order, a module around the network: the same state, and the scores that follow from it."""
    model = Module()
    loaders = data(model.network)
    callback = lgm.GradientMetrics(BOTH)
    used = trainer(callback)
    before = state_of(model.eval())
    callback.fit(used, model, loaders, ROLES)
    assert_same_state({**before, "random": torch.get_rng_state()}, model)
    inside, outside = (loader.dataset.tensors for loader in loaders.values())
    plain = lgm.fit(model.network, [tuple(t.flip(0) for t in inside)], BOTH[:2], ood=[outside])
    for one, other in zip(fitted_of(callback), plain, strict=True):
        assert_same_fit(one, other, 1e-4)
    used.test(model, loaders["mine"], verbose=False)
    expected = lgm.score(model.network, inside[0], plain)
    for name, values in expected.items():
        found = torch.tensor(callback.results.column(name).to_pylist())
        torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-4)


def test_scores_of_errors_never_see_out_of_distribution_samples() -> None:
    model = cnn()
    inside, outside = fit_batches(model, images)
    alone = lgm.fit(model, inside, META)[0]
    assert_same_fit(alone, lgm.fit(model, inside, META, ood=outside)[0])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_score_that_is_not_fitted(stage: str) -> None:
    model = Module()
    with pytest.raises(ValueError, match=r"'oberdiek\(target=head\)' is not fitted: call GradientMetrics.fit"):
        getattr(trainer(lgm.GradientMetrics(META)), stage)(model, data(model.network)["mine"])
    with pytest.raises(ValueError, match="is not fitted"):
        lgm.score(model.network, images(2), META)


def test_wrong_calls_of_fit_are_explained() -> None:
    model = Module()
    loaders = data(model.network)
    callback = lgm.GradientMetrics(META)
    with pytest.raises(ValueError, match="does not have this callback"):
        callback.fit(trainer(), model, loaders["mine"])
    plain = lgm.GradientMetrics("energy")
    with pytest.warns(UserWarning, match="none of the scores needs a fit"):
        plain.fit(trainer(plain), model, loaders["mine"])
    detector = lgm.GradientMetrics("confounding_detector")
    with pytest.raises(ValueError, match="in- and out-of-distribution samples: give both kinds of data, with roles"):
        detector.fit(trainer(detector), model, loaders["mine"])
    with pytest.raises(ValueError, match="include no out-of-distribution sample"):
        detector.fit(trainer(detector), model, {"mine": loaders["mine"]}, {"mine": "id"})
    with pytest.raises(ValueError, match="need no fit"):
        lgm.fit(model.network, [], "energy")
    with pytest.raises(ValueError, match="no finite in-distribution sample"):
        lgm.fit(model.network, [], META)


@pytest.mark.parametrize(("shift", "found"), [(0, "no error"), (1, "only errors")])
def test_data_with_only_errors_or_without_errors_is_refused(shift: int, found: str) -> None:
    model, x = cnn(), images(20)
    labels = (model(x).argmax(1) + shift) % 5
    with pytest.raises(ValueError, match=f"makes {found} on the 20 samples"):
        lgm.fit(model, [(x, labels)], META)
    with pytest.raises(ValueError, match="needs true labels"):
        lgm.fit(model, [x], META)
    with pytest.raises(ValueError, match="no labelled sample"):
        lgm.fit(model, [(x, torch.full((20,), -1))], META)


def test_rows_that_are_not_finite_are_left_out() -> None:
    model = cnn()
    (x, y), *_ = fit_batches(model, images)[0]
    broken = x.clone()
    broken[3, 0, 0, 0], broken[8, 1, 2, 3] = float("nan"), float("inf")
    keep = torch.tensor([i not in (3, 8) for i in range(len(x))])
    with pytest.warns(UserWarning, match="2 samples with NaN or Inf were left out"):
        found = lgm.fit(model, [(broken, y)], META)[0]
    assert_same_fit(found, lgm.fit(model, [(x[keep], y[keep])], META)[0])


def test_rows_are_capped_independently_of_batches_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cap of 12 rows: memory stays bounded, and neither batches nor order change what is kept."""
    monkeypatch.setattr(totals, "MAX_ROWS", 12)
    most, kept = [], totals.RunningTotal.add

    def watched(self: totals.RunningTotal, contribution) -> None:
        kept(self, contribution)
        most.append(sum(len(rows[totals.KEY]) for rows in self.rows))

    monkeypatch.setattr(totals.RunningTotal, "add", watched)
    seen: list[int] = []
    finish = lgm.scores.oberdiek.finish

    def counted(self: lgm.scores.oberdiek, total):
        seen.append(len(total["rows/incorrect"]))
        return finish(self, total)

    monkeypatch.setattr(lgm.scores.oberdiek, "finish", counted)
    model = cnn().double()
    (x, y), *_ = fit_batches(model, images)[0]
    order = torch.randperm(len(x))
    whole = lgm.fit(model, [(x, y)], META)[0]
    parts = lgm.fit(model, list(zip(x[order].split(5), y[order].split(5), strict=True)), META)[0]
    assert_same_fit(whole, parts, 1e-9)
    assert seen == [12, 12] and max(most) <= 2 * 12


def test_wide_rows_are_capped_by_their_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "MAX_ENTRIES", 1000)
    running = totals.RunningTotal()
    for _ in range(9):
        x = torch.randn(20, 49)
        running.add({"rows/x": x, totals.KEY: totals.row_keys(x), "count": torch.tensor(20)})
    assert running.total["rows/x"].shape == (1000 // 50, 49) and running.total["count"] == 180


def test_the_kept_rows_are_spread_evenly() -> None:
    """A sample chosen by keys is uniform: of 4000 rows the 1000 kept are a quarter of every quarter."""
    inputs = torch.cat([torch.rand(2000, 5), 100 + torch.rand(2000, 5)])
    keys = totals.row_keys(inputs)
    kept = keys.argsort()[:1000]
    assert len(keys.unique()) == 4000
    for part in range(4):
        assert 190 <= ((kept >= 1000 * part) & (kept < 1000 * (part + 1))).sum() <= 310


def test_a_state_is_saved_loaded_and_refused(tmp_path: Path) -> None:
    model = cnn()
    inside, _ = fit_batches(model, images)
    scores = lgm.fit(model, inside, [META, "oberdiek(target='3.*',classifier=network)"])
    paths = save_fitted([*scores, make("energy")], tmp_path)
    assert [path.suffix for path in paths] == [".safetensors"] * 2 and not list(tmp_path.glob("*.p*"))
    unfitted = [make(score.name) for score in scores] + [make("energy")]
    loaded = load_fitted(unfitted, tmp_path, model)
    x = images(3)
    for name, values in lgm.score(model, x, scores).items():
        torch.testing.assert_close(lgm.score(model, x, loaded)[name], values, rtol=0, atol=0)
    other = cnn()
    with pytest.raises(ValueError, match=r"fitted for another model.*fit the score again"):
        load_fitted(unfitted, tmp_path, other)
    with pytest.raises(ValueError, match="fitted for another model"):
        lgm.score(other, x, loaded)
    with pytest.raises(ValueError, match="fitted for the head '7', but this is '5'"):
        load_fitted(unfitted, tmp_path, model, head="5")
    changed = make("oberdiek(target=head,classifier=network)", name=META)
    with pytest.raises(ValueError, match="made for another arguments"):
        load_fitted([changed], tmp_path, model)
    with pytest.raises(FileNotFoundError, match="fit it first"):
        load_fitted([make("oberdiek(levels=layer)")], tmp_path, model)
    with pytest.raises(ValueError, match="not fitted, so there is nothing to save"):
        save_fitted([make("oberdiek")], tmp_path)


def test_a_model_trained_after_the_fit_is_refused() -> None:
    model = Module()
    loaders = data(model.network)
    callback = lgm.GradientMetrics(META)
    used = trainer(callback)
    callback.fit(used, model, loaders["mine"])
    with torch.no_grad():
        model.network[7].bias[2] += 0.1
    with pytest.raises(ValueError, match="fitted for another model"):
        used.test(model, loaders["mine"], verbose=False)


def test_fingerprint_is_that_of_the_weights() -> None:
    """The fingerprint is the same in another precision and inside a wrapper, and differs after any small change."""
    model = cnn()
    first = fingerprint(model)
    assert first == fingerprint(Module(model)) == fingerprint(model.double()) == fingerprint(model.bfloat16())
    for change in (
        lambda m: m[7].weight[0, 0].mul_(1.01),
        lambda m: m[3].weight.copy_(m[3].weight.flip(0)),
        lambda m: m[1].running_mean.add_(0.01),
    ):
        torch.manual_seed(0)
        model = cnn()
        before = fingerprint(model)
        with torch.no_grad():
            change(model)
        assert fingerprint(model) != before


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision: str) -> None:
    model = Module()
    callback = lgm.GradientMetrics([META])
    used = trainer(callback, precision=precision)
    loader = data(model.network)["mine"]
    callback.fit(used, model, loader)
    used.test(model, loader, verbose=False)
    found = torch.tensor(callback.results.column(META).to_pylist())
    assert found.isfinite().all() and found.std() > 0.01


def test_fit_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    model = Module()
    callback = lgm.GradientMetrics([META])
    callback.fit(trainer(callback, enable_progress_bar=True), model, data(model.network)["mine"])
    assert "6/6" in capsys.readouterr().out


def test_training_the_detector_does_not_affect_the_run() -> None:
    """It runs inside another trainer's epoch: random state, threads and ranks are as before."""
    model = Module()
    callback = lgm.GradientMetrics(["confounding_detector(epochs=2)"])
    rank, threads = rank_zero_only.rank, torch.get_num_threads()
    random = torch.get_rng_state()
    lgm.fit(model.network, *_detector_data(model))
    assert torch.equal(random, torch.get_rng_state()) and torch.get_num_threads() == threads
    callback.fit(trainer(callback), model, data(model.network), ROLES)
    assert rank_zero_only.rank == rank and fitted_of(callback)[0].state is not None


def _detector_data(model: Module) -> tuple:
    inside, _ = fit_batches(model.network, images)
    return inside, [META]


SCRIPT = """
import sys, torch, warnings
import lightning_gradmetrics as lgm
from tests.models import Module
from tests.scoring.test_fitting import META, ROLES, data, fitted_of, trainer
from lightning_gradmetrics.scores import save_fitted

torch.manual_seed(0)
model = Module()
callback = lgm.GradientMetrics([META, "confounding_detector(epochs=3)"])
used = trainer(callback, devices=2, strategy="ddp")
loaders = data(model.network)
first = [t[:33] for t in loaders["mine"].dataset.tensors]
loaders["mine"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*first), 7)
callback.fit(used, model, loaders, ROLES)
save_fitted(callback.scorer.scores, f"{sys.argv[1]}/{used.global_rank}")
used.test(model, loaders["mine"], verbose=False)
if used.is_global_zero:
    assert callback.results.num_rows == 33, callback.results.num_rows
torch.distributed.destroy_process_group()  # otherwise its threads may outlive the interpreter, which ends the process with SIGABRT
"""


@pytest.mark.slow
def test_two_processes_fit_the_same_state(tmp_path: Path) -> None:
    """33 and 40 samples on two processes, where the sampler repeats one: the state of one process, on both ranks.

    Lightning starts the second process; other tests fork theirs.
    """
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "PL_TORCH_DISTRIBUTED_BACKEND": "gloo",
    }
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    model = Module().network
    loaders = data(model)
    inside, outside = (loader.dataset.tensors for loader in loaders.values())
    scores = [META, "confounding_detector(epochs=3)"]
    alone = lgm.fit(model, [tuple(t[:33] for t in inside)], scores, ood=[outside])
    for rank in (0, 1):
        for one, other in zip(load_fitted(resolve(scores), tmp_path / str(rank), model), alone, strict=True):
            assert_same_fit(one, other, 1e-4)


def test_cross_validation_of_the_detector(caplog: pytest.LogCaptureFixture) -> None:
    """Held-out folds separate samples three times as large, but not samples of the same kind."""
    model = cnn()
    inside, outside = fit_batches(model, images)
    with caplog.at_level("INFO"):
        found = lgm.fit(model, inside, "confounding_detector(folds=4,epochs=5)", ood=outside)[0]
    auroc = found.state["cross_validated_auroc"]
    assert auroc.shape == (4,) and auroc.min() > 0.9 and "the mean of 4 folds" in caplog.text
    same = lgm.fit(model, inside, "confounding_detector(folds=4,epochs=5)", ood=[(images(40), None)])[0]
    assert 0.2 < same.state["cross_validated_auroc"].mean() < 0.8
    alone = lgm.fit(model, inside, "confounding_detector(epochs=5)", ood=outside)[0]
    assert "cross_validated_auroc" not in alone.state
    with pytest.raises(ValueError, match="folds is 41; it must be between 2 and 40"):
        lgm.fit(model, inside, "confounding_detector(folds=41,epochs=1)", ood=outside)


def test_the_detector_learns_the_direction() -> None:
    """Trained with the two kinds exchanged, the detector ranks them in reverse: the sum alone cannot."""
    model = cnn()
    inside, outside = fit_batches(model, images)
    small, large = images(30), 3 * images(30)
    for one, other, sign in ((inside, outside, 1), (outside, inside, -1)):
        score = lgm.fit(model, one, "confounding_detector(epochs=10)", ood=other)
        low, high = (next(iter(lgm.score(model, x, score).values())).mean() for x in (small, large))
        assert sign * (high - low) > 0.5


def test_the_command_fits_and_keeps_the_states(tmp_path: Path) -> None:
    """States of one run give the same scores in the next; those of another model are refused."""
    sets = digits(patches=50)
    model = digits_cnn(sets, epochs=2, width=4)

    def run(folder: Path, network: Module | None = None, **settings) -> lgm.GradientMetrics:
        options = SimpleNamespace(
            **{"fitted_folder": None, "batch_size": 100, "num_workers": 0, "resume": False, **settings}
        )
        callback = lgm.GradientMetrics(["oberdiek", "confounding_detector(epochs=5)", "energy"])
        used = trainer(callback)
        experiment = {"data": sets, "model": network or model, "callback": callback, "trainer": used}
        fit(SimpleNamespace(**experiment, settings=options, directory=folder, shared=None))
        used.test(network or model, sets.loaders(200)["photos"], verbose=False)
        return callback

    first = run(tmp_path / "first")
    second = run(tmp_path / "second", fitted_folder=tmp_path / "first" / "fitted")
    assert len(list((tmp_path / "first/fitted").iterdir())) == len(list((tmp_path / "second/fitted").iterdir())) == 2
    assert first.results.equals(second.results)
    assert scores_of(first, "confounding_detector(epochs=5)").mean() > 0.7
    with pytest.raises(ValueError, match="fitted for another model"):
        run(tmp_path / "third", digits_cnn(sets, epochs=1, width=4), fitted_folder=tmp_path / "first" / "fitted")


def scores_of(callback: lgm.GradientMetrics, name: str) -> torch.Tensor:
    return torch.tensor(callback.results.column(name).to_pylist())
