"""The callback in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, warnings
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
import lightning_gradmetrics as lgm
from tests.models import Module

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
devices, out = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = Module()
sets = [DataLoader(TensorDataset(torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))), 4) for n in (23, 11)]
scores, sources = ["energy", "gradnorm", "pseudo_label(target=all)"], {"profile": True, "top_k": {"energy": 6}}
callback = lgm.GradientMetrics(scores, datasets={"in": "id", "out": "far"}, **sources)
options = {"accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
trainer = Trainer(strategy="ddp" if devices > 1 else "auto", callbacks=[callback], **options)
found = {}
for stage in ("test", "predict"):
    getattr(trainer, stage)(model, sets)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    shown = [axes.get_title() for picture in callback.pictures() for axes in picture.figure.axes]
    tables = {name: table.to_pydict() for name, table in callback.tables().items()}
    found[stage] = {"metrics": metrics, "rows": callback.results.to_pydict(), "tables": tables, "shown": shown}
with open(f"{out}.{trainer.global_rank}", "w") as file:
    json.dump(found, file)
"""

FAILING = """
import sys, warnings
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset
import lightning_gradmetrics as lgm
from tests.models import Module

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
devices, out = int(sys.argv[1]), sys.argv[2]


class Full(CSVLogger):
    def log_image(self, **options):
        raise OSError("the disk is full")


def fails(loggers, score, **options):
    callback = lgm.GradientMetrics(score)
    vars(callback).update(options)  # past the checks of arguments, so that judging fails on rank 0
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp", logger=loggers, callbacks=[callback], **quiet)
    try:
        trainer.test(Module(), DataLoader(TensorDataset(torch.randn(9, 3, 8, 8), torch.zeros(9).long()), 4))
    except Exception as error:
        return trainer.global_rank, f"{type(error).__name__}: {error}"


rank, judging = fails(False, "energy", resamples=-1)
_, drawing = fails(Full(out), "gga")
with open(f"{out}.{rank}", "w") as file:
    print(judging, drawing, sep="\\n", file=file)
"""

STAGES = ("test", "predict")


def start(source: str, devices: int, folder: Path, timeout: float = 600) -> list[str]:
    """Run a script in ``count`` processes and return the output of each."""
    script, out = folder / "script.py", folder / f"out{devices}"
    script.write_text(source)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), str(devices), str(out)]
    environment = {
        key: value for key, value in os.environ.items() if "RANK" not in key and not key.startswith(("WORLD", "MASTER"))
    }
    done = subprocess.run(
        command, cwd=root, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return [Path(f"{out}.{rank}").read_text() for rank in range(devices)]


def run(devices: int, folder: Path) -> list[dict]:
    return [json.loads(text) for text in start(SCRIPT, devices, folder)]


@pytest.mark.slow
def test_two_and_three_processes_have_the_results_of_one(tmp_path: Path) -> None:
    """Sizes that divide by none: every row once, every metric the same, on every rank, in test and in predict.

    Rank 0's pictures, and the numbers in them, are those of all samples.
    """
    (alone,) = run(1, tmp_path)
    for devices in (2, 3):
        ranks = run(devices, tmp_path)
        for stage in STAGES:
            wanted, rows = alone[stage], ranks[0][stage]["rows"]
            assert len(rows["index"]) == 34 and wanted["metrics"]
            for key in ("dataset", "index", "prediction", "label", "finite"):
                assert rows[key] == wanted["rows"][key], key
            for key in ("energy", "gradnorm", "pseudo_label(target=all)"):
                assert rows[key] == pytest.approx(wanted["rows"][key], rel=1e-4)
            assert ranks[0][stage]["shown"] == alone[stage]["shown"]
            assert sum(title.startswith("#") for title in alone[stage]["shown"]) == 12
            for name, columns in alone[stage]["tables"].items():
                for key, values in columns.items():
                    found = ranks[0][stage]["tables"][name][key]
                    assert found == (values if isinstance(values[0], str | int) else pytest.approx(values, rel=1e-4))
            for rank in ranks:
                assert rank[stage]["metrics"] == pytest.approx(wanted["metrics"], abs=1e-6)


@pytest.mark.slow
def test_a_failure_on_rank_0_ends_every_process(tmp_path: Path) -> None:
    """The other processes raise too, with the error of rank 0, long before gloo's timeout of 30 minutes."""
    ranks = [text.splitlines() for text in start(FAILING, 2, tmp_path, timeout=300)]
    expected = [
        "ValueError: resamples must be a whole number of at least 0, got -1",
        "OSError: the disk is full",
    ]
    assert ranks[0] == expected
    stopped = "RuntimeError: rank 0 failed, so rank 1 stops too. Its error: "
    assert ranks[1] == [f"{stopped}{error}" for error in expected]
