"""From a batch to its scores: gather the evidence that the chosen scores need, once, and hand it to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import (
    Inputs,
    batch_size,
    call,
    check_inputs,
    check_model,
    gradients_enabled,
    logits_of,
    map_tensors,
    preserved,
)
from lightning_gradmetrics.classifier.head import Capture, capturing, linear_layers, named_head, returning_logits
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.gradients.statistics import GradientStatistics, Moment, result_dtype
from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.evidence import Evidence, Target, parameter_filter
from lightning_gradmetrics.scoring.registry import Score, ScoreLike, resolve
from lightning_gradmetrics.scoring.states import check_fitted, check_head

__all__ = ["Scorer", "score"]


@dataclass
class Scorer:
    """Computes a set of scores, sharing whatever they share.

    Args:
        scores: The scores.
        head: The name of the classification head, or ``None`` to find it.
        logits_fn: From the model's output to its logits ``(N, C)``.
        engine: The engine of the scores that need a backward pass.
        looks: What else looks at the evidence, beside the scores.
    """

    scores: tuple[Score, ...]
    head: str | None = None
    logits_fn: Callable[[Any], Tensor] = logits_of
    engine: str = "auto"
    looks: Sequence[Callable[[Evidence], Any]] = ()
    _needs: dict[int, Needs] = field(default_factory=dict, repr=False)
    _needs_of: tuple[Any, Any] = field(default=(None, None), repr=False)

    def __post_init__(self) -> None:
        self.head_is_named = self.head is not None

    def needs(self, classes: int) -> Needs:
        """What the scores, and whatever else, look at, for that number of classes."""
        if (
            self._needs_of[0] is not self.scores or self._needs_of[1] is not self.looks
        ):  # a fit puts others in their place
            self._needs, self._needs_of = {}, (self.scores, self.looks)
        if classes not in self._needs:
            self._needs[classes] = needs_of([*self.scores, *self.looks], classes)
        return self._needs[classes]

    def capture(self, model: nn.Module) -> Capture:
        """A watcher of the model's next forward."""
        return Capture(model, self.head, self.logits_fn)

    def evidence(
        self,
        capture: Capture,
        model: nn.Module,
        inputs: Inputs,
        labels: Tensor | None,
        outside: Tensor | None = None,
        dataset: str | None = None,
    ) -> Evidence:
        """What the scores need of a batch whose forward was captured.

        Args:
            capture: What was seen of the forward.
            model: The model, for what needs a forward of its own.
            inputs: Its inputs.
            labels: True labels ``(N,)``, or ``None``.
            outside: Which samples are out-of-distribution ``(N,)``, where that is known.
            dataset: The name of the data set, for messages.

        Raises:
            ValueError: If a score needs a label that is not there.
        """
        features, logits = self._captured(capture, batch_size(inputs))
        check_head(self.scores, self.head)
        needs = self.needs(logits.shape[1])
        labels = None if labels is None else labels.to(logits.device)
        if needs.labels:
            self.check_labels(labels, logits, dataset)
        gradients, probes = _gradients(self, needs, model, inputs, labels), _probes(self, needs, model, inputs)
        head = None if self.head is None else _weight_and_bias(named_head(model, self.head))
        return Evidence(logits, features, labels, outside, gradients, probes, head)

    def __call__(self, evidence: Evidence) -> dict[str, Tensor]:
        """The scores by name, ``(N,)`` each."""
        dtype = result_dtype(evidence.given_logits.dtype)
        return {score.name: score(evidence).to(dtype) for score in self.scores}

    def check_labels(self, labels: Tensor | None, logits: Tensor, dataset: str | None) -> None:
        """Refuse samples without a label where a score looks at it: it has no value there that could be compared.

        Raises:
            ValueError: If a label is missing or is not one of the logits' classes.
        """
        problem = _label_problem(
            labels, len(logits), logits.shape[1], f" in the data set {dataset!r}" if dataset else ""
        )
        if problem is not None:
            names = ", ".join(repr(score.name) for score in self.scores if score.needs.labels)
            raise ValueError(f"{f'the score {names}' if names else 'the profile'} needs {problem}")

    def _captured(self, capture: Capture, size: int) -> tuple[Tensor | None, Tensor]:
        """The head's input, where a score needs it, and the logits."""
        found = None if self.needs(3).features or self.head else capture.model_logits(size)
        features = None
        if found is None:
            features, found = capture.features_and_logits(size)
            self.head = capture.head
        _check_logits(found)
        return features, found


def _label_problem(labels: Tensor | None, size: int, classes: int, place: str) -> str | None:
    """What is wrong with the labels of a batch, in words, or ``None``."""
    remedy = "leave it out, or score labelled data alone: pass targets=, or give batches (inputs, labels)"
    if labels is None:
        return f"true labels, and there are none{place}: {remedy}"
    if labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        return f"true labels ({size},), whole numbers; these are {tuple(labels.shape)}, {labels.dtype}{place}"
    unknown = int(((labels < 0) | (labels >= classes)).sum())
    if not unknown:
        return None
    return (
        f"the true label of every sample, and {unknown} of {size} samples of a batch{place} have none "
        f"from 0 to {classes - 1}: {remedy}"
    )


