"""The gradient metrics of a batch of losses, by one backward pass through the user's own graph."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.compat.gradient_metrics.metrics import GradientMetric, _MomentMetric, merged
from lightning_gradmetrics.engine.kernels.reduction import CHUNK_ENTRIES
from lightning_gradmetrics.engine.plan import PlanError
from lightning_gradmetrics.engine.recording import Recording
from lightning_gradmetrics.engine.uses import Use
from lightning_gradmetrics.gradients.statistics import Moment, Moments, accumulator, result_dtype

__all__ = ["GradientMetricCollector"]


class GradientMetricCollector:
    """Computes gradient metrics of every sample in a batch.

    Build it before the forward pass: it watches the target layers' forward passes (by forward hooks, which go when
    the collector
    goes), so that one backward pass serves all samples. Losses whose forward pass it has not seen, and targets that
    are single
    tensors, take one backward pass a sample, as do layers that no rule covers; a warning says so.

    Args:
        metrics: A gradient metric, or a sequence of them.

    Raises:
        ValueError: If there is no metric, or one is no :class:`~lightning_gradmetrics.compat.gradient_metrics.metrics.GradientMetric`.

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
        targets = [target for metric in self._metrics for target in metric.target_layers]
        self._parameters = {id(p): p for metric in self._metrics for p in metric.target_parameters}
        self._recording = Recording([t for t in targets if isinstance(t, nn.Module)], self._parameters)
        weakref.finalize(self, self._recording.remove)

    def __call__(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """The metrics of every sample.

        Args:
            loss: Losses ``(N,)``, one a sample, with their graph.
            retain_graph: Whether to keep the graph for further backward passes.

        Returns:
            ``(N, dim)``.

        Raises:
            ValueError: If the loss requires no gradient, or is not ``(N,)``.
        """
        _check_loss(loss)
        self.reset()
        try:
            uses = self._fast_uses(loss, retain_graph)
        except PlanError as error:
            self._recording.give_up(str(error))
            uses = None
        result = self._by_loop(loss, retain_graph) if uses is None else self._from_uses(uses, len(loss))
        self.reset()
        return result

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
        """The number of values a sample."""
        return len(self.data)

    def _fast_uses(self, loss: Tensor, retain_graph: bool) -> dict[int, _Evidence] | None:
        """Each reached parameter's evidence from one backward pass, or ``None`` if no forward pass was seen."""
        wanted = {key: self._wanted(key) for key in self._parameters}
        kept = {id(p) for metric in self._metrics if not _by_moments(metric) for p in metric.target_parameters}
        found: dict[int, _Evidence] = {}

        def sink(key: int, use: Use) -> None:
            moments = use.moments(wanted[key]) if wanted[key] else {}
            found[key] = _Evidence(moments, use if key in kept else None)

        if not self._recording.collect(loss, sink, retain_graph):
            return None
        return found

    def _wanted(self, key: int) -> frozenset[Moment]:
        metrics = [m for m in self._metrics if _by_moments(m) and any(id(p) == key for p in m.target_parameters)]
        return frozenset().union(*(m.moments for m in metrics))  # type: ignore[attr-defined]

    def _from_uses(self, found: Mapping[int, _Evidence], size: int) -> Tensor:
        """All metrics ``(N, dim)`` from the parameters' evidence."""
        columns = []
        opaque = [metric for metric in self._metrics if not _by_moments(metric)]
        rows = self._by_rows(opaque, found, size) if opaque else {}
        for metric in self._metrics:
            columns.append(rows[id(metric)] if id(metric) in rows else self._by_moments(metric, found, size))
        return torch.cat(columns, 1)

    def _by_moments(self, metric: GradientMetric, found: Mapping[int, _Evidence], size: int) -> Tensor:
        assert isinstance(metric, _MomentMetric)
        parts = []
        for parameter in metric.target_parameters:
            zero = torch.zeros(size, dtype=accumulator(parameter), device=parameter.device)
            evidence = found.get(id(parameter))
            parts.append(dict.fromkeys(metric.moments, zero) if evidence is None else evidence.moments)
        count = sum(p.numel() for p in metric.target_parameters)
        return metric.values(merged([{k: part[k] for k in metric.moments} for part in parts]), count).to(
            result_dtype(metric.target_parameters[0].dtype)
        )

    def _by_rows(
        self, metrics: Sequence[GradientMetric], found: Mapping[int, _Evidence], size: int
    ) -> dict[int, Tensor]:
        """Metrics ``(N, k)`` that want to see each gradient, a bounded number of samples at a time."""
        parameters = {id(p): p for metric in metrics for p in metric.target_parameters}
        step = max(1, 16 * CHUNK_ENTRIES // max(1, sum(p.numel() for p in parameters.values())))
        values: dict[int, list[Tensor]] = {id(metric): [] for metric in metrics}
        for start in range(0, size, step):
            count = min(step, size - start)
            gradients = {key: _gradients(found.get(key), p, start, count) for key, p in parameters.items()}
            for n in range(count):
                for metric in metrics:
                    values[id(metric)].append(
                        _collected(metric, [gradients[id(p)][n] for p in metric.target_parameters])
                    )
        return {key: torch.stack(rows) for key, rows in values.items()}

    def _by_loop(self, loss: Tensor, retain_graph: bool) -> Tensor:
        """All metrics by one backward pass a sample."""
        parameters = list(self._parameters.values())
        if any(not p.requires_grad for p in parameters):
            raise ValueError(
                "a target tensor requires no gradient, and the forward pass of its layer was not seen: build the "
                "collector with the layer (not the tensor) before the forward pass, or call requires_grad_() on the "
                "tensor first"
            )
        rows = []
        for n, one in enumerate(loss):
            keep = retain_graph or n < len(loss) - 1
            found = torch.autograd.grad(one, parameters, retain_graph=keep, allow_unused=True)
            gradients = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)}
            values = [_collected(m, [gradients[id(p)] for p in m.target_parameters]) for m in self._metrics]
            rows.append(torch.cat(values))
        return torch.stack(rows) if rows else torch.zeros(0, self.dim, device=loss.device)


