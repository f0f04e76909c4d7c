"""The built wheel, and a Python environment with the wheel installed, for tests that use the package as a new user would."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

PROJECT = Path(__file__).parents[2]


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


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the project's wheel, once for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "wheel"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "wheel.lock"):
        if not list(folder.glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
            run(*pip, "-w", folder, PROJECT, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def python(wheel: Path) -> Path:
    """Install the wheel into a virtual environment that finds everything else in this one."""
    folder = wheel.parent / "venv"
    python, is_ready = folder / "bin" / "python", folder / "ready"
    with FileLock(wheel.parent / "venv.lock"):
        if not is_ready.exists():
            run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
            packages = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
            (packages / "outside.pth").write_text("\n".join(site.getsitepackages()))
            pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
            run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
            is_ready.touch()
    return python
