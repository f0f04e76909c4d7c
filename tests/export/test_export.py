"""Exports: a detector in pytorch-ood's own loop, and OpenOOD's interface as its v1.5 evaluator calls it."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_gradmetrics as lgm
from tests.models import assert_same_state, cnn, images, state_of

pytest.importorskip("pytorch_ood")
from pytorch_ood.api import Detector, ModelNotSetException, RequiresFittingException
from pytorch_ood.detector import EnergyBased
from pytorch_ood.metrics import OODMetrics

SCORES = ["energy", "gradnorm", "pseudo_label(target=all)", "mahalanobis", "trust(views=2)", "sirc"]


def labelled(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images(n), torch.arange(n) % 5


@pytest.mark.parametrize("name", SCORES)
def test_pytorch_ood_runs_a_score(name: str) -> None:
    model, (x, y) = cnn(), labelled(60)
    detector = lgm.export.pytorch_ood(name, model)
    assert isinstance(detector, Detector)
    if detector.requires_fit:
        with pytest.raises(RequiresFittingException):
            detector.predict(x)
    assert detector.fit(DataLoader(TensorDataset(x, y), 16)) is detector
    metrics = OODMetrics()  # pytorch-ood's loop: a negative label is an outlier
    for batch, target in DataLoader(TensorDataset(torch.cat([x, 4 * x]), torch.cat([y, -1 - y])), 32):
        metrics.update(detector(batch), target)
    assert 0 <= metrics.compute()["AUROC"] <= 1
    direct = lgm.fit(model, [(x, y)], name) if detector.requires_fit else name
    (expected,) = lgm.score(model, x, direct).values()
    before = state_of(model)
    torch.testing.assert_close(detector.predict(x), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(before, model)


def test_equals_pytorch_oods_own_detector() -> None:
    model, x = cnn(), images(9)
    torch.testing.assert_close(
        lgm.export.pytorch_ood("energy", model).predict(x), EnergyBased(model).predict(x), rtol=1e-5, atol=1e-5
    )


def test_outliers_in_the_loader_are_left_out_of_the_fit() -> None:
    model, (x, y) = cnn(), labelled(40)
    mixed = [(torch.cat([x, 9 * x]), torch.cat([y, -torch.ones(40).long()]))]
    detectors = [lgm.export.pytorch_ood("rmds", model).fit(loader) for loader in ([(x, y)], mixed)]
    torch.testing.assert_close(detectors[0].predict(x), detectors[1].predict(x))


def test_a_model_may_be_given_later_and_must_be_given() -> None:
    model, x = cnn(), images(4)
    detector = lgm.export.pytorch_ood("entropy")
    with pytest.raises(ModelNotSetException, match="needs a model"):
        detector.predict(x)
    torch.testing.assert_close(detector(model)(x), lgm.score(model, x, "entropy")["entropy"])


@pytest.mark.parametrize("export", [lgm.export.pytorch_ood, lgm.export.openood])
def test_scores_of_true_labels_are_refused(export) -> None:
    with pytest.raises(ValueError, match="needs true labels"):
        export("el2n")


class OpenOODData(Dataset):
    """Items as OpenOOD's datasets return them."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"data": self.x[i], "label": self.y[i], "image_name": f"{i}.png"}


@pytest.mark.parametrize("name", SCORES)
def test_openood_runs_a_score(name: str) -> None:
    """The calls of OpenOOD v1.5's ``Evaluator``: set-up, the check for a search, ``inference`` on each loader."""
    model, (x, y) = cnn(), labelled(50)
    postprocessor = lgm.export.openood(name)()
    postprocessor.setup(model, {"train": DataLoader(OpenOODData(x, y), 16), "val": None}, {"val": None})
    assert not (postprocessor.APS_mode and not postprocessor.hyperparam_search_done)
    prediction, confidence, label = postprocessor.inference(model, DataLoader(OpenOODData(x, y), 20), progress=False)
    assert prediction.dtype == label.dtype == int and confidence.shape == (50,)
    np.testing.assert_array_equal(prediction, model(x).argmax(1).numpy())
    np.testing.assert_array_equal(label, y.numpy())
    direct = lgm.fit(model, [(x, y)], name) if postprocessor.bound.requires_fit else name
    (expected,) = lgm.score(model, x, direct).values()
    np.testing.assert_allclose(-confidence, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_openoods_base_class_is_used_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class BasePostprocessor:
        def __init__(self, config: object) -> None:
            self.config = config

    package, inner = ModuleType("openood"), ModuleType("openood.postprocessors")
    inner.BasePostprocessor = BasePostprocessor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openood", package)
    monkeypatch.setitem(sys.modules, "openood.postprocessors", inner)
    postprocessor = lgm.export.openood("energy")(config="given")
    assert isinstance(postprocessor, BasePostprocessor) and postprocessor.config == "given"
