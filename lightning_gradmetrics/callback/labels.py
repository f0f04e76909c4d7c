"""Reads the inputs and labels of each batch before the step that may change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.callback.sample_rows import SampleRows
from lightning_gradmetrics.classifier.batches import (
    REMEDY,
    BatchCopy,
    Converter,
    LabelsNotUnderstoodError,
    batch_inputs,
    shallow_copy,
    split_batch,
)
from lightning_gradmetrics.classifier.forward import Inputs, tensors_in
from lightning_gradmetrics.classifier.labels import class_numbers, described, map_numbers, token_numbers
from lightning_gradmetrics.classifier.notices import first_time
from lightning_gradmetrics.classifier.observation import ModelCall
from lightning_gradmetrics.classifier.row_order import (
    CERTAIN_BITS,
    LIKELY_BITS,
    is_partly_equal,
    order_of_part,
    row_order,
)
from lightning_gradmetrics.pictures.pixels.label_maps import marked_labels
from lightning_gradmetrics.pictures.pixels.settings import Pixels

__all__ = ["BatchReader", "ReadBatch", "SplitBatch"]

SplitBatch = Callable[[Any], tuple[Inputs, Tensor | None]]


@dataclass(frozen=True)
class ReadBatch:
    """The inputs and labels of a batch before the step.

    Args:
        inputs: The inputs, or ``None`` if unknown.
        copied: The batch, copied; ``None`` if the user's ``split_batch`` returned the labels.
        labels: The labels that the user's ``split_batch`` returned.
        size: The length of its first tensor, or ``None``.
        ids: The id of each sample, if the run stores ids.
    """

    inputs: Inputs | None
    copied: BatchCopy | None
    labels: Any
    size: int | None
    ids: Sequence[str] = ()


class BatchReader:
    """Reads each batch before the step, and its labels after the step.

    Args:
        split: The user's ``split_batch``, or the package's.
        warn: Warns once for all processes.
        pixels: Which labels of pixels are ignored.
    """

    def __init__(self, split: SplitBatch, warn: Callable[[str], None], pixels: Pixels | None = None) -> None:
        self.split = split
        self.pixels = pixels or Pixels()
        self.warn = warn
        self._numbers: dict[str, set[int]] = {}  # the labels of each dataset with two classes
        self._bits = 0.0  # evidence, in bits, that the last batches were passed in a different order

    def read(self, batch: Any) -> ReadBatch:
        """Return the batch before the step.

        Raises:
            ValueError: If the user's ``split_batch`` fails, or does not return inputs and labels.
        """
        if self.split is split_batch:
            copied = BatchCopy(batch)
            return ReadBatch(_known_inputs(batch), copied, None, copied.size)
        parts = self._parts(batch)
        if not isinstance(parts, tuple) or len(parts) != 2:
            raise ValueError(
                f"split_batch returned {described(parts)}; expected a pair (inputs, labels or None), as in "
                "split_batch=lambda batch: (batch['image'], batch['class'])"
            )
        inputs, labels = parts
        first = next(tensors_in(inputs), None)
        copied_labels = labels.detach().clone() if isinstance(labels, Tensor) else labels
        return ReadBatch(inputs, None, copied_labels, len(first) if first is not None and first.ndim else None)

    def _parts(self, batch: Any) -> Any:
        """Return what the user's ``split_batch`` returns; an error of it says that it is one."""
        try:
            return self.split(shallow_copy(batch))
        except Exception as problem:
            raise ValueError(
                f"split_batch failed for a batch that is {described(batch)} with {type(problem).__name__}: {problem}. It takes a batch "
                "and returns (inputs, labels or None)"
            ) from problem

    def rows(self, batch: ReadBatch, calls: Sequence[ModelCall], inputs: Inputs | None, size: int) -> SampleRows:
        """Return which rows of the batch the model received, in which order.

        Args:
            batch: The batch before the step.
            calls: The calls of the model.
            inputs: The joined inputs of the calls.
            size: The number of samples ``N`` of the calls.

        Raises:
            ValueError: If the samples are in a different order and their values were changed too.
        """
        if batch.size is not None and size < batch.size:
            tensors = list(tensors_in(batch.inputs)) if batch.copied is None else batch.copied.tensors()
            selected = order_of_part(list(tensors_in(inputs)), tensors)
            if selected is not None and len(selected) == size:
                return SampleRows(batch.size, selected)
        order = self._order(batch, calls, inputs) if size > 1 else None
        return SampleRows(size, order if order is not None and len(order) == size else None)

    def _order(self, batch: ReadBatch, calls: Sequence[ModelCall], inputs: Inputs | None) -> Tensor | None:
        """Return the position in the batch of each sample that the model received; ``None`` if the order is the same."""
        copied = batch.copied
        if copied is None:
            passed, batch_tensors = list(tensors_in(inputs)), list(tensors_in(batch.inputs))
        elif len(calls) == 1 and all(copied.holds([tensor]) for tensor in calls[0].received):
            passed, batch_tensors = copied.changed(calls[0].received, list(tensors_in(calls[0].inputs)))
        else:
            passed, batch_tensors = list(tensors_in(inputs)), copied.tensors()
        detected = row_order(passed, batch_tensors)
        if detected is None:
            return None
        sizes = [len(call.logits) for call in calls if call.logits is not None]
        if len(calls) > 1 and detected.order is None and is_partly_equal(passed, batch_tensors, sizes):
            raise ValueError(
                f"the step calls the model {len(calls)} times: some calls received the rows of the batch in their order, and others "
                "did not, so it is unknown which rows belong to the samples. Call the model once for the batch, or for "
                "consecutive parts of it"
            )
        self._bits = self._bits + detected.bits if detected.bits else 0.0
        if self._bits >= CERTAIN_BITS:
            raise ValueError(
                "the step passes the samples to the model in a different order than the batch, with changed values, so labels and "
                "index would belong to other samples. Keep the order of the batch in the step, or sort the samples in the "
                "collate_fn and pass sample_id="
            )
        if self._bits >= LIKELY_BITS:
            self.warn_once(
                "order",
                "the step probably passes the samples to the model in a different order than the batch, with changed values: labels "
                "and index may belong to other samples. Keep the order of the batch in the step",
            )
        return detected.order

    def labels(
        self, batch: ReadBatch, size: int, classes: int, received: Sequence[Tensor], dataset: str
    ) -> Tensor | None:
        """Return the labels of a batch ``(N,)``; ``None`` if it has none, or, with one warning, if they are ambiguous.

        Args:
            batch: The batch before the step.
            size: The number of samples ``N``.
            classes: The number of classes.
            received: The tensors that the model received.
            dataset: The name of the dataset.

        Raises:
            ValueError: If the user's ``split_batch`` returned labels that are not one class per sample.
        """
        kind = f"one class number per sample, shape ({size},), or None"
        labels = self._converted(batch, size, classes, received, dataset, (class_numbers, kind))
        if labels is not None and batch.copied is not None and first_time(self, ("choice", dataset)):
            other = batch.copied.second_choice(size, classes, received)
            if other is not None:
                self.warn(
                    f"the {other[0]} of the batches of the dataset {dataset!r} could be the labels too; the {other[1]} is used. To "
                    f"use another one {REMEDY}"
                )
        return labels

    def token_labels(self, batch: ReadBatch, size: int, received: Sequence[Tensor], dataset: str) -> Tensor | None:
        """Return the labels of the tokens of a batch ``(N, T)``; ``None`` as for :meth:`labels`.

        Args:
            batch: The batch before the step.
            size: The number of texts ``N``.
            received: The tensors that the model received.
            dataset: The name of the dataset.

        Raises:
            ValueError: If the user's ``split_batch`` returned labels that are not one number per token.
        """
        kind = f"one number per token, shape ({size}, T), or None"
        return self._converted(batch, size, 0, received, dataset, (token_numbers, kind))

    def _converted(
        self,
        batch: ReadBatch,
        size: int,
        classes: int,
        received: Sequence[Tensor],
        dataset: str,
        wanted: tuple[Converter, str],
    ) -> Tensor | None:
        """Return the labels that a converter finds; ``wanted`` holds the converter and a description of its result."""
        read, kind = wanted
        if batch.copied is None:
            labels = None if batch.labels is None else read(batch.labels, size, classes)
            if labels is None and batch.labels is not None:
                raise ValueError(f"split_batch returned labels that are {described(batch.labels)}; expected {kind}")
            return labels
        try:
            return batch.copied.labels(size, classes, received, read)
        except LabelsNotUnderstoodError as problem:
            remedy = f"To use labels {REMEDY}"
            if batch.size not in (size, None):
                remedy = (
                    f"The step passes {size} rows to the model for a batch of {batch.size}, with other values, so it is unknown which "
                    "labels belong to them. Select, repeat or crop samples in the dataset or in its collate_fn"
                )
            self.warn_once(dataset, f"no labels are used for the dataset {dataset!r}: {problem}. {remedy}")
            return None

    def label_maps(
        self, batch: ReadBatch, size: int, classes: int, received: Sequence[Tensor], dataset: str
    ) -> Tensor | None:
        """Return the label maps of a batch ``(N, H, W)``: -100 is ignored, -200 is out-of-distribution; or ``None``.

        Args:
            batch: The batch before the step.
            size: The number of images ``N``.
            classes: The number of classes.
            received: The tensors that the model received.
            dataset: The name of the dataset.

        Raises:
            ValueError: If a label is neither a class nor ignored.
        """
        kind = f"a map of class numbers per image, shape ({size}, H, W)"
        labels = self._converted(batch, size, classes, received, dataset, (map_numbers, kind))
        if labels is None:
            return None
        return marked_labels(labels, classes, self.pixels.ignored, self.pixels.ood_labels)

    def note_numbers(self, labels: Tensor, dataset: str) -> None:
        """Record the label numbers of a batch of two classes.

        Args:
            labels: The labels ``(N,)``.
            dataset: The name of the dataset.
        """
        self._numbers.setdefault(dataset, set()).update(map(int, torch.unique(labels)))

    def warn_of_signs(self) -> None:
        """Warn of datasets whose labels are -1 and 1 only: negative labels are unknown, but these may be two classes."""
        for dataset, numbers in self._numbers.items():
            if numbers == {-1, 1}:
                self.warn_once(
                    f"signs of {dataset}",
                    f"the labels of the dataset {dataset!r} are -1 and 1. A negative label is an unknown one, so only samples of class "
                    f"1 have a label. If -1 is a class, {REMEDY}, with the labels 0 and 1",
                )

    def warn_once(self, key: str, text: str) -> None:
        """Warn once for each key."""
        if first_time(self, key):
            self.warn(text)


def _known_inputs(batch: Any) -> Inputs | None:
    try:
        return batch_inputs(batch)
    except TypeError:
        return None
