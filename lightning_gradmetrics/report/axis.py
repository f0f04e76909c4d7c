"""A score's axis: limits that outliers cannot stretch, and a log scale where the values span decades."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from lightning_gradmetrics.report.curves import Floats

__all__ = ["Axis", "choose_axis"]

_DECADES_FOR_LOG = 2.5
_LINEAR, _LOG, _NEGATIVE_LOG = "linear", "log", "log of the negative"


@dataclass(frozen=True)
class Axis:
    """Where values are drawn: ``place`` maps values to positions, ``ticks`` are (position, text) pairs."""

    kind: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, values: Floats) -> Floats:
        """Positions of values, with what lies beyond the limits moved onto them."""
        positions: Floats = np.clip(_forward(self.kind)(values), self.low, self.high)
        return positions


def choose_axis(groups: Sequence[Floats]) -> Axis:
    """The axis for several groups of finite values: from the lowest 0.5 % quantile of a group to the highest 99.5 %.

    Example:
        >>> choose_axis([np.array([0.0, 1.0, 2.0])]).kind
        'linear'
        >>> [text for _, text in choose_axis([np.logspace(-6, 0, 1000)]).ticks]
        ['1e-6', '1e-4', '0.01', '1']
    """
    groups = [group for group in groups if len(group)]
    kind = _kind(np.concatenate(groups)) if groups else _LINEAR
    placed = [_forward(kind)(group) for group in groups]
    placed = [group[np.isfinite(group)] for group in placed]
    placed = [group for group in placed if len(group)] or [np.array([0.0, 1.0])]
    low = min(float(np.quantile(group, 0.005)) for group in placed)
    high = max(float(np.quantile(group, 0.995)) for group in placed)
    pad = 0.02 * (high - low) or max(abs(low) * 0.05, 1e-12)
    low, high = low - pad, high + pad
    return Axis(kind, low, high, _linear_ticks(low, high) if kind == _LINEAR else _log_ticks(kind, low, high))


def _kind(values: Floats) -> str:
    for kind, sided in ((_LOG, values), (_NEGATIVE_LOG, -values)):
        positive = sided[sided > 0]
        if sided.min() >= 0 and len(positive) >= 0.9 * len(sided):
            low, high = np.log10(np.quantile(positive, (0.01, 0.99)))
            return kind if high - low >= _DECADES_FOR_LOG else _LINEAR
    return _LINEAR


def _forward(kind: str) -> Callable[[Floats], Floats]:
    def log(values: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            logarithm: Floats = np.log10(values)
        return logarithm

    if kind == _LINEAR:
        return lambda values: values
    return log if kind == _LOG else lambda values: -log(-values)


def _linear_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
    places = [float(x) for x in locator.tick_values(low, high) if low <= x <= high]
    for digits in range(1, 17):
        texts = [_short(place, digits) for place in places]
        if len(set(texts)) == len(texts) and all(
            np.isclose(float(t), p, rtol=1e-9) for t, p in zip(texts, places, strict=True)
        ):
            break
    return tuple(zip(places, texts, strict=True))


def _log_ticks(kind: str, low: float, high: float) -> tuple[tuple[float, str], ...]:
    exponents = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    step = max(1, -(-len(exponents) // 4))
    exponents_shown = [k for k in exponents if k % step == 0]
    sign = "-" if kind == _NEGATIVE_LOG else ""
    powers = [(float(k), k if kind == _LOG else -k) for k in exponents_shown]
    return tuple((place, sign + (f"{10.0**k:g}" if -3 < k < 4 else f"1e{k}")) for place, k in powers)


def _short(place: float, digits: int) -> str:
    """Rounded to significant digits: plain from 0.001 to 99999, otherwise as 1e-5 or 2e6, and never a minus zero."""
    text = f"{place:.{digits}g}"
    if float(text) == 0:
        return "0"
    mantissa, _, exponent = f"{float(text):.{digits - 1}e}".partition("e")
    return f"{float(text):.12g}" if -4 < int(exponent) < 5 else f"{float(mantissa):g}e{int(exponent)}"
