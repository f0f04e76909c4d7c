"""Finds the sample that each row of a call belongs to, its owner, by two backward passes instead of a plan.

The first backward pass multiplies each sample's loss by a different weight; the second uses the plain losses. The ratio
of a row's two gradients is the weight of its sample, so it identifies the owner whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.engine.passes.collecting_pass import CollectingPass, Sink
from lightning_gradmetrics.engine.passes.plan import BROADCAST, Plan, PlanError, Source
from lightning_gradmetrics.engine.rules import RULES, Call, Rule, bind
from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.calls import has_tensors, map_arguments, sources_in, tensors_in
from lightning_gradmetrics.engine.tracing.graph import Copies
from lightning_gradmetrics.engine.uses import RowsUse

__all__ = ["OwnershipPass", "grouped_rows", "owners_of_rows"]

PROJECTIONS = 4
"""Number of values to which a row's gradient is reduced for the comparison."""

_FLAT = frozenset(
    [
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "gt",
        "lt",
        "ge",
        "le",
        "eq",
        "ne",
        "argmax",
        "argmin",
        "isnan",
        "isfinite",
        "isinf",
        "__gt__",
        "__lt__",
        "__ge__",
        "__le__",
        "__eq__",
        "__ne__",
        "sign",
        "detach",
    ]
)
"""Functions through which no gradient flows."""


