"""Every example runs, and prints its result; tests/ray has the one with Ray."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("[!_]*.py"))
OPTIONAL = {
    "huggingface_text": "transformers",
    "lightning_cli": "jsonargparse",
    "optuna_tuning": "optuna",
}
STARTS_PROCESSES = ("hydra_sweep", "lightning_cli")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_begins_with_the_title_of_its_page(path: Path) -> None:
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    assert lines[1] == "=" * len(lines[0]) and not lines[2] and lines[3].endswith((".", "::"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_code_of_the_quickstart_runs_and_has_the_stated_result(tmp_path: Path, monkeypatch, capsys) -> None:
    page = (FOLDER.parent / "docs" / "quickstart.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "quickstart"}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    assert {"roc.png", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    prose = " ".join(page.split())
    stated = re.search(r"\*\*energy finds .* AUROC of ([\d.]+) .*, max softmax with ([\d.]+)", prose)
    assert stated
    measured = names["callback"].evaluation
    for score, value in zip(("energy", "max_softmax"), stated.groups(), strict=True):
        (found,) = measured.find(score=score, task="ood", dataset="unknown", metric="auroc")
        assert found["value"] * 100 == pytest.approx(float(value), abs=2)  # the training differs between processors


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "ray_data"], ids=lambda path: path.stem)
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
