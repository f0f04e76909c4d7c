"""Digits and image folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_gradmetrics.cli.data import digits, image_folders


def write_image(path: Path, size: tuple[int, int], seed: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8), mode=None).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for seed, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.jpg"]):
        write_image(tmp_path / "inside" / name, (8, 8), seed)
    write_image(tmp_path / "outside" / "a.png", (16, 10), 7, "L")
    (tmp_path / "outside" / "notes.txt").write_text("not an image")
    return tmp_path


def test_digits_are_split_by_class_and_never_overlap() -> None:
    data = digits(train=100)
    train_x, train_y = data.train.tensors
    inside_x, inside_y = data.sets["digits"].tensors
    assert len(train_y) == 100 and set(train_y.tolist()) == set(inside_y.tolist()) == set(range(8))
    seen = {x.numpy().tobytes() for x in train_x}
    assert not seen & {x.numpy().tobytes() for x in inside_x}
    fit_x, fit_y = data.fit["digits_fit"].tensors
    held_out = {x.numpy().tobytes() for x in fit_x}
    assert len(fit_y) == 250 and len(held_out) == 250
    assert not held_out & (seen | {x.numpy().tobytes() for x in inside_x})
    loaders, roles = data.fit_loaders(64)
    assert roles == {"digits_fit": "id", "photos_fit": "far"} and len(loaders["photos_fit"].dataset) == 80
    assert (data.sets["digits_8_9"].tensors[1] == -1).all()
    photos = data.sets["photos"].tensors[0]
    assert photos.shape == (400, 1, 8, 8) and photos.min() >= 0 and photos.max() <= 1 and photos.std() > 0.05
    assert list(data.roles.values()) == ["id", "near", "far"]


def test_digits_are_the_same_for_the_same_seed() -> None:
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    for name in first.sets:
        assert torch.equal(first.sets[name].tensors[0], again.sets[name].tensors[0])
    assert not torch.equal(first.sets["digits"].tensors[0], other.sets["digits"].tensors[0])


@pytest.mark.parametrize("train", [0, -1, 10_000])
def test_digits_with_an_impossible_split(train: int) -> None:
    with pytest.raises(ValueError, match=f"train is {train} and fit is 250; train must be at least 1"):
        digits(train=train)


def test_image_folders(folders: Path) -> None:
    data = image_folders(
        id={"pets": str(folders / "inside")}, far=str(folders / "outside"), size=8, mean=[0, 0, 0], std=[1, 1, 1]
    )
    assert data.classes == ("cat", "dog") and dict(data.roles) == {"pets": "id", "outside": "far"}
    assert [label for _, label in data.sets["pets"]] == [0, 0, 1]
    image, label = data.sets["outside"][0]
    assert label == -1 and image.shape == (3, 8, 8) and torch.equal(image[0], image[1])
    pixels = torch.from_numpy(np.array(Image.open(folders / "inside/cat/1.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(data.sets["pets"][0][0], pixels)


def test_normalisation_and_centre(folders: Path) -> None:
    data = image_folders(
        id=str(folders / "inside"), far=str(folders / "outside"), size=6, resize=10, mean=[0.5] * 3, std=[0.25] * 3
    )
    raw = torch.from_numpy(np.array(Image.open(folders / "outside/a.png")))
    torch.testing.assert_close(data.sets["outside"][0][0][0], (raw[2:8, 5:11] / 255 - 0.5) / 0.25)


def test_classes_in_the_models_order(folders: Path) -> None:
    data = image_folders(id=str(folders / "inside"), size=8, classes=["dog", "cat"])
    assert [label for _, label in data.sets["inside"]] == [1, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": "missing"}, "no folder"),
        ({"id": "outside"}, "no class folders"),
        ({"id": "inside", "far": "empty"}, "no image below"),
        ({"id": "inside", "classes": ["cat"]}, "is not in a class folder; the classes are: cat"),
        ({"id": "inside", "far": "inside"}, "two datasets are called 'inside'"),
        ({"id": "inside", "interpolation": "cubist"}, "unknown interpolation 'cubist'; did you mean 'bicubic'"),
    ],
)
def test_bad_folders(folders: Path, options: dict, message: str) -> None:
    (folders / "empty").mkdir()
    paths = {key: str(folders / value) if key in ("id", "far") else value for key, value in options.items()}
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        image_folders(size=8, **paths)


def test_data_to_fit_scores_on(folders: Path) -> None:
    """Separate folders, or the training data, or an error that names both."""
    options = {"id": {"pets": str(folders / "inside")}, "size": 8}
    with pytest.raises(ValueError, match=r"no data to fit scores on \(gradorth\).*data.fit=PATH"):
        image_folders(**options).fit_loaders(4, scores=["gradorth"])
    loaders, roles = image_folders(**options, train=str(folders / "inside")).fit_loaders(4)
    assert list(loaders) == ["train"] and roles == {"train": "id"}
    outside = {"others": str(folders / "outside")}
    loaders, roles = image_folders(**options, fit={"more": str(folders / "inside")}, fit_ood=outside).fit_loaders(4)
    assert roles == {"more": "id", "others": "ood"}
    assert [label for _, labels in loaders["more"] for label in labels] == [0, 0, 1]
    assert [int(label) for _, labels in loaders["others"] for label in labels] == [-1]
