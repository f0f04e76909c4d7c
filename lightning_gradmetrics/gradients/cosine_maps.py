"""Geometric gradient analysis: cosine similarity maps (CSMs) of the input gradients of the losses of all classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import check_model, gradients_enabled, preserved, with_two_classes
from lightning_gradmetrics.classifier.input_gradients import check_floats, differentiable_logits
from lightning_gradmetrics.gradients.cosine_map_summaries import cosine_similarity
from lightning_gradmetrics.gradients.precision import at_least_float32

__all__ = ["class_covectors", "cosine_similarity_maps"]

_WHO = "cosine similarity maps"

BUDGET = 2**28
"""Memory limit in bytes for saliency maps. A batch that needs more is split into chunks, with one forward pass each."""

ROWS = {"cpu": 4, "cuda": 512}
"""Largest number of samples times classes in one backward pass. Small batches process several classes at once."""

ROWS_OF_TWO = 16
"""The same for one or two samples on a CPU, where a backward pass is mostly overhead."""

MOST_ENTRIES = 2**23
"""Limits the same number on a CPU to this number of entries of the inputs, because the memory grows with them."""


def cosine_similarity_maps(
    model: nn.Module, inputs: Tensor, *, sign: bool = True, rescale: bool = True, classes: int | None = None
) -> Tensor:
    r"""Compute the cosine similarity of the saliency maps of every pair of classes, for each sample.

    With logits ``z(x)`` and ``z' = 10 z / max_j |z_j|`` (``rescale``), the saliency map of class ``c`` is
    ``S_c = max over channels of sign(d CE(z', c) / d x)``, and the map's entry is ``<S_c, S_d> / (|S_c|_2 |S_d|_2)``.

    This takes one forward pass and computes input gradients only. Since ``sum_c p_c dL_c/dx = 0``, the gradient of the
    likeliest class follows from the others without a backward pass.

    The maximum over channels is taken over axis 1 of inputs with four or more axes, ``(N, channels, H, W)``. Inputs with
    fewer axes, such as ``(N, D)``, have no channel axis: all their entries are used.

    A class whose saliency map is zero everywhere has cosine 0 with every class, including itself; see
    :func:`lightning_gradmetrics.gradients.cosine_map_summaries.zero_saliency`. If a sample's logits or gradients are not
    finite, its map is NaN. Other samples are not affected.

    Args:
        model: A classifier with logits ``(N, C)``, batch norm in eval mode. It is left unchanged.
        inputs: ``(N, ...)``, floats.
        sign: Whether to take the sign of the gradient's entries before the maximum over channels.
        rescale: Whether to scale each sample's logits to a largest absolute value of 10 before the softmax.
        classes: ``None`` for all C classes in the model's order; ``k`` for the k classes with each sample's largest
            logits, largest first.

    Returns:
        ``(N, K, K)``, symmetric, entries in [-1, 1], in float32 or float64; K is C, or ``classes``.

    Raises:
        TypeError: If the inputs are not a tensor of floats.
        ValueError: If ``classes`` is not in 1 ... C, a batch norm is in train mode, or the logits do not depend on the
            inputs.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> cosine_similarity_maps(model, torch.tensor([[2.0, 1.0]]))
        tensor([[[ 1., -1.],
                 [-1.,  1.]]])

    Reference:
        L. Schwinn et al., "Identifying Untrustworthy Predictions in Neural Networks by Geometric Gradient Analysis",
        UAI 2021.
    """
    _check(model, inputs)
    with preserved(model), gradients_enabled(model):
        model.requires_grad_(False)
        return _maps(model, inputs, sign, rescale, classes)


def _check(model: nn.Module, inputs: Tensor) -> None:
    check_model(model)
    check_floats(inputs, _WHO)


def _maps(model: nn.Module, inputs: Tensor, sign: bool, rescale: bool, classes: int | None) -> Tensor:
    """Return the maps, computed in chunks of samples if the saliency maps exceed the budget."""
    leaf, own_logits = differentiable_logits(model, inputs, _WHO)
    logits = with_two_classes(own_logits)
    order = _ranking(logits.detach(), classes)
    size, ranked, count = *order.shape, logits.shape[1]
    step = max(1, BUDGET // (ranked * max(count, _positions(leaf)) * 4))
    if step < size:
        del leaf, own_logits, logits
        return torch.cat([_maps(model, chunk, sign, rescale, classes) for chunk in torch.split(inputs, step)])
    csm = cosine_similarity(_saliency(leaf, logits, order, sign, rescale))
    return csm if classes is not None else _in_class_order(csm, order)


def _ranking(logits: Tensor, classes: int | None) -> Tensor:
    """Return each sample's classes by logit, ``(N, K)``, largest first."""
    count = logits.shape[1]
    if classes is not None and not (isinstance(classes, Integral) and 1 <= classes <= count):
        raise ValueError(
            f"classes={classes}; allowed: None for all classes, or from 1 to {count}, the model's number of classes"
        )
    return logits.argsort(dim=1, descending=True, stable=True)[:, :classes]


def _in_class_order(csm: Tensor, order: Tensor) -> Tensor:
    """Reorder rows and columns from the ranking to the model's order of classes."""
    position = order.argsort(1)
    rows = csm.gather(1, position[:, :, None].expand_as(csm))
    return rows.gather(2, position[:, None, :].expand_as(csm))


def class_covectors(logits: Tensor, classes: Tensor, *, rescale: bool = True) -> Tensor:
    """Compute the gradient of each class's loss with respect to the logits, up to a positive factor.

    The gradient of ``CE(z', c)`` is ``p - e_c``. This function returns it divided by ``1 - p_c``, which is ``q - e_c`` with
    ``q`` the softmax over the other classes: it stays accurate even if ``p_c`` rounds to 1. With ``rescale`` the gradient is
    propagated through ``z' = 10 z / max_j |z_j|``, without the factor ``10 / max_j |z_j|``.

    Args:
        logits: ``(N, C)``.
        classes: ``(N, K)``, class indices.
        rescale: Whether the loss uses the rescaled logits. All-zero logits cannot be rescaled; their gradient is zero.

    Returns:
        ``(N, K, C)``, in float32 or float64.

    Example:
        >>> class_covectors(torch.zeros(1, 3), torch.tensor([[0, 2]]), rescale=False)
        tensor([[[-1.0000,  0.5000,  0.5000],
                 [ 0.5000,  0.5000, -1.0000]]])
    """
    logits = at_least_float32(logits)
    chosen = F.one_hot(classes, logits.shape[1])
    if logits.shape[1] == 1:
        return chosen * (logits * 0)[:, None]
    scaled = _rescaled(logits) if rescale else logits
    covectors = scaled[:, None].masked_fill(chosen.bool(), -torch.inf).softmax(-1) - chosen
    return _through_rescaling(covectors, logits) if rescale else covectors


def _rescaled(logits: Tensor) -> Tensor:
    """Return logits with the largest absolute value 10; all-zero logits stay zero."""
    largest = logits.abs().amax(1, keepdim=True)
    return 10 * logits / torch.where(largest == 0, 1, largest)


def _through_rescaling(covectors: Tensor, logits: Tensor) -> Tensor:
    """Multiply by the transposed Jacobian of the rescaling times ``max|z| / 10``, which changes one component."""
    largest, index = logits.abs().max(1, keepdim=True)
    unit = logits / torch.where(largest == 0, 1, largest)
    at_largest = F.one_hot(index, logits.shape[1]).bool()  # (N, 1, C)
    others = (covectors * unit[:, None]).masked_fill(at_largest, 0).sum(-1, keepdim=True)
    back = torch.where(at_largest, -logits.gather(1, index).sign()[:, None] * others, covectors)
    return torch.where((largest == 0)[:, None], 0, back)


def _saliency(leaf: Tensor, logits: Tensor, order: Tensor, sign: bool, rescale: bool) -> Tensor:
    """Return the saliency maps ``(N, K, positions)`` of the ranked classes."""
    covectors = class_covectors(logits.detach(), order, rescale=rescale).to(logits.dtype)
    if len(leaf) == 0:
        return leaf.new_zeros(0, order.shape[1], _positions(leaf))
    if order.shape[1] < logits.shape[1]:
        return torch.cat([_reduce(gradients, sign) for gradients in _gradients(leaf, logits, covectors)], 1)
    weights = _weights_of_others(logits.detach(), order, rescale)
    first = torch.zeros_like(leaf, dtype=weights.dtype)
    maps, done = [], 0
    for gradients in _gradients(leaf, logits, covectors[:, 1:]):
        share = weights[:, done : done + gradients.shape[1]]
        first -= torch.einsum("nk,nk...->n...", share, gradients.to(share.dtype))
        maps.append(_reduce(gradients, sign))
        done += gradients.shape[1]
    return torch.cat([_reduce(first.to(leaf.dtype)[:, None], sign), *maps], 1)


def _weights_of_others(logits: Tensor, order: Tensor, rescale: bool) -> Tensor:
    """Return weights ``(N, C - 1)`` of the other gradients whose negative mean is the likeliest class's gradient.

    They follow from ``sum_c p_c grad_c = 0``, with gradients divided by ``1 - p_c`` as in :func:`class_covectors`.
    """
    logits = at_least_float32(logits)
    log_p = (_rescaled(logits) if rescale else logits).log_softmax(1).gather(1, order)[:, 1:]
    return (log_p + torch.log1p(-log_p.exp())).softmax(1)


def _gradients(leaf: Tensor, logits: Tensor, covectors: Tensor) -> Iterator[Tensor]:
    """Yield the input gradients ``(N, G, ...)`` of groups of covectors ``(N, K, C)``; :data:`ROWS` limits a group."""
    rows = len(leaf) * covectors.shape[1]
    limit = ROWS.get(leaf.device.type, 1)
    if leaf.device.type == "cpu":
        limit = max(limit, ROWS_OF_TWO) if len(leaf) <= 2 else limit
        limit = min(limit, MOST_ENTRIES // max(1, leaf[0].numel()))
    groups = max(1, math.ceil(rows / max(limit, len(leaf))))
    for group in covectors.transpose(0, 1).tensor_split(groups):
        yield _vector_jacobian(leaf, logits, group).transpose(0, 1)


def _vector_jacobian(leaf: Tensor, logits: Tensor, covectors: Tensor) -> Tensor:
    """Backpropagate covectors ``(G, N, C)`` of the logits to the inputs, ``(G, N, ...)``, batched if possible."""
    if len(covectors) > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return torch.func.vmap(partial(_backward, leaf, logits))(covectors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation does not support batched gradients
            pass
    return torch.stack([_backward(leaf, logits, row) for row in covectors])


def _backward(leaf: Tensor, logits: Tensor, covectors: Tensor) -> Tensor:
    return torch.autograd.grad(logits, leaf, covectors, retain_graph=True)[0]


def _reduce(gradients: Tensor, sign: bool) -> Tensor:
    """Reduce gradients ``(N, K, channels, ...)`` to saliency maps ``(N, K, positions)``."""
    signed = gradients.sign() if sign else gradients
    maps = (signed.amax(2) if signed.ndim >= 5 else signed).flatten(2)
    if not sign:
        return maps
    broken = gradients.flatten(2).sum(2, keepdim=True).isnan()  # torch.sign(nan) is 0
    return maps.masked_fill(broken, torch.nan)


def _positions(inputs: Tensor) -> int:
    """Return the number of entries of one saliency map."""
    shape = inputs.shape[2:] if inputs.ndim >= 4 else inputs.shape[1:]
    return shape.numel()
