"""Recurrent layers, expressed as linear layers, which have a rule, and element-wise steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from lightning_gradmetrics.engine.rules.recurrence import is_supported, lstm_direction
from lightning_gradmetrics.engine.tracing.calls import DECOMPOSED, tensors_in

__all__ = ["gru_cell", "layers", "lstm_cell", "plain_cell"]

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Tensor | None]], State]


def lstm_cell(projected: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Return one step of an LSTM, ``c' = f c + i g`` and ``h' = o tanh c'``; ``weights``: ``W_hh, b_hh, W_hr``."""
    hidden, cell = state
    i, f, g, o = (projected + _linear(hidden, weights[0], weights[1])).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return (hidden if weights[2] is None else _linear(hidden, weights[2], None)), cell


def gru_cell(projected: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Return one step of a GRU, ``h' = n + z (h - n)``."""
    hidden = state[0]
    input_r, input_z, input_n = projected.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = _linear(hidden, weights[0], weights[1]).chunk(3, -1)
    new = (input_n + (input_r + hidden_r).sigmoid() * hidden_n).tanh()
    return (new + (input_z + hidden_z).sigmoid() * (hidden - new),)


def plain_cell(
    activation: Callable[[Tensor], Tensor], projected: Tensor, state: State, weights: Sequence[Tensor | None]
) -> State:
    """Return one step of an Elman network, ``h' = act(W_ih x + W_hh h)``."""
    return (activation(projected + _linear(state[0], weights[0], weights[1])),)


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    return F.linear(x, weight, bias)


def _direction(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor | None], reverse: bool) -> Any:
    """Return one direction of one layer, ``(T, N, D) -> (T, N, H)``, and its last state."""
    w_ih, w_hh, b_ih, b_hh, projection = weights
    whole = _linear(x, w_ih, b_ih)
    used = [tensor for tensor in (x, *state, *weights) if tensor is not None]
    if cell is lstm_cell and projection is None and is_supported(whole, used):
        return lstm_direction(x, whole, state, weights[:4], reverse)
    projected = whole.unbind(0)
    outputs = []
    for step in projected[::-1] if reverse else projected:
        state = cell(step, state, (w_hh, b_hh, projection))
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _weights(flat: Sequence[Tensor], sets: int, has_biases: bool) -> list[tuple[Tensor | None, ...]]:
    """Return ``W_ih, W_hh, b_ih, b_hh, W_hr`` for each layer and direction; ``None`` for a missing one."""
    each = len(flat) // sets
    groups: list[tuple[Tensor | None, ...]] = []
    for start in range(0, len(flat), each):
        w_ih, w_hh, *others = flat[start : start + each]
        b_ih, b_hh = (others[0], others[1]) if has_biases else (None, None)
        projections = others[2:] if has_biases else others
        groups.append((w_ih, w_hh, b_ih, b_hh, projections[0] if projections else None))
    return groups


def layers(
    fused: Callable[..., Any],
    cell: Cell,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: Any,
    batch_first: Any,
) -> Any:
    """Return a stack of recurrent layers, with the arguments and the result of the fused function.

    Packed sequences, recognised by a tensor of batch sizes as second argument, go to the fused function.
    """
    if isinstance(has_biases, (tuple, list)):
        return fused(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    directions = 2 if bidirectional else 1
    weights = _weights(params, num_layers * directions, has_biases)
    states = _cast(fused, weights[0][-1] is not None, hx)
    x, last = input.transpose(0, 1) if batch_first else input, []
    for layer in range(num_layers):
        runs = []
        for index in range(layer * directions, (layer + 1) * directions):
            first = tuple(state[index] for state in states)
            output, state = _direction(cell, x, first, weights[index], reverse=index % directions == 1)
            runs.append(output)
            last.append(state)
        x = torch.cat(runs, -1) if bidirectional else runs[0]
        x = F.dropout(x, dropout, train) if layer < num_layers - 1 else x
    ends = map(torch.stack, zip(*last, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *ends)


def _cell(
    fused: Callable[..., Any],
    cell: Cell,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Any = None,
    b_hh: Any = None,
) -> Any:
    state = _cast(fused, False, hx)
    result = cell(_linear(input, w_ih, b_ih), tuple(state), (w_hh, b_hh, None))
    return result if len(result) > 1 else result[0]


def _cast(fused: Callable[..., Any], projects: bool, hx: Any) -> list[Tensor]:
    """Return the states in the types in which autocast lets a fused function compute them."""
    states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
    device = states[0].device
    if torch.is_autocast_enabled(device.type):
        types = _types_of_states(fused, projects, device, states[0].dtype, torch.get_autocast_dtype(device.type))
        states = list(map(Tensor.to, states, types))
    return states


@lru_cache(maxsize=64)
def _types_of_states(
    fused: Callable[..., Any], projects: bool, device: torch.device, dtype: torch.dtype, autocast: torch.dtype
) -> tuple[torch.dtype, ...]:
    """Return the types of a fused function's states under autocast, from a call with two hidden units.

    It differs between functions and devices: on a CPU, autocast applies to ``lstm`` without projections but not to ``gru``.
    """
    is_whole, gates, states = _SIZES[fused]
    outputs = 1 if projects else 2
    with torch._C.DisableTorchFunction(), torch.no_grad(), _disable_current_modes():  # no call of the model
        x = torch.zeros((1, 1, 1) if is_whole else (1, 1), dtype=dtype, device=device)
        state: Any = x.new_zeros(*x.shape[:-1], outputs)
        if states > 1:
            state = [state, x.new_zeros(*x.shape[:-1], 2)]
        weights = [
            x.new_zeros(2 * gates, 1),
            x.new_zeros(2 * gates, outputs),
            x.new_zeros(2 * gates),
            x.new_zeros(2 * gates),
        ]
        if projects:
            weights.append(x.new_zeros(1, 2))
        arguments = (x, state, weights, True, 1, 0.0, False, False, True) if is_whole else (x, state, *weights)
        result = fused(*arguments)
    return tuple(tensor.dtype for tensor in tensors_in(result))[is_whole:]


_SIZES: dict[Callable[..., Any], tuple[bool, int, int]] = {}
"""For each fused function, whether it runs whole layers, and its numbers of gates and of states."""

for _fused, _one, _function, _gates, _states in (
    (torch.lstm, torch.lstm_cell, lstm_cell, 4, 2),
    (torch.gru, torch.gru_cell, gru_cell, 3, 1),
    (torch.rnn_tanh, torch.rnn_tanh_cell, partial(plain_cell, torch.tanh), 1, 1),
    (torch.rnn_relu, torch.rnn_relu_cell, partial(plain_cell, torch.relu), 1, 1),
):
    DECOMPOSED[_fused] = partial(layers, _fused, _function)
    DECOMPOSED[_one] = partial(_cell, _one, _function)
    _SIZES[_fused], _SIZES[_one] = (True, _gates, _states), (False, _gates, _states)
