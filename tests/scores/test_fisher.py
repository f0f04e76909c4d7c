"""The factors that the influence is fitted with."""

from __future__ import annotations

import pytest
import torch

import lightning_gradmetrics as lgm
from tests.models import mlp, vectors


def test_factors_are_damped_means_over_the_data() -> None:
    """They equal a plain loop over the samples, for any batches."""
    model, inputs = mlp().double(), vectors(9).double()
    (score,) = lgm.fit(model, inputs.split([4, 2, 3]), "kfac_influence(damping=0.01)")
    output, features = torch.zeros(5, 5).double(), torch.zeros(10, 10).double()
    with torch.no_grad():
        for x in inputs:
            h = torch.cat([model[:-1](x[None])[0], torch.ones(1).double()])
            p = model(x[None])[0].softmax(0)
            output += (torch.diag(p) - torch.outer(p, p)) / 9
            features += torch.outer(h, h) / 9
    for name, mean in (("output", output), ("features", features)):
        damped = mean + 0.01 * mean.trace() / len(mean) * torch.eye(len(mean)).double()
        torch.testing.assert_close(score.state[name] @ damped, torch.eye(len(mean)).double(), rtol=1e-8, atol=1e-8)


def test_an_unusual_sample_has_more_influence() -> None:
    model, inputs = mlp(), vectors(50)
    (score,) = lgm.fit(model, [inputs], "kfac_influence")
    far = lgm.score(model, 10 * vectors(50), score)["kfac_influence"]
    near = lgm.score(model, vectors(50), score)["kfac_influence"]
    assert far.median() > near.median()


@pytest.mark.parametrize("damping", [0.0, -1.0])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        lgm.fit(mlp(), [vectors(3)], f"kfac_influence(damping={damping})")
