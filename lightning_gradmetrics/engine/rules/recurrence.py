"""One direction of an LSTM layer as one node of the graph, with a written-out backward pass through time.

Let ``z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh`` be the gates. The gradients of all parameters follow from those of the gates:
``W_hh`` is used by one linear layer on the earlier hidden states ``h_{t-1}``, which are known constants once the forward
pass has run. The node returns the gradients of the gates, which include all later steps.

While a model is probed, the forward pass of a direction is one operator. A proof that samples are kept apart needs one rule for it
(:mod:`~lightning_gradmetrics.engine.tracing.layout_rules`), and no trace of each time step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_gradmetrics.engine.kernels.operators import operator

__all__ = ["is_supported", "lstm_direction", "lstm_run"]


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


@dataclass
class _Run:
    """A forward pass without a graph; everything but the last states has the shape ``(T, N, ...)``.

    Args:
        backwards: Whether the last time comes first.
        hidden: The hidden states.
        cells: The cell states.
        gates: The sigmoids of all gates, ``(T, N, 4 H)``.
        candidates: The hyperbolic tangents of the third gates.
        earlier: The hidden states before each step.
        earlier_cells: The cell states before each step.
        last: The hidden state at the end, ``(N, H)``.
        last_cell: The cell state at the end.
    """

    backwards: bool
    hidden: Tensor
    cells: Tensor
    gates: Tensor
    candidates: Tensor
    earlier: Tensor
    earlier_cells: Tensor
    last: Tensor
    last_cell: Tensor


def lstm_direction(
    projected: Tensor, state: Sequence[Tensor], w_hh: Tensor, b_hh: Tensor | None, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the hidden states of one direction of a layer, ``(T, N, H)``, and its last hidden and cell states.

    Args:
        projected: ``W_ih x_t + b_ih``, ``(T, N, 4 H)``.
        state: The first hidden and cell states, ``(N, H)``.
        w_hh: The recurrent weights, ``(4 H, H)``.
        b_hh: Their biases, ``(4 H,)``.
        backwards: Whether the last time comes first.
    """
    hidden, cell = state
    with torch._C.DisableTorchFunction(), torch.no_grad():  # the parameters are used in the linear layer below
        weight, bias = w_hh.detach(), None if b_hh is None else b_hh.detach()
        results = lstm_run(projected.detach(), hidden.detach(), cell.detach(), weight, bias, backwards)
        run = _Run(backwards, *results)
    recurrent = F.linear(run.earlier, w_hh, b_hh)
    outputs, *last = _Recurrence.apply(projected, recurrent, hidden, cell, weight, run)  # type: ignore[no-untyped-call]
    return outputs, tuple(last)


def _empty(projected: Tensor, hidden: Tensor, *_: Any) -> list[Tensor]:
    """Return tensors like the results of :func:`lstm_run`."""
    times, size = projected.shape[0], hidden.shape[-1]
    widths = (size, size, 4 * size, size, size, size)
    rows = [hidden.new_empty(times, hidden.shape[0], width) for width in widths]
    return [*rows, torch.empty_like(hidden), torch.empty_like(hidden)]


@operator(
    "(Tensor projected, Tensor hidden, Tensor cell, Tensor weight, Tensor? bias, bool backwards) -> Tensor[]", _empty
)
def lstm_run(
    projected: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, bias: Tensor | None, backwards: bool
) -> list[Tensor]:
    """Return the tensors of a :class:`_Run`; the arguments are those of :func:`lstm_direction`, without graphs."""
    rows: list[tuple[Tensor, ...]] = []
    first, size = (hidden.unsqueeze(0), cell.unsqueeze(0)), cell.shape[1]
    steps = (projected if bias is None else projected + bias).unbind(0)
    transposed = weight.t().contiguous()  # otherwise every product transposes it
    for step in steps[::-1] if backwards else steps:
        values = step + hidden @ transposed
        gates = values.sigmoid()
        i, f, _, o = gates.chunk(4, -1)
        candidate = values.narrow(-1, 2 * size, size).tanh()
        cell = torch.addcmul(f * cell, i, candidate)
        hidden = o * cell.tanh()
        rows.append((hidden, cell, gates, candidate))
    columns = list(map(torch.stack, zip(*(rows[::-1] if backwards else rows), strict=True)))
    earlier = [_shifted(state, states, backwards) for state, states in zip(first, columns[:2], strict=True)]
    return [*columns, *earlier, hidden, cell]


def _shifted(first: Tensor, states: Tensor, backwards: bool) -> Tensor:
    """Return the state before each step."""
    return torch.cat([states[1:], first] if backwards else [first, states[:-1]])


class _Recurrence(torch.autograd.Function):
    """Returns the states of a run; its backward pass returns the gradients of the gates and of the first states."""

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, run: _Run
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backwards = run.backwards
        ctx.save_for_backward(weight, run.gates, run.candidates, run.cells, run.earlier_cells)
        return run.hidden, run.last, run.last_cell

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, gates, candidates, cells, earlier_cells = ctx.saved_tensors
        of_outputs, of_hidden, of_cell = gradients
        i, f, _, o = gates.chunk(4, -1)
        squashed = cells.tanh()
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
            of_hidden = by_gate[t].flatten(1) @ weight
            of_cell = of_cell * f[t]
        together = by_gate.flatten(2)
        return together, together, of_hidden, of_cell, None, None
