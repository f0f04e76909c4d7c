"""GradOrth: the fitted subspace, and limiting cases of the score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores.gradorth import leading_directions
from tests.models import fast_rows, mlp, vectors


def features(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model[:-1](inputs)  # type: ignore[index, no-any-return]


@pytest.mark.parametrize("energy", fast_rows([0.5, 0.9, 0.97], [0.9]))
def test_the_subspace_is_that_of_the_singular_vectors(energy: float) -> None:
    """The vectors equal those of numpy's decomposition of all features at once, for any batches: the fewest that suffice."""
    model, inputs = mlp().double(), vectors(50).double()
    (score,) = lgm.fit(model, inputs.split([20, 7, 23]), f"gradorth(energy={energy})")
    _, sizes, right = np.linalg.svd(features(model, inputs).numpy(), full_matrices=False)
    share = np.cumsum(sizes**2) / np.sum(sizes**2)
    rank = int(np.searchsorted(share, energy)) + 1
    assert score.state is not None
    found = score.state["directions"].numpy()
    assert found.shape == (9, rank) and share[rank - 1] >= energy and (rank == 1 or share[rank - 2] < energy)
    np.testing.assert_allclose(found @ found.T, right[:rank].T @ right[:rank], atol=1e-10)


def test_all_the_energy_is_gradnorm() -> None:
    model, inputs = mlp().double(), vectors(40).double()
    (score,) = lgm.fit(model, [inputs], "gradorth(energy=1)")
    first, second = lgm.score(model, vectors(5).double(), [score, "gradnorm(p=2)"]).values()
    torch.testing.assert_close(first, second)


def test_an_unseen_direction_has_no_weight() -> None:
    """Features beside the subspace: the same sample without them has the same score, but for its logits."""
    model = torch.nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        model.weight[:, 3] = 0
    inside = torch.cat([torch.randn(30, 3), torch.zeros(30, 1)], 1).double()
    (score,) = lgm.fit(model, [inside], "gradorth(energy=1)")
    x = torch.randn(5, 4).double()
    known = x * torch.tensor([1.0, 1, 1, 0])
    torch.testing.assert_close(*(lgm.score(model, batch, score)[score.name] for batch in (x, known)))


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.5])
def test_energy_is_a_fraction(energy: float) -> None:
    with pytest.raises(ValueError, match="energy"):
        lgm.fit(mlp(), [vectors(3)], f"gradorth(energy={energy})")


def test_without_features_there_is_no_subspace() -> None:
    with pytest.raises(ValueError, match="all zero"):
        leading_directions(torch.zeros(3, 3), 0.97)
