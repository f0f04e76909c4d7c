"""GraNd and EL2N: their labels, and the samples that they identify."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scoring.registry import make
from tests.models import Module, cnn, images, mlp, vectors

SCORES = ["grand", "grand(target=head)", "grand(target='7.*')", "el2n"]
LABELS = torch.tensor([0, 1, 2, 3])


def run(scores: list[str], loaders: object, **options: object) -> lgm.GradientMetrics:
    callback = lgm.GradientMetrics(scores, **options)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=[callback], **quiet).predict(Module(), loaders)  # type: ignore[arg-type]
    return callback


def loader(labels: torch.Tensor | None) -> DataLoader:
    tensors = [images(4)] if labels is None else [images(4), labels]
    return DataLoader(TensorDataset(*tensors), 2)


@pytest.mark.parametrize("case", SCORES)
def test_the_dry_run_detects_that_labels_are_needed(case: str) -> None:
    assert make(case).needs.labels


@pytest.mark.parametrize("case", SCORES)
def test_missing_labels_are_an_error_that_names_the_score(case: str) -> None:
    with pytest.raises(ValueError, match=r"needs true labels.*targets=") as raised:
        lgm.score(cnn(), images(4), ["entropy", case])
    assert repr(case) in str(raised.value) and "entropy" not in str(raised.value)


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("value", [-1, -100, 5])
def test_a_label_outside_of_the_classes_is_refused(case: str, value: int) -> None:
    """-100 would be ignored by the loss, and count as no gradient at all."""
    with pytest.raises(ValueError, match=r"1 of 4 samples.*from 0 to 4"):
        lgm.score(cnn(), images(4), case, torch.tensor([0, value, 2, 3]))


@pytest.mark.parametrize("targets", [torch.zeros(3).long(), torch.zeros(4, 2).long(), torch.full((4,), 0.5)])
def test_labels_of_another_shape_or_kind_are_refused(targets: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs true labels \(4,\), integers"):
        lgm.score(cnn(), images(4), "el2n", targets)


@pytest.mark.parametrize("labels", [None, torch.full((4,), -1)], ids=["none", "unknown"])
@pytest.mark.parametrize("case", ["grand", "el2n"])
def test_a_dataset_without_labels_is_named(case: str, labels: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="'far'") as raised:
        run(["energy", case], [loader(LABELS), loader(labels)], datasets={"mine": "id", "far": "far"})
    assert repr(case) in str(raised.value)


def test_other_scores_accept_datasets_without_labels() -> None:
    callback = run(["energy"], [loader(LABELS), loader(None)], datasets={"mine": "id", "far": "far"})
    assert callback.results.num_rows == 8 and all(callback.results["finite"].to_pylist())


def test_the_callback_passes_the_labels() -> None:
    data = loader(LABELS)
    callback = lgm.GradientMetrics(["grand", "el2n"])
    model = Module().eval()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", callbacks=[callback], **options).test(model, data, verbose=False)  # type: ignore[arg-type]
    expected = lgm.score(model.network, data.dataset.tensors[0], ["grand", "el2n"], LABELS)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(callback.results[name].to_pylist()), values)


def test_on_the_head_grand_is_el2n_times_the_feature_norm() -> None:
    model, inputs = cnn().double(), images(4).double()
    wanted = ["grand(target=head)", "grand(target='7.weight')", "el2n", "feature_norm(p=2)"]
    closed, by_name, error, feature = lgm.score(model, inputs, wanted, LABELS).values()
    torch.testing.assert_close(closed, -error * feature)
    torch.testing.assert_close(by_name, closed)


def test_the_predicted_class_as_label_is_the_pseudo_label() -> None:
    model, inputs = cnn().double(), images(4).double()
    predicted = model(inputs).argmax(1)
    first, second = lgm.score(model, inputs, ["grand", "pseudo_label(statistic=l2,target=all)"], predicted).values()
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("case", ["grand", "el2n"])
def test_wrong_labels_have_the_largest_scores(case: str) -> None:
    """For a model that fits clean labels, labels that are swapped afterwards have the largest values."""
    model, inputs = mlp(3), 3 * vectors(60)
    with torch.no_grad():
        model[-1].weight.mul_(6)
        clean = model(inputs).argmax(1)
    swapped = torch.arange(60) % 10 == 0
    found = lgm.score(model, inputs, case, torch.where(swapped, (clean + 1) % 3, clean))[case]
    assert found[swapped].median() > found[~swapped].quantile(0.9)
