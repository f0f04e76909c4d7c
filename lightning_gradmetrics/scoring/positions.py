"""Scores at positions: tests whether a score works on maps, and computes its values for positions as rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["ROWS", "as_rows", "by_rows", "made_up_maps", "sampled_rows", "works_on_maps"]

ROWS = 2**16
"""Positions that are scored at the same time as rows."""

SAMPLED = 1024
"""Largest number of positions of a sample that fitted scores are fitted on."""


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
    return replace(rows, given_head=evidence.given_head, one_logit=evidence.one_logit)


def _rows_of(maps: Tensor) -> Tensor:
    """Return ``(N, C, *P)`` as rows ``(M, C)``."""
    return maps.movedim(1, -1).reshape(-1, maps.shape[1])


def _blocks(rows: Evidence) -> Iterator[Evidence]:
    everything = torch.arange(len(rows.given_logits), device=rows.given_logits.device)
    for block in everything.split(ROWS):  # type: ignore[no-untyped-call]
        yield rows.rows(block)


def by_rows(function: Callable[[Evidence], Tensor], evidence: Evidence, with_features: bool) -> Tensor:
    """Return a score's values for the positions as rows, ``(N, *P)``; one sample after the other, in blocks.

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


def sampled_rows(evidence: Evidence, keep: Tensor, keys: Tensor, with_features: bool) -> tuple[Evidence, Tensor] | None:
    """Return a bounded sample of the positions as rows ``(M, C)``, and a key for each; ``None`` if there are none.

    The sample depends only on the keys, not on the batch. Where labels are given, positions without one are left out.

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
        places = torch.arange(len(rows.given_logits))
        if rows.given_labels is not None:
            places = places[(rows.given_labels >= 0).cpu()]
        key = int(keys[number])
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        chosen = places[torch.randperm(len(places), generator=generator)[:SAMPLED]].sort().values
        if len(chosen):
            parts.append(rows.rows(chosen.to(keep.device)))
            row_keys.append(torch.randint(-(2**62), 2**62, (len(chosen),), generator=generator))
    return (_joined(parts), torch.cat(row_keys)) if parts else None


def _joined(parts: Sequence[Evidence]) -> Evidence:
    """Return the rows of several samples together."""
    columns: list[Tensor | None] = []
    for name in ("given_logits", "given_features", "given_labels", "given_ood"):
        values = [getattr(part, name) for part in parts]
        columns.append(None if values[0] is None else torch.cat(values))
    logits, features, labels, ood = columns
    assert logits is not None
    return replace(
        parts[0], given_logits=logits, given_features=features, given_labels=labels, given_ood=ood, _softmax={}
    )


def made_up_maps() -> Evidence:
    """Return evidence of maps of equal height, width and number of classes, on which a wrong axis is noticed by value."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64)
    features = torch.rand(3, 3, 3, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (3, 3, 3), generator=generator)
    head = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return Evidence(logits, features, labels, torch.tensor([False, True, False]), given_head=(head, None))


def works_on_maps(function: Callable[[Evidence], Tensor]) -> bool:
    """Return whether a score has the same values for maps as for their positions as rows.

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
