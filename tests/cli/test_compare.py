"""Several runs in one table."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest

from lightning_gradmetrics.cli.compare import comparison_grid, read_runs, summary_rows
from lightning_gradmetrics.cli.errors import UsageError
from lightning_gradmetrics.results.replacing import write_csv
from tests.cli.conftest import Command

COLUMNS = ("score", "family", "fit", "task", "dataset", "group", "metric", "value", "low", "high")


def write_metrics(folder: Path, shift: float, scores: tuple[str, ...] = ("energy", "gradnorm")) -> None:
    rows = []
    for number, score in enumerate(scores):
        for task, dataset, group in (("misclassification", "mine", "id"), ("ood", "svhn", "far"), ("ood", None, "far")):
            value = 0.8 + 0.05 * number + shift
            rows.append(
                {"score": score, "task": task, "dataset": dataset, "group": group, "metric": "auroc", "value": value}
            )
        rows.append(
            {"score": score, "task": "ood", "dataset": "svhn", "group": "far", "metric": "fpr95", "value": None}
        )
    write_csv(folder / "metrics.csv", rows, COLUMNS)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_metrics(tmp_path / "sweep" / "0", 0.0)
    write_metrics(tmp_path / "sweep" / "1", 0.02)
    write_metrics(tmp_path / "other", 0.04, ("energy",))
    return tmp_path


def test_mean_and_spread(runs: Path) -> None:
    read = read_runs([runs / "sweep", runs / "other"])
    assert list(read) == [runs / "sweep" / "0", runs / "sweep" / "1", runs / "other"]
    rows = {(row["score"], row["dataset"], row["metric"]): row for row in summary_rows(list(read.values()))}
    energy = rows["energy", "svhn", "auroc"]
    assert energy["runs"] == 3 and energy["mean"] == pytest.approx(0.82)
    assert energy["std"] == pytest.approx(statistics.stdev([0.8, 0.82, 0.84]))
    assert (energy["least"], energy["most"]) == pytest.approx((0.8, 0.84))
    assert rows["gradnorm", "svhn", "auroc"]["runs"] == 2
    assert rows["energy", "svhn", "fpr95"]["runs"] == 0 and "mean" not in rows["energy", "svhn", "fpr95"]


def test_other_seeds_are_repetitions_and_other_arguments_are_settings(runs: Path) -> None:
    for number, temperature in enumerate((1.0, 1.0, 2.0)):
        folder = runs / "sweep" / str(number)
        write_metrics(folder, 0.0)
        arguments = {"seed": number, "temperature": temperature}
        scores = [{"name": name, "arguments": arguments} for name in ("energy", "gradnorm")]
        (folder / "metrics.json").write_text(json.dumps({"scores": scores}))
    rows = summary_rows(list(read_runs([runs / "sweep"]).values()))
    counts = {row["score"]: row["runs"] for row in rows if row["dataset"] == "mine"}
    assert counts == {
        "energy(temperature=1.0)": 2,
        "gradnorm(temperature=1.0)": 2,
        "energy(temperature=2.0)": 1,
        "gradnorm(temperature=2.0)": 1,
    }


def test_the_table(runs: Path) -> None:
    grid = comparison_grid(summary_rows(list(read_runs([runs]).values())), 3)
    assert [(heading, column.heading) for heading, column in grid.columns] == [
        ("errors", "mine"),
        ("far", "svhn"),
        ("far", "mean"),
    ]
    column = dict(zip(grid.names.cells, grid.columns[1][1].cells, strict=True))
    assert column == {"energy": "82.0 ± 2.0", "gradnorm": "86.0 ± 1.4 (2)"}
    assert grid.columns[1][1].best == {list(column).index("gradnorm")}


def test_the_command(runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("compare", "sweep", "other", "--output", "made")
    assert done.returncode == 0, done.stderr
    assert "82.0 ± 2.0" in done.stdout and "Comparison of 3 runs" in done.stderr
    with (runs / "made" / "comparison.csv").open(newline="") as file:
        assert {row["score"] for row in csv.DictReader(file)} == {"energy", "gradnorm"}
    assert "82.0 ± 2.0" in (runs / "made" / "comparison.md").read_text()
    assert r"82.0 $\pm$ 2.0" in (runs / "made" / "comparison.tex").read_text()
    page = (runs / "made" / "comparison.html").read_text()
    assert "86.0 ± 1.4" in page and "sweep/1" in page and "Far OOD" in page
    monkeypatch.setenv("COLUMNS", "30")
    narrow = command("compare", "sweep", "other")
    assert "…" not in narrow.stdout and "2 more columns in comparison.md" in " ".join(narrow.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: gradmetrics compare"),
        (["sweep/0"], "found 1 run"),
        (["nowhere"], "no run in 'nowhere'"),
        (["--x"], "usage"),
    ],
)
def test_mistakes(runs: Path, command: Command, arguments: list[str], words: str) -> None:
    done = command("compare", *arguments)
    assert done.returncode == 1 and words in done.stderr


def test_files_of_other_programs_are_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = runs / "lightning_logs" / "version_0"
    other.mkdir(parents=True)
    (other / "metrics.csv").write_text("epoch,step,train_loss\n0,1,0.5\n")  # as Lightning's CSVLogger writes
    assert other not in read_runs([runs])
    assert "lightning_logs/version_0/metrics.csv" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no run in"):
        read_runs([runs / "lightning_logs"])


def test_runs_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run in"):
        read_runs([tmp_path])


@pytest.mark.slow
def test_a_sweep_ends_with_a_comparison(tmp_path: Path, command: Command) -> None:
    quick = (
        "score=[max_softmax,gradnorm]",
        "logger=none",
        "report=false",
        "resamples=0",
        "model.epochs=1",
        "model.width=2",
    )
    done = command("-m", "seed=0,1", *quick)
    assert done.returncode == 0, done.stderr
    assert "mean ± standard deviation over 2 runs" in done.stdout
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    assert (sweep / "comparison.csv").is_file() and (sweep / "1" / "metrics.csv").is_file()
