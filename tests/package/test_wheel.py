"""The built wheel: what it contains, and that a stranger's typed program passes ``mypy --strict`` against it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.package.conftest import PROJECT, clean, run

PROGRAM = """
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm


def uncertainty(model: nn.Module, images: Tensor) -> Tensor:
    scores = lgm.score(model, images, ["gradnorm", "entropy"])
    return scores["gradnorm"]


def largest_gradient(model: nn.Module, images: Tensor) -> Tensor:
    statistics = lgm.gradient_statistics(model, images, "pseudo_label")
    return statistics.max + statistics.norm(2)


callback = lgm.GradientMetrics(["gradnorm", "entropy"], datasets={"mine": "id"})
value: Tensor = uncertainty(nn.Linear(4, 3), torch.rand(2, 4))
print(value.shape, lgm.__file__)
"""

CONFIGURATION = """
from lightning_gradmetrics.cli.configuration import configuration_directory

folder = configuration_directory()
assert (folder / "score" / "gradnorm.yaml").is_file()
print(folder)
"""

MISTAKE = """
import lightning_gradmetrics as lgm

lgm.GradientMetrics(["gradnorm"], datasets=3)
"""


MYPY = """
[mypy]
strict = True
[mypy-lightning.*,torchmetrics.*,sklearn.*,scipy.*,matplotlib.*]
follow_imports = skip
"""
"""Strict, with the types of torch; reading all of Lightning takes a minute and adds nothing."""


@pytest.mark.slow
def test_the_wheel_contains_types_configuration_and_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = PROJECT / "lightning_gradmetrics"
    sources = [path for ending in ("*.c", "*.h", "*.j2", "*.css", "*.js") for path in folder.rglob(ending)]
    configuration = list((PROJECT / "conf").rglob("*.yaml"))
    assert sources
    assert configuration
    assert "lightning_gradmetrics/py.typed" in names
    for path in sources:
        assert path.relative_to(PROJECT).as_posix() in names
    for path in configuration:
        assert f"lightning_gradmetrics/{path.relative_to(PROJECT).as_posix()}" in names
    assert "hydra_plugins/lightning_gradmetrics_search_path/__init__.py" in names
    assert "lightning_gradmetrics/cli/hydra_search_path/callbacks/gradient_metrics.yaml" in names


@pytest.mark.slow
def test_a_typed_program_runs_and_passes_mypy_strict(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "program.py").write_text(PROGRAM)
    printed = run(python, "program.py", cwd=tmp_path)
    assert str(python.parent.parent) in printed, "the program must import the installed wheel"
    assert str(python.parent.parent) in run(python, "-c", CONFIGURATION, cwd=tmp_path), "the command must find conf/"
    pytest.importorskip("mypy")
    (tmp_path / "mistake.py").write_text(MISTAKE)
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(python), "program.py", "mistake.py"]
    done = subprocess.run(mypy, cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=600)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, done.stdout
    assert errors[0].startswith("mistake.py:") and 'Argument "datasets"' in errors[0]
