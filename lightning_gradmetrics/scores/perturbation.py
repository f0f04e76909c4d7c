"""ODIN: the softmax after a small step of the input against the gradient of the predicted class's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import call, logits_of, preserved
from lightning_gradmetrics.classifier.input_gradients import check_floats, differentiable_logits
from lightning_gradmetrics.gradients.cosine_maps import class_covectors
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import register

__all__ = ["PerturbedLogits", "odin"]


@dataclass(frozen=True)
class PerturbedLogits:
    """A probe: the logits ``(N, C)`` of ``x - epsilon sign(grad_x -log softmax(z / T)_y)``, ``y`` the predicted class.

    Args:
        temperature: T; it weighs the other classes in the gradient.
        epsilon: The step, in the units of the model's input.
    """

    temperature: float
    epsilon: float

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """The logits of the perturbed inputs."""
        check_floats(inputs, "perturbed inputs")
        with preserved(model):
            model.requires_grad_(False)
            leaf, logits = differentiable_logits(model, inputs, "perturbed inputs")
            predicted = logits.detach().argmax(1, keepdim=True)
            # The gradient of the loss up to a positive factor, which keeps its digits where the softmax saturates.
            covector = class_covectors(logits.detach() / self.temperature, predicted, rescale=False)[:, 0]
            (gradient,) = torch.autograd.grad(logits, leaf, covector.to(logits.dtype))
            with torch.no_grad():
                return logits_of(call(model, inputs - self.epsilon * gradient.sign()))


@register("gradient", "Liang et al. 2018, arXiv:1706.02690")
def odin(evidence: Evidence, *, temperature: float = 100.0, epsilon: float = 0.0014) -> Tensor:
    r"""One minus ODIN, the largest softmax probability of the perturbed input at a temperature.

    ``x' = x - epsilon sign(grad_x -log softmax(z(x) / T)_y)`` with ``y`` the predicted class; the score is ``1 - max_c
    softmax(z(x') / T)_c`` as the sum of all other probabilities, and ODIN is one minus it. Two forwards and a backward.
    The defaults are those of GradTrust's demo; the paper tunes both on data. ``epsilon`` is in the units of the model's
    input, after any normalisation: in half precision it must stay above the input's rounding. An entry whose gradient
    is exactly 0 is not moved (the official code moves it).
    """
    logits = evidence.probe(PerturbedLogits(temperature, epsilon), (evidence.logits.shape[1],))
    p = torch.softmax(logits.to(evidence.logits.dtype) / temperature, 1)
    return p.scatter(1, p.argmax(1, keepdim=True), 0.0).sum(1)
