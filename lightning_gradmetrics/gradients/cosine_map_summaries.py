"""Cosine similarities, and features and summaries of cosine similarity maps (CSMs)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.precision import at_least_float32

__all__ = [
    "cosine_similarity",
    "csm_features",
    "effective_rank",
    "least_row_cosine",
    "max_cosine",
    "mean_cosine",
    "min_cosine",
    "spectrum",
    "std_cosine",
    "zero_saliency",
]


def cosine_similarity(maps: Tensor) -> Tensor:
    """Compute the cosine similarity of every pair of vectors of a sample.

    A zero vector has cosine 0 with every vector, including itself.

    Args:
        maps: ``(N, K, D)``, K vectors per sample.

    Returns:
        ``(N, K, K)``, in [-1, 1], in float32 or float64.

    Example:
        >>> cosine_similarity(torch.tensor([[[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]]))
        tensor([[[1.0000, 0.7071, 0.0000],
                 [0.7071, 1.0000, 0.0000],
                 [0.0000, 0.0000, 0.0000]]])
    """
    maps = at_least_float32(maps)
    largest = maps.abs().amax(-1, keepdim=True)
    maps = maps / torch.where(largest == 0, 1, largest)  # so that squares neither overflow nor underflow
    gram = maps @ maps.mT
    norm = gram.diagonal(dim1=1, dim2=2).sqrt()
    norm = torch.where(norm == 0, 1, norm)
    csm = gram / (norm[:, :, None] * norm[:, None, :])
    return ((csm + csm.mT) / 2).clamp(-1, 1)


def zero_saliency(csm: Tensor) -> Tensor:
    """Return which classes have a saliency map that is zero everywhere, so that their cosine with themselves is 0.

    Args:
        csm: ``(N, K, K)``.

    Returns:
        ``(N, K)``, bool.

    Example:
        >>> zero_saliency(cosine_similarity(torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])))
        tensor([[False,  True]])
    """
    return csm.diagonal(dim1=1, dim2=2) == 0


def csm_features(csm: Tensor) -> Tensor:
    """Return the cosines above the diagonal, row by row: the feature vector of an anomaly detector.

    Args:
        csm: ``(N, K, K)``.

    Returns:
        ``(N, K (K - 1) / 2)``.

    Raises:
        ValueError: If the maps have fewer than two classes.

    Example:
        >>> csm_features(torch.arange(9.0).view(1, 3, 3))
        tensor([[1., 2., 5.]])
    """
    _check_maps(csm)
    size = csm.shape[1]
    rows, columns = torch.triu_indices(size, size, offset=1, device=csm.device)
    return csm[:, rows, columns]


def _check_maps(csm: Tensor) -> None:
    if csm.ndim != 3 or csm.shape[1] != csm.shape[2] or csm.shape[1] < 2:
        raise ValueError(f"expected cosine similarity maps (N, K, K) with K >= 2 classes, got shape {tuple(csm.shape)}")


def mean_cosine(csm: Tensor) -> Tensor:
    """Return the mean cosine of two different classes, ``(N,)``: higher = more uncertain.

    The direction is an empirical finding. It held for misclassifications and near out-of-distribution data. On far data
    (digits shown to a classifier of photographs), the mean did not separate the two kinds.

    Example:
        >>> mean_cosine(torch.tensor([[[1.0, -0.5], [-0.5, 1.0]]]))
        tensor([-0.5000])
    """
    return csm_features(csm).mean(1)


def std_cosine(csm: Tensor) -> Tensor:
    """Return the standard deviation (divisor: the number of pairs) of the cosines of different classes, ``(N,)``."""
    return csm_features(csm).std(1, correction=0)


def min_cosine(csm: Tensor) -> Tensor:
    """Return the smallest cosine of two different classes, ``(N,)``."""
    return csm_features(csm).amin(1)


def max_cosine(csm: Tensor) -> Tensor:
    """Return the largest cosine of two different classes, ``(N,)``."""
    return csm_features(csm).amax(1)


def least_row_cosine(csm: Tensor) -> Tensor:
    """Return the smallest mean cosine of one class with all others, ``(N,)``: low if one class opposes the rest.

    Example:
        >>> least_row_cosine(torch.tensor([[[1.0, 0.6, -0.4], [0.6, 1.0, -0.2], [-0.4, -0.2, 1.0]]]))
        tensor([-0.3000])
    """
    _check_maps(csm)
    return ((csm.sum(2) - csm.diagonal(dim1=1, dim2=2)) / (csm.shape[1] - 1)).amin(1)


def spectrum(csm: Tensor) -> Tensor:
    """Return the eigenvalues of each map, ``(N, K)``, largest first; NaN for a sample with NaN in its map.

    Example:
        >>> spectrum(torch.ones(1, 2, 2))
        tensor([[2., 0.]])
    """
    broken = csm.isfinite().logical_not().flatten(1).any(1)
    values: Tensor = torch.linalg.eigvalsh(csm.masked_fill(broken[:, None, None], 0)).flip(1).clamp(min=0)
    return values.masked_fill(broken[:, None], torch.nan)


def effective_rank(csm: Tensor) -> Tensor:
    """Return the effective number of directions of the saliency maps, the exponential of the spectrum's entropy.

    Args:
        csm: ``(N, K, K)``.

    Returns:
        ``(N,)``, from 1 to K; 0 if every saliency map is zero.

    Example:
        >>> effective_rank(torch.stack([torch.eye(3), torch.ones(3, 3)])).round(decimals=3)
        tensor([3., 1.])

    Reference:
        O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    values = spectrum(csm)
    total = values.sum(1, keepdim=True)
    share = values / torch.where(total == 0, 1, total)
    return torch.where(total[:, 0] == 0, 0, torch.special.entr(share).sum(1).exp())
