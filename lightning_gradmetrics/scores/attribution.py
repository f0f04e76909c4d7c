"""GAIA: detects abnormal attributions of the prediction to the activations inside a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import preserved
from lightning_gradmetrics.classifier.input_gradients import check_floats, differentiable_logits
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["AttributionDensity", "gaia"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def attributed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the normalisation layers of a model, or its convolutions and linear layers if it has none."""
    for kinds in (NORMS, WEIGHTED):
        layers: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, kinds):
                layers.append(module)
        if layers:
            return layers
    raise ValueError(
        f"{type(model).__name__} has no normalisation, convolution or linear layer: gaia has no activations"
    )


@contextmanager
def _gradients_of_outputs(layers: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Yield a mapping that a backward pass inside the block fills with the gradients of the layers' first outputs."""
    gradients: dict[nn.Module, Tensor] = {}
    called: set[nn.Module] = set()

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and module not in called:
            called.add(module)
            output.register_hook(_keep(gradients, module))  # type: ignore[no-untyped-call]  # an in-place ReLU may follow

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(watch).remove)
        yield gradients


def _keep(gradients: dict[nn.Module, Tensor], module: nn.Module) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        gradients[module] = gradient.detach()

    return hook


def density(layer: nn.Module, gradient: Tensor, size: int) -> Tensor | None:
    """Return the fraction of non-zero entries in each channel, ``(N, C)``; ``None`` without a sample axis.

    Example:
        >>> density(nn.BatchNorm2d(2), torch.tensor([[[[0.0, 1.0]], [[2.0, 1.0]]]]), 1)
        tensor([[0.5000, 1.0000]])
    """
    if not len(gradient) or len(gradient) % size:
        return None
    is_last = isinstance(layer, (nn.Linear, nn.LayerNorm))
    values = gradient if is_last else gradient.movedim(1, -1)
    return at_least_float32((values != 0).to(values)).reshape(size, -1, values.shape[-1]).mean(1)


@dataclass(frozen=True)
class AttributionDensity:
    """A probe: the mean over all channels of the squared fraction of non-zero attribution gradients, ``(N,)``."""

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the means."""
        check_floats(inputs, "attributions")
        with preserved(model), eager(), _gradients_of_outputs(attributed_layers(model)) as gradients:
            leaf, logits = differentiable_logits(model, inputs, "attributions")
            torch.autograd.grad(logits.amax(1).sum(), leaf)
        densities = []
        for layer, gradient in gradients.items():
            shares = density(layer, gradient, len(inputs))
            if shares is not None:
                densities.append(shares)
        return torch.cat(densities, 1).square().mean(1)


@register("gradient", "Chen et al. 2023, arXiv:2311.09620")
def gaia(evidence: Evidence) -> Tensor:
    r"""GAIA-Z: how few of the attributions inside the network are exactly zero.

    The attributions are the gradients of the largest logit with respect to the output of every normalisation layer, or
    of every convolution and linear layer if there is none. The score is the mean over all channels of the squared
    fraction of non-zero entries: in-distribution samples leave more units inactive. It costs a forward and a backward
    pass. A network without units that can be inactive, such as ReLUs, has no zeros, and all its samples score 1.

    The paper's other variant, GAIA-A, is not included.

    Returns:
        A score with values ``(N,)`` in ``[0, 1]``.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> lgm.score(model, torch.randn(5, 3), gaia())["gaia"].shape
        torch.Size([5])

    Reference:
        J. Chen et al., "GAIA: Delving into Gradient-based Attribution Abnormality for Out-of-distribution Detection",
        NeurIPS 2023, https://arxiv.org/abs/2311.09620, https://github.com/JGEthanChen/GAIA-OOD
    """
    values = evidence.probe(AttributionDensity()).to(evidence.logits.dtype)
    return values.masked_fill(evidence.logits.isfinite().all(1).logical_not(), torch.nan)