def _weight_and_bias(head: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return head.weight, head.bias


def _gradients(
    scorer: Scorer, needs: Needs, model: nn.Module, inputs: Inputs, labels: Tensor | None
) -> dict[tuple[Target, Objective], GradientStatistics]:
    """Statistics for every target and objective: one forward, and one backward an objective."""
    if not needs.gradients:
        return {}
    filters = {target: parameter_filter(target) for target in needs.gradients}
    objectives = list(dict.fromkeys(o for by_objective in needs.gradients.values() for o in by_objective))
    moments = {m for by_objective in needs.gradients.values() for wanted in by_objective.values() for m in wanted}
    # A named head may lie before a softmax or a scaling: the model then has to return what the head does.
    own = returning_logits(model, scorer.head, scorer.logits_fn) if scorer.head_is_named else nullcontext()
    with own:
        results = gradient_statistics(
            model,
            inputs,
            objectives,
            lambda name: any(accepts is None or accepts(name) for accepts in filters.values()),
            per_parameter=True,
            statistics=_statistic_names(moments),
            targets=labels,
            logits=logits_of if scorer.head_is_named else scorer.logits_fn,
            engine=scorer.engine,
        )
    by_objective = dict(zip(objectives, results, strict=True))
    for target, accepts in filters.items():
        if not any(accepts is None or accepts(name) for name in results[0].names):
            named = [name for name, _ in model.named_parameters()]
            raise ValueError(
                f"the target {target!r} of a score chooses no parameter; the parameters are: {', '.join(named[:12])}"
            )
    return {
        (target, o): by_objective[o].select(filters[target])
        for target in needs.gradients
        for o in needs.gradients[target]
    }


def _statistic_names(moments: Iterable[Moment]) -> list[str]:
    return [{"sum": "mean"}.get(m, m) if isinstance(m, str) else f"l{m:g}" for m in moments]


def _probes(scorer: Scorer, needs: Needs, model: nn.Module, inputs: Inputs) -> dict[Any, Tensor]:
    """The scores' own computations on the model, which returns its logits to them."""
    if not needs.probes:
        return {}
    with preserved(model), gradients_enabled(), returning_logits(model, scorer.head, scorer.logits_fn):
        plain = map_tensors(inputs, lambda t: t.clone() if t.is_inference() else t.detach())
        return {probe: probe(model, plain) for probe in needs.probes}


def _check_logits(logits: Tensor) -> None:
    """Refuse probabilities, warn of log-probabilities: both change the scores that look at the size of the logits."""
    if not logits.numel() or not logits.isfinite().all():
        return
    if logits.shape[1] < 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}; a classifier has at least two classes: expected (N, C) with C >= 2"
        )
    rows = logits.detach().float()
    if bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            "the model returns probabilities, and scores need logits: name the head, as in head='fc', so that its output is taken, "
            "or pass logits_fn=, a callable from the model's output to its logits"
        )
    if bool((rows.logsumexp(1).abs() < 1e-4).all()):
        warnings.warn(
            "the model seems to return log-probabilities; energy, max_logit and gradtrust need the raw logits: name the head, "
            "as in head='fc'",
            stacklevel=3,
        )


def score(
    model: nn.Module,
    inputs: Inputs,
    scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
    targets: Tensor | None = None,
    *,
    head: str | None = None,
    logits_fn: Callable[[Any], Tensor] = logits_of,
    engine: str = "auto",
) -> dict[str, Tensor]:
    """Uncertainty scores of every sample, higher = more uncertain; plain torch, no Trainer.

    Args:
        model: A classifier; batch norms must be in eval mode. It comes back exactly as it was.
        inputs: A tensor ``(N, ...)``, a mapping (keyword arguments) or a sequence (positional arguments) of them.
        scores: Names, as ``"gradnorm"`` or ``"gradnorm(temperature=2.0)"``, or :class:`Score` objects, or a mapping
            that names them.
        targets: True labels ``(N,)``, for the scores that need them.
        head: The name of the classification head, a linear layer; found by itself where its output is what the model
            returns.
        logits_fn: From the model's output to its logits ``(N, C)``.
        engine: The engine of the scores that need a backward pass.

    Returns:
        Each score ``(N,)`` by name, on the model's device.

    Raises:
        ValueError: If a score is unknown or not fitted for this model, a batch norm is in train mode, or the head
            cannot be found.
        TypeError: If the inputs are no floats and the model has no embedding.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> found = score(model, torch.randn(5, 2, 4), ["gradnorm", "entropy"])
        >>> {name: tuple(values.shape) for name, values in found.items()}
        {'gradnorm': (5,), 'entropy': (5,)}
    """
    scorer = Scorer(resolve(scores), head, logits_fn, engine)
    check_model(model)
    check_inputs(model, inputs)
    check_fitted(scorer.scores, model)
    if not batch_size(inputs):
        return {s.name: torch.empty(0, device=next(model.parameters()).device) for s in scorer.scores}
    if scorer.needs(3).features and not linear_layers(model):
        scorer.capture(model).features_and_logits(batch_size(inputs))
    with preserved(model), capturing(scorer.capture(model)) as capture, torch.no_grad(), eager():
        call(model, inputs)
    return scorer(scorer.evidence(capture, model, inputs, targets))
