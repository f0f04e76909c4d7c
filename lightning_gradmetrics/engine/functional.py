"""The ``torch.func`` engine: ``vmap(grad)`` over a bounded number of samples at a time."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap
from torch.overrides import TorchFunctionMode

from lightning_gradmetrics.classifier.forward import as_rows, map_tensors
from lightning_gradmetrics.engine.places import tensors_by_place
from lightning_gradmetrics.engine.refusals import raise_if_out_of_memory
from lightning_gradmetrics.engine.task import Task, empty_moments, joined
from lightning_gradmetrics.gradients.precision import accumulator, at_least_float32
from lightning_gradmetrics.gradients.scaling import rescaled_moments, unit_scale
from lightning_gradmetrics.gradients.statistics import Moments, gradient_moments, stacked_moments

__all__ = ["functional_moments"]

ENTRIES = 2**25
"""Number of gradient entries computed at a time: 128 MiB in float32."""


def functional_moments(task: Task) -> list[Moments]:
    """Return the moments ``(N, P)`` of each objective's gradient, by ``vmap(grad)`` in chunks of samples.

    Raises:
        NotImplementedError: If ``torch.func`` cannot run the model, or a parameter has a hook, which it does not call.
    """
    _refuse_hooks(task)
    entries_of_sample = sum(parameter.numel() for parameter in task.parameters.values())
    limit = ENTRIES if task.memory is None else min(ENTRIES, task.memory // 16)
    step = max(1, limit // max(entries_of_sample, 1))
    parts = [empty_moments(task)]
    for start in range(0, task.size, step):
        chunk = task.rows(start, start + step)
        try:
            parts.append(_chunk_moments(chunk))
        except Exception as error:  # torch.func, and operations that it does not cover, raise many kinds of errors
            raise_if_out_of_memory(error)
            if not _runs_without(chunk):
                raise
            raise NotImplementedError(
                f"torch.func cannot run {type(task.model).__name__}, which engine='vmap' needs: use engine='auto' or 'reference' ({error})"
            ) from error
    return joined(parts)


def _refuse_hooks(task: Task) -> None:
    for name, parameter in task.parameters.items():
        if parameter._backward_hooks:
            raise NotImplementedError(
                f"the parameter {name} has a hook, which torch.func does not call: use engine='auto' or 'reference', or remove the hook"
            )


def _runs_without(task: Task) -> bool:
    """Return whether the losses can be computed without ``torch.func``; then it is the cause of an error."""
    try:
        logits = task.forward()
        for index in range(len(task.losses)):
            task.loss(index, logits)
    except Exception:  # the error of the model or of an objective, which is the first one too
        return False
    return True


class _NoReplacedData(TorchFunctionMode):
    """Refuses ``tensor.data = other``: torch.func's tensors then have invalid memory, and the process may crash."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        if func == _SET_DATA:
            raise RuntimeError("torch.func cannot run a forward pass that replaces the .data of a tensor")
        return func(*args, **(kwargs or {}))


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _chunk_moments(task: Task) -> list[Moments]:
    moments = []
    for index in range(len(task.losses)):
        gradients, undo = _unit_gradients(task, index)
        rows = [gradient_moments(gradient, task.wanted) for gradient in gradients.values()]
        moments.append(rescaled_moments(stacked_moments(rows), undo))
    return moments


def _unit_gradients(task: Task, index: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return every sample's gradient, scaled by a power of two, and the factors ``(N,)`` that undo the scale."""
    parameters = {name: parameter.detach() for name, parameter in task.parameters.items()}
    detached = {id(parameter): parameter.detach() for parameter in task.model.parameters()}
    flags = task.per_sample

    def gradients(inputs: object, target: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        def forward(chosen: dict[str, Tensor]) -> Tensor:
            in_order = iter(flags)

            def as_batch_of_one(tensor: Tensor) -> Tensor:
                per_sample = next(in_order)
                return (tensor.unsqueeze(0) if per_sample else tensor).clone()

            batch = map_tensors(inputs, as_batch_of_one)
            arguments = (batch,) if isinstance(batch, (Tensor, dict)) else tuple(batch)
            kwargs = arguments[0] if isinstance(batch, dict) else {}
            used = {id(task.parameters[name]): tensor for name, tensor in chosen.items()}
            tensors = tensors_by_place(task.model, {**detached, **used})
            output = functional_call(task.model, tensors, () if kwargs else arguments, kwargs, tie_weights=False)
            return as_rows(task.logits(output))

        logits, pull = vjp(forward, parameters)  # type: ignore[misc]
        loss = task.losses[index](None if target is None else target[None])
        gradient = grad(lambda z: loss(z).sum())(at_least_float32(logits)).to(accumulator(logits))
        scale = unit_scale(gradient, logits.dtype)  # a backward pass that clips or normalises gradients is not linear
        (pulled,) = pull((gradient * scale[:, None]).to(logits.dtype))
        return pulled, 1 / scale[0]

    in_order = iter(flags)

    def axis_of(tensor: Tensor) -> Any:
        return 0 if next(in_order) else None

    in_dims = (map_tensors(task.inputs, axis_of), None if task.targets is None else 0)
    with warnings.catch_warnings(), _NoReplacedData():
        warnings.filterwarnings("ignore", "There is a performance drop")
        mapped = vmap(gradients, in_dims, randomness="same")
        return mapped(task.inputs, task.targets)  # type: ignore[no-any-return]
