"""Every example runs, and prints its result."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("[!_]*.py"))
OPTIONAL = {
    "huggingface_text": "transformers",
    "lightning_cli": "jsonargparse",
    "optuna_tuning": "optuna",
    "ray_data": "ray",
}
STARTS_PROCESSES = ("hydra_sweep", "lightning_cli", "ray_data")


def test_every_example_is_on_the_page_of_examples() -> None:
    page = (FOLDER.parent / "docs" / "examples.md").read_text()
    assert set(re.findall(r"\.\./examples/(\w+)\.py", page)) == {path.stem for path in EXAMPLES} | {"_digits"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    needed = OPTIONAL.get(path.stem)
    if needed and find_spec(needed) is None:
        pytest.skip(f"the example needs the package {needed}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    if path.stem in STARTS_PROCESSES:
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        runpy.run_path(str(path), run_name="__main__")
        printed = capsys.readouterr().out
    assert "gradnorm" in printed
