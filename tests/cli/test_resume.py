"""An interrupted run of the command, and the command that completes it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.conftest import Command

MINE = """
from pathlib import Path

import torch
from torch.utils.data import TensorDataset


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3)
        self.seen = 0

    def forward(self, x):
        if Path("fire").exists() and self.seen > 40:
            raise RuntimeError("the machine is on fire")
        self.seen += len(x)
        return self.layer(x)


def net(data=None):
    return Net()


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % 3
    sets = {}
    for name in ("id", "far"):
        sets[name] = TensorDataset(torch.randn(50, 4, generator=generator), labels)
    return sets
"""

ARGUMENTS = (
    "model._target_=mine.net",
    "data._target_=mine.data",
    "score=[max_softmax,gradnorm]",
    "batch_size=8",
    "logger=none",
    "report=false",
    "resamples=0",
)


@pytest.mark.slow
def test_an_interrupted_run_is_completed(tmp_path: Path, command: Command) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    undisturbed = command(*ARGUMENTS, "hydra.run.dir=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    (tmp_path / "fire").touch()
    burnt = command(*ARGUMENTS, "hydra.run.dir=run")
    assert burnt.returncode == 1 and "rows are committed in" in burnt.stderr
    assert "batch_size=8 logger=none report=false resamples=0 resume=true hydra.run.dir=run" in burnt.stderr
    (tmp_path / "fire").unlink()
    again = command(*ARGUMENTS, "hydra.run.dir=run")
    assert again.returncode == 1 and "add resume=true to complete it" in again.stderr
    other = command(*ARGUMENTS, "score.gradnorm.temperature=2", "resume=true", "hydra.run.dir=run")
    assert other.returncode == 1 and "scores.gradnorm.arguments.temperature is 1" in other.stderr
    resumed = command(*ARGUMENTS, "resume=true", "hydra.run.dir=run")
    assert resumed.returncode == 0, resumed.stderr
    tables = [pq.read_table(tmp_path / folder / "results.parquet") for folder in ("undisturbed", "run")]
    assert tables[0].equals(tables[1]) and tables[0].num_rows == 100
    metrics = [(tmp_path / folder / "metrics.csv").read_text() for folder in ("undisturbed", "run")]
    assert metrics[0] == metrics[1] and not (tmp_path / "run" / "results").exists()
    complete = command(*ARGUMENTS, "resume=true", "hydra.run.dir=run")
    assert complete.returncode == 0 and "nothing to resume" in complete.stderr
