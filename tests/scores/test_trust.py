"""Trust: its distances against refitting, its views against one forward per view, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores.averaging import shifted_views
from lightning_gradmetrics.scores.channels import WIDTH, channels_of, observing_channels
from lightning_gradmetrics.scores.detectors import ledoit_wolf, mahalanobis, moment_sums
from lightning_gradmetrics.scores.trust import Measurements, left_out_distances
from tests.models import assert_same_state, cnn, images, mlp, state_of, vectors


def test_left_out_distances_equal_a_fit_without_the_row() -> None:
    torch.manual_seed(0)
    rows = torch.randn(30, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    normal = ledoit_wolf(moment_sums(rows))
    shrinkage = normal["shrinkage"]
    target = normal["covariance"] - (1 - shrinkage) * torch.cov(rows.T, correction=0)
    found = left_out_distances(rows, normal["mean"], torch.linalg.inv(normal["covariance"]), shrinkage)
    for row in range(30):
        others = rows[torch.arange(30) != row]
        covariance = (1 - shrinkage) * torch.cov(others.T, correction=0) * 29 / 30 + target  # each row counts 1/30
        state = {"mean": others.mean(0), "precision": torch.linalg.inv(covariance)}
        torch.testing.assert_close(found[row], mahalanobis(rows[row : row + 1], state)[0])


def test_left_out_distances_of_new_rows_are_alike_where_their_own_fit_flatters() -> None:
    torch.manual_seed(0)
    rows, new = torch.randn(200, 100, dtype=torch.float64), torch.randn(500, 100, dtype=torch.float64)
    covariance = torch.cov(rows.T, correction=0)
    state = {"mean": rows.mean(0), "precision": torch.linalg.inv(covariance)}
    left_out = left_out_distances(rows, state["mean"], state["precision"], torch.tensor(0.0))
    ratio = left_out.median() / mahalanobis(new, state).median()
    assert 0.9 < ratio < 1.1
    assert mahalanobis(rows, state).median() < 0.6 * mahalanobis(new, state).median()


def test_views_average_the_measurements() -> None:
    model, x = cnn().double(), images(6).double()
    probe = Measurements(4, 1, True)
    predicted = model(x).argmax(1)
    expected = []
    for view in shifted_views(x, 4, 1):
        z = model(view)
        with observing_channels(model, 6) as seen:
            model(view)
        p = z.softmax(1)[torch.arange(6), predicted]
        expected.append(torch.cat([((1 - p) / p).log()[:, None], -z.logsumexp(1)[:, None], seen.columns.double()], 1))
    torch.testing.assert_close(probe(model, x), torch.stack(expected).mean(0), rtol=1e-6, atol=1e-9)


def test_unlike_inputs_are_raised_and_the_ranking_of_ordinary_samples_stays() -> None:
    torch.manual_seed(0)
    model = cnn()
    (fitted,) = lgm.fit(model, [images(400)], "trust")
    plain = lgm.score(model, images(300), [fitted, "max_softmax"])
    far = lgm.score(model, 6 * images(300), [fitted])["trust"]
    assert far.quantile(0.05) > plain["trust"].quantile(0.95)


def test_costs_one_forward_per_view_and_leaves_the_model_as_it_was() -> None:
    model, calls = cnn(), []
    x, before = images(5), state_of(model)
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    Measurements(1, 0, True)(model, x)
    assert len(calls) == 1
    Measurements(10, 0, True)(model, x)
    assert len(calls) == 11
    hook.remove()
    assert_same_state(before, model)


def test_a_wide_model_is_sketched_and_every_sample_alike() -> None:
    layers = []
    for _ in range(4):
        layers += [nn.Linear(700, 700), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(700, 3)).eval()
    x = torch.randn(5, 700)
    whole, part = Measurements(1, 0, True)(model, x), Measurements(1, 0, True)(model, x[2:4])
    assert whole.shape[1] - 2 <= WIDTH
    torch.testing.assert_close(part, whole[2:4], rtol=1e-4, atol=1e-5)


def test_rows_of_windows_belong_to_their_sample() -> None:
    x = torch.randn(6, 5, 4)  # two samples of three windows of five tokens
    found = channels_of(nn.Linear(4, 2), x, 2)
    assert found is not None
    torch.testing.assert_close(found[:, :4], x.view(2, 15, 4).mean(1))
    assert channels_of(nn.Linear(4, 2), torch.randn(7, 4), 2) is None


def test_refusals() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="2 or more finite samples"):
        lgm.fit(model, [vectors(1)], "trust")
    with pytest.raises(ValueError, match="the same"):
        lgm.fit(model, [torch.ones(8, 7)], "trust")
    with pytest.raises(TypeError, match="take one view"):
        lgm.fit(model, [vectors(20)], "trust(views=3)")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        lgm.fit(Bare().eval(), [vectors(20)], "trust")
