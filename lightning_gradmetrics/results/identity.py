"""Describes the weights, the data and their order, to compare two runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from lightning_gradmetrics.results.sample_index import known_order, sampler_of
from lightning_gradmetrics.results.unfinished import RestOfStream

__all__ = [
    "IN_ORDER",
    "UNKNOWN_ORDER",
    "batch_size_of",
    "describe_loader",
    "expected_rows",
    "tensors_hash",
    "weights_hash",
]

UNKNOWN_ORDER = "unknown"
IN_ORDER = "in order"
ROWS_READ = 1000
"""Number of rows at each end of an array that its hash includes."""


def weights_hash(model: nn.Module) -> str:
    """Return a hash of every bit of a model's parameters and buffers.

    Args:
        model: The model.
    """
    return tensors_hash([*model.named_parameters(), *model.named_buffers()])


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of every bit of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> bytes:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    dense = local.to_dense() if local.layout != torch.strided else local
    plain = dense.int_repr() if dense.is_quantized else dense
    return plain.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def describe_loader(loader: Any) -> dict[str, Any]:
    """Return the facts that must be equal in a resumed run: the dataset's type, number of rows and content, and the order.

    Args:
        loader: A dataloader. The content is known for datasets in memory and for lists of files; otherwise it is
            ``None``.
    """
    dataset = getattr(loader, "dataset", loader)
    if isinstance(dataset, RestOfStream):
        dataset = dataset.whole
    is_stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
    rows = None if is_stream or not isinstance(loader, DataLoader) else len(dataset)
    order = "of the stream" if is_stream else _order(loader)
    return {"kind": type(dataset).__qualname__, "rows": rows, "order": order, "content": _content(dataset)}


def batch_size_of(loader: Any) -> int | None:
    """Return the number of rows of a loader's batches, or ``None`` if unknown."""
    size = getattr(loader, "batch_size", None)
    batches = getattr(loader, "batch_sampler", None)
    return size if isinstance(size, int) else getattr(batches, "batch_size", None)


def expected_rows(loader: Any) -> int | None:
    """Return the number of rows of one pass over a dataloader, if the pass returns each row of the dataset once."""
    described = describe_loader(loader)
    dropping = (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    drops = any(getattr(owner, "drop_last", False) for owner in dropping)
    return None if drops or described["order"] != IN_ORDER else described["rows"]


def _order(loader: DataLoader[Any]) -> str:
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler):
        if known_order(loader) is None:
            return UNKNOWN_ORDER
        return f"shuffled with seed {sampler.seed}, epoch {sampler.epoch}" if sampler.shuffle else IN_ORDER
    order = known_order(loader)
    if order is None:
        return UNKNOWN_ORDER
    is_plain = isinstance(order, range) or np.array_equal(order, np.arange(len(order)))
    return IN_ORDER if is_plain else _hash([np.asarray(order).tobytes()])


def _content(dataset: Any) -> str | None:
    """Return a hash of a dataset's content in memory; ``None`` for an unknown type of dataset."""
    if isinstance(dataset, Subset):
        inner = _content(dataset.dataset)
        return None if inner is None else _hash([inner, _value(dataset.indices)])
    if isinstance(dataset, ConcatDataset):
        return _hash(map(str, map(_content, dataset.datasets)))
    if isinstance(dataset, TensorDataset):
        return _hash(map(_value, dataset.tensors))
    if isinstance(getattr(dataset, "_fingerprint", None), str):  # of the library datasets
        return str(dataset._fingerprint)
    values = []
    for name in ("data", "samples", "targets", "labels"):  # of torchvision's datasets
        value = getattr(dataset, name, None)
        if isinstance(value, (Tensor, np.ndarray, list)):
            values.append(_value(value))
    return _hash(values) if values else None


def _value(values: Any) -> bytes:
    """Return the first and the last rows of a tensor, an array or a list, as bytes."""
    ends = (values[:ROWS_READ], values[-ROWS_READ:])
    if isinstance(values, Tensor):
        return b"".join(map(_bytes_of, ends))
    if isinstance(values, np.ndarray) and values.dtype != object:
        return b"".join(end.tobytes() for end in ends)
    return repr((len(values), ends)).encode()


def _hash(values: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() if isinstance(value, str) else value)
    return digest.hexdigest()[:16]
