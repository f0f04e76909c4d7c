"""Resumes an interrupted run: finds the samples that are not committed, and makes dataloaders of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradmetrics.results.identity import UNKNOWN_ORDER, describe_loader
from lightning_gradmetrics.results.parts import PART, RUN, ResumeError, difference
from lightning_gradmetrics.results.reading import CommittedRows, committed_rows, has_images
from lightning_gradmetrics.results.sample_index import batch_sampler_of, sampler_of
from lightning_gradmetrics.results.unfinished import RestOfStream, unfinished_batches, unfinished_list

__all__ = ["check_images", "check_new", "check_resumable", "check_stream", "committed_mask", "unfinished"]

NO_IMAGES = (
    "The run of a segmentation model cannot be resumed: the pixels of the committed images are not stored, so the metrics of "
    "pixels would leave them out. Score all images again in another directory, or without output=; "
    "read_results(directory, incomplete=True) reads the committed rows"
)


def unfinished(dataloader: Any, directory: str | Path, dataset: str | None = None) -> Any:
    """Return a dataloader of the samples that an interrupted run did not store.

    The remaining batches equal those of an uninterrupted run, so all scores are the same to the last bit. Pass the
    loader to a trainer whose callback is ``GradientMetrics(..., output=directory, resume=True)``.

    Args:
        dataloader: The dataloader of the interrupted run; or a list or a mapping of all its dataloaders.
        directory: The results directory (``output=``). If it is missing or empty, the dataloader is returned unchanged,
            so that the same script can start and resume a run.
        dataset: The dataset's name, if ``dataloader`` is one of several.

    Returns:
        A dataloader, list or mapping, like ``dataloader``. If no sample is left, it has one batch, which the callback
        does not score again.

    Raises:
        ResumeError: If the directory contains results of another dataset or order, or the order is unknown; the message
            names the difference.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=2)
        >>> unfinished(loader, tempfile.mkdtemp()) is loader
        True
    """
    directory = Path(directory)
    parts = sorted(directory.glob(PART))
    if not parts:
        return dataloader
    stored = json.loads((pq.read_schema(parts[0]).metadata or {}).get(RUN, b"{}")).get("datasets", {})
    committed = committed_rows(directory)

    def rest(loader: Any, name: str | None) -> Any:
        return _rest(loader, _name_of(name, stored, directory), stored, committed, directory)

    if isinstance(dataloader, Mapping):
        return {name: rest(loader, name) for name, loader in dataloader.items()}
    if isinstance(dataloader, (list, tuple)):
        if len(dataloader) != len(stored):
            raise ResumeError(f"{directory} has {len(stored)} datasets, but there are {len(dataloader)} dataloaders")
        return [rest(loader, name) for loader, name in zip(dataloader, stored, strict=True)]
    return rest(dataloader, dataset)


def _name_of(name: str | None, stored: Mapping[str, Any], directory: Path) -> str:
    if name in stored:
        return str(name)
    if name is None and len(stored) == 1:
        return next(iter(stored))
    names = ", ".join(map(repr, stored)) or "none"
    wanted = "there are several datasets: pass dataset=" if name is None else f"no dataset {name!r}"
    raise ResumeError(f"{directory}: {wanted}; it has the datasets {names}")


def _rest(
    loader: Any, name: str, stored: Mapping[str, Any], committed: CommittedRows, directory: Path
) -> DataLoader[Any]:
    described = describe_loader(loader)
    change = difference(f"datasets.{name}", stored[name], described)
    if change is not None:
        raise ResumeError(f"cannot resume {directory}: {change}. Pass the dataloader of the interrupted run")
    done = committed.unknown.get(name, 0)
    if isinstance(loader.dataset, IterableDataset):
        check_stream(loader, name, done)
        return _replaced(loader, dataset=RestOfStream(loader.dataset, done))
    check_resumable(name, described, done)
    batches, sampler = batch_sampler_of(loader), sampler_of(loader)
    mask = committed_mask(name, committed, len(loader.dataset))
    if batches is None:
        raise ResumeError(
            f"the dataloader of {name!r} has batch_size=None; a run resumes batch by batch: give it a size"
        )
    if isinstance(batches, (list, tuple)):
        return _replaced(loader, batch_sampler=unfinished_list(batches, mask))
    left = unfinished_batches(sampler, batches.batch_size, batches.drop_last, mask)
    return _replaced(loader, batch_sampler=left, batch_size=None, drop_last=False)


def _replaced(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """Return a copy of a loader with changed attributes, which PyTorch only allows in the constructor."""
    changed = copy.copy(loader)
    vars(changed).update(attributes, _iterator=None)
    return changed


def check_resumable(name: str, described: Mapping[str, Any], unknown: int) -> None:
    """Refuse a dataset whose remaining samples are unknown.

    Args:
        name: The dataset's name.
        described: The result of :func:`describe_loader`.
        unknown: The number of its committed rows that have no index.

    Raises:
        ResumeError: If its order is unknown, or committed rows have no index.
    """
    if described["order"] == UNKNOWN_ORDER:
        raise ResumeError(
            f"cannot resume the dataset {name!r}: the order of its dataloader is random in each run (shuffle=True or a "
            "custom sampler). Use shuffle=False, or score it again in another directory"
        )
    if unknown:
        raise ResumeError(
            f"cannot resume the dataset {name!r}: {unknown} of its committed rows have no index, so the samples that are "
            "left are unknown; score it again in another directory"
        )


def check_images(directory: Path) -> None:
    """Refuse a directory with rows of images of a segmentation model.

    Args:
        directory: A results directory.

    Raises:
        ResumeError: If it has such rows.
    """
    if has_images(directory):
        raise ResumeError(f"cannot resume {directory}. {NO_IMAGES}")


def check_new(directory: Path) -> None:
    """Refuse a directory with rows of images of a segmentation model for a new run.

    Args:
        directory: A results directory.

    Raises:
        FileExistsError: If it has such rows, which the run would not complete.
    """
    if has_images(directory):
        raise FileExistsError(
            f"{directory} already contains results of a segmentation model, and such a run cannot be resumed: choose another "
            "directory, or delete this one"
        )


def check_stream(loader: DataLoader[Any], name: str, rows: int, is_skipped: bool = False) -> None:
    """Refuse an iterable dataset that cannot skip its first rows.

    Args:
        loader: A dataloader of an iterable dataset, or of its rows after the first ones.
        name: The dataset's name.
        rows: The number of committed rows.
        is_skipped: Whether the dataloader is expected to have skipped them already.

    Raises:
        ResumeError: If the dataset has no method ``skip(rows)``, or several worker processes read it.
    """
    dataset = loader.dataset
    if isinstance(dataset, RestOfStream):
        if dataset.rows != rows:
            raise ResumeError(f"{rows} rows of {name!r} are committed, but its dataloader skips {dataset.rows}")
        return
    kind = type(dataset).__name__
    if is_skipped and callable(getattr(dataset, "skip", None)):
        raise ResumeError(
            f"{rows} rows of the dataset {name!r} are committed, but its dataloader starts at the first row: pass "
            "lightning_gradmetrics.unfinished(dataloader, directory) to the trainer"
        )
    if not callable(getattr(dataset, "skip", None)):
        raise ResumeError(
            f"cannot resume the dataset {name!r}: {kind} is iterable and cannot skip the {rows} rows that are committed. Give "
            "it a method skip(rows) that returns the dataset without its first rows, or score it again in another directory"
        )
    if loader.num_workers > 1:
        raise ResumeError(
            f"cannot resume the dataset {name!r}: {loader.num_workers} worker processes read the {kind}, so the order of its rows "
            "is uncertain; use num_workers=0 or 1"
        )


def committed_mask(name: str, committed: CommittedRows, rows: int) -> np.ndarray[Any, Any]:
    """Return which rows ``(N,)``, bool, of a dataset are committed.

    Args:
        name: The dataset's name.
        committed: The result of :func:`committed_rows`.
        rows: The number of rows N of the dataset.

    Raises:
        ResumeError: If a committed index is not a row of the dataset.
    """
    indices = committed.indices.get(name, np.array([], dtype=np.int64))
    if len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < rows:
        raise ResumeError(
            f"cannot resume the dataset {name!r}: it has {rows} rows, and indices from {indices[0]} to {indices[-1]} are "
            "committed; score it again in another directory"
        )
    mask = np.zeros(rows, dtype=bool)
    mask[indices] = True
    return mask
