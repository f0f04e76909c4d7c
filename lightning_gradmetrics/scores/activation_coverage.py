"""NAC-UE: how often in-distribution samples reached the activation states that a sample has."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import preserved, with_two_classes
from lightning_gradmetrics.classifier.input_gradients import check_floats, differentiable_logits
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.objectives import Objective
from lightning_gradmetrics.scores.attribution import channels_last, observing_outputs
from lightning_gradmetrics.scoring.arguments import Allowed, Count, Positive
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["ActivationStates", "interval_edges", "nac_ue"]

BASE = 1000.0
"""The base of the logarithm that spaces the intervals in the authors' code."""

EvenFromFour = Annotated[int, Allowed("an even number of at least 4", lambda value: value >= 4 and value % 2 == 0)]


def interval_edges(bins: int) -> Tensor:
    """Return the edges of the authors' ``bins - 1`` intervals of [0, 1], which are narrowest around 0.5, ``(bins,)``.

    Args:
        bins: The number of edges, even.

    Example:
        >>> interval_edges(6)
        tensor([0.0000, 0.4042, 0.5000, 0.5958, 1.0100, 1.2000], dtype=torch.float64)
    """
    steps = torch.linspace(1, BASE**0.5, bins // 2, dtype=torch.float64)
    lower = steps.log() / torch.tensor(BASE, dtype=torch.float64).log()
    upper = 1 - lower.flip(0)
    edges = torch.cat([lower[:-1], upper, upper.new_tensor([1.2])])
    edges[-2] += 0.01
    return edges


@dataclass(frozen=True)
class ActivationStates:
    """A probe: activation times gradient of every channel, and the channel's share of the score, ``(N, 2, F)``.

    Args:
        layers: A pattern of the layers' names.
    """

    layers: str

    def layers_read(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers whose outputs are read.

        Raises:
            ValueError: If the pattern matches no layer.
        """
        chosen = [layer for name, layer in model.named_modules() if name and fnmatchcase(name, self.layers)]
        if not chosen:
            names = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"nac_ue: no layer matches layers={self.layers!r}; the model's parts are {names}")
        return chosen

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return for each channel the product of the two sums over all positions, and ``1 / (layers * channels)``."""
        check_floats(inputs, "activation states")
        chosen = self.layers_read(model)
        uniform = Objective.of("uniform").loss(None)
        with preserved(model), eager(), observing_outputs(chosen, keeps_outputs=True) as observed:
            leaf, logits = differentiable_logits(model, inputs, "activation states")
            torch.autograd.grad(uniform(with_two_classes(logits)).sum(), leaf)
        products = []
        for layer, output in observed.outputs.items():  # in the order of the calls
            if layer not in observed.gradients:
                continue
            activation = channels_last(layer, output, len(inputs))
            slope = channels_last(layer, observed.gradients[layer], len(inputs))
            if activation is not None and slope is not None:
                products.append(activation.sum(1) * slope.sum(1))
        if not products:
            raise ValueError(f"nac_ue: no layer of layers={self.layers!r} has an output with one row per sample")
        shares = [torch.full_like(product, 1 / (len(products) * product.shape[1])) for product in products]
        return torch.stack([torch.cat(products, 1), torch.cat(shares, 1)], 1)


@register("gradient", "Liu et al. 2024, arXiv:2306.02879")
class nac_ue(FittedScore):
    r"""NAC-UE: negative coverage of a sample's activation states by in-distribution samples.

    The state of a channel is ``sigmoid(a h g)`` with its activation ``h`` and the derivative ``g`` of the cross-entropy
    to the uniform distribution, both summed over all positions. The states of in-distribution data are counted in intervals of
    [0, 1]; the coverage of an interval is ``min(count / fill, 1)``. The score is the negative mean coverage over the channels of
    each layer, averaged over the layers. The fit streams counts in memory of F x bins; labels are not needed.

    By default the layer is the head's input, the authors' ``avgpool`` setting for CIFAR-10: then ``g = W^T (p - 1/C)`` is known
    in closed form, and there is no backward pass. The intervals are those of the authors' code in OpenOOD, narrowest
    around 0.5. pytorch-ood's ``NACUE`` differs: its intervals are narrowest at 0 and 1, it multiplies before it averages over
    positions, and it adds up the layers.

    Args:
        layers: A pattern of layer names, as in ``"layer4*"``, whose outputs are the activations; ``None`` is the head's
            input. A pattern takes one forward and one backward pass.
        bins: The number of edges of the intervals, even.
        steepness: The factor ``a``. The authors tune it for each layer, from 0.001 to 3000.
        fill: The count at which an interval is covered.

    Raises:
        ValueError: If no layer matches, or the data to fit on contain fewer than ``fill`` samples.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, images = nn.Linear(4, 3), torch.randn(60, 4)
        >>> (fitted,) = lgm.fit(model, [images], nac_ue())
        >>> bool((lgm.score(model, images, fitted)["nac_ue"].abs() <= 1).all())
        True

    Reference:
        Y. Liu et al., "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization", ICLR 2024,
        https://arxiv.org/abs/2306.02879, https://github.com/BierOne/ood_coverage
    """

    layers: str | None = None
    bins: EvenFromFour = 50
    steepness: Positive = 100.0
    fill: Count = 50

    def measure(self, evidence: Evidence) -> Tensors:
        if self.layers is None:
            output = evidence.softmax().probabilities - 1 / evidence.logits.shape[1]
            weight = evidence.head[0].to(output)
            products = evidence.features * (output[:, -len(weight) :] @ weight)
            shares = torch.full_like(products, 1 / products.shape[1])
        else:
            products, shares = evidence.probe(ActivationStates(self.layers), (2, 8)).to(evidence.logits).unbind(1)
        edges = interval_edges(self.bins).to(products)
        states = torch.sigmoid(self.steepness * products)
        intervals = torch.bucketize(states, edges, right=True) - 1
        known = products.isfinite().all(1)
        return {"intervals": intervals.clamp(0, self.bins - 2), "shares": shares, "known": known}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        intervals = measured["intervals"][measured["known"]]
        channels = intervals.shape[1]
        offsets = (self.bins - 1) * torch.arange(channels, device=intervals.device)
        counts = torch.bincount((intervals + offsets).flatten(), minlength=channels * (self.bins - 1))
        return {"counts": counts.view(channels, self.bins - 1), "samples": measured["known"].sum()}

    def finish(self, total: Tensors) -> Tensors:
        samples = int(total["samples"])
        if samples < self.fill:
            raise ValueError(
                f"nac_ue(fill={self.fill}) is fitted on {self.fill} or more finite samples, but there are {samples}: give "
                "more, or lower fill"
            )
        return {"coverage": (total["counts"].double() / self.fill).clamp(max=1)}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        coverage = state["coverage"].T.gather(0, measured["intervals"])
        covered = (coverage.to(measured["shares"]) * measured["shares"]).sum(1)
        return (-covered).masked_fill(measured["known"].logical_not(), torch.nan)
