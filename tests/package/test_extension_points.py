"""The extension points, as documented: the code of docs/extending.md in a package, used in the callback and the command."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.rules import RULES, rule
from lightning_gradmetrics.evaluation import metrics
from lightning_gradmetrics.scoring.registry import RECIPES
from tests.models import Module

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SCORES = ["max_softmax", "mine.top_two(scale=2.0)", "mine.norm_above_mean", "pseudo_label(target='all')"]


def blocks(language: str) -> str:
    return "\n\n".join(re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(blocks("python"))
    return tmp_path


@pytest.fixture
def mine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The imported module; what it registers is removed afterwards."""
    monkeypatch.syspath_prepend(folder)
    tables = (RECIPES, RULES, metrics.METRICS, metrics.TASKS, metrics.SHOWN, metrics.HIGHER_IS_BETTER)
    before = [dict(table) for table in tables]
    yield importlib.import_module("mine")
    sys.modules.pop("mine")
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_the_callback_uses_all_extensions(mine: ModuleType) -> None:
    model = Module(mine.net().eval())
    callback = lgm.GradientMetrics(SCORES, datasets={"mine": "id", "shifted": "far"}, resamples=0)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback])
    data = mine.data()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no fast rule.*")
        callback.fit(trainer, model, DataLoader(data["fit"], 7))
        trainer.test(model, [DataLoader(data["id"]["mine"], 7), DataLoader(data["far"]["shifted"], 7)], verbose=False)
    assert callback.score_names == ["max_softmax", "top_two(scale=2.0)", "norm_above_mean", "pseudo_label(target=all)"]
    (entry,) = [m for m in callback.evaluation.find(score="max_softmax") if m["metric"] == "detection_error"]
    assert 0 < entry["value"] < 0.5
    meter = mine.DetectionError()
    names = callback.results["dataset"].to_pylist()
    target = torch.tensor([int(name == "shifted") for name in names])
    meter.update(torch.tensor(callback.results["max_softmax"].to_numpy()), target)
    assert meter.compute().item() == pytest.approx(entry["value"])


def test_a_rule_equals_the_reference_and_a_wrong_one_changes_no_number(mine: ModuleType) -> None:
    x = torch.randn(6, 5)
    model = mine.net(5).double()
    fast, reference = (
        lgm.gradient_statistics(model, x.double(), "pseudo_label", per_parameter=True, engine=engine)
        for engine in ("auto", "reference")
    )
    torch.testing.assert_close(fast.norm(2), reference.norm(2))

    @rule(torch.prelu, arguments="input weight", weights="weight")
    def wrong(call: object, g: torch.Tensor) -> Iterator[tuple[str, object]]:
        for name, use in mine.prelu(call, g):
            yield name, mine.RowsUse(use.value * 2)

    with pytest.warns(UserWarning, match=r"1\.weight \(its fast rule disagrees with autograd"):
        slow = lgm.gradient_statistics(mine.net(5).double(), x.double(), "pseudo_label", per_parameter=True)
    torch.testing.assert_close(slow.norm(2), reference.norm(2))


@pytest.mark.slow
def test_the_command_uses_all_extensions(folder: Path) -> None:
    """Also a score in a file of the user's own configuration folder."""
    words = shlex.split(blocks("bash").replace("\\\n", " "))[1:]
    (folder / "conf" / "score").mkdir(parents=True)
    (folder / "conf" / "score" / "from_file.yaml").write_text("from_file: {_target_: mine.top_two, scale: 3.0}")
    words = [word.replace("score=[max_softmax,energy]", "score=[max_softmax,energy,from_file]") for word in words]
    words = [f"--config-dir={folder / 'conf'}", *words, "report=false", "logger=none", "resamples=0"]
    command = [sys.executable, "-m", "lightning_gradmetrics.cli", *words]
    done = subprocess.run([*command, f"hydra.run.dir={folder / 'run'}"], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and "no fast rule" not in done.stderr, done.stderr
    found = json.loads((folder / "run" / "metrics.json").read_text())["metrics"]
    assert {m["score"] for m in found} == {"max_softmax", "energy", "from_file", "top_two", "above", "all"}
    assert "detection_error" in {m["metric"] for m in found}
