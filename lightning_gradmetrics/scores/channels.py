"""Channel statistics of a forward pass: mean and deviation of the inputs of every convolution and linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import batch_size, call, preserved
from lightning_gradmetrics.classifier.observation import arguments_of, whole_modules
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.scoring.layer_rows import has_known_axes, rows_of_input

__all__ = ["WIDTH", "ChannelProbe", "ChannelStatistics", "channels_of", "observing_channels", "weighted_layers"]

WIDTH = 2048
"""Largest number of statistics per sample; those of wider models are reduced by random sums in each layer."""

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def channels_of(layer: nn.Module, x: Tensor, size: int) -> Tensor | None:
    """Return the mean and the standard deviation of each channel of a layer's input, ``(N, 2 C)``.

    Args:
        layer: A convolution, whose channels are the second axis, or a linear layer, whose channels are the last.
        x: Its input; the axis of the samples is the first until another one was found, and may have several consecutive rows
            per sample.
        size: The number of samples ``N``.

    Returns:
        The statistics; ``None`` if the input does not contain the samples.

    Example:
        >>> channels_of(nn.Linear(2, 3), torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), 1)
        tensor([[2., 0., 1., 0.]])
    """
    rows = rows_of_input(layer, x, size)
    if rows is None:
        return None
    values = rows if isinstance(layer, nn.Linear) else rows.movedim(1, -1)
    positions = at_least_float32(values.detach()).reshape(size, -1, values.shape[-1])
    return torch.cat([positions.mean(1), positions.std(1, correction=0)], 1)


def _sketched(statistics: Tensor, width: int) -> Tensor:
    """Return at most ``width`` sums of the columns with random signs, the same for every sample."""
    columns = statistics.shape[1]
    if columns <= width:
        return statistics
    generator = torch.Generator().manual_seed(columns)
    signs = torch.randint(0, 2, (columns, width), generator=generator) * 2 - 1
    sketch: Tensor = statistics @ (signs.to(statistics) / columns**0.5)
    return sketch


def weighted_layers(model: nn.Module) -> list[nn.Module]:
    """Return the convolutions and linear layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, WEIGHTED)]


class ChannelStatistics:
    """The channel statistics of one forward pass.

    Args:
        size: The number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.by_layer: dict[nn.Module, Tensor] = {}
        self.seen: set[nn.Module] = set()

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the statistics of a layer's first call."""
        layer_input = args[0] if args else next(iter(kwargs.values()), None)
        if layer in self.seen or not isinstance(layer_input, Tensor) or not layer_input.is_floating_point():
            return
        self.seen.add(layer)
        statistics = channels_of(layer, layer_input, self.size)
        if statistics is not None:
            self.by_layer[layer] = statistics

    @property
    def columns(self) -> Tensor:
        """The statistics of all layers, ``(N, F)`` with F at most :data:`WIDTH`.

        Raises:
            ValueError: If no layer was called.
        """
        layers = list(self.by_layer.values())
        if not layers:
            raise ValueError(
                "the model called no convolution and no linear layer with one row per sample: trust has no channel to "
                "measure; score it with sirc or entropy"
            )
        if sum(layer.shape[1] for layer in layers) <= WIDTH:
            return torch.cat(layers, 1)
        width = max(1, WIDTH // len(layers))
        sketches = []
        for statistics in layers:
            sketches.append(_sketched(statistics, width))
        return torch.cat(sketches, 1)


@contextmanager
def observing_channels(model: nn.Module, size: int) -> Iterator[ChannelStatistics]:
    """Observe the channels of a forward pass inside the block; every hook is removed after it.

    Args:
        model: The model.
        size: The number of samples of the pass.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> with observing_channels(model, 5) as seen:
        ...     _ = model(torch.randn(5, 3, 4, 4))
        >>> seen.columns.shape
        torch.Size([5, 38])
    """
    statistics = ChannelStatistics(size)
    with ExitStack() as stack:
        for layer in weighted_layers(model):
            stack.callback(layer.register_forward_pre_hook(statistics.see, with_kwargs=True).remove)
        yield statistics


@dataclass
class _Call:
    """The channel statistics of a model that is called once; hooks start and end the recording."""

    running: int = 0
    calls: list[ChannelStatistics] = field(default_factory=list)

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running += 1
        if self.running == 1:
            self.calls.append(ChannelStatistics(batch_size(arguments_of(args, kwargs))))

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running:
            self.calls[-1].see(layer, args, kwargs)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running -= 1

    def columns(self, size: int) -> Tensor | None:
        """Return the statistics ``(N, F)``; ``None`` unless there was one call, with this number of samples and known axes."""
        is_complete = len(self.calls) == 1 and not self.running
        if not is_complete or self.calls[0].size != size or not self.calls[0].by_layer:
            return None
        if not all(has_known_axes(layer, size) for layer in self.calls[0].seen):
            return None
        return self.calls[0].columns


@dataclass(frozen=True)
class ChannelProbe:
    """A probe: the channel statistics ``(N, F)`` of the forward pass of the prediction."""

    backward: ClassVar[bool] = False

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[Callable[[int], Tensor | None]]:
        """Observe one call of the model inside the block; yields a function from N to the statistics or ``None``."""
        observed = _Call()
        with ExitStack() as stack:
            for module in whole_modules(model):
                stack.callback(module.register_forward_pre_hook(observed.start, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(observed.end).remove)
            for layer in weighted_layers(model):
                stack.callback(layer.register_forward_pre_hook(observed.see, with_kwargs=True).remove)
            yield observed.columns

    def layers_read(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers whose inputs are read."""
        return weighted_layers(model)

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the statistics by a forward pass."""
        with preserved(model), torch.no_grad(), eager(), observing_channels(model, batch_size(inputs)) as statistics:
            call(model, inputs)
        return statistics.columns
