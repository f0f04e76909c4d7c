"""Compiles a graph of torch operators for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx

from lightning_gradmetrics.classifier.tensor_records import version_of

__all__ = ["compiled_graph"]


def compiled_graph(
    graph: fx.GraphModule,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    inputs: Sequence[Tensor],
    labels: Tensor | None,
) -> Callable[..., Sequence[Tensor]]:
    """Return a compiled function of the same arguments as a graph, which must have the same layouts in each call.

    Inductor compiles the graph directly. ``torch.compile`` would first compare all arguments with those of earlier calls,
    which takes longer than a small graph. It is used if inductor fails, or if the graph changes its arguments.

    Args:
        graph: The graph, whose arguments are lists of tensors.
        parameters: The model's parameters.
        buffers: The model's buffers.
        inputs: The model's inputs.
        labels: The labels, if there are any.
    """
    flat: list[Any] = _flat(parameters, buffers, inputs, labels)
    versions = list(map(version_of, flat))
    try:
        run: Any = torch._inductor.compile(_flattened(graph), flat)
        with torch.no_grad():
            run(*flat)
    except Exception:  # inductor raises many kinds of errors; some graphs can be compiled in parts
        return _compiled_by_dynamo(graph)
    if versions != list(map(version_of, flat)):
        return _compiled_by_dynamo(graph)
    return lambda *arguments: run(*_flat(*arguments))


def _flat(
    parameters: Sequence[Tensor], buffers: Sequence[Tensor], inputs: Sequence[Tensor], labels: Tensor | None
) -> list[Tensor]:
    return [*parameters, *buffers, *inputs] if labels is None else [*parameters, *buffers, *inputs, labels]


def _flattened(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph whose arguments are tensors instead of lists of tensors."""
    copy = deepcopy(graph)
    copy.graph.set_codegen(fx.graph.CodeGen())
    for node in copy.graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor) and not node.users:  # there are no labels
            copy.graph.erase_node(node)
    copy.recompile()
    return copy


def _compiled_by_dynamo(graph: fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
    compiled = torch.compile(graph, dynamic=False)

    def run(*arguments: Any) -> Sequence[Tensor]:
        with torch.compiler.set_stance("default"):
            result: Sequence[Tensor] = compiled(*arguments)
        return result

    return run
