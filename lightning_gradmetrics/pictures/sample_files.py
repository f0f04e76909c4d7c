"""Writes thumbnails of chosen samples, read from their datasets, to a run directory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from lightning_gradmetrics.pictures.base import file_name, images_of
from lightning_gradmetrics.pictures.examples import displayed, thumbnails

__all__ = ["sample_paths", "write_thumbnails"]

FOLDER = "samples"
SIDE = 72
"""Longest side of a thumbnail, in pixels."""


def write_thumbnails(
    directory: Path,
    datasets: Mapping[str, Any],
    indices: Mapping[str, Sequence[int]],
    split_batch: Callable[[Any], tuple[Any, Any]],
) -> dict[str, dict[str, str]]:
    """Write a small PNG file of each chosen sample whose input is an image, and ``samples/index.json``.

    Args:
        directory: The run directory.
        datasets: The datasets by name. A dataset without ``__getitem__`` is skipped; one that fails is skipped with a warning.
        indices: The chosen samples of each dataset.
        split_batch: Returns the inputs and labels of a batch.

    Returns:
        The file of each sample, by dataset and index.
    """
    files: dict[str, dict[str, str]] = {}
    for name, chosen in indices.items():
        dataset = getattr(datasets.get(name), "dataset", datasets.get(name))
        if not hasattr(dataset, "__getitem__"):
            continue
        try:
            files[name] = _write_set(directory, name, dataset, chosen, split_batch)
        except Exception as error:
            warnings.warn(f"no thumbnails of {name!r}: {error}", stacklevel=2)
    path = directory / FOLDER / "index.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(files), encoding="utf-8")
    return files


def _write_set(
    directory: Path,
    name: str,
    dataset: Any,
    chosen: Sequence[int],
    split_batch: Callable[[Any], tuple[Any, Any]],
) -> dict[str, str]:
    from PIL import Image

    files = {}
    for index in chosen:
        if index < 0:
            continue
        images = images_of(split_batch(default_collate([dataset[index]]))[0])
        if images is None:
            return {}
        file = Path(FOLDER) / f"{file_name(name)}_{index}.png"
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(displayed(thumbnails(images, SIDE)[0]))
        scale = max(1, SIDE // max(picture.size))  # browsers blur very small images
        size = (scale * picture.width, scale * picture.height)
        picture.resize(size, Image.Resampling.NEAREST).save(directory / file, optimize=True)
        files[str(index)] = file.as_posix()
    return files


def sample_paths(dataset: Any) -> list[str] | None:
    """Return the path of each sample, for datasets that list their files in ``files``, ``samples`` or ``imgs``.

    Args:
        dataset: A dataset or a dataloader.

    Example:
        >>> from types import SimpleNamespace
        >>> sample_paths(SimpleNamespace(samples=[("cats/1.png", 0), ("dogs/2.png", 1)]))
        ['cats/1.png', 'dogs/2.png']
    """
    dataset = getattr(dataset, "dataset", dataset)
    for name in ("files", "samples", "imgs"):
        entries = getattr(dataset, name, None)
        if isinstance(entries, (list, tuple)) and entries:
            paths = list(map(_path_of, entries))
            if None not in paths:
                return list(map(str, paths))
    return None


def _path_of(entry: Any) -> str | None:
    """Return the path in an entry that is a path or begins with one, otherwise None."""
    first = entry[0] if isinstance(entry, (list, tuple)) else entry
    return str(first) if isinstance(first, (str, Path)) else None
