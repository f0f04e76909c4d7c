"""Finds how the logits of a segmentation model are composed of the outputs of heads, by comparing values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.carry import IDENTITY, LINEAR_MODES, Carry, find_carry
from lightning_gradmetrics.classifier.head import LayerCall
from lightning_gradmetrics.classifier.patches import Patches

__all__ = ["Composition", "Part", "compose", "recompose", "reproduces"]

MOST_CALLS = 4
"""Largest number of calls of one layer whose average is tried."""

MOST_CANDIDATES = 8
"""Number of layers, at the end of the forward pass, whose sums are tried."""

CHECKED = 64
"""Number of positions at which a layer's output is compared with its weight."""


@dataclass(frozen=True)
class Part:
    """One call of a head.

    Args:
        name: The layer's name.
        call: The number of the call among those of the layer.
        carry: The map that is applied to its output before all parts are added.
        share: Its factor in the sum.
    """

    name: str
    call: int = 0
    carry: Carry = IDENTITY
    share: float = 1.0


@dataclass(frozen=True)
class Composition:
    """The logits as a sum of heads, mapped to the logits' grid.

    Args:
        parts: The summands: calls of heads.
        carry: The map that is applied to their sum.
    """

    parts: tuple[Part, ...]
    carry: Carry = IDENTITY

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts))


def compose(calls: Sequence[LayerCall], logits: Tensor) -> list[Composition]:
    """Return every composition of layer outputs that equals the logits, the simplest kind first; empty if none is found.

    Three kinds are tried: one layer; the average of several calls of one layer on reflected inputs; the sum of two or
    three layers. Every sum may be resized and cropped.

    Args:
        calls: Calls of the layers that may be heads, with their outputs ``(N, C, *Q)``.
        logits: What the model returned, ``(N, C, *P)``.

    Example:
        >>> z = torch.randn(1, 3, 4, 4)
        >>> (made,) = compose([LayerCall("head", z, z, None, None)], nn.functional.interpolate(z, scale_factor=2))
        >>> made.names, made.carry.mode
        (('head',), 'nearest')
    """
    for kind in (_unchanged, _single, _reflected, _added):
        compositions = list(kind(calls, logits))
        if compositions:
            return compositions
    return []


def _output(call: LayerCall) -> Tensor:
    assert call.output is not None
    return call.output


