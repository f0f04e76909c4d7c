"""Datasets of Hugging Face by name or folder: images, or texts with a tokeniser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gradmetrics.cli.data.groups import check_names, open_groups, role_groups
from lightning_gradmetrics.cli.data.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["HuggingFaceRows", "huggingface_data"]

Member = str | Mapping[str, Any]
Members = str | Mapping[str, Member] | None
Encode = Callable[[Mapping[str, Any]], Any]


class HuggingFaceRows(Dataset[Any]):
    """Rows of a Hugging Face dataset as the model's inputs and a label.

    Args:
        dataset: A map-style dataset with named columns.
        encode: A function from a row to the model's inputs: a tensor, or a mapping of tensors.
        label: The column of labels; ``None`` sets every label to -1, unknown.
    """

    def __init__(self, dataset: Any, encode: Encode, label: str | None) -> None:
        self.dataset, self.encode, self.label = dataset, encode, label

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        row = self.dataset[index]
        label = -1 if self.label is None else int(row[self.label])
        inputs = self.encode(row)
        return {**inputs, "labels": label} if isinstance(inputs, Mapping) else (inputs, label)


def huggingface_data(
    id: Member | Mapping[str, Member],
    near: Members = None,
    far: Members = None,
    other: Mapping[str, Members] | None = None,
    fit: Members = None,
    split: str = "test",
    label: str = "label",
    image: str = "image",
    size: int | None = None,
    resize: int | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    text: str | None = None,
    tokenizer: str | None = None,
    max_length: int = 128,
) -> EvaluationData:
    """Return datasets of Hugging Face with roles.

    Args:
        id: The in-distribution data: a name on the hub such as ``cifar10``, a folder written by ``save_to_disk``, or
            ``{name: member}``. A member with arguments is a mapping, ``{name: {path: glue, name: sst2, split:
            validation}}``, whose other keys are passed to ``load_dataset``.
        near: Near out-of-distribution data, in the same form.
        far: Far out-of-distribution data, in the same form.
        other: Further groups, ``{group: members}``.
        fit: Data that scores are fitted on, in the same form.
        split: The split of members that do not name one.
        label: The column of labels.
        image: The column of images.
        size: Width and height of the model's input; images need it.
        resize: The length of the shorter side before the crop; ``None`` uses ``size``.
        interpolation: One of Pillow's filters.
        mean: Subtracted from each RGB channel, which is in [0, 1].
        std: Each channel is divided by it.
        text: The column of texts; ``None`` for images.
        tokenizer: The tokeniser of texts: a name on the hub, or a folder.
        max_length: The number of tokens to which texts are truncated or padded.

    Raises:
        ImportError: If the package ``datasets`` is not installed, or ``transformers`` for texts.
        ValueError: If a column, a split or an argument is missing, or a name appears twice.
    """
    groups = role_groups(id, near, far, other)
    fits = role_groups(fit, None, None, None)
    check_names([*groups.values(), *fits.values()])
    if text is None:
        encode = _image_encoder(image, size, resize, interpolation, mean, std)
    else:
        encode = _text_encoder(text, tokenizer, max_length)
    column = image if text is None else text

    def open_member(member: Member, in_distribution: bool) -> HuggingFaceRows:
        dataset = _open(member, split)
        wanted = [column, label] if in_distribution else [column]
        for name in wanted:
            if name not in dataset.column_names:
                raise ValueError(f"{member!r} has no column {name!r}; it has {', '.join(dataset.column_names)}")
        return HuggingFaceRows(dataset, encode, label if in_distribution else None)

    sets, roles = open_groups(groups, open_member)
    fit_sets, _ = open_groups(fits, open_member)
    first = sets[next(iter(groups["id"]))].dataset
    classes = tuple(getattr(first.features[label], "names", ()))
    return EvaluationData(sets, roles, classes, fit=fit_sets)


def _image_encoder(
    column: str,
    size: int | None,
    resize: int | None,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Encode:
    if size is None:
        raise ValueError("data.size is missing: the width and height of the model's input, as in data.size=224")
    transform = ImageTransform(size, resize, interpolation, mean, std)

    def encode(row: Mapping[str, Any]) -> Tensor:
        return transform(row[column])

    return encode


def _text_encoder(column: str, tokenizer: str | None, max_length: int) -> Encode:
    if tokenizer is None:
        raise ValueError(
            "data.tokenizer is missing: the name or folder of a tokeniser, as in data.tokenizer=bert-base-uncased"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("texts need the package transformers: pip install transformers") from error
    encoder = AutoTokenizer.from_pretrained(tokenizer)

    def encode(row: Mapping[str, Any]) -> dict[str, Tensor]:
        encoded = encoder(row[column], truncation=True, padding="max_length", max_length=max_length)
        return {name: torch.tensor(values) for name, values in encoded.items()}

    return encode


def _open(member: Member, split: str) -> Any:
    """Return the dataset of a name, of a folder, or of a mapping with the key ``path``."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("data=huggingface needs the package datasets: pip install datasets") from error
    arguments = {"path": member} if isinstance(member, str) else dict(member)
    if "path" not in arguments:
        raise ValueError(f"{member!r} has no key 'path': the name or the folder of a dataset")
    path, chosen = str(arguments.pop("path")), str(arguments.pop("split", split))
    if not (Path(path) / "dataset_info.json").is_file() and not (Path(path) / "dataset_dict.json").is_file():
        return datasets.load_dataset(path, split=chosen, **arguments)
    loaded = datasets.load_from_disk(path)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if chosen not in loaded:
        raise ValueError(f"{path!r} has no split {chosen!r}; it has {', '.join(loaded)}: set data.split")
    return loaded[chosen]
