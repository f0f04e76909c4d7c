"""Anomaly detectors in plain torch: Mahalanobis with Ledoit-Wolf shrinkage, and the local outlier factor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ledoit_wolf",
    "local_outlier_factor",
    "lof_state",
    "mahalanobis",
    "mahalanobis_state",
    "moment_sums",
    "nearest_rows",
]

CHUNK = 2**22
"""Number of distances computed at a time."""


def moment_sums(x: Tensor) -> dict[str, Tensor]:
    """Return the sums over rows that :func:`mahalanobis_state` needs; sums of several batches may be added.

    Args:
        x: ``(N, D)``.
    """
    squares = x.square().sum(1)
    return {
        "count": x.new_tensor(len(x)),
        "sum": x.sum(0),
        "products": x.T @ x,
        "squares_times_x": squares @ x,
        "fourth": squares.square().sum(),
    }


def mahalanobis_state(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mean and shrunk precision of the rows behind the sums, in constant memory.

    Args:
        sums: The result of :func:`moment_sums` for 2 or more rows.

    Returns:
        ``mean`` ``(D,)`` and ``precision`` ``(D, D)``, the inverse of the covariance of :func:`ledoit_wolf`.

    Raises:
        ValueError: If there are fewer than 2 rows, or all rows are equal.
    """
    normal = ledoit_wolf(sums)
    return {"mean": normal["mean"], "precision": torch.linalg.pinv(normal["covariance"], hermitian=True)}


def ledoit_wolf(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    r"""Return mean and shrunk covariance of the rows behind the sums.

    The covariance is ``(1 - s) S + s tr(S)/D I`` with Ledoit and Wolf's shrinkage ``s``.

    Args:
        sums: The result of :func:`moment_sums` for 2 or more rows.

    Returns:
        ``mean`` ``(D,)``, ``covariance`` ``(D, D)`` and ``shrinkage``, from 0 to 1.

    Raises:
        ValueError: If there are fewer than 2 rows, or all rows are equal.

    Reference:
        O. Ledoit and M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
        Multivariate Analysis 88, 2004.
    """
    count, mean = sums["count"], sums["sum"] / sums["count"]
    if count < 2:
        raise ValueError(f"a covariance needs 2 or more samples, but there are {int(count)}")
    covariance = sums["products"] / count - torch.outer(mean, mean)
    size, trace = len(mean), covariance.trace()
    if not trace > 1e-12 * sums["products"].trace() / count:
        raise ValueError("all samples have the same features: there is no covariance to fit")
    average = trace / size
    distance = covariance.square().sum() - size * average**2
    spread = (_centred_fourth(sums, mean) / count - covariance.square().sum()) / count
    shrinkage = (spread.clamp(min=0) / distance).clamp(max=1) if distance > 0 else spread.new_tensor(1)
    shrunk = (1 - shrinkage) * covariance + shrinkage * average * torch.eye(size).to(covariance)
    return {"mean": mean, "covariance": shrunk, "shrinkage": shrinkage}


def _centred_fourth(sums: dict[str, Tensor], mean: Tensor) -> Tensor:
    """Return ``sum |x - m|^4`` from the raw sums."""
    square = mean @ mean
    return (
        sums["fourth"]
        + 4 * mean @ sums["products"] @ mean
        - 3 * sums["count"] * square**2
        - 4 * mean @ sums["squares_times_x"]
        + 2 * square * sums["products"].trace()
    )


def mahalanobis(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the squared Mahalanobis distance of rows ``(N, D)`` to the mean, ``(N,)``."""
    centred = x - state["mean"]
    return (centred @ state["precision"] * centred).sum(1)


def lof_state(rows: Tensor, neighbours: int) -> dict[str, Tensor]:
    """Return the tensors that the local outlier factor needs from the rows of its fit.

    Args:
        rows: ``(M, D)``.
        neighbours: The number of neighbours; at most M - 1 are used.

    Returns:
        ``rows``; ``reach`` ``(M,)``, each row's distance to its last neighbour; ``density`` ``(M,)``, its local
        density.

    Raises:
        ValueError: If there are fewer than 2 rows.
    """
    if len(rows) < 2:
        raise ValueError(f"the local outlier factor needs 2 or more samples to be fitted on, but there are {len(rows)}")
    count = min(neighbours, len(rows) - 1)
    distances, nearest = nearest_rows(rows, rows, count + 1)
    own = nearest == torch.arange(len(rows), device=rows.device)[:, None]
    own |= (~own.any(1))[:, None] & (torch.arange(count + 1, device=rows.device) == count)  # among many identical rows
    distances, nearest = distances[~own].view(-1, count), nearest[~own].view(-1, count)
    reach = distances[:, -1].contiguous()
    return {"rows": rows, "reach": reach, "density": _density(distances, nearest, reach)}


def nearest_rows(x: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return distances to, and positions of, the nearest rows, ``(N, count)`` each, nearest first.

    Args:
        x: ``(N, D)``.
        rows: ``(M, D)``.
        count: The number of neighbours.
    """
    mode = "donot_use_mm_for_euclid_dist"  # exact, and the same in any batch
    distances, positions = [], []
    for chunk in torch.split(x, max(1, CHUNK // len(rows))):
        closest = torch.cdist(chunk, rows, compute_mode=mode).topk(count, largest=False)
        distances.append(closest.values)
        positions.append(closest.indices)
    return torch.cat(distances), torch.cat(positions)


def _density(distances: Tensor, nearest: Tensor, reach: Tensor) -> Tensor:
    """Return one over the mean reachability distance."""
    return 1 / (torch.maximum(distances, reach[nearest]).mean(1) + 1e-10)


def local_outlier_factor(x: Tensor, state: dict[str, Tensor], neighbours: int) -> Tensor:
    """Return the local outlier factor of rows ``(N, D)``: the mean density of their neighbours over their own, ``(N,)``.

    Reference:
        M. Breunig et al., "LOF: identifying density-based local outliers", SIGMOD 2000.
    """
    broken = x.isfinite().all(1).logical_not()
    known = x.masked_fill(broken[:, None], 0)
    distances, nearest = nearest_rows(known, state["rows"], min(neighbours, len(state["rows"]) - 1))
    factor = state["density"][nearest].mean(1) / _density(distances, nearest, state["reach"])
    return factor.masked_fill(broken, torch.nan)
