"""Fitting scores over a stream of batches, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.batches import split_batch
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.evidence import Evidence, Needs, needs_of
from lightning_gradmetrics.forward import call, check_inputs, check_model, preserved
from lightning_gradmetrics.head import capturing
from lightning_gradmetrics.results import finite_rows
from lightning_gradmetrics.scores import FittedScore, ScoreLike, resolve
from lightning_gradmetrics.scores.fitted import Tensors, add, fingerprint
from lightning_gradmetrics.scoring import Scorer

__all__ = ["Fitting", "fit"]


@dataclass
class _FittingScorer(Scorer):
    """Gathers the evidence that fitting needs, labels included."""

    def needs(self, classes: int) -> Needs:
        if classes not in self._needs:
            fitted = [score for score in self.scores if isinstance(score, FittedScore)]
            self._needs[classes] = needs_of([score.contribution for score in fitted], classes)  # type: ignore[list-item]
        return self._needs[classes]


@dataclass
class Fitting:
    """Accumulates what scores are fitted on.

    Args:
        scores: The scores to fit.
        like: The scorer whose settings (head, logits, engine) hold here too.
    """

    scores: Sequence[FittedScore]
    like: Scorer
    totals: dict[str, Tensors] = field(default_factory=dict)
    left_out: int = 0

    def __post_init__(self) -> None:
        self.scorer: Scorer = _FittingScorer(tuple(self.scores), self.like.head, self.like.logits, self.like.engine)

    def add(self, evidence: Evidence, finite: Tensor) -> None:
        """Add a batch; rows that are not finite are left out and counted."""
        finite = finite.to(evidence.given_logits.device)
        self.left_out += int((~finite).sum())
        kept = evidence.rows(finite)
        if len(kept.given_logits):
            for score in self.scores:
                self.totals[score.name] = add([self.totals.get(score.name, {}), score.contribution(kept)])

    def join(self, totals: Sequence[dict[str, Tensors]]) -> None:
        """Put the totals of several processes together."""
        self.totals = {score.name: add([t.get(score.name, {}) for t in totals]) for score in self.scores}

    def finish(self, model: nn.Module) -> dict[str, FittedScore]:
        """The fitted scores by name.

        Raises:
            ValueError: If no sample was seen.
        """
        if self.left_out:
            warnings.warn(f"{self.left_out} samples with NaN or Inf were left out of the fit", stacklevel=2)
        if not all(self.totals.get(score.name) for score in self.scores):
            raise ValueError("the data to fit the scores on hold no samples: give a dataloader with finite samples")
        return {score.name: score.fitted(self.totals[score.name], fingerprint(model)) for score in self.scores}


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    scores: ScoreLike | Iterable[ScoreLike],
    *,
    outside: Iterable[Any] = (),
    **options: Any,
) -> list[FittedScore]:
    """Fit scores without a Trainer.

    Args:
        model: A classifier in eval mode, on the device of the batches.
        batches: Batches of in-distribution data, as a dataloader gives them: ``(inputs, labels)``, a tensor, or a mapping.
        scores: The scores to fit.
        outside: Batches of out-of-distribution data, for detectors that are fitted on both kinds.
        **options: ``head``, ``logits`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        The fitted scores, ready for :func:`lightning_gradmetrics.score`.

    Raises:
        ValueError: If a score needs no fit, or there are no samples.
    """
    wanted = resolve(scores)
    plain = [score.name for score in wanted if not isinstance(score, FittedScore)]
    if plain:
        raise ValueError(f"the scores {', '.join(plain)} need no fit")
    fitting = Fitting([score for score in wanted if isinstance(score, FittedScore)], Scorer(wanted, **options))
    check_model(model)
    for kind, stream in ((False, batches), (True, outside)):
        for batch in stream:
            inputs, labels = split_batch(batch)
            check_inputs(model, inputs)
            with preserved(model), capturing(fitting.scorer.capture(model)) as capture, torch.no_grad(), eager():
                logits = call(model, inputs)
            flags = torch.full((len(fitting.scorer.logits(logits)),), kind)
            evidence = fitting.scorer.evidence(capture, model, inputs, labels, flags)
            fitting.add(evidence, finite_rows(inputs, [evidence.given_logits]))
    return [replace(score) for score in fitting.finish(model).values()]
