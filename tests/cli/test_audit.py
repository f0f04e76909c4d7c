"""The listed samples with the largest scores are the ones that are shown."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.cli.audit import planted_statements, top_samples_grid, with_planted
from lightning_gradmetrics.cli.data import digits, training_data
from lightning_gradmetrics.pictures import ExampleGallery, write_pictures
from lightning_gradmetrics.pictures.examples import thumbnails
from lightning_gradmetrics.report import write_report, write_run
from lightning_gradmetrics.report.tables import print_grid
from lightning_gradmetrics.results.table import largest, largest_of_each
from tests.cli.conftest import Command
from tests.models import MODELS, Module, images
from tests.pictures.test_maps import batch


def table(values: list[float], finite: list[bool] | None = None) -> pa.Table:
    n = len(values)
    columns = {"dataset": ["a"] * (n - 2) + ["b"] * 2, "index": [*range(n - 2), 0, 1], "prediction": [0] * n}
    return pa.table({**columns, "label": [1] + [None] * (n - 1), "s": values, "finite": finite or [True] * n})


def test_largest_of_one_dataset_and_of_each() -> None:
    results = table([0.5, 2.0, 3.0, 2.0, 1.0, 9.0])
    assert largest(results, "s", 3, "a")["index"].to_pylist() == [2, 1, 3]
    found = largest(results, "s", 1)
    assert found.to_pylist() == [
        {"dataset": "a", "index": 2, "label": None, "prediction": 0, "s": 3.0},
        {"dataset": "b", "index": 1, "label": None, "prediction": 0, "s": 9.0},
    ]
    assert largest(results, "s").num_rows == 6
    assert largest(results.slice(0, 0), "s").column_names == ["dataset", "index", "label", "prediction", "s"]


def test_rows_that_are_not_finite_are_left_out() -> None:
    results = table([0.5, float("inf"), 3.0, 1.0, float("nan")], [True, False, True, True, False])
    assert largest(results, "s")["s"].to_pylist() == [3.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("t",), "no score 't'; available: s"),
        (("index",), "no score 'index'"),
        (("s", 0), "n is 0"),
        (("s", 2, "c"), "no dataset 'c'; available: a, b"),
    ],
)
def test_mistakes_are_explained(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        largest(table([0.0, 1.0, 2.0]), *arguments)


def test_the_terminal_table() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_grid(console, top_samples_grid(largest_of_each(table([0.5, 2.0, 3.0, 1.0]), {"s": 1})))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["s", "a", "1", "–", "0", "2"] in lines and ["s", "b", "0", "–", "0", "3"] in lines


@pytest.mark.parametrize("top_k", [{"energi": 3}, {"energy": 0}, {"energy": 2.5}, {"energy": True}])
def test_invalid_examples_are_refused(top_k: dict) -> None:
    with pytest.raises(ValueError, match=r"not one of the run's: energy|whole number of samples of at least 1"):
        lgm.GradientMetrics("energy", top_k=top_k)


SCORES = ["energy", "pseudo_label"]


def run(inputs: dict[str, torch.Tensor], network: torch.nn.Module, batch_size: int = 4, **options):
    torch.manual_seed(2)
    loaders = {n: DataLoader(TensorDataset(x, torch.randint(0, 5, (len(x),))), batch_size) for n, x in inputs.items()}
    callback = lgm.GradientMetrics(SCORES, datasets=list(inputs), top_k={"pseudo_label": 5, "energy": 2}, **options)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], **quiet)
    trainer.predict(Module(network), loaders, return_predictions=False)
    return callback


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_a_run_keeps_pictures_of_the_listed_samples(batch_size: int) -> None:
    """The number of pictures is limited and does not depend on the batches, also with NaN and ties."""
    data = {"inside": images(30), "out side": images(4)}
    data["inside"][3, 0, 0, 0] = float("nan")
    data["inside"][20] = data["inside"][10]
    callback = run(data, MODELS["cnn"][0](), batch_size)
    source = callback.sources[0]
    listed = callback.tables()["largest"]
    assert listed.num_rows == 5 + 4 + 2 + 2
    for (dataset, score), top in source.seen.items():
        wanted = largest(callback.results, score, callback.top_k[score], dataset)
        assert top.index.tolist() == wanted["index"].to_pylist()
        assert top.value.tolist() == wanted[score].to_pylist()
        assert top.prediction.tolist() == wanted["prediction"].to_pylist()
        assert top.label.tolist() == wanted["label"].to_pylist()
        assert torch.equal(torch.stack(top.images), data[dataset][top.index])
    assert set(source.seen) == {(d, s) for d in data for s in SCORES}


@pytest.mark.slow
def test_the_report_shows_them(tmp_path: Path) -> None:
    callback = run({"inside": images(9), "out side": images(4)}, MODELS["cnn"][0]())
    figures = write_pictures(callback.pictures(), tmp_path)
    assert [Path(figure["file"]).stem for figure in figures] == [
        "largest_inside_pseudo_label",
        "largest_inside_energy",
        "largest_out_side_pseudo_label",
        "largest_out_side_energy",
    ]
    write_run(tmp_path, callback.results, callback.evaluation, callback.scorer.scores, model={}, figures=figures)
    page = write_report(tmp_path).read_text()
    assert "Examples with the largest scores</h2>" in page and page.count("<img") == 4


def test_inputs_other_than_images_are_listed_without_pictures() -> None:
    callback = run({"rows": torch.randn(9, 7)}, MODELS["mlp"][0]())
    assert callback.pictures() == [] and callback.tables()["largest"].num_rows == 7


def test_images_of_several_sizes_and_processes() -> None:
    """Two processes keep the same samples as one; small images keep their size, and large ones are shrunk."""
    torch.manual_seed(0)
    whole, parts = ExampleGallery({"s": 4}), [ExampleGallery({"s": 4}) for _ in range(2)]
    for number, size in enumerate([(8, 8), (120, 60), (9, 7), (8, 8)]):
        found = batch(torch.rand(3, 1, *size), {"s": torch.rand(3)})
        found.index.add_(3 * number)
        whole.add(found)
        parts[number % 2].add(found)
    parts[0].join([part.kept() for part in parts])
    one, other = whole.seen["a", "s"], parts[0].seen["a", "s"]
    assert one.index.tolist() == other.index.tolist() and len(one.images) == 4
    assert all(torch.equal(a, b) for a, b in zip(one.images, other.images, strict=True))
    assert parts[0].pictures()[0].figure.axes[0].get_title().startswith(f"#{one.index[0]} ")
    mean = torch.rand(2, 3, 192, 96)
    torch.testing.assert_close(thumbnails(mean), torch.nn.functional.avg_pool2d(mean, 2))


def test_correct_incorrect_and_unknown_labels_differ() -> None:
    gallery = ExampleGallery({"s": 3})
    found = batch(torch.rand(3, 3, 4, 4), {"s": torch.tensor([3.0, 2.0, 1.0])})
    found.label.copy_(torch.tensor([0, 5, -1]))
    gallery.add(found)
    (picture,) = gallery.pictures()
    words = [axes.get_xlabel() for axes in picture.figure.axes]
    assert words == ["label 0", "label 5, predicted 1", "predicted 2"]


def test_planted_labels_are_counted_and_marked() -> None:
    results = table([0.5, 2.0, 3.0, 1.0])
    planted = {"a": frozenset({0, 1})}
    (statement,) = planted_statements(results, ["s"], planted)
    assert statement.startswith("2 of the 2 planted labels in a are among the 2 largest s (2.0 expected")
    marked = with_planted(largest_of_each(results, {"s": 2}), {"a": frozenset({1})})
    flags = {(row["dataset"], row["index"]): row["planted"] for row in marked.to_pylist()}
    assert flags == {("a", 1): True, ("a", 0): False, ("b", 0): False, ("b", 1): False}


def test_training_data_with_planted_labels() -> None:
    """The planted labels have other classes in training and scored data; the images are unchanged."""
    data = digits(train=50)
    audited = training_data(data, mislabelled=9, seed=3)
    assert audited.train is audited.sets["train"] and audited.roles == {"train": "id"}
    labels = [(int(data.train[i][1]), int(audited.train[i][1])) for i in range(50)]
    changed = [i for i, (old, new) in enumerate(labels) if old != new]
    assert len(changed) == 9 and all(0 <= new < 8 for _, new in labels)
    assert audited.descriptions["train"].endswith(", ".join(map(str, changed)))
    assert audited.planted == {"train": frozenset(changed)}
    assert all(torch.equal(data.train[i][0], audited.train[i][0]) for i in range(50))
    assert training_data(data).train is data.train
    with pytest.raises(ValueError, match="mislabelled is 51; expected 0 to 50"):
        training_data(data, 51)
    with pytest.raises(ValueError, match="no training set to audit"):
        training_data(replace(data, train=None))


@pytest.mark.slow
def test_the_audit_finds_planted_labels(tmp_path: Path, command: Command) -> None:
    """Most of the 12 are among the 20 largest GraNd and EL2N scores; they are counted, listed, shown and written."""
    found = command("experiment=audit", "logger=none", "resamples=0")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0].endswith(
        "of the 12 planted labels in train are among the 12 largest el2n (0.4 expected by chance)."
    )
    assert "Samples with the largest scores" in found.stdout
    judged = [line.split()[0] for line in found.stdout.partition("errors: train")[2].splitlines() if line.strip()]
    assert "max_softmax" in judged and not {"grand", "el2n"} & set(judged)
    (run,) = (tmp_path / "outputs").glob("*/*")
    wrong = set(training_data(digits(train=400), 12).train.labels)
    listed = pyarrow.csv.read_csv(run / "largest.csv").to_pylist()
    for score in ("grand", "el2n"):
        shown = {row["index"] for row in listed if row["score"] == score}
        assert len(shown) == 20 and len(shown & wrong) >= 8
        marked = {row["index"] for row in listed if row["score"] == score and row["planted"]}
        assert marked == shown & wrong
    assert "network.12" in (run / "profile.csv").read_text()
    page = (run / "report.html").read_text()
    answer = page[page.index('<ul class="advice">') :]
    assert answer.index("of the 12 planted labels in train") < answer.index("</li>")
    assert "Examples with the largest scores</h2>" in page and "Gradient norms by layer</h2>" in page


def test_a_profile_of_the_labels_needs_labels() -> None:
    with pytest.raises(ValueError, match="the profile needs the true label of every sample"):
        x = TensorDataset(images(4), torch.full((4,), -1))
        callback = lgm.GradientMetrics("energy", profile="label")
        trainer = Trainer(accelerator="cpu", callbacks=[callback], enable_progress_bar=False, logger=False)
        trainer.predict(Module(), DataLoader(x, 4))


@pytest.mark.slow
def test_scores_that_read_labels_have_no_detection_metrics(tmp_path: Path, command: Command) -> None:
    """Without other scores there are no metrics, but the planted labels are still counted."""
    settings = ("model.epochs=1", "model.width=2", "logger=none", "report=false")
    found = command("experiment=audit", "score=[el2n]", "callback.profile=false", "callback.top_k=null", *settings)
    assert found.returncode == 0, found.stderr
    assert "of the 12 planted labels" in found.stdout and "AUROC" not in found.stdout
    (run,) = (tmp_path / "outputs").glob("*/*")
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 and not (run / "table.md").exists()
