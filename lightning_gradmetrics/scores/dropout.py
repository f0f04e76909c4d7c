"""Monte Carlo dropout: the mean prediction of networks with units dropped at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import batch_size, call, logits_of, preserved, with_two_classes
from lightning_gradmetrics.classifier.notices import warn_once
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.scoring.arguments import Count, CountOrZero
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["MeanPrediction", "mc_dropout"]

_WHOLE_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPPED = -1.7580993408473766
"""The value that alpha dropout gives to dropped units: SELU's limit for large negative inputs."""


@dataclass(frozen=True)
class MeanPrediction:
    """A probe: the mean softmax ``(N, C)`` over passes with dropout.

    Each pass draws one set of masks from a separate generator and applies it to every sample, so that a sample's value
    does not depend on its batch, on the device, or on the caller's random numbers.

    Args:
        passes: The number of passes.
        seed: The seed of the masks.
    """

    backward: ClassVar[bool] = False
    passes: int
    seed: int

    @property
    def forwards(self) -> int:
        """The number of forward passes of a model with dropout."""
        return self.passes

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the mean softmax; the softmax of one pass if the model has no dropout."""
        dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
        if not dropouts:
            warn_once(
                model,
                f"{type(model).__name__} has no dropout module with p > 0: mc_dropout equals the entropy of its prediction",
            )
        generator = torch.Generator().manual_seed(self.seed)
        with preserved(model), torch.no_grad(), eager(), _dropping(dropouts, batch_size(inputs), generator):
            passes = self.passes if dropouts else 1
            total = torch.zeros(())
            for _ in range(passes):
                logits = with_two_classes(logits_of(call(model, inputs)))
                total = total + at_least_float32(logits).softmax(1)
            return total / passes


@contextmanager
def _dropping(dropouts: list[nn.modules.dropout._DropoutNd], size: int, generator: torch.Generator) -> Iterator[None]:
    """Make the dropout modules drop units inside the block, the same units for each of the ``size`` samples."""

    def dropped(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _drop(module, output, size, generator)  # type: ignore[arg-type]

    with ExitStack() as stack:
        for module in dropouts:
            module.eval()  # the module itself then returns its input
            stack.callback(module.register_forward_hook(dropped).remove)
        yield


def _drop(module: nn.modules.dropout._DropoutNd, x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Apply dropout to ``x``, whose first axis holds the samples, or several consecutive rows (such as windows) per sample."""
    rows = len(x) // size if len(x) % size == 0 else len(x)
    channels = isinstance(module, _WHOLE_CHANNELS)
    shape = (rows, x.shape[1], *[1] * (x.ndim - 2)) if channels else (rows, *x.shape[1:])
    mask = (torch.rand(shape, generator=generator) >= module.p).to(x.device, x.dtype)
    mask = mask.repeat(len(x) // rows, *[1] * (x.ndim - 1))
    if not isinstance(module, _ALPHA):
        return x * mask / (1 - module.p) if module.p < 1 else x * mask
    scale = ((1 - module.p) * (1 + module.p * _DROPPED**2)) ** -0.5 if module.p < 1 else 0.0
    dropped: Tensor = scale * (x * mask + _DROPPED * (1 - mask) + _DROPPED * -module.p)
    return dropped


@register("baseline", "Gal & Ghahramani 2016, arXiv:1506.02142")
def mc_dropout(evidence: Evidence, *, passes: Count = 10, seed: CountOrZero = 0) -> Tensor:
    r"""Entropy of the mean softmax over passes with dropout, in nats.

    Only ``nn.Dropout`` modules are enabled; dropout built into attention and recurrent layers stays off. Each pass has
    one set of masks, the same for every sample. For a model without dropout the score is the entropy, with a warning.
    GradTrust's demo intends this quantity, but its code keeps only the last pass.

    Args:
        passes: The number of forward passes.
        seed: The seed of the masks.

    Returns:
        A score with values ``(N,)`` in ``[0, log C]``.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).eval()
        >>> lgm.score(model, torch.ones(3, 2), mc_dropout(passes=4))["mc_dropout(passes=4)"].shape
        torch.Size([3])

    Reference:
        Y. Gal and Z. Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep
        Learning", ICML 2016, https://arxiv.org/abs/1506.02142
    """
    p = evidence.probe(MeanPrediction(passes, seed), (evidence.logits.shape[1],))
    entropy: Tensor = torch.special.entr(p.to(evidence.logits.dtype)).sum(1)
    return entropy
