"""Arrays in ``.npz`` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gradmetrics.cli.data.groups import check_names, named, open_groups, role_groups
from lightning_gradmetrics.cli.data.sets import EvaluationData

__all__ = ["npz_data"]

Files = str | Mapping[str, str] | None


def npz_data(
    id: str | Mapping[str, str],
    near: Files = None,
    far: Files = None,
    other: Mapping[str, Files] | None = None,
    fit: Files = None,
    inputs: str = "inputs",
    labels: str = "labels",
) -> EvaluationData:
    """Return arrays of ``.npz`` files as datasets with roles.

    Args:
        id: The in-distribution file: a path, or ``{name: path}``.
        near: Near out-of-distribution files, in the same form.
        far: Far out-of-distribution files, in the same form.
        other: Further groups, ``{group: files}``.
        fit: Files to fit scores on, in-distribution.
        inputs: The name of the array of inputs ``(N, ...)``: floats, or whole numbers for a model with an embedding.
        labels: The name of the array of labels ``(N,)``. A file without it, or of out-of-distribution data, has none.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If an array is missing, has a different length, or contains bytes.
    """
    groups = role_groups(id, near, far, other)
    fits = named(fit)
    check_names([*groups.values(), fits])

    def open_file(path: str, in_distribution: bool) -> TensorDataset:
        return _open(path, inputs, labels if in_distribution else None)

    sets, roles = open_groups(groups, open_file)
    fit_sets, _ = open_groups({"id": fits}, open_file)
    return EvaluationData(sets, roles, fit=fit_sets)


def _open(path: str, inputs: str, labels: str | None) -> TensorDataset:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {path!r}: give the path of a file written with numpy.savez")
    with np.load(file, allow_pickle=False) as arrays:
        if inputs not in arrays:
            raise ValueError(f"{path!r} has no array {inputs!r}; it has {', '.join(arrays)}: set data.inputs")
        values = _input_tensor(arrays[inputs], path)
        known = arrays[labels] if labels is not None and labels in arrays else np.full(len(values), -1)
    if known.shape != (len(values),):
        raise ValueError(
            f"{path!r} has {len(values)} inputs and labels of shape {known.shape}; expected ({len(values)},)"
        )
    return TensorDataset(values, torch.from_numpy(known.astype(np.int64)))


def _input_tensor(array: NDArray[np.generic], path: str) -> Tensor:
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        return torch.from_numpy(array.astype(np.int64))
    raise ValueError(
        f"the inputs in {path!r} are {array.dtype}; save values that the model accepts: floats, as in x.astype('float32') / 255, or "
        "whole numbers of 16 bits or more"
    )
