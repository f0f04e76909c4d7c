"""Datasets of torchvision by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.groups import check_names, open_groups, role_groups
from lightning_gradmetrics.cli.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.errors import unknown_name

__all__ = ["LabelledImages", "torchvision_data"]

Member = str | Mapping[str, Any]
Members = str | Mapping[str, Member] | None


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """A dataset of images and labels, with the images as tensors.

    Args:
        dataset: Returns ``(image, label)``.
        transform: Turns an image into a tensor.
        labelled: Whether the labels are classes of the model; otherwise every label is -1 (unknown).
    """

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Image.Image], Tensor], labelled: bool) -> None:
        self.dataset, self.transform, self.labelled = dataset, transform, labelled

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), int(label) if self.labelled else -1


def torchvision_data(
    id: str | Mapping[str, Member],
    size: int,
    near: Members = None,
    far: Members = None,
    other: Mapping[str, Members] | None = None,
    root: str = "data",
    download: bool = False,
    fit_on_train: bool = False,
    resize: int | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> EvaluationData:
    """Return the test sets of torchvision's datasets, with roles.

    Args:
        id: The in-distribution data: a name such as ``CIFAR10``, ``{name: CIFAR10}``, or, with arguments of the class,
            ``{name: {dataset: ImageNet, split: val}}``.
        size: Width and height of the model's input.
        near: Near out-of-distribution data, in the same form.
        far: Far out-of-distribution data, in the same form.
        other: Further groups, ``{group: members}``.
        root: The folder of the files.
        download: Whether to download files that are missing.
        fit_on_train: Whether fitted scores are fitted on the training set of ``id``.
        resize: The length of the shorter side before the crop; ``None`` uses ``size``.
        interpolation: One of Pillow's filters.
        mean: Subtracted from each RGB channel, which is in [0, 1].
        std: Each channel is divided by it.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If a name is unknown, or appears twice.
    """
    transform = ImageTransform(size, resize, interpolation, mean, std)
    groups = role_groups(id, near, far, other)
    check_names(groups.values())

    def open_member(member: Member, in_distribution: bool, train: bool = False) -> LabelledImages:
        return LabelledImages(_open(member, root, download, train), transform, in_distribution)

    sets, roles = open_groups(groups, open_member)
    first = next(iter(groups["id"]))
    training = open_member(groups["id"][first], True, train=True) if fit_on_train else None
    classes = tuple(map(str, getattr(sets[first].dataset, "classes", ())))
    return EvaluationData(sets, roles, classes, training)


def _open(member: Member, root: str, download: bool, train: bool) -> Dataset[Any]:
    """Return the dataset of a name with optional arguments; the test split unless ``train`` or an argument says otherwise."""
    arguments = {"dataset": member} if isinstance(member, str) else dict(member)
    kind = _class_of(str(arguments.pop("dataset", "")))
    accepted = inspect.signature(kind).parameters
    defaults = {"root": root, "train": train, "split": "train" if train else "test"}
    chosen: dict[str, Any] = {}
    for key, value in defaults.items():
        if key in accepted:
            chosen[key] = value
    if download and "download" in accepted:
        chosen["download"] = True
    if train:
        arguments.pop("split", None)
    made: Dataset[Any] = kind(**{**chosen, **arguments})
    return made


def _class_of(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError("data=torchvision needs torchvision: pip install 'lightning-gradmetrics[vision]'") from error
    if name not in datasets.__all__:
        raise ValueError(unknown_name("torchvision dataset", name, datasets.__all__))
    return getattr(datasets, name)
