"""What a plan expects of sorts: which products of groups and look-ups have rows in the order of which sort."""

from __future__ import annotations

from collections.abc import Collection

import torch

from lightning_gradmetrics.engine.planning.findings import Findings, Traced
from lightning_gradmetrics.engine.tracing.calls import tensors_in
from lightning_gradmetrics.engine.tracing.graph import runs_custom_code
from lightning_gradmetrics.engine.tracing.sorts import GROUPED_PRODUCTS
from lightning_gradmetrics.engine.tracing.trace import TracedCall

__all__ = ["has_groups", "planned_sorts"]


def has_groups(traced: Traced) -> bool:
    """Return whether a model multiplies groups of rows in one call."""
    return any(call.function in GROUPED_PRODUCTS for call in traced.calls.calls)


def planned_sorts(found: Findings, three: Traced, meeting: Collection[int]) -> dict[int, int] | None:
    """Return the number of the sort whose order the rows have, for each product of groups and each look-up in a parameter.

    It is ``None`` if a plan cannot follow sorted rows.

    Args:
        found: What the operations show.
        three: The forward pass of three samples.
        meeting: The numbers of the calls with parameters.
    """
    if found.layouts is None or not found.sorted:
        return None if has_groups(three) else {}
    outline, calls = three.outline, three.calls
    if outline.stores_through_hooks or outline.has_hooks or calls.pauses_gradients or runs_custom_code(three.logits):
        return None
    numbers = {three.operations.serial(keys.indices): number for number, keys in enumerate(calls.sorts)}
    sorts: dict[int, int] = {}
    groups = 0
    for number, call in enumerate(calls.calls):
        orders = _orders(call, found, three)
        if call.function in GROUPED_PRODUCTS:
            if not orders or orders[0] not in numbers:
                return None
            sorts[number] = numbers[orders[0]]
            groups += 1
        elif orders and number in meeting:
            if not _is_look_up(call, found, three) or orders[0] not in numbers:
                return None
            sorts[number] = numbers[orders[0]]
    is_seen = groups == calls.groups  # a product inside of another function may not be seen later
    return sorts if is_seen and (groups or not sorts) else None


def _is_look_up(call: TracedCall, found: Findings, three: Traced) -> bool:
    """Return whether a call looks up rows of a table by an integer of each sorted row."""
    if call.function != torch.Tensor.__getitem__ or len(call.args) != 2:
        return False
    table, index = call.args
    if not isinstance(index, torch.Tensor) or index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
        return False
    serial = three.operations.serial
    return table.ndim == 2 and serial(table) not in found.sorted and serial(index) in found.sorted


def _orders(call: TracedCall, found: Findings, three: Traced) -> list[int]:
    """Return the numbers of the orders of a call's sorted rows."""
    orders: list[int] = []
    for tensor in (*tensors_in((call.args, call.kwargs)), *tensors_in(call.result)):
        serial = three.operations.serial(tensor)
        if serial in found.sorted:
            orders.append(found.sorted[serial])
    return orders