class _Evidence:
    """What is known of every sample's gradient of one parameter: its moments, and if needed the gradient's use."""

    def __init__(self, moments: Moments, use: Use | None) -> None:
        self.moments, self.use = moments, use


def _by_moments(metric: GradientMetric) -> bool:
    """Whether a metric follows from moments: one of this package's, as it is, with no transform."""
    plain = metric.grad_transform is None and isinstance(metric, _MomentMetric) and metric.target_parameters
    names = ("__call__", "_collect", "_get_metric", "data", "reset")
    return bool(plain) and all(getattr(type(metric), n) is _original(metric, n) for n in names)


def _original(metric: GradientMetric, name: str) -> Any:
    """What this package defines for ``name``."""
    ours = next(c for c in type(metric).__mro__ if c.__module__ == _MomentMetric.__module__)
    return getattr(ours, name)


def _collected(metric: GradientMetric, gradients: Sequence[Tensor]) -> Tensor:
    """The metric of one sample."""
    metric.reset()
    for gradient in gradients:
        metric(gradient.contiguous())
    value = metric.data
    metric.reset()
    return value


def _gradients(evidence: _Evidence | None, parameter: Tensor, start: int, count: int) -> Tensor:
    if evidence is None or evidence.use is None:
        return parameter.detach().new_zeros(1, *parameter.shape).expand(count, *parameter.shape)
    with torch.no_grad():
        return evidence.use.rows(start, start + count).gradient().reshape(count, *parameter.shape)


def _checked(metrics: Any) -> list[GradientMetric]:
    if not isinstance(metrics, Sequence):
        raise ValueError(f"metrics has to be a GradientMetric or a sequence of them, got {type(metrics).__name__}")
    for metric in metrics:
        if not isinstance(metric, GradientMetric):
            raise ValueError(f"metrics has to hold GradientMetric instances only, found {type(metric).__name__}")
    if not metrics:
        raise ValueError("the sequence of metrics is empty; give at least one, such as Max(model)")
    return list(metrics)


def _check_loss(loss: Tensor) -> None:
    if not loss.requires_grad:
        why = (
            "it was computed in inference mode: run the forward pass inside torch.inference_mode(False) and "
            "torch.enable_grad(), with cloned inputs, or use "
            "lightning_gradmetrics.gradient_statistics, which does so itself"
            if loss.is_inference() or torch.is_inference_mode_enabled()
            else "run the forward pass with gradients enabled (torch.enable_grad()), after building the collector"
        )
        raise ValueError(f"the loss has to require a gradient to take gradient metrics of it; {why}")
    if loss.ndim != 1:
        raise ValueError(
            f"the loss has to have shape (N,), one entry a sample, got {tuple(loss.shape)}: use reduction='none'"
        )
