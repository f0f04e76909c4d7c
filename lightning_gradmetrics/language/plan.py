"""Sorts scores by unit: tokens, sequences, or hidden states of the prompt."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_gradmetrics.language.semantic_gradients import SEMANTIC_SCORES, HybridGrad, SemanticScore, SemGrad
from lightning_gradmetrics.scoring.dry_run import Requests, needs_of
from lightning_gradmetrics.scoring.recipes import Score
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve

__all__ = ["GenerationScores", "LanguageScoreLike", "planned"]

LanguageScoreLike = ScoreLike | SemanticScore
"""A score; or ``"semgrad"`` or ``"hybridgrad"``, by name or as an object."""


@dataclass(frozen=True)
class GenerationScores:
    """The scores of a generation by unit.

    Args:
        tokens: Scores of each token.
        sequences: Scores of a gradient of the sequence's mean loss.
        of_head: Scores of the head's gradient of the sequence's mean loss, by column name.
        semantic: Scores of hidden states, by name.
    """

    tokens: tuple[Score, ...] = ()
    sequences: tuple[Score, ...] = ()
    of_head: Mapping[str, Score] = field(default_factory=dict)
    semantic: Mapping[str, SemanticScore] = field(default_factory=dict)

    @property
    def requests(self) -> Requests:
        """The requested gradients of targets other than the head."""
        return needs_of(self.sequences).gradients

    @property
    def needs_backward(self) -> bool:
        """Whether a score needs more than the input and output of the head."""
        return bool(self.sequences or self.semantic)


def planned(scores: Any, *, head_gradient: bool = False) -> GenerationScores:
    """Return the scores by unit.

    Args:
        scores: One or more scores: anything that ``lgm.score`` accepts, and ``"semgrad"`` and ``"hybridgrad"``.
        head_gradient: Whether to add scores of the head's gradient of the sequence's mean loss.

    Raises:
        ValueError: If a score is unknown, not fitted, or not defined for generated text.

    Example:
        >>> plan = planned(["entropy", "gradnorm(target=all)", "semgrad"])
        >>> plan.tokens, plan.sequences, list(plan.semantic)
        ((entropy,), (gradnorm(target=all),), ['semgrad'])
    """
    semantic, others = _separated(scores)
    tokens: list[Score] = []
    sequences: list[Score] = []
    for score in resolve(others) if others else ():
        (sequences if _is_of_sequences(score) else tokens).append(score)
    of_head = {}
    if head_gradient:
        for score in tokens:
            if score.needs.head_gradient and score.arguments.get("factor", "both") == "both":
                of_head[f"{score.name}/gradient"] = score
    return GenerationScores(tuple(tokens), tuple(sequences), of_head, semantic)


def _separated(scores: Any) -> tuple[dict[str, SemanticScore], Any]:
    """Return the scores of hidden states, and all others."""
    if isinstance(scores, Mapping):
        entries: Iterable[tuple[str | None, Any]] = scores.items()
    elif isinstance(scores, Iterable) and not isinstance(scores, str):
        entries = ((None, score) for score in scores)
    else:
        entries = ((None, scores),)
    semantic: dict[str, SemanticScore] = {}
    named: dict[str, Any] = {}
    unnamed: list[Any] = []
    for name, score in entries:
        made = _semantic(score)
        if made is not None:
            semantic[name or _name_of(score, made)] = made
        elif name is None:
            unnamed.append(score)
        else:
            named[name] = score
    return semantic, named or unnamed


def _semantic(score: Any) -> SemanticScore | None:
    if isinstance(score, (SemGrad, HybridGrad)):
        return score
    if not isinstance(score, str) or score.partition("(")[0].strip() not in SEMANTIC_SCORES:
        return None
    name, _, rest = score.partition("(")
    arguments = {}
    try:
        call = ast.parse(f"f({rest or ')'}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        for keyword in call.keywords:
            value = keyword.value
            arguments[str(keyword.arg)] = value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"cannot read the score {score!r}; write {name}(semantic_token=-1)") from error
    try:
        return SEMANTIC_SCORES[name.strip()](**arguments)
    except TypeError as error:
        raise TypeError(f"the score {score!r} has an unknown argument: {error}") from error


def _name_of(score: Any, made: SemanticScore) -> str:
    return score if isinstance(score, str) else type(made).__name__.lower()


def _is_of_sequences(score: Score) -> bool:
    """Return whether a score is defined for sequences instead of tokens.

    Raises:
        ValueError: If it is not defined for generated text.
    """
    needs = score.needs
    if needs.probes:
        raise ValueError(
            f"the score {score.name!r} reads layers or runs the model again, which is not defined for generated text; allowed: scores "
            "of logits, features and gradients"
        )
    if getattr(score, "state", ...) is None:
        raise ValueError(f"the score {score.name!r} is not fitted; fit it first with lgm.fit")
    if not needs.gradients:
        return False
    if needs.features or needs.head_gradient:
        raise ValueError(
            f"the score {score.name!r} mixes gradients of the head and of other parameters, which have different units here: "
            "one value per token and one per sequence"
        )
    return True
