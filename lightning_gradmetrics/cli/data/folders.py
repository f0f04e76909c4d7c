"""Image folders: a folder a class for in-distribution data, any folder of images for out-of-distribution data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["ImageFolder", "image_folders"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images below a folder, in the order of their paths, as ``(3, size, size)`` and their class.

    Args:
        folder: The folder. With ``classes``, an image's class is the name of the folder just below it.
        classes: The names of the classes in the order of their labels, or ``None``: every label is then -1, unknown.
        size: Width and height: the shorter side is resized to ``resize`` (or ``size``) and the centre is cut out.
        resize: The shorter side before the centre is cut out; ``None`` takes ``size``.
        interpolation: How it is resized: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, as Pillow has them.
        mean: Subtracted a channel, of RGB in [0, 1].
        std: Divided by a channel.

    Raises:
        FileNotFoundError: If there is no such folder or no image in it.
        ValueError: If an image lies in no class folder.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str] | None,
        size: int,
        resize: int | None = None,
        interpolation: str = "bicubic",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}: give the path of a folder of images")
        self.files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise FileNotFoundError(
                f"no image below {str(folder)!r}; allowed: files ending in {', '.join(sorted(SUFFIXES))}"
            )
        self.labels = [-1 if classes is None else self._label(path, classes) for path in self.files]
        self.size, self.resize = size, resize or size
        self.interpolation = _resampling(interpolation)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def _label(self, path: Path, classes: Sequence[str]) -> int:
        name = path.relative_to(self.folder).parts[0]
        if name not in classes:
            raise ValueError(f"{str(path)!r} lies in no class folder; the classes are: {', '.join(classes)}")
        return list(classes).index(name)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as file:
            image = _fit(file.convert("RGB"), self.resize, self.size, self.interpolation)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std, self.labels[index]


def _resampling(name: str) -> Image.Resampling:
    known = {filter.name.lower(): filter for filter in Image.Resampling}
    if name.lower() not in known:
        raise ValueError(f"unknown interpolation {name!r}; allowed: {', '.join(known)}")
    return known[name.lower()]


def _fit(image: Image.Image, resize: int, size: int, interpolation: Image.Resampling) -> Image.Image:
    """Resize the shorter side to ``resize`` and cut out the centre, ``size`` wide and high."""
    width, height = image.size
    if min(width, height) != resize:
        scale = resize / min(width, height)
        image = image.resize((max(resize, round(width * scale)), max(resize, round(height * scale))), interpolation)
        width, height = image.size
    left, top = (width - size) // 2, (height - size) // 2
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def image_folders(
    id: str | Mapping[str, str],
    size: int,
    near: str | Mapping[str, str] | None = None,
    far: str | Mapping[str, str] | None = None,
    other: Mapping[str, Mapping[str, str]] | None = None,
    train: str | None = None,
    fit: str | Mapping[str, str] | None = None,
    fit_outside: str | Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    resize: int | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> EvaluationData:
    """Image folders with roles.

    Args:
        id: The in-distribution folder, with a folder a class below it: a path, or ``{name: path}``.
        size: Width and height of the model's input.
        near: Near out-of-distribution folders: a path, or ``{name: path}``.
        far: Far out-of-distribution folders, likewise.
        other: Further groups of them, ``{group: {name: path}}``.
        train: A folder of training data, with a folder a class below it; fitted scores fall back on it.
        fit: Folders to fit scores on, with a folder a class below them: neither trained on nor scored.
        fit_outside: Folders of out-of-distribution images to train detectors on that need both kinds.
        classes: Names of the class folders in the order of the model's classes; ``None`` takes them in alphabetical
            order.
        resize: The shorter side before the centre is cut out; ``None`` takes ``size``.
        interpolation: How it is resized: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``, as Pillow has them.
        mean: Subtracted a channel, of RGB in [0, 1].
        std: Divided by a channel.

    Raises:
        FileNotFoundError: If a folder does not exist or holds no image.
        ValueError: If a name stands twice.
    """
    groups = {
        "id": _named(id),
        "near": _named(near),
        "far": _named(far),
        **{key: _named(value) for key, value in (other or {}).items()},
    }
    fitted = {"id": _named(fit), "outside": _named(fit_outside)}
    names = [name for group in (*groups.values(), *fitted.values()) for name in group]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise ValueError(
            f"two folders are called {sorted(double)[0]!r}: give each a name of its own, as in near={{name: path}}"
        )
    known = tuple(classes or _class_names(next(iter(groups["id"].values()))))
    options = {"size": size, "resize": resize, "interpolation": interpolation, "mean": mean, "std": std}

    def sets_of(groups: Mapping[str, Mapping[str, str]]) -> dict[str, ImageFolder]:
        return {
            name: ImageFolder(path, known if role == "id" else None, **options)  # type: ignore[arg-type]
            for role, group in groups.items()
            for name, path in group.items()
        }

    return EvaluationData(
        sets=sets_of(groups),
        roles={name: role for role, group in groups.items() for name in group},
        classes=known,
        train=ImageFolder(train, known, **options) if train else None,  # type: ignore[arg-type]
        descriptions={name: str(path) for group in groups.values() for name, path in group.items()},
        fit=sets_of(fitted),
        fit_roles={name: role for role, group in fitted.items() for name in group},
    )


def _named(folders: str | Mapping[str, str] | None) -> dict[str, str]:
    """``{name: path}``; a single path is called by its last part."""
    if folders is None:
        return {}
    return dict(folders) if isinstance(folders, Mapping) else {Path(folders).name: str(folders)}


def _class_names(folder: str) -> list[str]:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {folder!r}: give the path of a folder with one folder a class")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not names:
        raise FileNotFoundError(f"no class folders below {folder!r}: in-distribution images lie in one folder a class")
    return names
