"""One direction of an LSTM layer as one node of the graph, with a written-out backward pass through time.

Let ``z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh`` be the gates. The gradients of all parameters follow from those of the gates:
``W_hh`` is used by one linear layer on the earlier hidden states ``h_{t-1}``, which torch's own LSTM computes, so that they are
known constants. The node returns the gradients of the gates, which include all later steps.

While a model is probed, the hidden states of a direction and its cell states are the results of two operators. A proof that samples are
kept apart needs one rule for them (:mod:`~lightning_gradmetrics.engine.tracing.layout_rules`), and no trace of each time step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.kernels import onednn
from lightning_gradmetrics.engine.kernels.operators import operator

__all__ = ["is_supported", "lstm_cells", "lstm_direction", "lstm_hidden"]


def is_supported(projected: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Return whether all tensors are in full precision on the CPU: lower precision rounds in the order of the calls.

    Args:
        projected: The product of the inputs and the weights.
        tensors: The first states and the recurrent weights.
    """
    if (
        not projected.is_cpu
        or projected.dtype not in (torch.float32, torch.float64)
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    kinds = {(tensor.dtype, tensor.device.type) for tensor in tensors}
    return kinds == {(projected.dtype, "cpu")}


def lstm_direction(
    x: Tensor, projected: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor | None], backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the hidden states of one direction of a layer, ``(T, N, H)``, and its last hidden and cell states.

    Args:
        x: The inputs, ``(T, N, D)``.
        projected: ``W_ih x_t + b_ih``, ``(T, N, 4 H)``.
        state: The first hidden and cell states, ``(N, H)``.
        weights: ``W_ih``, ``W_hh``, ``b_ih`` and ``b_hh``; the biases may be ``None``.
        backwards: Whether the last time comes first.
    """
    first, cell = state
    with torch._C.DisableTorchFunction(), torch.no_grad():  # the parameters are used in linear layers
        hidden = lstm_hidden(x, first, cell, *weights, backwards)
        earlier = _shifted(first.unsqueeze(0), hidden, backwards)
    _, w_hh, _, b_hh = weights
    assert w_hh is not None
    recurrent = F.linear(earlier, w_hh, b_hh)
    outputs, *last = _Recurrence.apply(projected, recurrent, first, cell, w_hh.detach(), backwards)  # type: ignore[no-untyped-call]
    return outputs, tuple(last)


def _empty_hidden(x: Tensor, hidden: Tensor, *_: Any) -> Tensor:
    """Return a tensor like the result of :func:`lstm_hidden`."""
    return hidden.new_empty(x.shape[0], *hidden.shape)


@operator(
    "(Tensor x, Tensor hidden, Tensor cell, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool backwards) -> Tensor",
    _empty_hidden,
)
def lstm_hidden(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    backwards: bool,
) -> Tensor:
    """Return the hidden states ``(T, N, H)`` of torch's own LSTM; the arguments are those of :func:`lstm_direction`."""
    weights = [tensor for tensor in (w_ih, w_hh, b_ih, b_hh) if tensor is not None]
    start = (hidden.unsqueeze(0), cell.unsqueeze(0))
    inputs = x.flip(0) if backwards else x
    states: Tensor = torch.lstm(inputs, start, weights, b_ih is not None, 1, 0.0, False, False, False)[0]
    return states.flip(0) if backwards else states


def _empty_cells(gates: Tensor, cell: Tensor, _: bool) -> list[Tensor]:
    """Return tensors like the results of :func:`lstm_cells`."""
    states = cell.new_empty(len(gates), *cell.shape)
    return [torch.empty_like(gates), states, torch.empty_like(states)]


@operator("(Tensor gates, Tensor cell, bool backwards) -> Tensor[]", _empty_cells)
def lstm_cells(gates: Tensor, cell: Tensor, backwards: bool) -> list[Tensor]:
    """Return the sigmoids of all gates, ``(T, N, 4 H)``, the hyperbolic tangents of the third, and all cell states.

    Args:
        gates: ``z_t`` for all times, ``(T, N, 4 H)``.
        cell: The first cell state, ``(N, H)``.
        backwards: Whether the last time comes first.
    """
    sigmoids, size = gates.sigmoid(), cell.shape[-1]
    candidates = gates.narrow(-1, 2 * size, size).tanh()
    cells = sigmoids.narrow(-1, 0, size) * candidates
    steps = list(zip(cells.unbind(0), sigmoids.narrow(-1, size, size).unbind(0), strict=True))
    for added, kept in steps[::-1] if backwards else steps:
        cell = added.addcmul_(kept, cell)
    return [sigmoids, candidates, cells]


def _shifted(first: Tensor, states: Tensor, backwards: bool) -> Tensor:
    """Return the state before each step."""
    return torch.cat([states[1:], first] if backwards else [first, states[:-1]])


class _Recurrence(torch.autograd.Function):
    """Returns the states of a layer; its backward pass returns the gradients of the gates and of the first states."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        recurrent: Tensor,
        first: Tensor,
        cell: Tensor,
        weight: Tensor,
        backwards: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C.DisableTorchFunction():  # these are no calls of the model
            gates, candidates, cells = lstm_cells(projected + recurrent, cell, backwards)
            squashed, end = cells.tanh(), 0 if backwards else -1
            hidden = gates.narrow(-1, 3 * cell.shape[-1], cell.shape[-1]) * squashed
            earlier_cells = _shifted(cell.unsqueeze(0), cells, backwards)
            last = hidden[end].clone(), cells[end].clone()
        ctx.backwards = backwards
        ctx.save_for_backward(weight, gates, candidates, squashed, earlier_cells)
        return hidden, *last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, gates, candidates, squashed, earlier_cells = ctx.saved_tensors
        of_outputs, of_hidden, of_cell = gradients
        i, f, _, o = gates.chunk(4, -1)
        through_sigmoid, through_tanh = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
        factors = (
            through_sigmoid(candidates, i),
            through_sigmoid(earlier_cells, f),
            through_tanh(i, candidates),
            through_sigmoid(squashed, o),
        )
        by_gate, through_cells = torch.stack(factors, 2), through_tanh(o, squashed)
        times = range(len(gates)) if ctx.backwards else range(len(gates) - 1, -1, -1)
        for t in times:
            of_hidden = of_hidden + of_outputs[t]
            of_cell = torch.addcmul(of_cell, of_hidden, through_cells[t])
            by_gate[t, :, :3] *= of_cell.unsqueeze(1)
            by_gate[t, :, 3] *= of_hidden
            of_hidden = onednn.product(by_gate[t].flatten(1), weight)
            of_cell = of_cell * f[t]
        together = by_gate.flatten(2)
        return together, together, of_hidden, of_cell, None, None
