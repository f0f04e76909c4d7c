"""Trust: its distances against refitting, its views against one forward pass per view, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores.channels import WIDTH, ChannelProbe, channels_of, observing_channels
from lightning_gradmetrics.scores.detectors import ledoit_wolf, mahalanobis, moment_sums
from lightning_gradmetrics.scores.shifts import shifted_views
from lightning_gradmetrics.scores.trust import ViewSums, error_log_odds, left_out_distances
from lightning_gradmetrics.scores.view_probes import ViewSet
from tests.callback import runs
from tests.models import Module, assert_same_state, cnn, fast_rows, images, mlp, state_of, vectors


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


def test_left_out_distances_match_new_rows_although_fitted_distances_are_too_small() -> None:
    torch.manual_seed(0)
    rows, new = torch.randn(200, 100, dtype=torch.float64), torch.randn(500, 100, dtype=torch.float64)
    covariance = torch.cov(rows.T, correction=0)
    state = {"mean": rows.mean(0), "precision": torch.linalg.inv(covariance)}
    left_out = left_out_distances(rows, state["mean"], state["precision"], torch.tensor(0.0))
    ratio = left_out.median() / mahalanobis(new, state).median()
    assert 0.9 < ratio < 1.1
    assert mahalanobis(rows, state).median() < 0.6 * mahalanobis(new, state).median()


def test_views_add_up_the_measurements() -> None:
    model, x = cnn().double(), images(6).double()
    expected = []
    for view in shifted_views(x, 4, 1)[1:]:
        z = model(view)
        with observing_channels(model, 6) as seen:
            model(view)
        p = z.softmax(1)
        expected.append(torch.cat([((1 - p) / p).log(), -z.logsumexp(1)[:, None], seen.columns.double()], 1))
    torch.testing.assert_close(ViewSums(ViewSet(4, 1))(model, x), torch.stack(expected).sum(0), rtol=1e-6, atol=1e-9)


def test_log_odds_stay_accurate_if_the_softmax_is_one() -> None:
    z = torch.tensor([[100.0, 0.0, 0.0], [0.0, 1e-9, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(error_log_odds(z)[0, 0], torch.tensor(2.0, dtype=torch.float64).log() - 100)
    p = z[1].softmax(0)
    torch.testing.assert_close(error_log_odds(z)[1], ((1 - p) / p).log())


def test_a_score_with_views_is_the_mean_of_what_it_measures() -> None:
    """A slow reference: one fit and one score from the measurements of each view, each in a separate forward pass."""
    torch.manual_seed(0)
    model, x = cnn().double(), images(60).double()
    (fitted,) = lgm.fit(model, [x], "trust(views=3)")
    y = model(x).argmax(1)
    log_odds, energy, channels = 0.0, 0.0, 0.0
    for view in shifted_views(x, 3):
        with observing_channels(model, 60) as seen:
            z = model(view)
        p = z.softmax(1)[torch.arange(60), y]
        log_odds, energy = log_odds + ((1 - p) / p).log() / 3, energy - z.logsumexp(1) / 3
        channels = channels + seen.columns / 3
    measured = {"log_odds": log_odds, "energy": energy, "channels": channels}
    state = fitted.finish({"rows/energy": energy.float(), "rows/channels": channels.float()})
    torch.testing.assert_close(
        lgm.score(model, x, fitted)["trust(views=3)"], fitted.score(measured, state), rtol=1e-5, atol=1e-6
    )


def test_unusual_inputs_score_higher_and_ordinary_samples_keep_their_ranking() -> None:
    torch.manual_seed(0)
    model = cnn()
    (fitted,) = lgm.fit(model, [images(400)], "trust")
    plain = lgm.score(model, images(300), [fitted, "max_softmax"])
    far = lgm.score(model, 6 * images(300), [fitted])["trust"]
    assert far.quantile(0.05) > plain["trust"].quantile(0.95)


def test_costs_one_forward_per_view_and_leaves_the_model_as_it_was() -> None:
    """If the score runs the model again, two samples of the first batch take one more pass."""
    model, x, rows = cnn(), images(50), []
    fitted = lgm.fit(model, [x], ["trust", "trust(views=10)"])
    before = state_of(model)
    hook = model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for score, expected in (
        (fitted[0], [50]),
        (fitted[1], [50, 2, *[50] * 9]),
        ("views(score=entropy,n=4)", [50, 2, *[50] * 3]),
    ):
        rows.clear()
        lgm.score(model, x, score)
        assert rows == expected
    hook.remove()
    assert_same_state(before, model)


def test_trust_and_other_scores_share_the_passes_of_equal_views() -> None:
    """One pass per view serves the log odds, the channels, the logits and the head's input; other views take their own."""
    model, x, rows = cnn(), images(50), []
    scores = ["trust(views=4)", "views(score=entropy,n=4)", "views(score=knn,n=4)", "views(score=energy,n=3)"]
    fitted = lgm.fit(model, [x], [scores[0], scores[2]])
    apart = {}
    for score in (*fitted, scores[1], scores[3]):
        apart |= lgm.score(model, x, score)
    hook = model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    together = lgm.score(model, x, [*fitted, scores[1], scores[3]])
    hook.remove()
    assert rows.count(50) == 1 + 3 + 2
    for name, values in apart.items():
        torch.testing.assert_close(together[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("score", "fewest"), [("trust", 20), ("channel_distance", 2), ("nac_ue(fill=9)", 9)])
def test_too_few_samples_are_refused_with_the_number_that_is_needed(score: str, fewest: int) -> None:
    model = cnn()
    with pytest.raises(ValueError, match=rf"is fitted on {fewest} or more finite samples, but there are {fewest - 1}"):
        lgm.fit(model, [images(fewest - 1)], score)
    (fitted,) = lgm.fit(model, [images(fewest)], score)
    assert lgm.score(model, images(5), fitted)[fitted.name].isfinite().all()


class Calls(Module):
    """A user's step that calls the network in one of several ways."""

    way = "whole"

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.way == "layers outside":
            self.network[0](batch + 1)  # type: ignore[index]
        if self.way == "parts":
            return torch.cat([self.network(part) for part in batch.chunk(2)])
        if self.way == "layers":
            for layer in self.network:  # type: ignore[union-attr]
                batch = layer(batch)
            return batch
        return self.network(batch)


@pytest.mark.parametrize(
    "way",
    fast_rows(
        ["whole", "layers outside", "parts", "layers", "compiled"], ["whole", "layers outside", "parts", "layers"]
    ),
)
def test_the_callback_reads_the_channels_of_the_step(way: str) -> None:
    torch.manual_seed(0)
    module, x = Calls(), images(24)
    (fitted,) = lgm.fit(module, [images(80)], "trust")
    expected = lgm.score(module.network, x, fitted)["trust"]
    module.way, loader = way, DataLoader(x, batch_size=8)
    if way == "compiled":
        module.network.compile(backend="eager")
    forwards, layer = [], module.network[3]  # type: ignore[index]
    layer.register_forward_hook(lambda *_: forwards.append(1))
    callback = lgm.GradientMetrics(scores=(fitted,))
    runs.trainer(callback).predict(module, loader)
    torch.testing.assert_close(torch.tensor(callback.results["trust"].to_pylist()), expected, rtol=1e-5, atol=1e-5)
    if way in ("whole", "layers outside"):
        assert len(forwards) == 3


def test_samples_on_the_second_axis_are_refused_if_ambiguous() -> None:
    class SecondAxis(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x).relu().mean(0))

    model = SecondAxis().eval()
    with pytest.raises(ValueError, match="rows of the first axis are not the samples"):
        lgm.fit(model, [torch.randn(8, 8, 6)], "trust")
    with pytest.raises(ValueError, match="no sample axis"):
        lgm.fit(model, [torch.randn(7, 8, 6)], "trust")


def test_statistics_of_a_wide_model_are_reduced_equally_for_all_samples() -> None:
    layers = []
    for _ in range(4):
        layers += [nn.Linear(700, 700), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(700, 3)).eval()
    x = torch.randn(5, 700)
    whole, part = ChannelProbe()(model, x), ChannelProbe()(model, x[2:4])
    assert whole.shape[1] <= WIDTH
    torch.testing.assert_close(part, whole[2:4], rtol=1e-4, atol=1e-5)


def test_rows_of_windows_belong_to_their_sample() -> None:
    x = torch.randn(6, 5, 4)  # two samples of three windows of five tokens
    found = channels_of(nn.Linear(4, 2), x, 2)
    assert found is not None
    torch.testing.assert_close(found[:, :4], x.view(2, 15, 4).mean(1))
    assert channels_of(nn.Linear(4, 2), torch.randn(7, 4), 2) is None


def test_refusals() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="20 or more finite samples"):
        lgm.fit(model, [vectors(1)], "trust")
    with pytest.raises(ValueError, match="the same"):
        lgm.fit(model, [torch.ones(30, 7)], "trust")
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
