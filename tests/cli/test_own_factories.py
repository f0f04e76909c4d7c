"""A user-defined dataset and model, used through the command."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_gradmetrics.cli.arguments import own_factories
from lightning_gradmetrics.cli.data.conversion import evaluation_data
from lightning_gradmetrics.cli.factories import build_scores
from tests.cli.conftest import Command

MINE = '''
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def samples(seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 5, generator=generator) + shift
    inputs[torch.arange(60), labels] += 2
    return TensorDataset(inputs, labels)


def data(shift=3.0):
    return {"id": {"mine": samples(0)}, "far": {"shifted": samples(1, shift)}, "fit": samples(2)}


def net(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def net_of_data(data, depth):
    return nn.Linear(next(iter(data.loaders(1)["mine"]))[0].shape[1], depth)


class Lit(LightningModule):
    """No test_step and no data argument."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.net = net(width)

    def forward(self, inputs):
        return self.net(inputs)


class Data(LightningDataModule):
    def setup(self, stage):
        self.made = data()

    def test_dataloader(self):
        return [DataLoader(self.made["id"]["mine"], 7), DataLoader(self.made["far"]["shifted"], 7)]

    def val_dataloader(self):
        return DataLoader(self.made["fit"], 7)


def spread(evidence, *, scale=1.0):
    return -scale * evidence.logits.std(1)


def broken():
    raise RuntimeError("no such file")
'''

QUICK = ("score=[max_softmax,gradnorm,oberdiek]", "logger=none", "report=false", "resamples=0")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine", None)


def parameters_and_sets(folder: Path) -> tuple[int, list[str]]:
    (run,) = (folder / "outputs").glob("*/*")
    metrics = json.loads((run / "metrics.json").read_text())
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert {row["score"] for row in rows} == {"max_softmax", "gradnorm", "oberdiek"}
    return metrics["model"]["parameters"], [dataset["name"] for dataset in metrics["datasets"]]


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        pytest.param(
            ["model._target_=mine.net", "model.width=6", "data._target_=mine.data", "data.shift=5"],
            5 * 6 + 6 + 6 * 3 + 3,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model={_target_: mine.Lit}", "data={_target_: mine.data}"], 5 * 4 + 4 + 4 * 3 + 3, marks=pytest.mark.slow
        ),
        (
            [
                "model=custom",
                "model._target_=mine.net_of_data",
                "+model.depth=3",
                "data=datamodule",
                "data.module={_target_: mine.Data}",
                "data.roles={mine: id, shifted: far}",
            ],
            5 * 3 + 3,
        ),
    ],
    ids=["functions", "dictionaries", "data_module"],
)
def test_own_model_and_data(folder: Path, command: Command, arguments: list[str], parameters: int) -> None:
    done = command(*arguments, *QUICK)
    assert done.returncode == 0, done.stderr
    assert "errors: mine" in done.stdout and "far: shifted" in done.stdout
    assert parameters_and_sets(folder) == (parameters, ["mine", "shifted"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model._target_=mine.nett"], "model._target_=mine.nett cannot be imported"),
        pytest.param(
            ["model._target_=nowhere.net"], "cannot be imported: No module named 'nowhere'", marks=pytest.mark.slow
        ),
        pytest.param(
            ["model._target_=mine.net", "model.depth=3"], "unexpected keyword argument 'depth'", marks=pytest.mark.slow
        ),
        (["model._target_=mine.data"], "model._target_=mine.data must return an nn.Module, got dict"),
        (
            ["data._target_=mine.net"],
            "data._target_=mine.net must return an EvaluationData, a LightningDataModule or a",
        ),
        pytest.param(["data._target_=mine.Data"], "Data has 2 test dataloaders without roles", marks=pytest.mark.slow),
        pytest.param(["data._target_=mine.broken"], "no such file", marks=pytest.mark.slow),
        (["model._target_=mine.net"], "on the first batch of 'digits' (inputs (1, 1, 8, 8)) fails: "),
        (["model=custom"], "model._target_ is missing: give it a value"),
    ],
)
def test_mistakes_are_one_line(folder: Path, command: Command, arguments: list[str], words: str) -> None:
    done = command(*arguments, *QUICK)
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("gradmetrics: ") and words in lines[-1], done.stderr
    assert len(lines) <= 2 and "Traceback" not in done.stderr


def test_custom_targets_do_not_inherit_arguments() -> None:
    assert own_factories(["model._target_=a.b", "seed=1"]) == ["model=custom", "++model._target_=a.b", "seed=1"]
    swept = own_factories(["-m", "seed=1,2", "model._target_=a.b"])
    assert swept == ["-m", "seed=1,2", "model=custom", "++model._target_=a.b"]
    assert own_factories(["data={_target_: a.b}"]) == ["data=custom", "++data={_target_: a.b}"]
    unchanged = ["model=torchvision", "model._target_=a.b", "model.name=x"]
    assert own_factories(unchanged) == unchanged
    assert own_factories(["model.width=3", "data=digits"]) == ["model.width=3", "data=digits"]


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (nn.Linear(1, 1), TypeError, "must return an EvaluationData"),
        ({"far": [1]}, ValueError, "has no in-distribution data"),
        ({"id": {"a": [1]}, "far": {"a": [2]}}, ValueError, "two datasets named 'a'"),
        ({"id": 3}, TypeError, "'id' must be a dataset, got int"),
    ],
)
def test_wrong_data(made: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluation_data(made, "mine.data")


def test_mappings_become_named_sets_with_roles() -> None:
    one, other = [(torch.zeros(1), 0)], [(torch.ones(1), -1)]
    data = evaluation_data({"id": one, "near": {"a": other, "b": other}, "fit": one, "train": one}, "mine.data")
    assert dict(data.roles) == {"id": "id", "a": "near", "b": "near"} and data.train is one
    loaders, roles = data.fit_loaders(4)
    assert list(loaders) == ["fit"] and roles == {"fit": "id"}


def test_a_score_can_be_a_function_of_the_evidence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    node = {"_target_": "mine.spread", "scale": 2.0}
    (made,) = build_scores(OmegaConf.create({"score": {"wide": node}}))
    assert (made.name, made.arguments) == ("wide", {"scale": 2.0})
    with pytest.raises(ValueError, match=r"score.wide: .*sclae"):
        build_scores(OmegaConf.create({"score": {"wide": {"_target_": "mine.spread", "sclae": 2.0}}}))
