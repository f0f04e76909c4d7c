"""Scores averaged over views, against one forward per view."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import load_fitted, save_fitted, views
from lightning_gradmetrics.scores.shifts import shifted_views
from lightning_gradmetrics.scoring.registry import make, resolve
from tests.models import cnn, images, mlp, vectors


def test_views_are_shifted_and_flipped_copies() -> None:
    x = torch.arange(2 * 1 * 32 * 64.0).view(2, 1, 32, 64)
    seen = shifted_views(x, 6)
    assert torch.equal(seen[0], x) and len(seen) == 6
    assert all(view.shape == x.shape and not torch.equal(view, x) for view in seen[1:])
    for number, view in enumerate(seen[1:], 1):
        upright = view.flip(3) if number % 2 else view
        difference = upright[0, 0, 2:-2, 4:-4] - x[0, 0, 2:-2, 4:-4]  # one and the same shift inside the border
        assert (difference == difference[0, 0]).all() and difference[0, 0].abs() <= 2 * 64 + 4
    assert all(torch.equal(a, b) for a, b in zip(seen, shifted_views(x, 6), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen, shifted_views(x, 6, seed=1), strict=True))


@pytest.mark.parametrize("inner", ["energy", "gradnorm(temperature=2)", "gradnorm(target=all)", "odin"])
def test_equals_the_mean_over_the_views(inner: str) -> None:
    model, x = cnn().double(), images(5).double()
    (values,) = lgm.score(model, x, views(inner, n=4)).values()
    each = [next(iter(lgm.score(model, view, inner).values())) for view in shifted_views(x, 4)]
    torch.testing.assert_close(values, torch.stack(each).mean(0), rtol=1e-9, atol=1e-12)


def test_the_softmax_is_that_of_the_plain_prediction() -> None:
    model, x = cnn().double(), images(6).double()
    predicted = model(x).argmax(1)
    p = torch.stack([model(view).softmax(1)[torch.arange(6), predicted] for view in shifted_views(x, 5, 2)]).mean(0)
    torch.testing.assert_close(lgm.score(model, x, "views(n=5,seed=2)")["views(n=5,seed=2)"], 1 - p)


def test_transforms_of_the_user_and_a_fitted_score() -> None:
    model, x = mlp(), vectors(9)
    (fitted,) = lgm.fit(model, [x], "knn(k=2)")
    both = views(fitted, transforms=lambda inputs: [inputs, -inputs], name="both")
    values = lgm.score(model, x, both)["both"]
    plain, mirrored = (lgm.score(model, y, fitted)["knn(k=2)"] for y in (x, -x))
    torch.testing.assert_close(values, (plain + mirrored) / 2)


@pytest.mark.parametrize("inner", ["knn(k=3)", "vim", "mahalanobis", "sirc"])
def test_a_score_without_a_state_is_fitted_on_the_plain_inputs(inner: str, tmp_path: Path) -> None:
    model, x = cnn().double(), images(60).double()
    batch = (x, torch.arange(60) % 5)
    fitted = lgm.fit(model, [batch], [inner, f"views(score={inner},n=4)"])
    direct = lgm.score(model, x, views(fitted[0], n=4, name="views"))["views"]
    averaged = lgm.score(model, x, fitted[1])[fitted[1].name]
    torch.testing.assert_close(averaged, direct, rtol=1e-9, atol=1e-12)
    save_fitted(fitted[1:], tmp_path)
    loaded = load_fitted([pickle.loads(pickle.dumps(fitted[1])).with_state(None, None, None)], tmp_path, model)
    assert torch.equal(lgm.score(model, x, loaded)[fitted[1].name], averaged)


def test_scores_of_outputs_share_the_forward_passes() -> None:
    model, x, rows = cnn(), images(30), []
    model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    lgm.score(model, x, ["views(score=energy,n=4)", "views(score=gen,n=4)", "views(n=4)"])
    assert rows == [30, 2, 30, 30, 30]


def test_a_head_that_is_not_the_output() -> None:
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Softmax(1)).eval()
    x = torch.randn(4, 3, 4, 4)
    values = lgm.score(body, x, views("energy", n=1, name="views"), head="1")["views"]
    torch.testing.assert_close(values, -body[1](x.flatten(1)).logsumexp(1))


def test_spelling_and_pickling() -> None:
    score = make("views(score=gradnorm(temperature=2),n=3)")
    assert score.name == make(score.name).name == "views(score='gradnorm(temperature=2)',n=3)"
    assert score.recipe.family == "gradient" and make("views").recipe.family == "baseline"
    assert pickle.loads(pickle.dumps(score)).name == score.name
    assert resolve({"mine": {"views": {"score": "energy", "n": 2}}})[0].inner.name == "energy"


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("views(score=gga_detector)", "views averages a fitted score, and 'gga_detector' has no state: fit it first"),
        ("views(score=el2n)", "views cannot average 'el2n', which needs true labels"),
        ("views(n=0)", "n=0; allowed: a whole number of at least 1"),
        ("views(score=enrgy)", "unknown score 'enrgy'; did you mean 'energy'"),
    ],
)
def test_scores_that_cannot_be_averaged_are_refused(score: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(score)


def test_inputs_that_are_not_images_need_transforms() -> None:
    with pytest.raises(TypeError, match=r"shifted and flipped images \(N, C, H, W\).*pass transforms="):
        lgm.score(mlp(), vectors(3), "views")
