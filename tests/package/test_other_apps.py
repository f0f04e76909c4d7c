"""Other people's programs with the installed wheel, each in a process: Hydra, LightningCLI, loggers, spawned and pickled callbacks."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.package.conftest import clean, run

DATA = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(shift):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + shift
    return DataLoader(TensorDataset(x, torch.arange(30) % 3), 8)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(0)

    def test_dataloader(self):
        return [loader(0), loader(5)]
"""

HYDRA_APP = """
import hydra
from lightning.pytorch import Trainer
from parts import Data, Net


@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(config):
    callbacks = [hydra.utils.instantiate(node) for node in config.callbacks.values()]
    trainer = Trainer(callbacks=callbacks, **config.trainer)
    trainer.test(Net(), datamodule=Data(), verbose=False)
    print(type(callbacks[0]).__module__, callbacks[0].score_names, callbacks[0].results.num_rows)


main()
"""

SHOWN_CONFIG = """
import hydra


@hydra.main(version_base="1.3", config_path="conf", config_name="main")
def main(config):
    print(config.callbacks)


main()
"""

MAIN_YAML = """
trainer: {accelerator: cpu, logger: false, enable_progress_bar: false, enable_checkpointing: false}
hydra: {output_subdir: null, run: {dir: .}, job: {chdir: false}}
"""

CLI_APP = """
from {package}.cli import LightningCLI
from parts import Data, Net

cli = LightningCLI(Net, Data)
callback = next(each for each in cli.trainer.callbacks if type(each).__name__ == "GradientMetrics")
print(callback.score_names, callback.stages, callback.results.num_rows)
"""

FIT_AND_TEST = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
import lightning_gradmetrics as lgm
from parts import Data, Net, loader


class Validated(Data):
    def val_dataloader(self):
        return loader(0)


def extra_loggers(names):
    if "wandb" in names:
        from lightning.pytorch.loggers import WandbLogger
        yield WandbLogger(save_dir=".", offline=True)
    if "mlflow" in names:
        from lightning.pytorch.loggers import MLFlowLogger
        yield MLFlowLogger(tracking_uri="file:mlruns")


def validation_step(self, batch, batch_idx):
    self.log("val_loss", self.training_step(batch, batch_idx))


Net.validation_step = validation_step
loggers = [TensorBoardLogger("board", "", ""), CSVLogger("csv", "", ""), *extra_loggers(sys.argv[1:])]
callback = lgm.GradientMetrics(["energy", "gradnorm"], datasets={"ours": "id", "noise": "far"})
options = dict(accelerator="cpu", max_epochs=1, enable_progress_bar=False, enable_checkpointing=False)
trainer = Trainer(logger=loggers, callbacks=[callback], log_every_n_steps=1, **options)
model, data = Net(), Validated()
trainer.fit(model, datamodule=data)
print("rows after fit:", callback.results.num_rows)
trainer.test(model, datamodule=data, verbose=False)
print("rows after test:", callback.results.num_rows)

both = {"validate": {"held_out": "id"}, "test": {"ours": "id", "noise": "far"}}
callback = lgm.GradientMetrics("energy", stages=("validate", "test"), datasets=both)
trainer = Trainer(logger=False, callbacks=[callback], **options)
trainer.validate(model, datamodule=data, verbose=False)
print("validated:", callback.results["dataset"].unique().to_pylist())
"""

SPAWNED = """
import pickle
import joblib
from lightning.pytorch import Trainer
import lightning_gradmetrics as lgm
from parts import Data, Net, loader

quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)


def rows(callback):
    Trainer(callbacks=[callback], **quiet).test(Net(), loader(0), verbose=False)
    return callback.results["gradnorm"].to_pylist()


