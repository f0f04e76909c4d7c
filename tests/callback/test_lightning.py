"""The callback in Lightning: checkpoints, pickling, several stages, monitors, fits, and pytorch_lightning."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_gradmetrics as lgm
from tests.callback.runs import Stepped, assert_scores, batches, column, mlp, numbers, test_run, trainer

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class PairOnly(Stepped):
    """Prepares its batch in the test step, keeps a metric, and has no ``predict_step``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.accuracy = MulticlassAccuracy(3)

    def step(self, batch: Any) -> Any:
        x, y = batch
        logits = self(2 * x + 1)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        return logits


class WithoutPredict(PairOnly):
    """Lightning's own ``predict_step``, which passes the whole list to ``forward``."""

    predict_step = LightningModule.predict_step


def test_fit_runs_the_step_of_a_module_without_a_predict_step() -> None:
    """Scores are fitted on the calls of the test step, whose metric and logs are not affected."""
    net, x, y = mlp(5, 8, 3), numbers(40, 5), torch.arange(40) % 3
    callback = lgm.GradientMetrics(["gradorth", "energy"])
    used, module = trainer(callback), WithoutPredict(net)
    callback.fit(used, module, batches(x[:32], y[:32]))
    assert module.accuracy._update_count == 0 and not {"predict_step", "log", "log_dict"} & vars(module).keys()
    used.test(module, batches(x[32:], y[32:]), verbose=False)
    fitted = lgm.fit(net, [(2 * x[:32] + 1, y[:32])], "gradorth")
    expected = lgm.score(net, 2 * x[32:] + 1, fitted)["gradorth"]
    torch.testing.assert_close(column(callback, "gradorth"), expected, rtol=1e-6, atol=1e-9)
    accuracy = (net(2 * x[32:] + 1).argmax(1) == y[32:]).float()
    assert used.callback_metrics["accuracy"] == pytest.approx(
        float(torch.stack([accuracy[y[32:] == c].mean() for c in range(3)]).mean())
    )


def fitted_callback(net: nn.Module, x: Tensor, **options: Any) -> lgm.GradientMetrics:
    return lgm.GradientMetrics([*lgm.fit(net, [x], "gradorth"), "energy"], **options)


