"""Records the kernels of a graph of torch operators on a CUDA device, and replays them without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.tensor_records import version_of
from lightning_gradmetrics.engine.kernels.operators import noted_tensors

__all__ = ["RecordedGraph"]

WARM_UP = 2
"""Number of runs before a recording, in which libraries allocate their workspaces and kernels are compiled."""


class RecordedGraph:
    """A function of tensors on a CUDA device; its kernels are recorded in the first call and replayed in later ones.

    Kernels read parameters and buffers at fixed addresses, so a recording follows changes of their values. If one of them
    has moved, the kernels are recorded again. Inputs and labels are copied to fixed addresses first.

    The kernels of a batch can be started ahead of the call, while Python still examines the model.

    Args:
        function: A function from parameters, buffers, inputs and labels to a tuple of tensors. It reads no values on the
            host.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._places: Hashable = None
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._read: list[Tensor] = []
        self._held: list[Tensor] = []
        self._is_ahead = self._changes_nothing = False

    def __call__(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        inputs: Sequence[Tensor],
        labels: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return the function's results, in memory that later calls do not change."""
        given = [*inputs] if labels is None else [*inputs, labels]
        places = _places([*parameters, *buffers])
        if places != self._places:
            self._is_ahead = False
            self._record(parameters, buffers, given, len(inputs))
            self._places = places
        if not self._is_ahead:
            self._replay(given)
        return tuple(map(Tensor.clone, self._outputs))

    @contextmanager
    def ahead(self, inputs: Sequence[Tensor], labels: Tensor | None) -> Iterator[None]:
        """Start the kernels for a batch; a call inside the block, which must be for the same batch, waits for their results.

        Nothing is started for a batch of another form, or if the kernels change parameters or buffers.
        """
        given = [*inputs] if labels is None else [*inputs, labels]
        if self._changes_nothing and list(map(_form, given)) == list(map(_form, self._inputs)):
            self._replay(given)
            self._is_ahead = True
        try:
            yield
        finally:
            self._is_ahead = False

    def _replay(self, given: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for fixed, tensor in zip(self._inputs, given, strict=True):
                fixed.copy_(tensor)
        self._graph.replay()

    def _record(
        self, parameters: Sequence[Tensor], buffers: Sequence[Tensor], given: Sequence[Tensor], count: int
    ) -> None:
        self._graph, self._outputs = None, ()  # frees the memory of an earlier recording
        self._inputs = list(map(Tensor.clone, given))
        labels = self._inputs[count] if len(given) > count else None
        device = self._inputs[0].device

        def run() -> tuple[Tensor, ...]:
            return self._function(list(parameters), list(buffers), self._inputs[:count], labels)

        cuda: Any = torch.cuda  # its streams have no types
        current, side = cuda.current_stream(device), cuda.Stream(device)
        self._held = [*parameters, *buffers]  # a replay never reads freed memory
        versions = list(map(version_of, self._held))
        side.wait_stream(current)
        with cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        current.wait_stream(side)
        self._changes_nothing = versions == list(map(version_of, self._held))
        graph = cuda.CUDAGraph()
        with noted_tensors() as self._read, cuda.graph(graph):
            self._outputs = run()
        self._graph = graph


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device


def _places(tensors: Sequence[Tensor]) -> Hashable:
    """Return where tensors are in memory, and how they are laid out."""
    return tuple((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
