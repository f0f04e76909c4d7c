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
        run = _compiled_by_inductor(_flattened(graph), flat)
    except Exception:  # inductor raises many kinds of errors; some graphs can be compiled in parts
        return _compiled_by_dynamo(graph)
    if versions != list(map(version_of, flat)):
        return _compiled_by_dynamo(graph)
    return lambda *arguments: run(_flat(*arguments))


def _compiled_by_inductor(graph: fx.GraphModule, flat: list[Any]) -> Callable[[list[Any]], Sequence[Tensor]]:
    """Return a compiled function of a list of tensors.

    It is the code that inductor has written, without what torch does around it for graphs whose results share memory with arguments,
    if both return the same.

    Args:
        graph: The graph.
        flat: Its arguments.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    written: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        written.append(compile_fx_inner(*args, **kwargs))
        return written[-1]

    complete: Any = compile_fx(graph, flat, inner_compile=noted)
    with torch.no_grad():
        expected = complete(*flat)
        direct = getattr(written[0], "current_callable", None) if len(written) == 1 else None
        if direct is not None and _are_same(expected, direct(list(flat)), flat):
            return direct  # type: ignore[no-any-return]
    return lambda arguments: complete(*arguments)


def _are_same(expected: Sequence[Tensor], found: Sequence[Tensor], arguments: Sequence[Tensor]) -> bool:
    """Return whether results have the same layouts and values, and own their memory."""
    if len(expected) != len(found):
        return False
    memory = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    for before, tensor in zip(expected, found, strict=True):
        is_same = before.dtype == tensor.dtype and before.stride() == tensor.stride()
        if not is_same or not torch.equal(before.nan_to_num(), tensor.nan_to_num()):
            return False
        if tensor.untyped_storage().data_ptr() in memory:
            return False
    return True


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
