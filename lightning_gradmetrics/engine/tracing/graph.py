"""Nodes that the engine inserts into autograd graphs, and a function that finds the parameters of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from lightning_gradmetrics.engine.tracing.calls import opened

__all__ = [
    "Copies",
    "GroupNormCrashError",
    "all_nodes",
    "ends_of_group_norms",
    "gradients_at",
    "is_custom",
    "is_of_user",
    "reached_parameters",
    "runs_custom_code",
    "runs_users_code",
    "saves_through_hooks",
    "with_graph",
    "storing_hooks",
    "without_storing_hooks",
]


class Root(torch.autograd.Function):
    """Adds a new tensor to the graph without a copy; it is not a leaf and may be changed in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        """Return the tensor itself."""
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # type: ignore[override]
        """Return no gradient: the graph ends here."""
        return None, None


def with_graph(result: Tensor, anchor: Tensor) -> Tensor:
    """Return a layer's result as a tensor whose hooks get its gradient, also if the model changes it in place.

    A tensor without a graph gets one. For a view, such as a linear layer returns for an input with positions, this is another tensor
    with the same memory that is no view: hooks on a view are lost when it is changed in place.

    Args:
        result: The result.
        anchor: A scalar with a graph.
    """
    if not result.requires_grad:
        return Root.apply(result.data, anchor)  # type: ignore[no-untyped-call, no-any-return]
    return torch.ops.aten._unsafe_view(result, result.shape) if result._is_view() else result  # type: ignore[no-any-return]


class Copies(torch.autograd.Function):
    """An expanded view of ``tensor`` for each sample; ``receive`` gets the gradients ``(N, *shape)``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, size: int, receive: Callable[[Tensor], None]) -> Tensor:
        """Return a view ``(size, *shape)``."""
        ctx.receive = receive
        return tensor.expand(size, *tensor.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        """Pass the gradient of each copy to ``receive``."""
        ctx.receive(gradient)
        return (gradient.sum(0) if ctx.needs_input_grad[0] else None), None, None, None


def gradients_at(total: Tensor, ends: Sequence[Any], gradient: Tensor | None, is_kept: bool) -> Sequence[Tensor | None]:
    """Return the same as ``torch.autograd.grad``, without its checks of the arguments if the gradient has the type of the total.

    These checks import SymPy in the first call of a process, which takes 0.6 s.

    Args:
        total: The tensor whose backward pass runs.
        ends: The tensors or edges of the graph at which the gradients are returned; ``None`` if one is not reached.
        gradient: The gradient of the tensor; ``None`` for a scalar.
        is_kept: Whether the graph is kept.
    """
    if gradient is None or gradient.shape != total.shape or gradient.dtype != total.dtype:
        return opened(torch.autograd.grad)(total, ends, gradient, retain_graph=is_kept, allow_unused=True)  # type: ignore[no-any-return]
    run = torch.autograd.graph._engine_run_backward
    return run((total,), (gradient,), is_kept, False, tuple(ends), True, accumulate_grad=False)


class GroupNormCrashError(RuntimeError):
    """A backward pass would end the process."""


def ends_of_group_norms(total: Tensor) -> list[Any]:
    """Return edges at which gradients must be computed too, so that the backward pass to weights does not end the process.

    Torch before 2.14 crashes on a CPU if it computes the gradient of a group norm's weights without that of its input, with
    channels last.

    Args:
        total: The tensor whose backward pass runs.

    Raises:
        GroupNormCrashError: If the input of such a group norm requires no gradient.
    """
    ends: list[Any] = []
    if not _GROUP_NORMS_CRASH:
        return ends
    for node in all_nodes(total):
        if node.name() != "NativeGroupNormBackward0":
            continue
        (source, number), *weights = node.next_functions
        if source is not None:
            ends.append(torch.autograd.graph.GradientEdge(source, number))
        elif any(weight is not None for weight, _ in weights) and _crashes(node._saved_input):
            raise GroupNormCrashError(
                f"torch {torch.__version__} would crash in the backward pass of this model, because no layer before a group norm "
                "with channels last has chosen parameters. Choose some of an earlier layer too, convert the model and its inputs "
                "to torch.contiguous_format, or install a newer torch (2.14)"
            )
    return ends


_GROUP_NORMS_CRASH = torch.__version__ < "2.14"
_LARGEST_CRASHING = 2047
"""Largest number of positions per channel with which they do."""


def _crashes(tensor: Tensor) -> bool:
    """Return whether a group norm of a tensor is one of those that crash."""
    if not tensor.is_cpu or tensor.shape[2:].numel() > _LARGEST_CRASHING:
        return False
    return suggest_memory_format(tensor) in (torch.channels_last, torch.channels_last_3d)


def reached_parameters(output: Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that a tensor's graph depends on.

    Example:
        >>> weight, bias = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> reached_parameters((weight * 2 + bias.detach()).sum(), {"weight": weight, "bias": bias})
        ['weight']
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    reached: dict[str, None] = {}
    for node in all_nodes(output):
        leaf = id(getattr(node, "variable", None))
        if leaf in names:
            reached[names[leaf]] = None
    return list(reached)


def runs_custom_code(output: Tensor) -> bool:
    """Return whether the backward pass from a tensor runs code of custom autograd functions or of hooks on modules.

    The functions of this package do not count.

    Example:
        >>> runs_custom_code(torch.ones(2, requires_grad=True).exp())
        False
    """
    return any(map(is_custom, all_nodes(output)))


def runs_users_code(output: Tensor) -> bool:
    """Return whether its graph contains custom autograd functions of the user; torch's own, such as checkpoints, do not count."""
    return any(map(is_of_user, all_nodes(output)))


def is_of_user(node: Any) -> bool:
    """Return whether a node runs a custom autograd function that is not of torch."""
    return is_custom(node) and not str(getattr(type(node)._forward_cls, "__module__", "")).startswith("torch.")


def is_custom(node: Any) -> bool:
    """Return whether a node runs code of a custom autograd function, or of hooks on a module, that is not of this package."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    function = getattr(type(node), "_forward_cls", None)
    return not getattr(function, "__module__", "").startswith(_PACKAGE)


_PACKAGE = __name__.partition(".")[0] + "."
"""This package."""


def all_nodes(output: Tensor) -> Iterator[Any]:
    """Yield every node of a tensor's graph."""
    waiting, visited = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


storing_hooks: Callable[[bool], tuple[Any, Any] | None] = torch._C._autograd._top_saved_tensors_default_hooks
"""Returns the hooks that decide what autograd stores, as in a checkpoint, or ``None``; its argument is always ``True``."""


def saves_through_hooks() -> bool:
    """Return whether hooks decide what autograd stores."""
    return storing_hooks(True) is not None


@contextmanager
def without_storing_hooks() -> Iterator[None]:
    """Let autograd store tensors itself inside the block, so that a checkpoint around it does not count them."""
    removed: list[tuple[Any, Any]] = []
    while (hooks := storing_hooks(True)) is not None:
        removed.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(removed):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
