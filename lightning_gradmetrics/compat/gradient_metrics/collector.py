"""Computes the gradient metrics of a batch of losses by one backward pass through the user's graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.norm_gradients import exact_norm_gradients_in
from lightning_gradmetrics.compat.gradient_metrics.collecting import collect
from lightning_gradmetrics.compat.gradient_metrics.metrics import GradientMetric, _MomentMetric, merged
from lightning_gradmetrics.compat.gradient_metrics.watching import Watch
from lightning_gradmetrics.engine.kernels.reduction import CHUNK_ENTRIES
from lightning_gradmetrics.engine.passes.plan import PlanError
from lightning_gradmetrics.engine.tracing.graph import all_nodes
from lightning_gradmetrics.engine.uses import Use
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator, result_dtype

__all__ = ["GradientMetricCollector"]


class GradientMetricCollector:
    """Computes gradient metrics of every sample in a batch.

    Build it before the forward pass. Hooks on the target layers record the forward pass, so that one backward pass serves
    all samples. They are removed when the collector is deleted.

    If that is impossible, each loss takes one backward pass; the values are the same, and a warning names the reason.
    This happens if the forward pass of a loss was not recorded, if losses share samples or depend on several of them,
    if a target is a single tensor, if samples depend on each other (batch norm in train mode), or if a layer has no
    rule.

    Args:
        metrics: A gradient metric, or a sequence of them.

    Raises:
        ValueError: If there is no metric, or one is not a
            :class:`~lightning_gradmetrics.compat.gradient_metrics.metrics.GradientMetric`.

    Example:
        >>> from lightning_gradmetrics.compat.gradient_metrics.metrics import Max, MeanStd
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> collector = GradientMetricCollector([Max(model), MeanStd(model)])
        >>> logits = model(torch.randn(5, 4))
        >>> loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="none")
        >>> collector(loss).shape, collector.dim
        (torch.Size([5, 3]), 3)

    Reference:
        Oberdiek, Rottmann, Gottschalk: Classification Uncertainty of Deep Neural Networks Based on Gradient
        Information, 2018.
    """

    def __init__(self, metrics: Sequence[GradientMetric] | GradientMetric) -> None:
        self._metrics = [metrics] if isinstance(metrics, GradientMetric) else _checked(metrics)
        self._parameters = _parameters_of(self._metrics)
        self._watch = Watch(_modules_of(self._metrics), self._parameters)
        weakref.finalize(self, self._watch.remove)

    def __call__(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Compute the metrics of every loss.

        Args:
            loss: Losses ``(N,)`` with their graph, normally one per sample.
            retain_graph: Whether to keep the graph for further backward passes.

        Returns:
            ``(N, dim)``, without a graph.

        Raises:
            ValueError: If the loss requires no gradient, or is not ``(N,)``; or if a target layer no longer has a parameter that
                it had when its metric was made.
        """
        _check_loss(loss)
        _check_present(self._metrics)
        self.reset()
        with exact_norm_gradients_in(all_nodes(loss)):
            collected = self._collected(loss, retain_graph) if len(loss) else None
            with torch.no_grad():
                result = self._by_loop(loss, retain_graph) if collected is None else self._from_collected(collected)
        self.reset()
        return result.detach()

    def reset(self) -> None:
        """Reset all metrics to their default values."""
        for metric in self._metrics:
            metric.reset()

    @property
    def data(self) -> Tensor:
        """The values of all metrics, ``(dim,)``."""
        return torch.cat([metric.data for metric in self._metrics])

    @property
    def dim(self) -> int:
        """The number of values per sample."""
        return len(self.data)

    def _collected(self, loss: Tensor, retain_graph: bool) -> _Collected | None:
        """Collect from one backward pass for all losses; return ``None`` if each loss needs a backward pass."""
        collected, parameters = _Collected(len(loss), self._metrics), self._parameters
        try:
            if any(parameter._backward_hooks for parameter in parameters.values()):
                raise PlanError("a hook on a parameter may change its gradient")
            reason = collect(loss, parameters, collected.add, retain_graph, self._watch.why_unseen)
        except PlanError as error:
            reason = str(error)
        if reason:
            self._watch.tell(reason)
            return None
        return collected

    def _from_collected(self, collected: _Collected) -> Tensor:
        """Return all metrics ``(N, dim)`` from the parameters' moments and gradients."""
        opaque = [metric for metric in self._metrics if not _by_moments(metric)]
        columns = self._by_rows(opaque, collected)
        for metric in self._metrics:
            if id(metric) not in columns:
                columns[id(metric)] = _metric_by_moments(metric, collected)
        return torch.cat([columns[id(metric)] for metric in self._metrics], 1)

    def _by_rows(self, metrics: Sequence[GradientMetric], collected: _Collected) -> dict[int, Tensor]:
        """Return metrics ``(N, k)`` that need the full gradients, for a limited number of samples at a time."""
        parameters = _parameters_of(metrics)
        step = max(1, 16 * CHUNK_ENTRIES // max(1, _entries(parameters.values())))
        values: dict[int, list[Tensor]] = {}
        for start in range(0, collected.size, step):
            count = min(step, collected.size - start)
            gradients = {}
            for key, parameter in parameters.items():
                gradients[key] = collected.gradients(key, parameter, start, count)
            for number in range(count):
                for metric in metrics:
                    value = _metric_of(metric, _rows_of(metric, gradients, number))
                    values.setdefault(id(metric), []).append(value)
        return {key: torch.stack(rows) for key, rows in values.items()}

    def _by_loop(self, loss: Tensor, retain_graph: bool) -> Tensor:
        """Return all metrics by one backward pass per loss."""
        parameters = list(self._parameters.values())
        _check_trainable(parameters)
        rows = []
        for number in range(len(loss)):
            with torch.enable_grad():
                single_loss = loss[number]
            keep = retain_graph or number < len(loss) - 1
            gradients_of_loss = torch.autograd.grad(single_loss, parameters, retain_graph=keep, allow_unused=True)
            gradients = {}
            for parameter, gradient in zip(parameters, gradients_of_loss, strict=True):
                gradients[id(parameter)] = _dense(gradient, parameter)
            values = []
            for metric in self._metrics:
                own = [gradients[id(parameter)] for parameter in metric.target_parameters]
                values.append(_metric_of(metric, own))
            rows.append(torch.cat(values))
        return torch.stack(rows) if rows else torch.zeros(0, self.dim, device=loss.device)


def _modules_of(metrics: Sequence[GradientMetric]) -> list[nn.Module]:
    """Return the target layers of all metrics that are modules."""
    modules: list[nn.Module] = []
    for metric in metrics:
        for target in metric.target_layers:
            if isinstance(target, nn.Module):
                modules.append(target)
    return modules


def _parameters_of(metrics: Sequence[GradientMetric]) -> dict[int, Tensor]:
    """Return the target parameters of all metrics, by identity."""
    parameters: dict[int, Tensor] = {}
    for metric in metrics:
        for parameter in metric.target_parameters:
            parameters[id(parameter)] = parameter
    return parameters


def _entries(parameters: Iterable[Tensor]) -> int:
    """Return the number of entries of all parameters."""
    return sum(parameter.numel() for parameter in parameters)


def _rows_of(metric: GradientMetric, gradients: Mapping[int, Tensor], number: int) -> list[Tensor]:
    """Return one sample's gradients of a metric's target parameters."""
    rows = []
    for parameter in metric.target_parameters:
        rows.append(gradients[id(parameter)][number])
    return rows


class _Collected:
    """The moments of each parameter's gradients for every loss, and the uses for metrics that need full gradients.

    Args:
        size: The number of losses.
        metrics: The metrics to compute.
    """

    def __init__(self, size: int, metrics: Sequence[GradientMetric]) -> None:
        self.size = size
        self._wanted: dict[int, frozenset[Moment]] = {}
        self._kept: set[int] = set()
        for metric in metrics:
            for parameter in metric.target_parameters:
                if _by_moments(metric):
                    assert isinstance(metric, _MomentMetric)
                    before = self._wanted.get(id(parameter), frozenset())
                    self._wanted[id(parameter)] = before | metric.moments
                else:
                    self._kept.add(id(parameter))
        self._moments: dict[int, Moments] = {}
        self._uses: dict[int, list[tuple[Use, Tensor]]] = {}

    def add(self, key: int, use: Use, numbers: Tensor) -> None:
        """Add one use of a parameter; sample ``n`` belongs to the loss ``numbers[n]``, or to none (-1)."""
        if key in self._kept:
            self._uses.setdefault(key, []).append((use, numbers))
        wanted = self._wanted.get(key)
        if not wanted:
            return
        moments, owned = use.moments(wanted), numbers >= 0
        own = self._moments.setdefault(key, {})
        for name, values in moments.items():
            if name not in own:
                own[name] = values.new_zeros(self.size)
            losses = numbers[owned].to(values.device)
            own[name][losses] = values[owned.to(values.device)]

    def moments(self, parameter: Tensor, wanted: frozenset[Moment]) -> Moments:
        """Return the moments ``(M,)`` of a parameter's gradients."""
        zero = torch.zeros(self.size, dtype=accumulator(parameter), device=parameter.device)
        own = self._moments.get(id(parameter), {})
        return {name: own.get(name, zero) for name in wanted}

    def gradients(self, key: int, parameter: Tensor, start: int, count: int) -> Tensor:
        """Return the gradients ``(count, *shape)`` of consecutive losses."""
        gradients = parameter.detach().new_zeros(count, *parameter.shape)
        for use, numbers in self._uses.get(key, ()):
            inside = ((numbers >= start) & (numbers < start + count)).nonzero().flatten()
            if not len(inside):
                continue
            first, last = int(inside[0]), int(inside[-1]) + 1
            rows = use.rows(first, last).gradient().reshape(last - first, *parameter.shape)
            gradients[numbers[inside] - start] = rows[inside - first].to(gradients.dtype)
        return gradients


def _metric_by_moments(metric: GradientMetric, collected: _Collected) -> Tensor:
    """Return one of this package's metrics, ``(M, k)``."""
    assert isinstance(metric, _MomentMetric)
    parts = []
    for parameter in metric.target_parameters:
        parts.append(collected.moments(parameter, metric.moments))
    return metric.values(merged(parts), _entries(metric.target_parameters)).to(
        result_dtype(metric.target_parameters[0].dtype)
    )


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient


def _by_moments(metric: GradientMetric) -> bool:
    """Return whether a metric can be computed from moments: it is this package's, unmodified and without a transform."""
    if metric.grad_transform is not None or not isinstance(metric, _MomentMetric) or not metric.target_parameters:
        return False
    names = ("__call__", "_collect", "_get_metric", "data", "reset")
    return all(getattr(type(metric), name) is _original(metric, name) for name in names)


def _original(metric: GradientMetric, name: str) -> Any:
    """Return this package's definition of ``name``."""
    ours = next(c for c in type(metric).__mro__ if c.__module__ == _MomentMetric.__module__)
    return getattr(ours, name)


def _metric_of(metric: GradientMetric, gradients: Sequence[Tensor]) -> Tensor:
    """Return the metric of one sample."""
    metric.reset()
    for gradient in gradients:
        metric(gradient.contiguous())
    value = metric.data
    metric.reset()
    return value


def _checked(metrics: Any) -> list[GradientMetric]:
    if not isinstance(metrics, Sequence):
        raise ValueError(f"metrics must be a GradientMetric or a sequence of them, got {type(metrics).__name__}")
    for metric in metrics:
        if not isinstance(metric, GradientMetric):
            raise ValueError(f"metrics must contain GradientMetric instances only, got {type(metric).__name__}")
    if not metrics:
        raise ValueError("the sequence of metrics is empty; give at least one, such as Max(model)")
    return list(metrics)


def _check_trainable(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        if not parameter.requires_grad:
            raise ValueError(
                "a target tensor requires no gradient, and the forward pass of its layer was not recorded: build the "
                "collector with the layer (not the tensor) before the forward pass, or call requires_grad_() on the "
                "tensor first"
            )


def _check_present(metrics: Sequence[GradientMetric]) -> None:
    """Refuse layers of which parameters were replaced: the loss does not depend on the old ones, whose gradients are zero."""
    present: dict[nn.Module, set[int]] = {}
    for metric in metrics:
        known: set[int] = set()
        for target in metric.target_layers:
            if isinstance(target, Tensor):
                known.add(id(target))
                continue
            if target not in present:
                present[target] = set(map(id, target.parameters()))
            known |= present[target]
        if not known.issuperset(map(id, metric.target_parameters)):
            raise ValueError(
                f"parameters of the layers of {type(metric).__name__} were replaced after it was made, as by load_state_dict(assign=True), "
                "a parametrization or another layer: make new metrics and a new collector"
            )


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss must be a tensor (N,), one entry per sample, got a {type(loss).__name__}: join losses with torch.stack"
        )
    if not loss.requires_grad:
        why = "run the forward pass with gradients enabled (torch.enable_grad()), after building the collector"
        if loss.is_inference() or torch.is_inference_mode_enabled():
            why = (
                "it was computed in inference mode: run the forward pass inside torch.inference_mode(False) and "
                "torch.enable_grad(), with cloned inputs, or use lightning_gradmetrics.gradient_statistics, which "
                "enables gradients itself"
            )
        raise ValueError(f"gradient metrics need a loss that requires a gradient; {why}")
    if loss.ndim != 1:
        raise ValueError(
            f"the loss must have shape (N,), one entry per sample, got {tuple(loss.shape)}: use reduction='none'"
        )
