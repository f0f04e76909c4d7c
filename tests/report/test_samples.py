"""Thumbnails, class names and paths of the listed samples, and the figures beside the report."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from lightning_gradmetrics.classifier.batches import split_batch
from lightning_gradmetrics.pictures import sample_paths, write_thumbnails
from lightning_gradmetrics.report import listed_samples, write_report
from tests.report.page_tree import parse, section
from tests.report.report_runs import SETS, make_run

FEW = {"baselines": ("max_softmax", "entropy"), "gradients": ("gradnorm",)}


@pytest.fixture
def run(tmp_path):
    """Return a run with class names, paths and pictures."""
    names = [f"class_{number}" for number in range(8)]
    run = make_run(tmp_path, changes={"model": {"name": "Net", "classes": 8, "class_names": names}}, **FEW)
    table = pq.read_table(run / "results.parquet")
    paths = [f"/home/ada/photos/{row['dataset']}/{row['index']}.png" for row in table.to_pylist()]
    pq.write_table(table.append_column("path", pa.array(paths)), run / "results.parquet")
    images = torch.rand(600, 3, 90, 45)
    sets = {name: TensorDataset(images[:rows], torch.zeros(rows)) for name, _, rows, _ in SETS}
    write_thumbnails(run, sets, listed_samples(run), split_batch)
    return run


def test_listed_samples_are_shown_as_thumbnails_with_class_names_and_paths(run):
    samples = section(parse(write_report(run)), "Samples")
    first = samples.find("figure", class_="gallery")[0]
    entries = first.find("li")
    table = pq.read_table(run / "results.parquet").to_pylist()
    rows = [row for row in table if row["dataset"] == "digits"]
    wanted = sorted(rows, key=lambda row: -row["max_softmax"])[:5]
    assert len(entries) == 5
    for entry, row in zip(entries, wanted, strict=True):
        assert entry.find("img")[0].attributes["src"].startswith("data:image/png;base64,")
        assert f"#{row['index']} " in entry.text and f"class_{row['label']}" in entry.text
        assert f"digits/{row['index']}.png" in entry.text
    assert "/home/ada" not in (run / "report.html").read_text()


def test_thumbnails_are_small_and_listed(run):
    files = json.loads((run / "samples" / "index.json").read_text())
    assert {name: list(map(int, members)) for name, members in files.items()} == listed_samples(run)
    with Image.open(run / files["digits"][next(iter(files["digits"]))]) as picture:
        assert picture.size == (36, 72)
        assert np.array(picture).max() == 255


@pytest.mark.slow
def test_inputs_other_than_images_have_no_thumbnails(tmp_path):
    run = make_run(tmp_path, **FEW)
    sets = {"digits": TensorDataset(torch.rand(500, 7), torch.zeros(500)), "digits_8_9": iter([])}
    files = write_thumbnails(run, sets, listed_samples(run), split_batch)
    assert not any(files.values())
    samples = section(parse(write_report(run)), "Samples")
    assert samples.find("table") and not samples.find("img")


def test_a_dataset_that_fails_is_named(tmp_path):
    run = make_run(tmp_path, **FEW)
    with pytest.warns(UserWarning, match="no thumbnails of 'digits': "):
        write_thumbnails(run, {"digits": TensorDataset(torch.rand(2, 1, 8, 8))}, listed_samples(run), split_batch)


def test_paths_of_a_folder():
    class Folder:
        files = ("a/1.png", "b/2.png")

    assert sample_paths(Folder()) == ["a/1.png", "b/2.png"]
    assert sample_paths(TensorDataset(torch.zeros(3))) is None
