"""GAIA: detects abnormal attributions of the prediction to the activations inside a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import preserved, with_two_classes
from lightning_gradmetrics.classifier.input_gradients import check_floats, differentiable_logits
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.layer_rows import rows_of_output
from lightning_gradmetrics.scoring.registry import register

__all__ = ["AttributionAverage", "AttributionDensity", "channels_last", "gaia", "observing_outputs"]

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


@dataclass
class SeenOutputs:
    """Layers' first outputs and their gradients; a backward pass fills in the gradients.

    Args:
        keeps_outputs: Whether the outputs are copied, or only their gradients are kept.
    """

    keeps_outputs: bool = False
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    gradients: dict[nn.Module, Tensor] = field(default_factory=dict)
    _seen: set[nn.Module] = field(default_factory=set)

    def see(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Note the first output of a layer, and return it.

        For a view, as of a linear layer with positions, this is another tensor with the same memory that is no view: hooks on a view are
        lost when it is changed in place.
        """
        if not isinstance(output, Tensor) or not output.requires_grad or module in self._seen:
            return output
        self._seen.add(module)
        if self.keeps_outputs:
            self.outputs[module] = output.detach().clone()  # an in-place ReLU may follow
        if output._is_view():
            output = torch.ops.aten._unsafe_view(output, output.shape)
        output.register_hook(partial(self._keep, module))
        return output

    def _keep(self, module: nn.Module, gradient: Tensor) -> None:
        self.gradients[module] = gradient.detach()


@contextmanager
def observing_outputs(layers: list[nn.Module], keeps_outputs: bool = False) -> Iterator[SeenOutputs]:
    """Observe the first output of each layer inside the block, and its gradient in a backward pass."""
    observed = SeenOutputs(keeps_outputs)
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(observed.see).remove)
        yield observed


def channels_last(layer: nn.Module, values: Tensor, size: int) -> Tensor | None:
    """Return a layer's output, or a gradient of it, by positions and channels, ``(N, P, C)``; ``None`` without a sample axis."""
    rows = rows_of_output(layer, values, size)
    if rows is None:
        return None
    is_last = rows.ndim < 3 or isinstance(layer, (nn.Linear, nn.LayerNorm))
    by_channel = rows if is_last else rows.movedim(1, -1)
    return at_least_float32(by_channel).reshape(size, -1, by_channel.shape[-1])


class _AttributionProbe:
    """The base of probes that read the outputs of attributed layers."""

    def layers_read(self, model: nn.Module) -> list[nn.Module]:
        """Return the layers whose outputs are read."""
        return attributed_layers(model)


@dataclass(frozen=True)
class AttributionDensity(_AttributionProbe):
    """A probe: the mean over all channels of the squared fraction of non-zero attribution gradients, ``(N,)``."""

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the means."""
        check_floats(inputs, "attributions")
        with preserved(model), eager(), observing_outputs(attributed_layers(model)) as observed:
            leaf, logits = differentiable_logits(model, inputs, "attributions")
            torch.autograd.grad(logits.amax(1).sum(), leaf)
        densities = []
        for layer, gradient in observed.gradients.items():
            values = channels_last(layer, (gradient != 0).to(gradient), len(inputs))
            if values is not None:
                densities.append(values.mean(1))
        return torch.cat(densities, 1).square().mean(1)


@dataclass(frozen=True)
class AttributionAverage(_AttributionProbe):
    """A probe: GAIA-A, the inner over the output component of the mean attribution gradients, ``(N,)``."""

    def __call__(self, model: nn.Module, inputs: Any) -> Tensor:
        """Return the quotients."""
        check_floats(inputs, "attributions")
        heads = _HeadInput()
        with preserved(model), eager(), ExitStack() as stack:
            observed = stack.enter_context(observing_outputs(attributed_layers(model)))
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    stack.callback(layer.register_forward_hook(heads.see).remove)
            leaf, logits = differentiable_logits(model, inputs, "attributions")
            features, weight = heads.of(logits)
            torch.autograd.grad(features.sum(), leaf)
        means = []
        for layer, gradient in observed.gradients.items():
            values = channels_last(layer, gradient, len(inputs))
            if values is not None:
                means.append(values.mean(1).double())
        if not means:
            raise ValueError("gaia(form=average): no attributed layer comes before the head, use form=zero")
        inner = torch.cat(means, 1).square().mean(1)
        outer = (_log_probability_slope(logits)[:, -len(weight) :] @ weight.detach().double()).abs().mean(1)
        return inner / outer.clamp(min=torch.finfo(outer.dtype).tiny)


def _log_probability_slope(logits: Tensor) -> Tensor:
    """The gradient of the sum of all classes' log-probabilities with respect to the logits; one logit z counts as ``(0, z)``."""
    values = with_two_classes(logits.detach().double())
    return 1 - values.shape[1] * torch.softmax(values, 1)


@dataclass
class _HeadInput:
    """The calls of linear layers, of which one returns the logits."""

    calls: list[tuple[nn.Linear, Tensor, Tensor]] = field(default_factory=list)

    def see(self, layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        self.calls.append((layer, args[0], output))

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the head's input ``(N, D)`` and its weight ``(C, D)``."""
        for layer, features, output in reversed(self.calls):
            if output.shape == logits.shape and torch.equal(output.nan_to_num(), logits.nan_to_num()):
                return features, layer.weight
        raise ValueError(
            "gaia(form=average) needs a linear layer that returns the logits, and this model has none: use form=zero"
        )


@register("gradient", "Chen et al. 2023, arXiv:2311.09620")
def gaia(evidence: Evidence, *, form: Literal["zero", "average"] = "zero") -> Tensor:
    r"""GAIA: abnormal attributions inside the network, by the fraction of zeros (GAIA-Z) or by their means (GAIA-A).

    The attributions are gradients with respect to the output of every normalisation layer (of every convolution and linear
    layer, if there is none). It costs a forward and a backward pass.

    GAIA-Z takes gradients of the largest logit, or of the only one. The score is the mean over all channels of the squared
    fraction of non-zero entries: in-distribution samples leave more units inactive. Zeros come from units
    that switch off, such as ReLU; without such units all samples score 1.

    GAIA-A takes gradients of the sum of the head's input ``h``, whose mean over positions in channel ``k`` is ``a_k``. The
    score is ``mean_k a_k^2 / mean_d |sum_c d log p_c / d h_d|``. As in the authors' code, the second mean is not squared.
    If the authors use the map before pooling as ``h``, their scores are these times a constant.

    Args:
        form: ``"zero"`` is GAIA-Z, ``"average"`` is GAIA-A.

    Returns:
        A score with values ``(N,)``: in ``[0, 1]``, or at least 0 for ``form="average"``.

    Raises:
        ValueError: If ``form="average"`` and no linear layer returns the logits.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
        >>> lgm.score(model, torch.randn(5, 3), gaia())["gaia"].shape
        torch.Size([5])

    Reference:
        J. Chen et al., "GAIA: Delving into Gradient-based Attribution Abnormality for Out-of-distribution Detection",
        NeurIPS 2023, https://arxiv.org/abs/2311.09620, https://github.com/JGEthanChen/GAIA-OOD
    """
    probe = AttributionDensity() if form == "zero" else AttributionAverage()
    values = evidence.probe(probe).to(evidence.logits.dtype)
    return values.masked_fill(evidence.logits.isfinite().all(1).logical_not(), torch.nan)
