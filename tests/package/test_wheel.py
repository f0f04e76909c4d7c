"""The built wheel: what it contains, and that a stranger's typed program passes ``mypy --strict`` against it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

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


def clean() -> dict[str, str]:
    """Return the environment without variables that lead Python or mypy to this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return its output; its error output is the message of a failure."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        PROJECT,
        cwd=folder,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """Install the wheel into a virtual environment that finds everything else in this one."""
    folder = wheel.parent / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    (packages / "outside.pth").write_text("\n".join(site.getsitepackages()))
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


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


@pytest.mark.slow
def test_a_typed_program_runs_and_passes_mypy_strict(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(MYPY)
    (tmp_path / "program.py").write_text(PROGRAM)
    printed = run(python, "program.py", cwd=tmp_path)
    assert str(python.parent.parent) in printed, "the program must import the installed wheel"
    mypy = [sys.executable, "-m", "mypy", "--python-executable", str(python)]
    run(*mypy, "program.py", cwd=tmp_path)

    (tmp_path / "mistake.py").write_text(MISTAKE)
    done = subprocess.run([*mypy, "mistake.py"], cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=600)
    assert 'Argument "datasets"' in done.stdout, done.stdout
