"""Image folders: one subfolder per class for in-distribution data, any folder of images for out-of-distribution data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.groups import check_names, named, open_groups, role_groups
from lightning_gradmetrics.cli.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["ImageFolder", "image_folders"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images below a folder, in the order of their paths, as tensors and their class.

    Args:
        folder: The folder. With ``classes``, an image's class is the name of the first subfolder on its path.
        classes: The names of the classes in the order of their labels; ``None`` sets every label to -1, unknown.
        transform: Turns an image into a tensor.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no image.
        ValueError: If an image is not in a class folder.
    """

    def __init__(
        self, folder: str | Path, classes: Sequence[str] | None, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}: give the path of a folder of images")
        self.files = sorted(filter(_is_image, self.folder.rglob("*")))
        if not self.files:
            raise FileNotFoundError(
                f"no image below {str(folder)!r}; allowed: files ending in {', '.join(sorted(SUFFIXES))}"
            )
        self.labels = [-1] * len(self.files)
        if classes is not None:
            self.labels = [self._label(path, classes) for path in self.files]
        self.transform = transform

    def _label(self, path: Path, classes: Sequence[str]) -> int:
        name = path.relative_to(self.folder).parts[0]
        if name not in classes:
            raise ValueError(f"{str(path)!r} is not in a class folder; the classes are: {', '.join(classes)}")
        return list(classes).index(name)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as file:
            return self.transform(file), self.labels[index]


def image_folders(
    id: str | Mapping[str, str],
    size: int,
    near: str | Mapping[str, str] | None = None,
    far: str | Mapping[str, str] | None = None,
    other: Mapping[str, Mapping[str, str]] | None = None,
    train: str | None = None,
    fit: str | Mapping[str, str] | None = None,
    fit_ood: str | Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    resize: int | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> EvaluationData:
    """Return image folders with roles.

    Args:
        id: The in-distribution folder, with one subfolder per class: a path, or ``{name: path}``.
        size: Width and height of the model's input.
        near: Near out-of-distribution folders: a path, or ``{name: path}``.
        far: Far out-of-distribution folders, in the same form.
        other: Further out-of-distribution groups, ``{group: {name: path}}``.
        train: A folder of training data, with one subfolder per class. Fitted scores use it if there is no ``fit``.
        fit: Folders to fit scores on, with one subfolder per class, which are neither trained on nor scored.
        fit_ood: Folders of out-of-distribution images, for detectors that are fitted on both kinds.
        classes: Names of the class folders in the order of the model's classes; ``None`` sorts them alphabetically.
        resize: The length of the shorter side before the crop; ``None`` uses ``size``.
        interpolation: One of Pillow's filters: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
        mean: Subtracted from each RGB channel, which is in [0, 1].
        std: Each channel is divided by it.

    Raises:
        FileNotFoundError: If a folder does not exist or contains no image.
        ValueError: If two folders have the same name.
    """
    groups = role_groups(id, near, far, other)
    fit_groups = {"id": named(fit), "ood": named(fit_ood)}
    check_names([*groups.values(), *fit_groups.values()])
    known = tuple(classes or _class_names(next(iter(groups["id"].values()))))
    transform = ImageTransform(size, resize, interpolation, mean, std)

    def open_folder(path: str, in_distribution: bool) -> ImageFolder:
        return ImageFolder(path, known if in_distribution else None, transform)

    sets, roles = open_groups(groups, open_folder)
    fit_sets, fit_roles = open_groups(fit_groups, open_folder)
    descriptions = {}
    for name, folder in sets.items():
        descriptions[name] = "/".join(folder.folder.parts[-2:])
    training = open_folder(train, True) if train else None
    return EvaluationData(sets, roles, known, training, descriptions, fit_sets, fit_roles)


def _class_names(folder: str) -> list[str]:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {folder!r}: give the path of a folder with one subfolder per class")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not names:
        raise FileNotFoundError(
            f"no class folders below {folder!r}: in-distribution images need one subfolder per class"
        )
    return names
