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
callback = lgm.GradientMetrics(["energy", "gradnorm", "pseudo_label(target=all)"], datasets={"in": "id", "out": "far"})
options = {"accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
trainer = Trainer(strategy="ddp" if devices > 1 else "auto", callbacks=[callback], **options)
found = {}
for stage in ("test", "predict"):
    getattr(trainer, stage)(model, sets)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    found[stage] = {"metrics": metrics, "rows": callback.results.to_pydict()}
with open(f"{out}.{trainer.global_rank}", "w") as file:
    json.dump(found, file)
"""

STAGES = ("test", "predict")


def run(devices: int, folder: Path) -> list[dict]:
    script, out = folder / "script.py", folder / f"out{devices}"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    command = [sys.executable, str(script), str(devices), str(out)]
    environment = {
        key: value for key, value in os.environ.items() if "RANK" not in key and not key.startswith(("WORLD", "MASTER"))
    }
    done = subprocess.run(
        command, cwd=root, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(devices)]


@pytest.mark.slow
def test_two_and_three_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Sizes that divide by none: every row once, every metric the same, on every rank, in test and in predict."""
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
            for rank in ranks:
                assert rank[stage]["metrics"] == pytest.approx(wanted["metrics"], abs=1e-6)
