"""Sweeps on launchers that start other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.cli.test_resume import ARGUMENTS, MINE

ROOT = Path(__file__).parents[2]
LAUNCHERS = {"parallel": "hydra_plugins.hydra_joblib_launcher", "local": "hydra_plugins.hydra_submitit_launcher"}


def is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_runs_every_job_and_compares_them(launcher: str, tmp_path: Path) -> None:
    if not is_installed(LAUNCHERS[launcher]):
        pytest.skip("needs the extra [launchers]")
    (tmp_path / "mine.py").write_text(MINE)
    swept = ("seed=0,1", f"hydra/launcher={launcher}", "hydra.sweep.dir=sweep")
    command = [sys.executable, "-m", "lightning_gradmetrics.cli", "-m", *ARGUMENTS, *swept]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    for job in ("0", "1"):
        assert pq.read_table(tmp_path / "sweep" / job / "results.parquet").num_rows == 100
    assert (tmp_path / "sweep" / "comparison.md").exists()