def _numbered(calls: Sequence[LayerCall]) -> dict[str, list[LayerCall]]:
    by_name: dict[str, list[LayerCall]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    return by_name


def _unchanged(calls: Sequence[LayerCall], logits: Tensor) -> Iterator[Composition]:
    """Yield the layers that return the logits without resizing."""
    for name, own in _numbered(calls).items():
        for number, call in enumerate(own):
            if torch.equal(_output(call), logits):
                yield Composition((Part(name, number),))
                break


def _single(calls: Sequence[LayerCall], logits: Tensor) -> Iterator[Composition]:
    for name, own in _numbered(calls).items():
        for number, call in enumerate(own):
            carry = find_carry(_output(call), logits)
            if carry is not None:
                yield Composition((Part(name, number),), carry)
                break


def _reflected(calls: Sequence[LayerCall], logits: Tensor) -> Iterator[Composition]:
    axes = range(logits.ndim - 2)
    flips: list[tuple[int, ...]] = []
    for count in range(len(axes) + 1):
        flips += itertools.combinations(axes, count)
    for name, own in _numbered(calls).items():
        if not 2 <= len(own) <= MOST_CALLS or any(call.output_shape != own[0].output_shape for call in own):
            continue
        for chosen in itertools.product(reversed(flips), repeat=len(own) - 1):
            parts = [Part(name, 0, IDENTITY, 1 / len(own))]
            for number, flip in enumerate(chosen):
                parts.append(Part(name, number + 1, Carry(flips=flip), 1 / len(own)))
            carry = find_carry(_sum(parts, calls), logits)
            if carry is not None:
                yield Composition(tuple(parts), carry)
                break


def _added(calls: Sequence[LayerCall], logits: Tensor) -> Iterator[Composition]:
    last = [own[-1] for own in _numbered(calls).values()][-MOST_CANDIDATES:]
    for count in (2, 3):
        for chosen in itertools.combinations(last, count):
            for parts in _resized_parts(chosen):
                carry = find_carry(_sum(parts, chosen), logits)
                if carry is not None:
                    yield Composition(tuple(parts), carry)
                    return


def _resized_parts(calls: Sequence[LayerCall]) -> Iterator[list[Part]]:
    """Yield the parts with smaller outputs resized to the largest, for every common kind of resizing."""
    outputs = [_output(call) for call in calls]
    size = _largest_size(outputs)
    ways: list[list[Carry]] = []
    for output in outputs:
        ways.append([IDENTITY] if tuple(output.shape[2:]) == size else _common_resizes(size))
    for carries in itertools.product(*ways):
        yield [Part(call.name, 0, carry) for call, carry in zip(calls, carries, strict=True)]


def _largest_size(outputs: Sequence[Tensor]) -> tuple[int, ...]:
    shapes = torch.tensor([output.shape[2:] for output in outputs])
    return tuple(shapes.amax(0).tolist())


def _common_resizes(size: tuple[int, ...]) -> list[Carry]:
    linear = LINEAR_MODES.get(len(size))
    if linear is None:
        return []
    resize = Carry(size=size, mode=linear, align_corners=False)
    return [resize, replace(resize, align_corners=True), Carry(size=size, mode="nearest")]


def _sum(parts: Sequence[Part], calls: Sequence[LayerCall]) -> Tensor:
    """Return the sum of the parts' outputs on their common grid."""
    by_name = _numbered(calls)
    total: Tensor | None = None
    for part in parts:
        carried = part.carry(_output(by_name[part.name][part.call]))
        if part.share != 1:
            carried = part.share * carried
        total = carried if total is None else total + carried
    assert total is not None
    return total


def recompose(known: Composition, calls: Sequence[LayerCall], logits: Tensor) -> Composition | None:
    """Return the composition adapted to another batch, which may have another size; ``None`` if it does not hold there.

    Args:
        known: The composition of an earlier batch.
        calls: The calls of its layers.
        logits: What the model returned.
    """
    by_name = _numbered(calls)
    outputs = []
    for part in known.parts:
        if part.call >= len(by_name.get(part.name, [])):
            return None
        outputs.append(_output(by_name[part.name][part.call]))
    size = _largest_size(outputs)
    parts = []
    for part in known.parts:
        resized = part.carry if part.carry.size is None else replace(part.carry, size=size)
        parts.append(replace(part, carry=resized))
    try:
        total = _sum(parts, calls)
    except RuntimeError:
        return None
    carry = find_carry(total, logits, known.carry)
    return None if carry is None else Composition(tuple(parts), carry)


@torch.no_grad()
def reproduces(layer: nn.Module, patches: Patches, call: LayerCall) -> bool:
    """Return whether a layer's weight and bias reproduce its output at some positions, up to rounding.

    Args:
        layer: The layer.
        patches: Its geometry.
        call: A call of the layer, with the classes on axis 1.
    """
    features, output = call.features, call.output
    assert features is not None and output is not None
    weight = patches.weight_matrix(layer.weight).double()  # type: ignore[arg-type]
    count = output[0, 0].numel()
    positions = torch.linspace(0, count - 1, min(CHECKED, count)).long().to(output.device)
    columns = []
    for tap in patches.taps(features[:1]):
        columns.append(tap.flatten(2)[0][:, positions].double())
    vectors = torch.stack(columns, 1)
    expected = output[0].flatten(1)[:, positions].double()
    groups = patches.groups
    grouped = vectors.unflatten(0, (groups, -1)).flatten(1, 2)  # type: ignore[no-untyped-call]
    made = torch.einsum("gcd,gdm->gcm", weight.unflatten(0, (groups, -1)), grouped).flatten(0, 1)  # type: ignore[no-untyped-call]
    size = torch.einsum("gcd,gdm->gcm", weight.unflatten(0, (groups, -1)).abs(), grouped.abs()).flatten(0, 1)  # type: ignore[no-untyped-call]
    if layer.bias is not None:
        bias = layer.bias.double().unsqueeze(1)  # type: ignore[operator]
        made, size = made + bias, size + bias.abs()
    rounding = torch.finfo(output.dtype).eps
    if output.is_cuda and output.dtype == torch.float32:
        rounding = 1e-3  # TF32
    known = made.isfinite() & expected.isfinite()
    return bool(((made - expected).abs() <= 64 * rounding * size + 1e-30)[known].all())
