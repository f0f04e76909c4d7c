"""Distances in feature space against pytorch-ood and scikit-learn, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from pytorch_ood import detector as library
from pytorch_ood.detector import nac
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores.activation_coverage import interval_edges

ROWS, CLASSES = 60, 4


@pytest.fixture
def data() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear classifier, samples to fit on with labels of every class, and others."""
    torch.manual_seed(3)
    model = nn.Linear(8, CLASSES).double()
    inputs, labels = torch.randn(ROWS, 8).double(), torch.arange(ROWS) % CLASSES
    return model, inputs + labels[:, None], labels, 2 * torch.randn(20, 8).double()


def fitted_on(data: tuple, score: str) -> Tensor:
    model, inputs, labels, new = data
    half = ROWS // 3
    batches = [(inputs[:half], labels[:half]), (inputs[half:], labels[half:])]
    (values,) = lgm.score(model, new, lgm.fit(model, batches, score)).values()
    return values


def test_mahalanobis_equals_pytorch_ood(data: tuple) -> None:
    """Up to the factor 2N: its covariance is not divided by N, and its score is half of the distance."""
    _, inputs, labels, new = data
    theirs = library.Mahalanobis(None).fit_features(inputs.float(), labels).predict_features(new.float())
    torch.testing.assert_close(
        fitted_on(data, "mahalanobis(normalise=False)") / (2 * ROWS), theirs.double(), rtol=1e-3, atol=0
    )
    unit, new_unit = inputs / inputs.norm(dim=1, keepdim=True), new / new.norm(dim=1, keepdim=True)
    theirs = library.Mahalanobis(None).fit_features(unit.float(), labels).predict_features(new_unit.float())
    torch.testing.assert_close(fitted_on(data, "mahalanobis") / (2 * ROWS), theirs.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("normalise", [True, False])
def test_knn_equals_pytorch_ood(data: tuple, k: int, normalise: bool) -> None:
    _, inputs, labels, new = data
    theirs = library.KNN(None, k=k, normalize=normalise).fit_features(inputs, labels).predict_features(new)
    torch.testing.assert_close(fitted_on(data, f"knn(k={k},normalise={normalise})"), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dimensions", [3, 6])
def test_vim_equals_pytorch_ood(data: tuple, dimensions: int) -> None:
    model, inputs, labels, new = data
    theirs = library.ViM(None, dimensions, model.weight, model.bias).fit_features(inputs, labels).predict_features(new)
    torch.testing.assert_close(fitted_on(data, f"vim(dimensions={dimensions})"), theirs.double(), rtol=1e-3, atol=1e-3)


def test_gen_equals_pytorch_ood(data: tuple) -> None:
    """Up to the number of classes: it takes the mean."""
    model, _, _, new = data
    ours = lgm.score(model, new, ["gen", "gen(gamma=0.5,top=2)"])
    theirs = library.GEN.score(model(new), 0.1) * CLASSES
    torch.testing.assert_close(ours["gen"], theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ours["gen(gamma=0.5,top=2)"], library.GEN.score(model(new), 0.5, 2) * 2, rtol=1e-5, atol=0
    )


def test_nac_ue_equals_pytorch_ood_with_the_intervals_of_the_authors(
    data: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes other intervals; the states, the counts and the coverage are the same."""
    model, inputs, _, new = data
    network = nn.Sequential(nn.Linear(8, 8).double(), nn.ReLU(), model)

    def intervals(states: Tensor, m: int) -> Tensor:
        return torch.bucketize(states, interval_edges(50), right=True) - 1

    monkeypatch.setattr(nac, "_bin_indices_geometric", intervals)
    theirs = library.NACUE(network, [network[1]], m_bins=49, alpha=100.0, o_star=6).fit([inputs]).predict(new)
    for score in ("nac_ue(fill=6)", "nac_ue(fill=6,layers='1')"):
        (ours,) = lgm.score(network, new, lgm.fit(network, [inputs], score)).values()
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)


def test_nac_ue_names_the_parts_of_a_model_without_the_layer(data: tuple) -> None:
    model, inputs, _, _ = data
    network = nn.Sequential(nn.Linear(8, 8).double(), nn.ReLU(), model)
    with pytest.raises(ValueError, match="no layer matches layers='layer4'; the model's parts are 0, 1, 2"):
        lgm.fit(network, [inputs], "nac_ue(layers=layer4)")


def test_sirc_keeps_the_ranking_of_ordinary_samples(data: tuple) -> None:
    """It also raises the scores of samples whose features are far smaller than those of the fit."""
    model, inputs, labels, _ = data
    (fitted,) = lgm.fit(model, [(inputs, labels)], "sirc")
    values = lgm.score(model, inputs, [fitted, "max_softmax"])
    order = values["sirc"].argsort()
    agree = torch.corrcoef(torch.stack([order.argsort(), values["max_softmax"].argsort().argsort()]).double())[0, 1]
    assert agree > 0.9
    small = lgm.score(model, 1e-3 * inputs, [fitted, "max_softmax"])
    raised = small["sirc"] - small["max_softmax"].log()
    assert raised.min() > 3 * (values["sirc"] - values["max_softmax"].log()).median()


@pytest.mark.parametrize(
    ("score", "labelled", "message"),
    [
        ("mahalanobis", False, "has no labelled sample: give batches"),
        ("rmds", False, "has no labelled sample: give batches"),
        ("knn(k=100)", True, r"knn.k=100. is fitted on 100 or more samples, but there are 60: lower k"),
        ("vim(dimensions=8)", True, "dimensions=8; the head's input has 8 numbers: allowed are 1 to 7"),
    ],
)
def test_data_that_cannot_be_fitted_is_refused(data: tuple, score: str, labelled: bool, message: str) -> None:
    model, inputs, labels, _ = data
    with pytest.raises(ValueError, match=message):
        lgm.fit(model, [(inputs, labels if labelled else labels - 100)], score)


@pytest.mark.parametrize("score", ["vim", "sirc(secondary=residual)"])
def test_too_few_samples_for_the_principal_subspace_are_refused(score: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    with pytest.raises(ValueError, match="all 15 samples to fit on are inside the principal subspace of 20"):
        lgm.fit(model, [torch.randn(15, 5).double()], score)


@pytest.mark.parametrize("score", ["rmds", "vim", "trust", "knn", "mahalanobis", "nac_ue(fill=9)", "grood"])
def test_two_fits_of_one_dataset_are_equal_to_the_last_bit(score: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))
    inputs, labels = torch.randn(200, 6), torch.arange(200) % 3
    batches = [(inputs[:90], labels[:90]), (inputs[90:], labels[90:])]
    values = []
    for _ in range(2):
        (fitted,) = lgm.fit(model, batches, score)
        values += lgm.score(model, inputs, fitted).values()
    assert torch.equal(*values)


@pytest.mark.parametrize("score", ["mahalanobis", "rmds"])
def test_classes_without_spread_and_labels_outside_the_classes_are_refused(score: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3).double(), torch.randn(12, 5).double()
    with pytest.raises(ValueError, match="do not vary within the classes"):
        lgm.fit(model, [(x[:3], torch.arange(3))], score)
    with pytest.raises(ValueError, match="have the label 3, and the model has 3 classes"):
        lgm.fit(model, [(x, torch.arange(12) % 4)], score)
