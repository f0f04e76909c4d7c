"""Other people's programs with the installed wheel: a Hydra app and a LightningCLI, each in a process."""

from __future__ import annotations

import subprocess
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
    assert "['energy'] 60" in run(python, "main.py", "+callbacks=gradient_metrics", cwd=app)


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
