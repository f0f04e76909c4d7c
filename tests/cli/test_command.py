"""The command in real subprocesses, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from lightning_gradmetrics.cli.configuration import configuration_directory
from lightning_gradmetrics.cli.models import ResNetCifar
from lightning_gradmetrics.scoring.registry import RECIPES, resolve
from tests.cli.conftest import Command


def gradmetrics(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160", "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "lightning_gradmetrics.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def configured(*overrides: str):
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        return compose("config", list(overrides))


def test_every_score_of_the_default_configuration_can_be_made() -> None:
    config = configured()
    scores = resolve({str(name): instantiate(node) for name, node in config.score.items()})
    assert {
        "max_softmax",
        "entropy",
        "energy",
        "gradnorm",
        "gradnorm_all",
        "gradtrust",
        "pseudo_label_std",
        "exgrad_all",
    } <= {s.name for s in scores}


def test_every_score_file_makes_registered_scores() -> None:
    """Every registered score has a file of its name, with its default arguments."""
    folder = configuration_directory() / "score"
    files = {path.stem for path in folder.glob("*.yaml")}
    assert files >= set(RECIPES)
    for file in sorted(files):
        nodes = OmegaConf.merge({"seed": 0}, OmegaConf.load(folder / f"{file}.yaml"))
        made = {name: instantiate(node) for name, node in nodes.items() if name != "seed"}
        assert made, file
        if file in RECIPES:
            assert list(made) == [file] and set(nodes[file]) - {"_target_"} == set(RECIPES[file].defaults), file


def test_scores_can_be_chosen_and_changed() -> None:
    config = configured("score=[gradnorm,entropy]", "score.gradnorm.temperature=2")
    assert list(config.score) == ["gradnorm", "entropy"] and config.score.gradnorm.temperature == 2


@pytest.mark.slow
def test_default_run(tmp_path: Path, command: Command) -> None:
    """A run writes the table, results, metrics, report and TensorBoard files; both runs use the weights of the package."""
    first = gradmetrics(tmp_path, "resamples=100")
    assert first.returncode == 0, first.stderr
    for word in (
        "max_softmax",
        "entropy",
        "energy",
        "gradnorm_all",
        "AUROC",
        "AURC",
        "FPR95",
        "digits_8_9",
        "photos",
    ):
        assert word in first.stdout, word
    for heading in ("errors: digits", "near: digits_8_9", "far: photos", "errors and far:"):
        assert heading in first.stdout
    stderr = [
        line for line in first.stderr.splitlines() if line and "Warning" not in line
    ]  # old versions of packages add an empty one
    assert [line.partition(":")[0] for line in stderr] == ["digits_cnn", "Results", "Report"], first.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    table = pq.read_table(run / "results.parquet")
    metrics = json.loads((run / "metrics.json").read_text())
    assert table.column_names == [
        "dataset",
        "index",
        "prediction",
        "label",
        *(s["name"] for s in metrics["scores"]),
        "finite",
    ]
    assert [d["rows"] for d in metrics["datasets"]] == [
        (np.array(table["dataset"].to_pylist()) == d["name"]).sum() for d in metrics["datasets"]
    ]
    accuracy = metrics["datasets"][0]["accuracy"]
    assert 0.8 < accuracy < 0.99, "there must be errors to find"
    assert (run / "report.html").stat().st_size > 10_000 and list((run / "tensorboard").glob("events*"))
    assert not (tmp_path / "checkpoints").exists()
    assert {"metrics.csv", "table.md", "table.tex"} <= {path.name for path in run.iterdir()}
    second = command("score=[max_softmax,gradnorm]", "logger=none", "report=false", "resamples=0")
    assert second.returncode == 0, second.stderr
    again = json.loads(
        max((tmp_path / "outputs").glob("*/*"), key=lambda p: p.stat().st_mtime).joinpath("metrics.json").read_text()
    )
    value = {(m["score"], m["task"], m["dataset"], m["metric"]): m["value"] for m in metrics["metrics"]}
    assert all(m["value"] == value[m["score"], m["task"], m["dataset"], m["metric"]] for m in again["metrics"])


@pytest.mark.slow
def test_image_folders_with_a_checkpoint(tmp_path: Path, command: Command) -> None:
    """The walkthrough's command line, on generated images."""
    generator = np.random.default_rng(0)
    for folder, count in [("inside/a", 6), ("inside/b", 6), ("close", 5), ("away", 4)]:
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                tmp_path / folder / f"{number}.png"
            )
    torch.manual_seed(0)
    torch.save(ResNetCifar(3, 2).state_dict(), tmp_path / "weights.pt")
    found = command(
        "data=image_folders",
        "data.size=32",
        "data.id={pets:inside}",
        "data.near=close",
        "data.far={sky:away}",
        "model=resnet20_cifar",
        "model.classes=2",
        "model.checkpoint=weights.pt",
        "score=[energy,gradnorm,pseudo_label_all]",
        "logger=none",
    )
    assert found.returncode == 0, found.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    table = pq.read_table(run / "results.parquet").to_pydict()
    assert table["dataset"] == ["pets"] * 12 + ["close"] * 5 + ["sky"] * 4
    assert table["label"] == [0] * 6 + [1] * 6 + [None] * 9


@pytest.mark.slow
def test_cross_validated_run(tmp_path: Path, command: Command) -> None:
    """The experiment, with fewer scores: held-out columns in the results, the table on screen and in files."""
    found = command(
        "experiment=combination",
        "score=[max_softmax,gradnorm,kfac_influence,combination,combination_errors,combination_ood]",
        "cross_validation_folds=2",
        "resamples=50",
        "logger=none",
    )
    assert found.returncode == 0, found.stderr
    (run,) = (tmp_path / "outputs").glob("*/*")
    table = pq.read_table(run / "results.parquet")
    names = ["kfac_influence", "combination", "combination_errors", "combination_ood"]
    left_out = [f"combination_ood without {name}" for name in ("digits_8_9", "photos")]
    assert table.column_names[4:] == ["max_softmax", "gradnorm", *names, *left_out, "finite"]
    records = json.loads((run / "fitted_comparison.json").read_text())
    assert len(records) == 3 + 4 + 4 and (run / "fitted_comparison.csv").is_file() and (run / "report.html").is_file()
    assert "best single" in found.stdout and "errors: digits" in found.stdout
    refused = command("cross_validation_folds=2", "score=[combination]", "logger=none")
    assert refused.returncode != 0 and "add one or more scores that need no fit" in refused.stderr


def test_list_of_scores(command: Command) -> None:
    found = command("scores")
    assert found.returncode == 0, found.stderr
    assert all(name in found.stdout for name in RECIPES)
