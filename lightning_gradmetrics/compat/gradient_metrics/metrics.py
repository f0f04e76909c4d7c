"""Metrics of gradient entries: maximum, minimum, mean, standard deviation and norm.

A metric collects gradients one at a time and stores their value. The metrics here can also be computed for a whole
batch from the moments of the gradients, which :class:`GradientMetricCollector` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_gradmetrics.gradients.statistics import Moment, Moments, gradient_moments, result_dtype

__all__ = ["GradientMetric", "Max", "Mean", "MeanStd", "Min", "PNorm"]

Targets = Sequence[nn.Module | Tensor] | nn.Module | Tensor
Transform = Callable[[Tensor], Tensor]


class GradientMetric:
    """The base class of all gradient metrics: subclasses define ``_collect``, ``_get_metric`` and ``reset``.

    Args:
        target_layers: Layers or tensors whose gradients are measured; for a layer, all its parameters.
        grad_transform: A function that is applied to each gradient before it is collected.

    Example:
        >>> class Entries(GradientMetric):
        ...     def _collect(self, grad):
        ...         self.count = self.count + grad.numel()
        ...     def _get_metric(self):
        ...         return self.count
        ...     def reset(self):
        ...         self.count = torch.tensor(0.0)
        >>> metric = Entries(nn.Linear(2, 3))
        >>> metric.reset()
        >>> metric(torch.ones(3, 2))
        >>> metric.data
        tensor([6.])
    """

    def __init__(self, target_layers: Targets, grad_transform: Transform | None = None) -> None:
        single = isinstance(target_layers, (nn.Module, Tensor))
        self.target_layers: tuple[nn.Module | Tensor, ...] = (
            (target_layers,) if single else tuple(target_layers)  # type: ignore[arg-type, assignment]
        )
        self.target_parameters: list[Tensor] = []
        self.grad_transform = grad_transform
        self._register_parameters()

    def __call__(self, grad: Tensor | Sequence[Tensor]) -> None:
        """Collect one or more gradients.

        Args:
            grad: The gradient of a parameter, or a sequence of them.
        """
        for tensor in (grad,) if isinstance(grad, Tensor) else grad:
            gradient = tensor.detach()
            self._collect(gradient if self.grad_transform is None else self.grad_transform(gradient))

    def _collect(self, grad: Tensor) -> None:
        """Update the value with one (transformed) gradient."""
        raise NotImplementedError(f"{type(self).__name__} must define _collect")

    def _get_metric(self) -> Tensor:
        """Return the value of the gradients collected so far."""
        raise NotImplementedError(f"{type(self).__name__} must define _get_metric")

    def reset(self) -> None:
        """Reset the value."""
        raise NotImplementedError(f"{type(self).__name__} must define reset")

    @property
    def data(self) -> Tensor:
        """The value of the gradients collected so far, ``(k,)``."""
        return self._get_metric().view(-1)

    def _register_parameters(self) -> None:
        for target in self.target_layers:
            self.target_parameters += [target] if isinstance(target, Tensor) else list(target.parameters())


class _MomentMetric(GradientMetric):
    """A metric that is a function of moments, which can be merged over gradients."""

    moments: frozenset[Moment] = frozenset()
    """The moments that the metric is computed from."""
    empty: ClassVar[float] = 0.0
    _moments: Moments
    _count: int
    _dtype: torch.dtype

    def __init__(self, target_layers: Targets, grad_transform: Transform | None = None) -> None:
        super().__init__(target_layers, grad_transform)
        self.reset()

    def values(self, moments: Mapping[Moment, Tensor], count: int) -> Tensor:
        """Compute the metric of ``N`` samples from moments.

        Args:
            moments: Moments ``(N,)`` of all gradient entries.
            count: The number of entries.

        Returns:
            ``(N, k)``.
        """
        raise NotImplementedError

    def _collect(self, grad: Tensor) -> None:
        if grad.is_complex():
            raise ValueError(
                f"{type(self).__name__} is not defined for complex gradients; use grad_transform=torch.view_as_real"
            )
        if not grad.is_floating_point():
            grad = grad.to(torch.get_default_dtype())
        new = gradient_moments(grad.reshape(1, -1), self.moments)
        self._moments = merged([self._moments, new]) if self._moments else new
        self._count += grad.numel()
        self._dtype = torch.promote_types(self._dtype, grad.dtype)

    def _get_metric(self) -> Tensor:
        if not self._moments:
            return self._initial()
        return self.values(self._moments, self._count)[0].to(result_dtype(self._dtype))

    def _initial(self) -> Tensor:
        return torch.tensor(self.empty)

    def reset(self) -> None:
        """Reset the value."""
        self._moments = {}
        self._count = 0
        self._dtype = torch.float32


def merged(parts: Sequence[Mapping[Moment, Tensor]]) -> Moments:
    """Merge the moments of several gradients."""
    joint = {"max": torch.maximum, "min": torch.minimum}
    out = dict(parts[0])
    for moments in parts[1:]:
        out = {key: joint.get(str(key), torch.add)(value, moments[key]) for key, value in out.items()}
    return out


class Max(_MomentMetric):
    """The largest gradient entry.

    Args:
        target_layers: Layers or tensors whose gradients are measured; for a layer, all its parameters.
        grad_transform: A function that is applied to each gradient before it is collected.

    Example:
        >>> metric = Max(nn.Linear(2, 3))
        >>> metric(torch.tensor([1.0, -2.0]))
        >>> metric.data
        tensor([1.])
    """

    moments = frozenset({"max"})
    empty = -math.inf

    def values(self, moments: Mapping[Moment, Tensor], count: int) -> Tensor:  # noqa: D102
        return moments["max"][:, None]


class Min(_MomentMetric):
    """The smallest gradient entry.

    Args:
        target_layers: Layers or tensors whose gradients are measured; for a layer, all its parameters.
        grad_transform: A function that is applied to each gradient before it is collected.

    Example:
        >>> metric = Min(nn.Linear(2, 3))
        >>> metric(torch.tensor([1.0, -2.0]))
        >>> metric.data
        tensor([-2.])
    """

    moments = frozenset({"min"})
    empty = math.inf

    def values(self, moments: Mapping[Moment, Tensor], count: int) -> Tensor:  # noqa: D102
        return moments["min"][:, None]


class Mean(_MomentMetric):
    """The mean of the gradient entries.

    Args:
        target_layers: Layers or tensors whose gradients are measured; for a layer, all its parameters.
        grad_transform: A function that is applied to each gradient before it is collected.

    Example:
        >>> metric = Mean(nn.Linear(2, 3))
        >>> metric(torch.tensor([1.0, -2.0]))
        >>> metric.data
        tensor([-0.5000])
    """

    moments = frozenset({"sum"})

    def values(self, moments: Mapping[Moment, Tensor], count: int) -> Tensor:  # noqa: D102
        return moments["sum"][:, None] / count


class MeanStd(_MomentMetric):
    """The mean and the unbiased standard deviation of the entries, ``sqrt(var + eps^2)``; ``eps`` for a single entry.

    Args:
        target_layers: Layers or tensors whose gradients are measured; for a layer, all its parameters.
        grad_transform: A function that is applied to each gradient before it is collected.
        return_mean: Whether to return the mean too, before the standard deviation.
        eps: Lower bound of the standard deviation.

    Raises:
        ValueError: If ``eps`` is not greater than zero.

    Example:
        >>> metric = MeanStd(nn.Linear(2, 3))
        >>> metric(torch.tensor([1.0, -2.0]))
        >>> metric.data
        tensor([-0.5000,  2.1213])
    """

    moments = frozenset({"sum", 2.0})

    def __init__(
        self,
        target_layers: Targets,
        grad_transform: Transform | None = None,
        return_mean: bool = True,
        eps: float = 1e-16,
    ) -> None:
        super().__init__(target_layers, grad_transform)
        if not eps > 0:
            raise ValueError(f"eps must be greater than zero, got {eps}")
        self.return_mean, self.eps = return_mean, eps

    def values(self, moments: Mapping[Moment, Tensor], count: int) -> Tensor:  # noqa: D102
        total, square = moments["sum"], moments[2.0]
        variance = (square - total * total / count).clamp(min=0) / max(count - 1, 1)
        deviation = (variance + self.eps**2).sqrt() if count > 1 else torch.full_like(total, self.eps)
        return torch.stack([total / count, deviation] if self.return_mean else [deviation], 1)

    def _initial(self) -> Tensor:
        return torch.tensor([0.0, self.eps] if self.return_mean else [self.eps])


class PNorm(_MomentMetric):
    r"""The p-norm of the gradient entries, ``(sum |x|^p)^(1/p)``.

    Args:
        target_layers: Layers or tensors whose gradients are measured; for a layer, all its parameters.
        grad_transform: A function that is applied to each gradient before it is collected.
        p: The power, in ``(0, inf]``; infinity also as the string ``"inf"``.

    Raises:
        ValueError: If ``p`` is not in ``(0, inf]``.

    Example:
        >>> metric = PNorm(nn.Linear(2, 3))
        >>> metric(torch.tensor([1.0, -2.0]))
        >>> metric.data
        tensor([3.])
    """

    def __init__(self, target_layers: Targets, grad_transform: Transform | None = None, p: float | str = 1.0) -> None:
        super().__init__(target_layers, grad_transform)
        try:
            power = float(p)
        except ValueError:
            power = math.nan
        if not power > 0:
            raise ValueError(f"p must be a number in (0, inf] or the string 'inf', got {p!r}")
        self.p = power
        self.moments = frozenset({"max", "min"}) if math.isinf(power) else frozenset({power})

    def values(self, moments: Mapping[Moment, Tensor], count: int) -> Tensor:  # noqa: D102
        if math.isinf(self.p):
            return torch.maximum(moments["max"].abs(), moments["min"].abs())[:, None]
        return moments[self.p].pow(1 / self.p)[:, None]