class OwnershipPass(CollectingPass):
    """A forward pass without a plan: two backward passes identify the owner of each row, and rows are grouped by owner.

    Args:
        parameters: The chosen parameters by name.
        size: The number of samples.
        sink: Called once per parameter and backward pass.
        constants: Tensors that depend neither on samples nor on parameters, such as buffers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], size: int, sink: Sink, constants: Iterable[Tensor]) -> None:
        super().__init__(Plan(()), parameters, size, sink)
        self._alive: list[Tensor] = list(constants)
        self._constants = set(map(id, self._alive))
        first = next(iter(parameters.values()))
        order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(first.device)
        self._sample_of = order.argsort()
        self.weights = 1 + (order + 0.5) / size
        self._weighted = False
        self._weighted_rows: dict[int, Tensor] = {}
        self._hooks, self._largest = 0, 0.0
        self._directions: dict[int, Tensor] = {}

    # -- forward ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call; the rows of calls with parameters are grouped later."""
        kwargs = kwargs or {}
        if self._silence.depth:
            return func(*args, **kwargs)
        result = self._run(func, args, kwargs)
        if not self._open:
            self.outline.add(func, args, kwargs, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        sources = sources_in(self._tracked, args, kwargs)
        if not sources:
            result = func(*args, **kwargs)
            self._note_constants(func, args, kwargs, result)
            return result
        if self._opens(func):
            return self._inside(func, args, kwargs)
        return self._with_parameters(func, sources, args, kwargs)

    def _note_constants(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record results of constant arguments as constants; a constant that is changed in place stops being one."""
        if self._constants.issuperset(map(id, tensors_in((args, kwargs)))):
            for tensor in tensors_in(result):
                self._constants.add(id(tensor))
                self._alive.append(tensor)
            return
        for tensor in tensors_in(result):
            self._constants.discard(id(tensor))
        if args and (getattr(func, "__name__", "").endswith("_") or not has_tensors(result)):
            for tensor in tensors_in(args[0]):
                self._constants.discard(id(tensor))

    def _with_parameters(self, func: Any, sources: tuple[Source, ...], args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if not torch.is_grad_enabled() or name in _FLAT:
            return func(*self._cut(args), **self._cut(kwargs))
        rule = RULES.get(func)
        values = bind(rule, args, kwargs) if rule else None
        fits = rule is not None and values is not None and self._suits(rule, values)
        others = set(map(id, tensors_in((args, kwargs)))) - self._tracked.keys()
        # A constant as long as the batch, such as an initial hidden state of zeros, also has one row per sample.
        shared = not fits or self.size not in (values or {})["input"].shape
        if shared and others <= self._constants:
            return self._derived_result(func, sources, args, kwargs)
        if fits and rule is not None:
            return self._row_rule(rule, func, sources, args, kwargs)
        if name in BROADCAST and not name.startswith(("expand", "broadcast", "repeat", "tile")):
            return self._row_broadcast(func, sources, args, kwargs)
        result = func(*self._cut(args), **self._cut(kwargs))
        if has_tensors(result):
            raise self._refused(sources, f"no rule covers {name}")
        return result

    def _refused(self, sources: Iterable[Source], reason: str) -> PlanError:
        names: set[str] = set()
        for source in sources:
            names.update(self._roots[source])
        return PlanError(reason, names=frozenset(names))

    def _derived_result(self, func: Any, sources: tuple[Source, ...], args: Any, kwargs: Any) -> Any:
        """Run on leaves, and remember which parameters the outputs depend on."""
        result = func(*map_arguments(self._leaf, args), **map_arguments(self._leaf, kwargs))
        names: dict[str, None] = {}
        for known in sources:
            names.update(dict.fromkeys(self._roots[known]))
        for number, tensor in enumerate(tensors_in(result)):
            if tensor.requires_grad and id(tensor) not in self._tracked:
                source = (self._hooks, number)
                self._hooks += 1
                self._tracked[id(tensor)] = source
                self._derived[source] = tensor
                self._roots[source] = tuple(names)
            elif not tensor.requires_grad:
                self._constants.add(id(tensor))
                self._alive.append(tensor)
        return result

    def _suits(self, found: Rule, values: Mapping[str, Any]) -> bool:
        """Return whether the rule's input is the only tensor that may depend on the samples."""
        x = values.get("input")
        if not isinstance(x, Tensor) or id(x) in self._tracked:
            return False
        for name, value in values.items():
            if isinstance(value, Tensor) and name != "input":
                tracked = id(value) in self._tracked
                if (tracked and name not in found.weights) or (not tracked and id(value) not in self._constants):
                    return False
        return True

    def _row_rule(self, found: Rule, func: Any, sources: tuple[Source, ...], args: Any, kwargs: Any) -> Any:
        named = bind(found, args, kwargs) or {}
        slots = {}
        for name, value in named.items():
            if isinstance(value, Tensor) and id(value) in self._tracked:
                slots[name] = self._tracked[id(value)]
        args, kwargs = self._cut(args), self._cut(kwargs)
        values = bind(found, args, kwargs) or {}
        x = values["input"]
        count = found.row_axes(values)
        rows = x.reshape(x.shape[:count].numel(), *x.shape[count:])
        call = Call({**values, "input": rows}, Axis(0), Axis(0), frozenset(slots))
        if count < 1 or not found.accepts(call):
            raise self._refused(sources, f"no rule covers this call of {getattr(func, '__name__', '')}")
        result = func(*args, **kwargs)
        if not result.requires_grad:
            result = self._attached(result)
        if result.shape[:count] != x.shape[:count]:
            raise self._refused(sources, "rows of input and output differ")
        for source in slots.values():
            self._expect(source)
        number, self._hooks = self._hooks, self._hooks + 1
        hook = partial(self._rows_arrive, number, found, call, slots, (count, x, x._version))
        result.register_hook(hook)
        return result

    def _attached(self, result: Tensor) -> Tensor:
        """Add a new tensor to the graph."""
        return result + torch.zeros_like(self.anchor, dtype=result.dtype) * self.anchor.to(result.dtype)

    def _row_broadcast(self, func: Any, sources: tuple[Source, ...], args: Any, kwargs: Any) -> Any:
        """Run with a copy of the parameter for each position of the axes that it is broadcast along."""
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors_in((args, kwargs))))  # type: ignore[no-untyped-call]
        count = len(shape)
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self._tracked:
                count = min(count, len(shape) - len(_stripped(tensor.shape)))
        count -= count == len(shape) and count > 1
        if count < 1:
            raise self._refused(sources, f"a parameter covers all axes in {getattr(func, '__name__', '')}")

        def spread(tensor: Tensor) -> Tensor:
            if id(tensor) not in self._tracked:
                return tensor
            source = self._tracked[id(tensor)]
            self._expect(source)
            number, self._hooks = self._hooks, self._hooks + 1
            receive = partial(self._copies_arrive, number, source)
            rows = shape[:count].numel()
            copies = Copies.apply(self._cut(tensor), self.anchor, rows, receive)  # type: ignore[no-untyped-call]
            inner = _stripped(tensor.shape)
            spread_out: Tensor = copies.reshape(*shape[:count], *(1,) * (len(shape) - count - len(inner)), *inner)
            return spread_out

        return func(*map_arguments(spread, args), **map_arguments(spread, kwargs))

    # -- backward -----------------------------------------------------------------------------------------------------

    def collect(self, logits: Tensor, gradient: Tensor, last: bool) -> None:
        """Run the backward pass with the weighted gradient, then with the plain one; the second collects."""
        self._weighted, self._largest = True, 1.0
        self._weighted_rows.clear()
        try:
            self.backward(logits, last=False, gradient=gradient * self.weights.to(gradient.dtype)[:, None])
        finally:
            self._weighted = False
        self.backward(logits, last, gradient)

    def _rows_arrive(
        self,
        number: int,
        found: Rule,
        call: Call,
        slots: Mapping[str, Source],
        before: tuple[int, Tensor, int],
        g: Tensor,
    ) -> None:
        count, x, version = before
        if x._version != version:
            raise self._refused(slots.values(), "a layer's input was changed in place after its use")
        with self._silence, self._guarded(slots.values()):
            rows = len(call.values["input"])
            flat = g.reshape(rows, g.shape[count:].numel())
            if self._weighted:
                self._weighted_rows[number] = self._projected(flat)
                return
            self._scale(slots.values(), x, g)
            index = self._grouping(number, flat, slots.values())
            grouped, gradient = _regrouped(call, g.reshape(rows, *g.shape[count:]), index)
            for slot, use in found.uses(grouped, found.split(grouped.out, gradient)):
                self._arrive(slots[slot], use)

    def _copies_arrive(self, number: int, source: Source, g: Tensor) -> None:
        with self._silence, self._guarded([source]):
            flat = g.reshape(len(g), g.shape[1:].numel())
            if self._weighted:
                self._weighted_rows[number] = self._projected(flat)
                return
            self._scale([source], g, g)
            owners = self._owners(number, flat, [source])
            has_owner = owners >= 0
            sums = g.new_zeros(self.size, *g.shape[1:])
            self._arrive(source, RowsUse(sums.index_add_(0, owners[has_owner], g[has_owner])))

    def _projected(self, rows: Tensor) -> Tensor:
        """Return each row reduced to a few numbers, ``(R, 4)``."""
        width = rows.shape[1]
        if width not in self._directions:
            generator = torch.Generator().manual_seed(width)
            directions = torch.randn(width, PROJECTIONS, generator=generator, dtype=torch.float64)
            self._directions[width] = directions.to(rows.device, torch.promote_types(rows.dtype, torch.float32))
        directions = self._directions[width]
        return rows.to(directions.dtype) @ directions

    def _owners(self, number: int, rows: Tensor, sources: Iterable[Source]) -> Tensor:
        if number not in self._weighted_rows:
            raise self._refused(sources, "a gradient arrives in one of two backward passes only")
        projected = self._projected(rows)
        owners, unclear = owners_of_rows(self._weighted_rows.pop(number), projected, self.weights, self._sample_of)
        size = projected.norm(dim=1)
        finite = size[size.isfinite()]
        self._largest = max(self._largest, float(finite.max()) if len(finite) else 0.0)
        # In half precision the rounding of a ratio is too large to distinguish noise from a row of several samples.
        noise = 0.0 if rows.element_size() < 4 else 64 * torch.finfo(rows.dtype).eps * self._largest
        if bool((unclear & ~(size <= noise)).any()):
            raise self._refused(sources, "a row belongs to several samples")
        return owners

    def _grouping(self, number: int, rows: Tensor, sources: Iterable[Source]) -> Tensor:
        return grouped_rows(self._owners(number, rows, sources), self.size)


