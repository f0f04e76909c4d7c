"""Computes the scores of an observed batch: collects the evidence once and shares it among the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import (
    as_rows,
    gradients_enabled,
    logits_in,
    logits_of,
    map_tensors,
    preserved,
)
from lightning_gradmetrics.classifier.head import returning_logits
from lightning_gradmetrics.classifier.observation import redirected
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.api import ENGINES
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.statistics import GradientStatistics, Moment, result_dtype
from lightning_gradmetrics.scoring.agreement import are_close
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.evidence import Evidence, Target, by_passes, parameter_filter
from lightning_gradmetrics.scoring.evidence_checks import (
    check_first_rows,
    check_parameters,
    has_two_sample_axes,
    label_problem,
)
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.layer_rows import MixedRowsError, find_sample_axes, has_known_axes
from lightning_gradmetrics.scoring.logit_checks import check_logits, known_labels, not_per_position, two_columns
from lightning_gradmetrics.scoring.positions import by_blocks
from lightning_gradmetrics.scoring.registry import Score
from lightning_gradmetrics.scoring.repeated_call import RepeatedCall
from lightning_gradmetrics.scoring.states import check_head

__all__ = ["Scorer"]


@dataclass
class Scorer:
    """Computes a set of scores with shared forward and backward passes.

    Args:
        scores: The scores.
        head: The name of the classification head, or ``None`` to find it.
        logits_fn: Returns the logits ``(N, C)`` from the model's output.
        engine: The engine of the scores that need a backward pass.
        looks: Functions other than the scores that also need evidence.
        found_head: The name of the head in the last evidence, or ``None``.
    """

    scores: tuple[Score, ...]
    head: str | None = None
    logits_fn: Callable[[Any], Tensor] = logits_in
    engine: str = "auto"
    looks: Sequence[Callable[[Evidence], Any]] = ()
    found_head: str | None = None
    _needs: dict[int, Needs] = field(default_factory=dict, repr=False)
    _needs_of: tuple[Any, Any] = field(default=(None, None), repr=False)
    _is_checked: bool = field(default=False, repr=False)
    _of_tokens: tuple[Any, Scorer] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; available: {', '.join(ENGINES)}")

    def needs(self, classes: int) -> Needs:
        """Return the needs of the scores and of ``looks`` for this number of classes."""
        if self._needs_of[0] is not self.scores or self._needs_of[1] is not self.looks:  # a fit replaces the scores
            self._needs, self._needs_of = {}, (self.scores, self.looks)
        if classes not in self._needs:
            self._needs[classes] = needs_of([*self.scores, *self.looks], classes)
        return self._needs[classes]

    def of_tokens(self) -> Scorer:
        """Return the scorer of the scores that have one value per token of a text."""
        known = self._of_tokens
        if known is None or known[0] is not self.scores or known[1].looks is not self.looks:
            scores = tuple(score for score in self.scores if not score.needs.of_texts)
            self._of_tokens = known = self.scores, replace(self, scores=scores)
        return known[1]

    def evidence(self, model: nn.Module, batch: ObservedBatch) -> Evidence:
        """Return the evidence that the scores need from an observed batch.

        Args:
            model: The model, for evidence that needs another forward pass.
            batch: The batch.

        Raises:
            ValueError: If a required label or input is missing, or the model's forward pass cannot be repeated.
        """
        check_logits(batch.logits)
        if batch.head is not None:
            self.found_head = batch.head.name
            check_head(self.scores, batch.head.name)
        scorer = self if batch.tokens is None else self.of_tokens()
        needs = scorer.needs(batch.logits.shape[1])
        labels = None if batch.labels is None else batch.labels.to(batch.logits.device)
        head = None if batch.head is None else (batch.head.weight, batch.head.bias)
        if batch.logits.ndim > 2:
            return self._evidence_of_positions(batch, needs, labels, head)
        if needs.labels:
            self.check_labels(labels, batch.logits, batch.dataset)
        repeated = RepeatedCall(model, batch, self.head, self.logits_fn)
        if needs.gradients or needs.probes:
            self._check_repeatable(repeated)
            _find_sample_axes(repeated, needs)
        gradients, probes = _gradients(repeated, needs, self.engine, labels), _probes(repeated, needs)
        return Evidence(
            batch.logits, batch.features, labels, batch.ood, gradients, probes, head, batch.one_logit, batch.slope
        )

    def _evidence_of_positions(
        self, batch: ObservedBatch, needs: Needs, labels: Tensor | None, head: tuple[Tensor, Tensor | None] | None
    ) -> Evidence:
        """Return the evidence of a model with one prediction per position.

        Raises:
            ValueError: If a score is not defined per position, or needs labels and there are none.
        """
        if needs.gradients or needs.probes:
            raise ValueError(not_per_position(self.scores, tuple(batch.logits.shape[2:])))
        known = None if labels is None else known_labels(labels, batch.logits)
        if needs.labels and known is None:
            raise ValueError(
                f"the score {', '.join(repr(score.name) for score in self.scores if score.needs.labels)} needs true labels of "
                "the positions, and there are none: pass targets=, or return batches (inputs, labels)"
            )
        evidence = Evidence(batch.logits, batch.features, known, batch.ood, given_head=head)
        return replace(evidence, one_logit=batch.one_logit, given_slope=batch.slope)

    def __call__(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return the scores by name, ``(N,)`` each, or ``(N, *P)`` at positions: NaN where a score needs an unknown label."""
        dtype = result_dtype(evidence.given_logits.dtype)
        values, blocked = {}, self._by_blocks(evidence)
        for score in self.scores:
            uncertainties = blocked[score.name] if score.name in blocked else score(evidence)
            values[score.name] = uncertainties.to(dtype)
            if evidence.has_positions and score.needs.labels:
                values[score.name] = values[score.name].masked_fill(evidence.labels < 0, torch.nan)
        return values

    def _by_blocks(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return the scores that depend on single positions only, computed in blocks."""
        if not evidence.has_positions:
            return {}
        chosen = [score for score in self.scores if not isinstance(score, FittedScore) and score.works_on_maps]
        values = by_blocks(chosen, evidence)
        return {score.name: uncertainties for score, uncertainties in zip(chosen, values, strict=True)}

    def check_labels(self, labels: Tensor | None, logits: Tensor, dataset: str | None) -> None:
        """Refuse samples without a label if a score reads labels.

        Raises:
            ValueError: If a label is missing or is not one of the logits' classes.
        """
        where = f" in the dataset {dataset!r}" if dataset else ""
        problem = label_problem(labels, len(logits), logits.shape[1], where)
        if problem is not None:
            names = ", ".join(repr(score.name) for score in self.scores if score.needs.labels)
            raise ValueError(f"{f'the score {names}' if names else 'the profile'} needs {problem}")

    def _check_repeatable(self, repeated: RepeatedCall) -> None:
        """Check once, before the first gradient, that the forward pass can be repeated, even for single samples.

        Raises:
            ValueError: If the inputs are unknown or have no sample axis, or a second forward pass differs.
        """
        model, batch = repeated.model, repeated.batch
        check_parameters(model)
        first, needs = repeated.first_input(), self.needs(batch.logits.shape[1])
        is_observed = not needs.gradients and needs.probes == list(batch.observed)
        if self._is_checked or (is_observed and not has_two_sample_axes(first)):
            return
        self._is_checked = True
        few = min(2, batch.size - 1)
        if not few:
            repeated.check()
            return
        flags = repeated.flags()
        try:
            first_rows = batch.logits[:few]
            check_first_rows(lambda: repeated.logits(range(few), flags), first_rows, type(model).__name__)
        except ValueError:
            repeated.check()
            if not repeated.is_random():
                raise


def _find_sample_axes(repeated: RepeatedCall, needs: Needs) -> None:
    """Find the axes of the samples in the layers that probes read, before the first batch of three or more samples.

    Raises:
        MixedRowsError: If the rows of a layer are not those of the samples.
    """
    layers: list[nn.Module] = []
    for probe in needs.probes:
        read = getattr(probe, "layers_read", None)
        layers += [] if read is None else read(repeated.model)
    size = repeated.batch.size
    unknown = [layer for layer in dict.fromkeys(layers) if not has_known_axes(layer, size)]
    if not unknown:
        return
    flags = repeated.flags()
    try:
        find_sample_axes(unknown, lambda samples: repeated.logits(samples, flags), size)
    except MixedRowsError:
        if not repeated.is_random():
            raise


def _gradients(
    repeated: RepeatedCall, needs: Needs, engine: str, labels: Tensor | None
) -> dict[tuple[Target, Objective], GradientStatistics]:
    """Return statistics for every target and objective, by one forward pass and one backward pass per objective."""
    if not needs.gradients:
        return {}
    model, batch, head = repeated.model, repeated.batch, repeated.head
    filters = {target: parameter_filter(target) for target in needs.gradients}
    objectives, moments = _wanted(needs)
    logits_fn = repeated.logits_fn if head is None else logits_of
    witness = _Witness(batch.logits, two_columns(logits_fn) if batch.one_logit else logits_fn)

    def chosen(name: str) -> bool:
        return any(accepts is None or accepts(name) for accepts in filters.values())

    # A softmax or a scaling may follow a named head; then the model must return the head's output.
    named = returning_logits(model, head, logits_of) if head is not None else nullcontext()
    with redirected(model, batch.called or model), named:
        results = gradient_statistics(
            model,
            batch.inputs,  # type: ignore[arg-type]
            objectives,
            chosen,
            per_parameter=True,
            statistics=_statistic_names(moments),
            targets=labels,
            logits=witness,
            engine=engine,
            sample_axis=batch.sample_axis,
        )
    if witness.seen is not None and not witness.seen.requires_grad and not repeated.has_graph():
        raise ValueError(
            f"the logits of {type(model).__name__} have no gradient: its forward runs under torch.no_grad, or detaches its output. "
            "Remove that, or choose scores of the logits and of the head"
        )
    if witness.seen is None or not are_close(witness.seen.detach(), batch.logits):  # they may come from another pass
        repeated.check()
    by_objective = dict(zip(objectives, results, strict=True))
    gradients = {}
    for target, accepts in filters.items():
        if not any(accepts is None or accepts(name) for name in results[0].names):
            names = list(dict(model.named_parameters()))
            raise ValueError(
                f"the target {target!r} of a score chooses no parameter; the parameters are: {', '.join(names[:12])}"
            )
        for objective in needs.gradients[target]:
            gradients[target, objective] = by_objective[objective].select(accepts)
    return gradients


@dataclass
class _Witness:
    """Returns the logits in the model's output, and stores the logits of the whole batch for comparison."""

    expected: Tensor
    logits_fn: Callable[[Any], Tensor]
    seen: Tensor | None = None

    def __call__(self, output: Any) -> Tensor:
        logits = as_rows(self.logits_fn(output))
        is_plain = not torch._C._functorch.is_functorch_wrapped_tensor(logits)
        if is_plain and logits.shape == self.expected.shape:
            self.seen = logits  # not copied: the engine counts the calls of the model's forward pass
        return logits


def _wanted(needs: Needs) -> tuple[list[Objective], set[Moment]]:
    """Return the objectives and moments of all targets."""
    objectives: dict[Objective, None] = {}
    moments: set[Moment] = set()
    for by_objective in needs.gradients.values():
        for objective, wanted in by_objective.items():
            objectives[objective] = None
            moments |= wanted
    return list(objectives), moments


def _statistic_names(moments: Iterable[Moment]) -> list[str]:
    names = []
    for moment in moments:
        if not isinstance(moment, str):
            names.append(f"l{moment:g}")
        else:
            names.append("mean" if moment == "sum" else moment)
    return names


def _probes(repeated: RepeatedCall, needs: Needs) -> dict[Any, Tensor]:
    """Return the results of the probes, both those observed in the step and those that run the model again."""
    model, batch = repeated.model, repeated.batch
    results = dict(batch.observed)
    missing = [probe for probe in needs.probes if probe not in results]
    if not missing:
        return results
    with preserved(model), gradients_enabled(model), repeated.returning_logits():
        inputs = map_tensors(batch.inputs, lambda tensor: tensor.detach().clone())
        for probe, others in by_passes(missing):
            results |= probe.together(others, model, inputs) if len(others) > 1 else {probe: probe(model, inputs)}
    return results
