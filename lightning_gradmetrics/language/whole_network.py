"""Gradients of a sequence's loss with respect to any parameters, by the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.statistics import GradientStatistics, Moment
from lightning_gradmetrics.language.model import LanguageModel, logits_of
from lightning_gradmetrics.language.sequences import Padded

__all__ = ["answer_weights", "network_statistics", "token_objective"]

PREFIX = "model."

PER_TOKEN = ("pseudo_label", "uniform", "label", "confounding", "confounding_logits")
"""Objectives whose mean over the tokens is used as the loss of the sequence."""


def token_objective(objective: Objective) -> Objective:
    """Return the objective, after checking that its mean over the tokens of a sequence is defined.

    Raises:
        ValueError: If it is the loss of a single class.
    """
    if objective.function is None and objective.name not in PER_TOKEN:
        raise ValueError(
            f"the objective {objective.name!r} takes one backward pass per token of the vocabulary and is not defined for a "
            f"sequence; allowed: {', '.join(PER_TOKEN)}, or a callable. Use target='head' for token scores"
        )
    return objective


def answer_weights(batch: Padded) -> tuple[Tensor, Tensor]:
    """Return the tokens that each position predicts and their weights in the mean over the answer, ``(N, T - 1)`` each.

    Args:
        batch: The batch.

    Example:
        >>> from lightning_gradmetrics.language.sequences import paired, right_padded
        >>> answer_weights(right_padded(paired([[1]], [[2, 3]]), torch.device("cpu")))
        (tensor([[2, 3]]), tensor([[0.5000, 0.5000]], dtype=torch.float64))
    """
    weights = torch.zeros(batch.ids.shape[0], batch.ids.shape[1] - 1, dtype=torch.float64)
    for row, sequence in enumerate(batch.sequences):
        weights[row, sequence.positions] = 1 / len(sequence.answer)
    return batch.ids[:, 1:], weights.to(batch.ids.device)


class SequenceLosses(nn.Module):
    """Returns the mean losses of each sequence's answer tokens ``(N, K)``, one column per objective."""

    def __init__(self, model: LanguageModel, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.model = model.module
        self.training = model.module.training
        self._objectives = tuple(objectives)
        self._options = model.parameters

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        options = {"attention_mask": mask, "use_cache": False}
        output = self.model(ids, **{key: value for key, value in options.items() if key in self._options})
        logits = logits_of(output, self.model)
        rows = logits[:, :-1].reshape(-1, logits.shape[-1])
        columns = []
        for objective in self._objectives:
            losses = objective.loss(labels.reshape(-1))(rows).view(labels.shape)
            columns.append((losses * weights.to(losses.dtype)).sum(1))
        return torch.stack(columns, 1)


def _column(losses: Tensor, number: int) -> Tensor:
    return losses[:, number]


def network_statistics(
    model: LanguageModel,
    batch: Padded,
    wanted: Mapping[Objective, set[Moment]],
    accepts: Callable[[str], bool] | None,
    engine: str = "auto",
) -> dict[Objective, GradientStatistics]:
    """Return statistics of the gradient of each sequence's mean loss, ``(N, P)``, by objective.

    Args:
        model: The model.
        batch: The sequences.
        wanted: The objectives per token and the moments of their gradients to compute.
        accepts: A predicate on parameter names; ``None`` accepts all.
        engine: The engine.
    """
    objectives = tuple(token_objective(objective) for objective in wanted)
    moments: set[Moment] = set()
    for keys in wanted.values():
        moments |= keys
    labels, weights = answer_weights(batch)
    columns = [Objective(f"column {number}", (), partial(_column, number=number)) for number in range(len(objectives))]
    results = gradient_statistics(
        model.losses.setdefault(objectives, SequenceLosses(model, objectives)),
        (batch.ids, batch.mask, labels, weights),
        columns,
        lambda name: accepts is None or accepts(model.prefix + name.removeprefix(PREFIX)),
        per_parameter=True,
        statistics=_statistics_of(moments),
        logits=_same,
        engine=engine,
    )
    return dict(zip(objectives, results, strict=True))


def _same(output: Tensor) -> Tensor:
    return output


def _statistics_of(moments: set[Moment]) -> list[str]:
    names: list[str] = []
    for moment in moments:
        if isinstance(moment, str):
            names.append("mean" if moment == "sum" else moment)
        else:
            names.append(f"l{moment:g}")
    return names
