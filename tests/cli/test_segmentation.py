"""The command on a segmentation model of the user's own, with images in folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_gradmetrics.cli.data.label_folders import LabelledImages
from lightning_gradmetrics.cli.leaderboard import section
from tests.cli.conftest import Command

MODEL = """
import torch
from torch import nn

def load():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(5):
        pixels, classes = rng.integers(256, size=(12, 16, 3)), rng.integers(3, size=(12, 16))
        classes[0] = 11
        Image.fromarray(pixels.astype("uint8")).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(classes.astype("uint8")).save(tmp_path / "labels" / f"{number}.png")
    (tmp_path / "espnet.py").write_text(MODEL)
    return tmp_path


def test_the_data_are_pairs_in_the_models_channels(root: Path) -> None:
    data = LabelledImages(root / "images", root / "labels", "bgr", 255, rows="even")
    assert len(data) == 3
    pixels, labels = data[1]
    array = np.array(Image.open(root / "images" / "2.png"))
    assert torch.equal(pixels, torch.from_numpy(array[:, :, ::-1].copy()).permute(2, 0, 1).float())
    assert labels.shape == (12, 16) and bool((labels[0] == 11).all())
    (root / "labels" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"3\.png.*has no label map"):
        LabelledImages(root / "images", root / "labels")
    with pytest.raises(ValueError, match=r"unknown rows 'evn'.*even"):
        LabelledImages(root / "images", root / "labels", rows="evn")


@pytest.mark.slow
def test_the_command_prints_the_metrics_of_every_unit(root: Path, command: Command) -> None:
    options = ["segmentation_scores=[max_softmax,pseudo_label]", "pixels.segments=2", "pixels.resamples=20"]
    options.append("leaderboard={title: Mine, notes: [wrong pixels]}")
    printed = command("experiment=camvid", f"root={root}", "pixels.maps=1", *options)
    assert printed.returncode == 0, printed.stderr
    assert "5 images, 880 labelled pixels" in printed.stdout
    for word in ("max_softmax", "pseudo_label", "within class", "Spearman", "segment"):
        assert word in printed.stdout
    assert len(list((root / "maps").glob("*.npz"))) == 1
    record = json.loads((root / "leaderboard.json").read_text())
    (dataset,) = record["datasets"]
    assert record["title"] == "Mine" and dataset["rows"] == 880
    assert [row["score"] for row in record["rows"]] == ["max_softmax", "pseudo_label"]
    for row in record["rows"]:
        assert f"{100 * row['errors'][0]:.3f}" in printed.stdout
    shown = "\n".join(section(record))
    assert "880 pixels of 5 images" in shown and "| score | forwards | fit | errors |" in shown


@pytest.mark.slow
def test_mistakes_are_named_in_one_line(root: Path, command: Command) -> None:
    assert "root is missing" in command("experiment=camvid").stderr
    assert "no images in" in command("experiment=camvid", "root=nowhere").stderr
    assert "a pixel has the label 11" in command("experiment=camvid", f"root={root}", "pixels.ignore_index=255").stderr
