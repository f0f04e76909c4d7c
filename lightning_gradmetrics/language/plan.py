"""Sorts scores by unit: tokens, or whole sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.evidence import TextProbe
from lightning_gradmetrics.scoring.recipes import Score
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve

__all__ = ["GenerationScores", "planned"]


@dataclass(frozen=True)
class GenerationScores:
    """The scores of a generation by unit.

    Args:
        tokens: Scores of each token.
        sequences: Scores of a gradient of the sequence's mean loss, or of hidden states.
        of_head: Scores of the head's gradient of the sequence's mean loss, by column name.
    """

    tokens: tuple[Score, ...] = ()
    sequences: tuple[Score, ...] = ()
    of_head: Mapping[str, Score] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """The evidence that the scores of sequences need."""
        return needs_of(self.sequences)


def planned(
    scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike], *, head_gradient: bool = False
) -> GenerationScores:
    """Return the scores by unit.

    Args:
        scores: One or more scores: anything that ``lgm.score`` accepts, and ``"semgrad"`` and ``"hybridgrad"``.
        head_gradient: Whether to add scores of the head's gradient of the sequence's mean loss.

    Raises:
        ValueError: If a score is unknown, not fitted, or not defined for generated text.

    Example:
        >>> plan = planned(["entropy", "gradnorm(target=all)", "semgrad"])
        >>> plan.tokens, plan.sequences
        ((entropy,), (gradnorm(target=all), semgrad))
    """
    tokens: list[Score] = []
    sequences: list[Score] = []
    for score in resolve(scores):
        (sequences if _is_of_sequences(score) else tokens).append(score)
    of_head = {}
    if head_gradient:
        for score in tokens:
            if score.needs.head_gradient and score.arguments.get("factor", "both") == "both":
                of_head[f"{score.name}/gradient"] = score
    return GenerationScores(tuple(tokens), tuple(sequences), of_head)


def _is_of_sequences(score: Score) -> bool:
    """Return whether a score is defined for sequences instead of tokens.

    Raises:
        ValueError: If it is not defined for generated text.
    """
    needs = score.needs
    if not all(isinstance(probe, TextProbe) for probe in needs.probes):
        raise ValueError(
            f"the score {score.name!r} reads layers or runs the model again, which is not defined for generated text; allowed: scores "
            "of logits, features and gradients"
        )
    if getattr(score, "state", ...) is None:
        raise ValueError(f"the score {score.name!r} is not fitted; fit it first with lgm.fit")
    if not needs.gradients and not needs.probes:
        return False
    if needs.features or needs.head_gradient:
        raise ValueError(
            f"the score {score.name!r} mixes gradients of the head and of other parameters, which have different units here: "
            "one value per token and one per sequence"
        )
    return True
