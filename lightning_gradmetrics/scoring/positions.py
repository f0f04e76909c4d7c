"""Computes scores at positions: directly on maps if the score supports it, otherwise with positions as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.head_features import HeadFeatures
from lightning_gradmetrics.gradients.statistics import Moment, Moments
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["ROWS", "as_rows", "by_blocks", "by_rows", "made_up_maps", "sampled_rows", "works_on_maps"]

ROWS = 2**16
"""Number of positions per block when they are scored as rows."""

ENTRIES = {"cpu": 2**19}
"""Number of logits per block, by device; on a CPU larger blocks do not fit into the cache."""

SAMPLED = 1024
"""Largest number of positions per sample that fitted scores are fitted on."""


def as_rows(evidence: Evidence, with_features: bool) -> Evidence:
    """Return the evidence of all positions as rows ``(M, C)``, sample after sample.

    Args:
        evidence: Evidence with positions.
        with_features: Whether to keep the head's input as vectors.

    Example:
        >>> as_rows(Evidence(torch.zeros(2, 5, 3, 4)), False).given_logits.shape
        torch.Size([24, 5])
    """
    features = None
    if with_features and evidence.given_features is not None:
        features = _rows_of(evidence.features)
    labels = None if evidence.given_labels is None else evidence.given_labels.reshape(-1)
    ood = evidence.given_ood
    if ood is not None:
        ood = ood.repeat_interleave(evidence.given_logits[0, 0].numel())
    rows = Evidence(_rows_of(evidence.given_logits), features, labels, ood)
    slope = evidence.given_slope
    slope = _rows_of(slope) if isinstance(slope, Tensor) else slope
    return replace(rows, given_head=evidence.given_head, one_logit=evidence.one_logit, given_slope=slope)


def _rows_of(maps: Tensor) -> Tensor:
    """Return ``(N, C, *P)`` as rows ``(M, C)``."""
    return maps.movedim(1, -1).reshape(-1, maps.shape[1])


def _blocks(rows: Evidence) -> Iterator[Evidence]:
    everything = torch.arange(len(rows.given_logits), device=rows.given_logits.device)
    for block in everything.split(ROWS):  # type: ignore[no-untyped-call]
        yield rows.rows(block)


def by_rows(function: Callable[[Evidence], Tensor], evidence: Evidence, with_features: bool) -> Tensor:
    """Return a score computed with the positions as rows, ``(N, *P)``: one sample after the other, in blocks.

    Args:
        function: A score of rows.
        evidence: Evidence with positions.
        with_features: Whether the score reads the head's input.
    """
    maps = []
    for number in range(len(evidence.given_logits)):
        sample = evidence.rows(torch.tensor([number], device=evidence.given_logits.device))
        parts = []
        for block in _blocks(as_rows(sample, with_features)):
            parts.append(function(block))
        maps.append(torch.cat(parts).reshape(evidence.shape[1:]))
    return torch.stack(maps) if maps else evidence.given_logits.new_empty(evidence.shape)


@dataclass(frozen=True)
class _PartOfFeatures(HeadFeatures):
    """The head's input at some of the positions, from moments computed once for all of them."""

    whole: HeadFeatures = field(default_factory=lambda: HeadFeatures(()))
    part: slice = field(default_factory=lambda: slice(None))
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def block_moments(self, wanted: Iterable[Moment]) -> list[Moments]:
        """Return moments over the features of each block, ``(N, M)``."""
        parts = []
        for moments in self.whole.block_moments(tuple(wanted)):
            own: Moments = {}
            for key, values in moments.items():
                own[key] = values.flatten(1)[:, self.part]
            parts.append(own)
        return parts

    def dense(self) -> Tensor:
        """Return the features, ``(N, D', M)``."""
        if not self.vectors:
            self.vectors["all"] = self.whole.dense().flatten(2)
        return self.vectors["all"][:, :, self.part]

    def rows(self, keep: Tensor) -> HeadFeatures:
        """Return the features of the samples that ``keep`` marks or lists."""
        return replace(self, whole=self.whole.rows(keep), vectors={})

    def precise(self) -> HeadFeatures:
        """Return the same object: the whole input has been converted already."""
        return self


def by_blocks(functions: Sequence[Callable[[Evidence], Tensor]], evidence: Evidence) -> list[Tensor]:
    """Return the values of scores that work on maps, ``(N, *P)`` each, computed for blocks of positions.

    Args:
        functions: The scores.
        evidence: Evidence with positions.
    """
    values: list[list[Tensor]] = [[] for _ in functions]
    for block in _position_blocks(evidence):
        for number, function in enumerate(functions):
            values[number].append(function(block))
    joined = []
    for parts in values:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        joined.append(whole.reshape(evidence.shape))
    return joined