if __name__ == "__main__":
    callback = lgm.GradientMetrics(["gradnorm(temperature=2)", "gradnorm"], print_summary=False)
    wanted = rows(pickle.loads(pickle.dumps(callback)))
    assert joblib.Parallel(n_jobs=2)(joblib.delayed(rows)(callback) for _ in range(2)) == [wanted, wanted]
    spawned = lgm.GradientMetrics(["gradnorm"], output="scored")
    Trainer(callbacks=[spawned], strategy="ddp_spawn", devices=2, **quiet).test(Net(), loader(0), verbose=False)
    assert sorted(spawned.results["index"].to_pylist()) == list(range(len(wanted)))
    print("equal:", len(wanted))
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Return a folder with a model, data, and the configuration of a Hydra app."""
    (tmp_path / "parts.py").write_text(DATA)
    (tmp_path / "main.py").write_text(HYDRA_APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "main.yaml").write_text(MAIN_YAML)
    return tmp_path


def test_a_hydra_app_adds_the_callback_by_name(python: Path, app: Path) -> None:
    """Scores as text, as a mapping and as a node; a fitted score is fitted on the app's training data."""
    node = "{_target_: lightning_gradmetrics.scores.exgrad, target: all}"
    scores = f"[max_softmax,{{gradnorm: {{temperature: 2}}}},{node},gradorth]"
    key = "callbacks.gradient_metrics"
    roles = f"{key}.datasets={{ours: id, noise: far}}"
    printed = run(
        python,
        "main.py",
        "+callbacks=gradient_metrics",
        f"{key}.scores={scores}",
        roles,
        f"{key}.fit_on=train",
        cwd=app,
    )
    names = "['max_softmax', 'gradnorm(temperature=2)', 'exgrad(target=all)', 'gradorth']"
    assert f"lightning_gradmetrics.callback.callback {names} 60" in printed
    assert "far: noise" in printed and "gradnorm(temperature=2)" in printed


def test_the_configuration_of_the_app_comes_first(python: Path, app: Path) -> None:
    folder = app / "conf" / "callbacks"
    folder.mkdir()
    (folder / "gradient_metrics.yaml").write_text(
        "mine: {_target_: lightning_gradmetrics.GradientMetrics, scores: energy}"
    )
    (app / "show.py").write_text(SHOWN_CONFIG)
    shown = run(python, "show.py", "+callbacks=gradient_metrics", cwd=app)
    assert "{'mine': {'_target_': 'lightning_gradmetrics.GradientMetrics', 'scores': 'energy'}}" in shown


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_cli_keeps_the_arguments_of_a_score(python: Path, app: Path, package: str) -> None:
    if package == "pytorch_lightning":
        pytest.importorskip(package)
        (app / "parts.py").write_text(DATA.replace("lightning.pytorch", package))
    pytest.importorskip("jsonargparse")
    (app / "cli.py").write_text(CLI_APP.format(package=package))
    score = '{"class_path": "lightning_gradmetrics.scores.gradnorm", "init_args": {"temperature": 2.0}}'
    arguments = [
        *("test", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"),
        "--trainer.callbacks+=lightning_gradmetrics.GradientMetrics",
        f'--trainer.callbacks.scores=["energy",{score}]',
        '--trainer.callbacks.stages=["test"]',
    ]
    printed = run(python, "cli.py", *arguments, cwd=app)
    assert "['energy', 'gradnorm(temperature=2.0)'] ('test',) 60" in printed
    if package == "pytorch_lightning":
        return  # the parser of the arguments is the same
    wrong = [argument.replace('"temperature"', '"nonsense"') for argument in arguments]
    done = subprocess.run(
        [python, "cli.py", *wrong],
        cwd=app,
        env={**clean(), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and "nonsense" in done.stderr, done.stderr[-2000:]


def test_loggers_and_stages(python: Path, app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of test sets do not disturb ``fit``; each logger has scalars and pictures in its own form."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (app / "fit_and_test.py").write_text(FIT_AND_TEST)
    installed = [name for name in ("wandb", "mlflow") if find_spec(name)]
    printed = run(python, "fit_and_test.py", *installed, cwd=app)
    assert "rows after fit: 0" in printed and "rows after test: 60" in printed
    assert "validated: ['held_out']" in printed and "far: noise" in printed
    assert "gradmetrics/noise/gradnorm/ood_auroc" in (app / "csv" / "metrics.csv").read_text()
    assert list((app / "board").glob("events.*"))
    found = [path.relative_to(app) for path in app.rglob("*.png")]
    pictures = {path.parts[0] for path in found if "roc_ood_noise" in str(path)}
    folders = {"wandb": "wandb", "mlflow": "mlruns"}
    assert pictures >= {"csv", *(folders[name] for name in installed)}, found


def test_spawned_pickled_and_parallel_callbacks(python: Path, app: Path) -> None:
    (app / "spawned.py").write_text(SPAWNED)
    assert "equal: 30" in run(python, "spawned.py", cwd=app)
