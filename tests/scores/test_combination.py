"""The fitted combination: its fit data, and its scores of unusual data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores.classifiers import STRENGTHS, regularised_logistic
from lightning_gradmetrics.scores.combination import COLUMNS
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import make
from tests.models import cnn, images, vectors
from tests.scores.fits import fit_batches


@pytest.mark.parametrize(
    ("detector", "labels", "outside"),
    [("mahalanobis", False, False), ("lof", False, False), ("errors", True, False), ("ood", False, True)],
)
def test_the_fit_reads_the_detectors_data_only(detector: str, labels: bool, outside: bool) -> None:
    needs = make(f"combination(detector={detector})").fit_needs
    assert (needs.labels, needs.ood) == (labels, outside)


def test_the_head_alone_takes_no_backward() -> None:
    assert not make("combination(target=head)").needs.backward
    objectives = make("combination").needs.gradients["all"]
    assert {objective.name for objective in objectives} == {"pseudo_label", "uniform"}


def test_samples_unlike_those_it_was_fitted_on_score_higher() -> None:
    """Every detector but that of errors, on samples three times as large."""
    model = cnn()
    inside, outside = fit_batches(model, images)
    for detector in ("mahalanobis", "lof", "ood"):
        score = lgm.fit(model, inside, f"combination(detector={detector})", ood=outside)
        low, high = (next(iter(lgm.score(model, x, score).values())) for x in (images(30), 3 * images(30)))
        assert (low[:, None] < high).float().mean() > 0.9, detector


@pytest.mark.slow
def test_strength_is_that_of_scikit_learn() -> None:
    """The weights are equal too."""
    generator = np.random.default_rng(0)
    for noise in (0.1, 3.0):
        x = generator.standard_normal((120, 5))
        y = (x[:, 0] + noise * generator.standard_normal(120) > 0.7).astype(int)
        found = regularised_logistic(torch.from_numpy(x), torch.from_numpy(y))
        parts = StratifiedKFold(5, shuffle=True, random_state=0)
        search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": STRENGTHS}, scoring="neg_log_loss", cv=parts)
        best = search.fit(x, y).best_estimator_
        assert found["strength"] == best.C
        np.testing.assert_allclose(found["weight"], best.coef_[0], rtol=1e-6)


class HalfDead(torch.nn.Module):
    """A network with a branch that is never active: its gradient is zero on every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.dead, self.head = (torch.nn.Linear(7, size) for size in (7, 7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.alive(x).tanh() + (self.dead(x) - 100).relu())


def test_a_dead_layer_and_bad_rows_leave_the_fit_finite() -> None:
    """A dead layer, and rows whose features are not finite."""
    model = HalfDead()
    score = lgm.fit(model, [vectors(30)], "combination")[0]
    assert all(value.isfinite().all() for value in score.state.values())
    assert lgm.score(model, vectors(5), score)[score.name].isfinite().all()
    evidence = Evidence(torch.randn(4, 3), torch.tensor([[1.0, 2.0]] * 3 + [[torch.inf, 0.0]]))
    part = make("combination(target=head)")
    fitted = part.fitted(part.contribution(evidence, torch.arange(4)), "")
    assert fitted(evidence).isfinite().tolist() == [True, True, True, False]


def test_too_few_of_a_class_is_explained() -> None:
    model, x = cnn(), images(20)
    right = model(x).argmax(1)
    labels = right.clone()
    labels[0] = (labels[0] + 1) % 5
    with pytest.raises(
        ValueError, match=r"2 or more errors and 2 or more correct predictions.*have 1 and 19: give label"
    ):
        lgm.fit(model, [(x, labels)], "combination(detector=errors)")
    with pytest.raises(ValueError, match="have 0 and 0"):
        lgm.fit(model, [(x, torch.full((20,), -1))], "combination(detector=errors)")
    with pytest.raises(ValueError, match=r"out-of-distribution samples.*have 0 and 20: give both kinds"):
        lgm.fit(model, [(x, labels)], "combination(detector=ood)")
    with pytest.raises(ValueError, match="needs 2 or more samples, but there are 1"):
        lgm.fit(model, [x[:1]], "combination")
    with pytest.raises(ValueError, match=r"detector=.svm.; allowed: .mahalanobis., .lof., .errors., .ood."):
        lgm.fit(model, [x], "combination(detector=svm)")


def test_every_feature_is_documented() -> None:
    """The docstring's list of formulas has one for each column."""
    text = make("combination").recipe.documentation
    for name in [name for name in COLUMNS if name.startswith("log |")]:
        assert name in text, name
    assert len(COLUMNS) == 9
