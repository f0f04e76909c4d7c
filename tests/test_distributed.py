"""The callback in real processes."""

from __future__ import annotations

import json
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
stage, devices, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model = Module()
sets = [DataLoader(TensorDataset(torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))), 4) for n in (23, 11)]
callback = lgm.GradientMetrics(["energy", "gradnorm", "pseudo_label(target=all)"], datasets={"in": "id", "out": "far"})
options = {"accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
trainer = Trainer(strategy="ddp" if devices > 1 else "auto", callbacks=[callback], **options)
getattr(trainer, stage)(model, sets)
metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
with open(f"{out}.{trainer.global_rank}", "w") as file:
    json.dump({"metrics": metrics, "rows": callback.results.to_pydict()}, file)
"""


def run(stage: str, devices: int, folder: Path) -> list[dict]:
    script, out = folder / "script.py", folder / f"out{devices}"
    script.write_text(SCRIPT)
    root = Path(__file__).parent.parent
    command = [sys.executable, str(script), stage, str(devices), str(out)]
    done = subprocess.run(command, cwd=root, env={**_environment(), "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(devices)]


def _environment() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if not key.startswith(("LOCAL_RANK", "RANK", "WORLD", "MASTER", "NODE_RANK"))}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["test", "predict"])
def test_two_and_three_processes_give_what_one_gives(stage: str, tmp_path: Path) -> None:
    """Sizes that divide by none: every row once, every metric the same, on every rank."""
    (alone,) = run(stage, 1, tmp_path)
    for devices in (2, 3):
        ranks = run(stage, devices, tmp_path)
        rows = ranks[0]["rows"]
        for key in ("dataset", "index", "prediction", "label", "finite"):
            assert rows[key] == alone["rows"][key], key
        for key in ("energy", "gradnorm", "pseudo_label(target=all)"):
            assert rows[key] == pytest.approx(alone["rows"][key], rel=1e-4)
        for rank in ranks:
            assert rank["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