def _stripped(shape: torch.Size) -> tuple[int, ...]:
    """Return a shape without leading dimensions of size one."""
    sizes = list(shape)
    while sizes and sizes[0] == 1:
        sizes.pop(0)
    return tuple(sizes)


def owners_of_rows(weighted: Tensor, plain: Tensor, weights: Tensor, sample_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sample that each row belongs to, and which rows do not belong to exactly one.

    Args:
        weighted: The rows ``(R, K)`` where the loss of sample ``n`` was multiplied by ``weights[n]``.
        plain: The rows ``(R, K)`` with weights of one.
        weights: ``(N,)``, the numbers ``1 + (k + 0.5) / N`` in some order.
        sample_of: ``(N,)``, the sample that has the ``k``-th smallest weight.

    Returns:
        Owners ``(R,)``, -1 for a row that is zero or ambiguous, and ``(R,)`` whether a row is ambiguous.

    Example:
        >>> weights, sample_of = torch.tensor([1.75, 1.25]), torch.tensor([1, 0])
        >>> rows = torch.tensor([[2.0], [0.0], [4.0], [1.0]])
        >>> owners_of_rows(rows * torch.tensor([[1.25], [1.0], [1.75], [1.5]]), rows, weights, sample_of)
        (tensor([ 1, -1,  0, -1]), tensor([False, False, False,  True]))
    """
    size = len(weights)
    squares = plain.square().sum(1)
    ratio = (weighted * plain).sum(1) / squares
    rank = ((ratio - 1) * size).nan_to_num(0.0).floor().clamp(0, size - 1).long()
    owners = sample_of[rank]
    error = (weighted - plain * weights.to(plain.dtype)[owners][:, None]).norm(dim=1)
    tolerance = min(1e-6 if plain.dtype == torch.float64 else 1e-3, 0.25 / size)
    zero = (squares == 0) & (weighted == 0).all(1)
    unclear = ~zero & ~(error <= tolerance * squares.sqrt())
    return torch.where(zero | unclear, -1, owners), unclear


def grouped_rows(owners: Tensor, size: int) -> Tensor:
    """Return the row numbers of each sample, ``(N, T)``, padded with -1.

    Example:
        >>> grouped_rows(torch.tensor([1, -1, 0, 1]), 3)
        tensor([[ 2, -1],
                [ 0,  3],
                [-1, -1]])
    """
    order = owners.argsort(stable=True)
    order = order[owners[order] >= 0]
    samples = owners[order]
    counts = torch.bincount(samples, minlength=size)
    starts = counts.cumsum(0) - counts
    index = owners.new_full((size, max(1, int(counts.max()))), -1)
    index[samples, torch.arange(len(order), device=owners.device) - starts[samples]] = order
    return index


def _regrouped(call: Call, g: Tensor, index: Tensor) -> tuple[Call, Tensor]:
    """Return a call and its output gradient with the rows of each sample adjacent."""
    samples, times = index.shape
    axis = Axis(0, times)
    flat = index.flatten()
    rows = len(g)
    if samples * times == rows and bool((flat == torch.arange(rows, device=flat.device)).all()):
        return replace(call, axis=axis, out=axis), g
    source_rows = flat.clamp_min(0)
    x = call.values["input"]
    gradient = g[source_rows] if rows else g.new_zeros(len(flat), *g.shape[1:])
    gradient = gradient.masked_fill((flat < 0).reshape(-1, *[1] * (g.ndim - 1)), 0)
    inputs = x[source_rows] if rows else x.new_zeros(len(flat), *x.shape[1:])
    if inputs.is_floating_point():  # a row with NaN or Inf would affect the sums of other samples
        inputs = inputs.masked_fill((flat < 0).reshape(-1, *[1] * (x.ndim - 1)), 0)
    return replace(call, values={**call.values, "input": inputs}, axis=axis, out=axis), gradient
