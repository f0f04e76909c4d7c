"""The table of all scores: AUROCs, costs and needs."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import nn

from lightning_gradmetrics.cli import cost_measurement
from lightning_gradmetrics.cli.configuration import configuration_directory
from lightning_gradmetrics.cli.cost_table import cost_grid_of_width, cost_records, write_costs
from lightning_gradmetrics.cli.factories import build_scores
from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.report.tables import print_grid
from lightning_gradmetrics.report.tables.marks import kind_of
from lightning_gradmetrics.scoring.registry import make
from tests.models import assert_same_state, cnn, images, state_of

SCORES = [make("entropy"), make("gradnorm", target="all"), make("el2n")]


@pytest.fixture(scope="module")
def costs() -> list[dict]:
    model, inputs = cnn(), images(6)
    before = state_of(model)
    found = cost_measurement.score_costs(model, inputs, torch.zeros(6, dtype=torch.long), SCORES, repeats=2)
    assert_same_state(before, model)
    return found


def results() -> pa.Table:
    sizes, generator = {"id": 20, "svhn": 10, "lsun": 30}, torch.Generator().manual_seed(0)
    columns = {
        "dataset": [name for name, size in sizes.items() for _ in range(size)],
        "index": [index for size in sizes.values() for index in range(size)],
        "prediction": [0] * 60,
        "label": pa.array([0, 1] * 10 + [None] * 40, pa.int64()),
        "entropy": torch.rand(60, generator=generator).tolist(),
        "gradnorm(target=all)": torch.rand(60, generator=generator).tolist(),
        "finite": [True] * 60,
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def records(costs: list[dict]) -> list[dict]:
    roles = {"id": "id", "svhn": "far", "lsun": "far"}
    evaluation = evaluate(results(), ["entropy", "gradnorm(target=all)"], roles, ["entropy"], resamples=50)
    return cost_records(evaluation, SCORES, costs)


def test_costs_are_those_of_the_score(costs: list[dict]) -> None:
    assert [cost["score"] for cost in costs] == [score.name for score in SCORES]
    assert all(cost["milliseconds"] > 0 and cost["predictions"] > 0 for cost in costs)
    entropy, everything, _ = (cost["extra_mib"] for cost in costs)
    assert 0 <= entropy < everything


def test_the_peak_of_memory_counts_the_held_tensors() -> None:
    def run() -> None:
        held = torch.empty(2**20)
        for _ in range(3):
            torch.empty(2**19)
        del held
        torch.empty(2**20)

    assert cost_measurement._peak(run, nn.Linear(1, 1)) == 4 * (2**20 + 2**19)


def test_records_of_a_role_are_the_mean_over_its_sets(records: list[dict]) -> None:
    entropy, el2n, gradnorm = records
    table = results()
    values = torch.tensor(table["entropy"].to_pylist())
    wins = (values[20:, None] > values[None, :20]).double().mean(1)
    mean = (wins[:10].mean() + wins[10:].mean()) / 2
    assert abs(mean - wins.mean()) > 1e-3  # the sets differ in size: pooling all samples would give a different number
    assert entropy["aurocs"].keys() == {"errors", "far"}
    assert entropy["aurocs"]["far"][0] == pytest.approx(float(mean))
    assert el2n["aurocs"] == {} and el2n["kind"] == "reads labels" and not el2n["backward"]
    assert gradnorm["backward"] and gradnorm["kind"] == ""


def test_needs_of_a_fit() -> None:
    kinds = {name: kind_of(make(name)) for name in ("entropy", "gradorth", "oberdiek", "confounding_detector", "el2n")}
    assert kinds == {
        "entropy": "",
        "gradorth": "fitted",
        "oberdiek": "fitted on labels",
        "confounding_detector": "fitted on OOD samples",
        "el2n": "reads labels",
    }


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_table_and_its_files(records: list[dict], tmp_path: Path, width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    print_grid(console, cost_grid_of_width(records, SCORES, width))
    shown = console.file.getvalue()
    line = next(line for line in shown.splitlines() if line.startswith("gradnorm(target=all)"))
    value, low, high = (100 * part for part in records[2]["aurocs"]["far"])
    assert f"{value:.1f}" in line and line.split()[1:3] == ["×2", "B"] and "…" not in shown
    assert (f"{value:.1f} ({low:.1f} to {high:.1f})" in line) == (width > 80)
    write_costs(records, SCORES, tmp_path)
    rows = list(csv.DictReader((tmp_path / "costs.csv").read_text().splitlines()))
    assert [row["score"] for row in rows] == ["entropy", "el2n", "gradnorm(target=all)"]
    assert float(rows[0]["far_auroc"]) == records[0]["aurocs"]["far"][0] and rows[1]["far_auroc"] == ""
    markdown = (tmp_path / "costs.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown[:5]}) == 1


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 1 sample"):
        cost_measurement.score_costs(cnn(), images(0), None, SCORES[:1])


def test_the_experiment_has_every_score() -> None:
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        config = compose("config", ["experiment=benchmark", "score=[gradnorm]", "score.gradnorm.temperature=2"])
    scores = build_scores(config, config.every_score)
    assert scores[0].name == "gradnorm" and dict(scores[0].arguments)["temperature"] == 2
    of_several = {"pseudo_label_statistics", "uniform_statistics"}
    files = {path.stem for path in (configuration_directory() / "score").iterdir()}
    assert {score.name for score in scores} >= files - {"pytorch_ood"} - of_several
