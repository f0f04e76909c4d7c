"""ODIN: the softmax after a small step of the input that lowers the loss of the predicted class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import call, logits_of, preserved, with_two_classes
from lightning_gradmetrics.classifier.input_gradients import check_floats, differentiable_logits
from lightning_gradmetrics.gradients.cosine_maps import class_covectors
from lightning_gradmetrics.scoring.arguments import NonNegative, Positive
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["PerturbedLogits", "odin"]


@dataclass(frozen=True)
class PerturbedLogits:
    """A probe: the logits ``(N, C)`` of ``x - epsilon sign(grad_x -log softmax(z / T)_y)``, ``y`` the predicted class.

    Args:
        temperature: The temperature ``T``, which weights the other classes in the gradient.
        epsilon: The step, in the units of the model's input.
    """

    forwards: ClassVar[int] = 2
    temperature: float
    epsilon: float

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the logits of the perturbed inputs."""
        check_floats(inputs, "perturbed inputs")
        with preserved(model):
            model.requires_grad_(False)
            leaf, own_logits = differentiable_logits(model, inputs, "perturbed inputs")
            logits = with_two_classes(own_logits)
            predicted = logits.detach().argmax(1, keepdim=True)
            # The gradient of the loss up to a positive factor; stays accurate if the softmax saturates.
            covector = class_covectors(logits.detach() / self.temperature, predicted, rescale=False)[:, 0]
            (gradient,) = torch.autograd.grad(logits, leaf, covector.to(logits.dtype))
            with torch.no_grad():
                return with_two_classes(logits_of(call(model, inputs - self.epsilon * gradient.sign())))


@register("gradient", "Liang et al. 2018, arXiv:1706.02690")
def odin(evidence: Evidence, *, temperature: Positive = 100.0, epsilon: NonNegative = 0.0014) -> Tensor:
    r"""One minus ODIN, the largest softmax probability of the perturbed input at a temperature.

    ``1 - max_c softmax(z(x') / T)_c`` with ``x' = x - epsilon sign(grad_x -log softmax(z(x) / T)_y)`` and ``y`` the
    predicted class, computed as the sum of all other probabilities. It takes two forward passes and one backward pass.
    Entries whose gradient is exactly 0 are not moved (the official code moves them).

    Args:
        temperature: The temperature ``T``. The default is that of GradTrust's demo; the paper tunes it on data.
        epsilon: The step, in the units of the model's input, after any normalisation. The default is that of
            GradTrust's demo; the paper tunes it on data. In half precision it must exceed the input's rounding.

    Returns:
        A score with values ``(N,)`` in ``[0, 1 - 1/C]``.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = nn.Linear(2, 2), torch.zeros(3, 2)
        >>> lgm.score(model, images, odin(temperature=10.0))["odin(temperature=10.0)"].shape
        torch.Size([3])

    Reference:
        S. Liang, Y. Li and R. Srikant, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural
        Networks", ICLR 2018, https://arxiv.org/abs/1706.02690
    """
    logits = evidence.probe(PerturbedLogits(temperature, epsilon), (evidence.logits.shape[1],))
    p = torch.softmax(logits.to(evidence.logits.dtype) / temperature, 1)
    return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)