def _position_blocks(evidence: Evidence) -> Iterator[Evidence]:
    """Yield the evidence of consecutive positions, ``(N, C, M)``, in one block if they are few."""
    logits = evidence.given_logits.flatten(2)
    entries = ENTRIES.get(logits.device.type, 2**24)
    if logits.numel() <= 2 * entries:
        yield evidence
        return
    step = max(1, entries // (len(logits) * logits.shape[1]))
    whole = None if evidence.given_features is None else evidence.layer_input
    slope = evidence.given_slope.flatten(2) if isinstance(evidence.given_slope, Tensor) else None
    labels = None if evidence.given_labels is None else evidence.given_labels.flatten(1)
    vectors: dict[str, Tensor] = {}
    for start in range(0, logits.shape[2], step):
        section = slice(start, start + step)
        changed: dict[str, Any] = {"given_logits": logits[:, :, section].contiguous(), "_softmax": {}}
        if whole is not None:
            changed["given_features"] = _PartOfFeatures(whole.blocks, whole=whole, part=section, vectors=vectors)
        if slope is not None:
            changed["given_slope"] = slope[:, :, section]
        if labels is not None:
            changed["given_labels"] = labels[:, section]
        yield replace(evidence, **changed)


def sampled_rows(evidence: Evidence, keep: Tensor, keys: Tensor, with_features: bool) -> tuple[Evidence, Tensor] | None:
    """Return a bounded sample of the positions as rows ``(M, C)``, and a key for each; ``None`` if there are none.

    The sample depends only on the keys, not on the batch. If labels are given, positions without a label are left out.

    Args:
        evidence: Evidence with positions.
        keep: The samples to use ``(N,)``, bool.
        keys: An integer for each sample ``(N,)``, on the CPU.
        with_features: Whether to keep the head's input as vectors.
    """
    parts: list[Evidence] = []
    row_keys: list[Tensor] = []
    for number in keep.nonzero().flatten().tolist():
        rows = as_rows(evidence.rows(torch.tensor([number], device=keep.device)), with_features)
        candidates = torch.arange(len(rows.given_logits))
        if rows.given_labels is not None:
            candidates = candidates[(rows.given_labels >= 0).cpu()]
        key = int(keys[number])
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:SAMPLED]].sort().values
        if len(chosen):
            parts.append(rows.rows(chosen.to(keep.device)))
            row_keys.append(torch.randint(-(2**62), 2**62, (len(chosen),), generator=generator))
    return (_joined(parts), torch.cat(row_keys)) if parts else None


def _joined(parts: Sequence[Evidence]) -> Evidence:
    """Return the rows of several samples together."""
    columns: list[Tensor | None] = []
    for name in ("given_logits", "given_features", "given_labels", "given_ood", "given_slope"):
        values = [getattr(member, name) for member in parts]
        columns.append(torch.cat(values) if isinstance(values[0], Tensor) else values[0])
    logits, features, labels, ood, slope = columns
    assert logits is not None and slope is not None
    rows = replace(parts[0], given_logits=logits, given_features=features, given_labels=labels, given_ood=ood)
    return replace(rows, given_slope=slope, _softmax={})


def made_up_maps() -> Evidence:
    """Return synthetic maps whose height, width and number of classes are equal, so that a wrong axis changes values, not shapes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64)
    features = torch.rand(3, 3, 3, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (3, 3, 3), generator=generator)
    head = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return Evidence(logits, features, labels, torch.tensor([False, True, False]), given_head=(head, None))


def works_on_maps(function: Callable[[Evidence], Tensor]) -> bool:
    """Return whether a score has the same values for maps as for the same positions as rows.

    Args:
        function: A score.

    Example:
        >>> works_on_maps(lambda evidence: evidence.logits.amax(1))
        True
        >>> works_on_maps(lambda evidence: evidence.logits.amax(-1))
        False
    """
    evidence = made_up_maps()
    try:
        values = function(evidence)
    except Exception:  # a score of rows may raise any error on maps
        return False
    expected = by_rows(function, evidence, True)
    if not isinstance(values, Tensor) or values.shape != expected.shape:
        return False
    return torch.allclose(values.to(expected.dtype), expected, rtol=1e-9, atol=1e-12, equal_nan=True)