def test_a_checkpoint_brings_the_fitted_states_back(tmp_path: Path) -> None:
    net, x = mlp(5, 8, 3), numbers(40, 5)
    callback = fitted_callback(net, x)
    used = trainer(callback, max_epochs=0)
    used.fit(Stepped(net), batches(x, torch.arange(40) % 3))
    used.save_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)  # tensors and text only
    assert any("gradorth" in str(state) for state in saved["callbacks"].values())
    if RequirementCache("lightning>=2.5"):  # earlier versions restore callbacks in a fit only
        other = lgm.GradientMetrics(["gradorth", "energy"])
        trainer(other).test(Stepped(net), batches(x[:8]), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    again = lgm.GradientMetrics(["gradorth", "energy"])
    again.load_state_dict(pickle.loads(pickle.dumps(callback.state_dict())))
    test_run(again, Stepped(net), batches(x[:8]))
    test_run(callback, Stepped(net), batches(x[:8]))
    assert again.results.equals(callback.results)
    changed = lgm.GradientMetrics({"gradorth": "gradorth(energy=0.5)"})
    with pytest.raises(ValueError, match="the state in the checkpoint was made for another arguments"):
        changed.load_state_dict(callback.state_dict())


def test_a_pickled_callback_has_the_same_scores() -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = fitted_callback(net, x, datasets=["mine"])
    copied = pickle.loads(pickle.dumps(callback))
    for each in (callback, copied):
        test_run(each, Stepped(net), batches(x, torch.arange(8) % 3))
    assert copied.results.equals(callback.results) and copied.results["dataset"][0].as_py() == "mine"
    again = pickle.loads(pickle.dumps(callback))
    assert again.results.equals(callback.results)


def environment() -> dict[str, str]:
    import os

    kept = {key: value for key, value in os.environ.items() if "RANK" not in key and not key.startswith("MASTER")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_pytorch_lightning() -> None:
    pytest.importorskip("pytorch_lightning")
    source = """
import sys
import lightning_gradmetrics as lgm
assert "pytorch_lightning" not in sys.modules
import torch
from torch.utils.data import DataLoader, TensorDataset
import pytorch_lightning as pl
import lightning.pytorch

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)
    def test_step(self, batch, batch_idx):
        self.net(batch[0])

callback = lgm.GradientMetrics(["gradnorm"])
assert isinstance(callback, pl.Callback) and isinstance(callback, lightning.pytorch.Callback)
assert issubclass(lgm.GradientMetrics, pl.Callback)
data = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6) % 3), 4)
quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)
pl.Trainer(accelerator="cpu", callbacks=[callback], **quiet).test(Net(), data, verbose=False)
assert callback.results.num_rows == 6
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, env=environment(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


# Stages and datasets


def test_one_callback_for_all_stages() -> None:
    net, x, y = mlp(5, 8, 3), numbers(8, 5), torch.arange(8) % 3
    names = {"validate": ["val"], "test": {"mine": "id", "other": "far"}}
    callback = lgm.GradientMetrics(["energy", "gradnorm"], datasets=names)
    used, module = trainer(callback, max_epochs=1), Stepped(net)
    used.fit(module, batches(x, y), batches(x, y))
    assert set(callback.results["dataset"].to_pylist()) == {"val"}
    used.test(module, [batches(x, y), batches(3 * x, y)], verbose=False)
    assert callback.results["dataset"].to_pylist() == ["mine"] * 8 + ["other"] * 8
    assert "gradmetrics/other/gradnorm/ood_auroc" in used.callback_metrics
    used.predict(module, batches(x, y))
    assert set(callback.results["dataset"].to_pylist()) == {"dataloader_0"}
    assert_scores(callback, net, x, ["energy", "gradnorm"])


def test_names_for_the_test_do_not_stop_a_fit() -> None:
    net, x, y = mlp(5, 8, 3), numbers(8, 5), torch.arange(8) % 3
    roles = {"mine": "id", "other": "far"}
    callback = lgm.GradientMetrics("energy", datasets=roles)
    used = trainer(callback, max_epochs=2)
    with pytest.warns(UserWarning, match="validation inside fit is not scored.*stages=") as heard:
        used.fit(Stepped(net), batches(x, y), batches(x, y))
    assert sum("not scored" in str(one.message) for one in heard) == 1 and callback.results.num_rows == 0
    used.test(Stepped(net), [batches(x, y), batches(x, y)], verbose=False)
    assert callback.results.num_rows == 16
    with pytest.raises(ValueError, match=r"names 2 datasets \(mine, other\), but fit has 1 dataloader"):
        trainer(lgm.GradientMetrics("energy", datasets=roles, stages="fit"), max_epochs=1).fit(
            Stepped(net), batches(x, y), batches(x, y)
        )


def test_stages_that_are_not_scored() -> None:
    net, x, y = mlp(5, 8, 3), numbers(8, 5), torch.arange(8) % 3
    callback = lgm.GradientMetrics("energy", stages=("test", "predict"))
    used = trainer(callback, max_epochs=1)
    used.fit(Stepped(net), batches(x, y), batches(x, y))
    used.validate(Stepped(net), batches(x, y), verbose=False)
    assert callback.results.num_rows == 0 and not used.callback_metrics
    used.test(Stepped(net), batches(x, y), verbose=False)
    assert callback.results.num_rows == 8


def test_fitted_scores_inside_a_fit() -> None:
    net, x, y = mlp(5, 8, 3), numbers(8, 5), torch.arange(8) % 3
    with pytest.raises(ValueError, match=r"gradorth cannot be scored in the validation of a fit.*stages="):
        trainer(fitted_callback(net, x, stages=["validate", "test"]), max_epochs=1).fit(
            Stepped(net), batches(x, y), batches(x, y)
        )
    with pytest.warns(UserWarning, match="fitted scores are valid for fixed weights"):
        trainer(fitted_callback(net, x), max_epochs=1).fit(Stepped(net), batches(x, y), batches(x, y))


class Perfect(Stepped):
    """Makes errors in the first epoch only."""

    def on_train_epoch_start(self) -> None:
        sign = -1.0 if self.current_epoch == 0 else 1.0
        self.net.weight.data = torch.diag(torch.tensor([4.0, 4.0, 4.0 * sign])).double()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-9)


def test_a_monitored_metric_is_logged_in_every_epoch(tmp_path: Path) -> None:
    x, y = torch.eye(3).double().repeat(4, 1), torch.arange(12) % 3
    key = "gradmetrics/val/max_softmax/misclassification_auroc"
    callback = lgm.GradientMetrics("max_softmax", datasets=["val"])
    keep = ModelCheckpoint(tmp_path, monitor=key, mode="max")
    stop = EarlyStopping(key, mode="max", patience=2, check_finite=False)
    used = trainer(callback, keep, stop, max_epochs=3, enable_checkpointing=True, num_sanity_val_steps=0)
    used.fit(Perfect(nn.Linear(3, 3).double()), batches(x, y), batches(x, y))
    assert used.current_epoch == 3 and bool(used.callback_metrics[key].isnan())
    assert sorted(used.callback_metrics) == sorted({key, key.replace("auroc", "aurc"), key.replace("auroc", "fpr95")})


def test_metrics_on_request() -> None:
    net, x = mlp(5, 8, 3), numbers(12, 5)
    callback = lgm.GradientMetrics({"a (b)": "pseudo_label(target=all)"}, metrics=["augrc"], prefix="mine")
    used = test_run(callback, Stepped(net), batches(x, torch.arange(12) % 3))
    assert set(used.callback_metrics) == {"mine/dataloader_0/a.b/misclassification_augrc"}


# An interruption


callback_net = mlp(5, 8, 3)


class Stops(Stepped):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch)
        if batch_idx == 2:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_rows() -> None:
    x = numbers(16, 5)
    callback = lgm.GradientMetrics("energy")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        test_run(callback, Stops(callback_net), batches(x, torch.arange(16) % 3))
    assert callback.results["index"].to_pylist() == list(range(8))
