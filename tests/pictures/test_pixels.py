"""The callback with segmentation models: common batch formats, rows of images, segments, metrics, and maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from lightning_gradmetrics.pictures.pixels import images
from lightning_gradmetrics.pictures.pixels.images import aggregate
from lightning_gradmetrics.results import ResumeError
from lightning_gradmetrics.results.output import Output
from tests.scoring.segmenters import HEADS, Segmenter, logits_of

SCORES = ["max_softmax", "pseudo_label"]
SIZE, LOGITS = (8, 9), (16, 19)


def data(count: int = 5, size: tuple[int, int] = LOGITS, classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        labels = torch.randint(classes, size, generator=generator)
        labels[0, :4] = 255
        rows.append((torch.randn(3, *SIZE, generator=generator), labels))
    return rows


class Batches(LightningModule):
    """A module whose step splits a batch as one library does."""

    def __init__(self, net: nn.Module, step: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.net, self.step = net, step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(self, batch)


def run_on(
    callback: lgm.GradientMetrics, rows: list[Any], net: nn.Module, step: Callable[[nn.Module, Any], Any]
) -> None:
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[callback], enable_model_summary=False, **quiet)
    trainer.test(Batches(net, step), DataLoader(rows, batch_size=2), verbose=False)


class KeywordModel(nn.Module):
    """A model as in transformers: keywords in, an object with small logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Segmenter(nn.Conv2d(4, 5, 1))

    @property
    def head(self) -> nn.Module:
        return self.net.head

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        return {"loss": None, "logits": self.net(pixel_values)}


FORMS: dict[str, tuple[Callable[[tuple[Tensor, Tensor]], Any], Callable[[nn.Module, Any], Any]]] = {
    "pair": (lambda row: row, lambda model, batch: model(batch[0])),
    "image and mask": (
        lambda row: {"image": row[0], "mask": row[1], "name": "a"},
        lambda model, batch: model(batch["image"]),
    ),
    "one channel, int32": (lambda row: (row[0], row[1][None].int()), lambda model, batch: model(batch[0])),
    "floats": (lambda row: {"image": row[0], "mask": row[1].float()}, lambda model, batch: model(batch["image"])),
    "changed in place": (lambda row: row, lambda model, batch: (model(batch[0]), batch[1].zero_())),
}


@pytest.mark.parametrize("form", FORMS)
def test_common_batch_formats(form: str) -> None:
    torch.manual_seed(0)
    change, step = FORMS[form]
    net, rows = HEADS["bilinear"]().eval(), data()
    callback = lgm.GradientMetrics(SCORES, pixels={"segments": 0})
    run_on(callback, [change(row) for row in rows], net, step)
    images, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    maps, prediction = lgm.score(net, images, SCORES), logits_of(net(images)).argmax(1)
    results = callback.results
    for name in SCORES:
        np.testing.assert_allclose(results[name].to_numpy(), maps[name].flatten(1).mean(1), rtol=1e-5)
    wrong = ((prediction != labels) & (labels != 255)).flatten(1).sum(1) / (labels != 255).flatten(1).sum(1)
    np.testing.assert_allclose(results["error"].to_numpy(), wrong, rtol=1e-6)
    assert results["pixels"].to_pylist() == [(label != 255).sum() for label in labels]
    assert results["label"].null_count == len(rows)


class Wrapped(nn.Module):
    """A model whose output is that of a library."""

    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.output = Segmenter(nn.Conv2d(4, 5, 1)), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.net(x))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "torchvision": lambda z: {"out": z, "aux": z.flip(1)},
    "transformers": lambda z: SimpleNamespace(logits=z, loss=None),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_libraries(kind: str) -> None:
    torch.manual_seed(0)
    net, rows = Wrapped(OUTPUTS[kind]).eval(), data(3, SIZE)
    callback = lgm.GradientMetrics(SCORES)
    run_on(callback, rows, net, lambda model, batch: model(batch[0]))
    maps = lgm.score(net.net, torch.stack([row[0] for row in rows]), SCORES)
    for name in SCORES:
        np.testing.assert_allclose(callback.results[name].to_numpy(), maps[name].flatten(1).mean(1), rtol=1e-5)


def test_a_tuple_of_masks_and_classes_needs_logits_fn() -> None:
    """``aux_params`` of segmentation_models_pytorch."""
    torch.manual_seed(0)
    net, rows = Wrapped(lambda z: (z, z.mean((2, 3)))).eval(), data(3, SIZE)
    with pytest.raises(TypeError, match=r"tuple \(mask, label\), pass logits_fn="):
        run_on(lgm.GradientMetrics(SCORES), rows, net, lambda model, batch: model(batch[0]))
    callback = lgm.GradientMetrics(SCORES, logits_fn=lambda output: output[0])
    run_on(callback, rows, net, lambda model, batch: model(batch[0]))
    assert callback.results["error"].null_count == 0


def test_classified_masks_are_refused_with_the_reason() -> None:
    net = Wrapped(lambda z: {"class_queries_logits": z.mean((2, 3)), "masks_queries_logits": z}).eval()
    with pytest.raises(TypeError, match=r"masks and a class for each mask.*no softmax of logits"):
        run_on(lgm.GradientMetrics(SCORES), data(2, SIZE), net, lambda model, batch: model(batch[0]))


def test_small_logits_are_resized_to_the_labels() -> None:
    """As ``post_process_semantic_segmentation`` does; the gradient is that of the resized logits."""
    torch.manual_seed(0)
    net, rows = KeywordModel().eval(), data()
    callback = lgm.GradientMetrics(SCORES)
    change = [{"pixel_values": row[0], "labels": row[1]} for row in rows]
    run_on(callback, change, net, lambda model, batch: model(**batch))
    resized = Segmenter(net.net.head, lambda z: F.interpolate(z, LOGITS, mode="bilinear"), net.net.body)
    maps = lgm.score(resized, torch.stack([row[0] for row in rows]), SCORES)
    np.testing.assert_allclose(
        callback.results["pseudo_label"].to_numpy(), maps["pseudo_label"].flatten(1).mean(1), 1e-5
    )


def test_one_logit_is_two_classes() -> None:
    torch.manual_seed(0)
    net, rows = HEADS["one logit"]().eval(), data(size=(16, 18), classes=2)
    callback = lgm.GradientMetrics(SCORES)
    run_on(callback, rows, net, lambda model, batch: model(batch[0]))
    images, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    wrong = ((net(images)[:, 0] > 0).long() != labels) & (labels != 255)
    np.testing.assert_allclose(callback.results["error"].to_numpy(), wrong.flatten(1).sum(1) / 284, rtol=1e-6)


def test_a_sigmoid_behind_one_logit_is_warned_of() -> None:
    torch.manual_seed(0)
    net, images = Segmenter(nn.Conv2d(4, 1, 1), torch.sigmoid).eval(), torch.randn(2, 3, *SIZE)
    with pytest.warns(UserWarning, match="between 0 and 1 everywhere, as behind a sigmoid"):
        lgm.score(net, images, "entropy")
    plain = lgm.score(Segmenter(net.head, None, net.body), images, "entropy")["entropy"]
    again = lgm.score(net, images, "entropy", logits_fn=torch.logit)["entropy"]
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)


def metric(callback: lgm.GradientMetrics, **wanted: Any) -> float:
    wanted = {"unit": "pixel", **wanted}
    (row,) = [row for row in callback.pixel_metrics.to_pylist() if wanted.items() <= row.items()]
    return float(row["value"])


@pytest.mark.parametrize("bins", [None, 16384])
def test_metrics_are_those_of_the_pixels(bins: int | None) -> None:
    torch.manual_seed(0)
    net, rows = HEADS["bilinear"]().eval(), data(7)
    settings = lgm.Pixels(
        bins=bins, every=1, ood_labels=(7,), ignore_index=(255, 6), class_names=tuple("abcde"), segments=1
    )
    for _, labels in rows:
        labels[3], labels[4] = 7, 6
    callback = lgm.GradientMetrics(SCORES, pixels=settings)
    run_on(callback, rows, net, lambda model, batch: model(batch[0]))
    images, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    values, prediction = lgm.score(net, images, "pseudo_label")["pseudo_label"], net(images).argmax(1)
    wrong, known = prediction != labels, labels < 5
    misses = {"score": "pseudo_label", "task": "misclassification", "metric": "auroc"}
    assert metric(callback, **misses, within="all") == pytest.approx(roc_auc_score(wrong[known], values[known]))
    per_image, within, pairs = [], 0.0, 0
    for one in range(len(rows)):
        per_image.append(roc_auc_score(wrong[one][known[one]], values[one][known[one]]))
    assert metric(callback, **misses, within="image") == pytest.approx(np.mean(per_image))
    for number in range(5):
        inside = known & (prediction == number)
        count = int(wrong[inside].sum() * (~wrong[inside]).sum())
        if count:
            within, pairs = within + count * roc_auc_score(wrong[inside], values[inside]), pairs + count
    assert metric(callback, **misses, within="predicted class") == pytest.approx(within / pairs)
    by_class = {(row["task"], row["score"], row["class"]): row for row in callback.class_metrics.to_pylist()}
    for number in range(5):
        inside, row = known & (prediction == number), by_class.get(("misclassification", "pseudo_label", number))
        if row is None:
            assert not inside.any()
            continue
        assert (row["class_name"], row["pixels"]) == ("abcde"[number], int(inside.sum()))
        assert row["share"] == pytest.approx(float(wrong[inside].float().mean()))
        if 0 < row["share"] < 1:
            assert row["auroc"] == pytest.approx(roc_auc_score(wrong[inside], values[inside]), abs=1e-6)
    assert {row["class_name"] for row in callback.segments.to_pylist()} <= set("abcde")
    seen = known | (labels == 7)
    outliers = metric(callback, score="pseudo_label", task="ood", metric="auroc", within="all")
    assert outliers == pytest.approx(roc_auc_score(labels[seen] == 7, values[seen]))


def test_segments_and_maps(tmp_path: Any) -> None:
    net, rows = HEADS["bilinear"]().eval(), data()
    callback = lgm.GradientMetrics(SCORES, pixels={"segments": 3, "maps": 2, "aggregates": ("mean", "q95")})
    run_on(callback, rows, net, lambda model, batch: model(batch[0]))
    segments, results = callback.segments.to_pylist(), callback.results
    assert {row["index"] for row in segments} == set(range(5))
    assert all(row["size"] >= 3 and 0 <= row["iou"] <= 1 - row["error"] + 1e-12 for row in segments)
    assert "pseudo_label/q95" in results.column_names
    files = callback.write_maps(tmp_path)
    largest = np.argsort(-results["max_softmax"].to_numpy())[:2]
    assert {file.name for file in files if file.suffix == ".npz"} == {f"dataloader_0_{index}.npz" for index in largest}
    arrays = np.load(tmp_path / f"dataloader_0_{largest[0]}.npz")
    expected = lgm.score(net, rows[largest[0]][0][None], "pseudo_label")["pseudo_label"][0]
    np.testing.assert_allclose(arrays["pseudo_label"], expected, rtol=2e-3)
    assert (tmp_path / f"dataloader_0_{largest[0]}.png").stat().st_size > 1000


def test_a_label_that_is_no_class_is_named() -> None:
    net, rows = HEADS["bilinear"]().eval(), data()
    rows[2][1][5, 5] = 11
    with pytest.raises(ValueError, match=r"label 11, and the model has 5 classes.*ignore_index"):
        run_on(lgm.GradientMetrics(SCORES), rows, net, lambda model, batch: model(batch[0]))


def test_class_names_are_those_of_all_classes() -> None:
    with pytest.raises(ValueError, match="class_names has 2 names, but the model has 5 classes"):
        run_on(
            lgm.GradientMetrics(SCORES, pixels={"class_names": ["a", "b"]}), data(), HEADS["bilinear"]().eval(), call
        )


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


@pytest.mark.parametrize("pixels", [{"maps": -1}, {"aggregates": ("median",)}, {"every": 0}, {"ood_labels": (255,)}])
def test_settings_are_checked(pixels: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        lgm.GradientMetrics(SCORES, pixels=pixels)


def test_a_results_directory_has_the_images_and_segments_of_a_run_in_memory(tmp_path: Path) -> None:
    """One part has the images of one batch."""
    torch.manual_seed(0)
    net = HEADS["bilinear"]().eval()
    settings = lgm.Pixels(segments=3, aggregates=("mean", "q95"), class_names=tuple("abcde"))
    kept = lgm.GradientMetrics(SCORES, pixels=settings)
    written = lgm.GradientMetrics(SCORES, pixels=settings, output=Output(tmp_path, rows_per_part=2))
    run_on(kept, data(), net, call)
    run_on(written, data(), net, call)
    assert len(list(tmp_path.glob("*.parquet"))) == 3 and "results on disk" in repr(written)
    assert kept.pixel_metrics.num_rows and str(written.pixel_metrics.to_pydict()) == str(kept.pixel_metrics.to_pydict())
    assert "results on disk" in repr(written)
    assert written.segments.equals(kept.segments) and kept.segments.num_rows > 5
    read = lgm.read_results(tmp_path)
    assert read.equals(kept.results) and {"error", "miou", "pseudo_label/q95"} <= set(read.column_names)


@pytest.mark.slow
def test_many_batches_are_kept_as_few_tensors() -> None:
    """Each batch of one image would otherwise keep thirty tensors."""
    torch.manual_seed(0)
    net = HEADS["bilinear"]().eval()
    callback, rows = lgm.GradientMetrics(SCORES, pixels={"segments": 3, "resamples": 0}), data(600, (4, 4))
    seen: list[int] = []
    run_on(callback, rows, net, lambda model, batch: (model(batch[0]), seen.append(most_batches(callback))))
    assert max(seen) <= 258 and callback.results.num_rows == 600


def most_batches(callback: lgm.GradientMetrics) -> int:
    return max(len(rows.batches) for rows in callback._run.stage.rows)


@pytest.mark.parametrize("name", ["error", "size", "miou", "segment"])
def test_a_score_with_the_name_of_a_column_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"column {name!r}.*rename the score"):
        run_on(lgm.GradientMetrics({name: "entropy"}), data(), HEADS["bilinear"]().eval(), call)


def test_a_results_directory_of_images_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pixels of committed images are not stored, so pixel metrics would leave them out."""
    stopped: list[bool] = []

    def stopping(model: nn.Module, batch: Any) -> Any:
        stopped.append(model.count == 2)
        if model.count == 2:
            raise RuntimeError("stopped")
        model.count += 1
        return model(batch[0])

    Batches.count = 0  # type: ignore[attr-defined]
    net = Segmenter(nn.Conv2d(4, 5, 1))
    stored = Output(tmp_path, rows_per_part=2)
    with pytest.raises(RuntimeError, match="stopped"):
        run_on(lgm.GradientMetrics(SCORES, output=stored), data(), net, stopping)
    said = capsys.readouterr().err
    assert "4 rows are committed" in said and "cannot be resumed" in said and "resume=True" not in said
    with pytest.raises(ValueError, match="score all images again"):
        lgm.read_results(tmp_path)
    Batches.count = -10  # type: ignore[attr-defined]
    with pytest.raises(ResumeError, match="run of a segmentation model cannot be resumed"):
        run_on(lgm.GradientMetrics(SCORES, output=tmp_path, resume=True), data(), net, stopping)
    with pytest.raises(FileExistsError, match="such a run cannot be resumed: choose another directory"):
        run_on(lgm.GradientMetrics(SCORES, output=tmp_path), data(), net, stopping)
    assert len(stopped) == 3
    assert lgm.read_results(tmp_path, incomplete=True)["max_softmax"].length() == 4


def test_logits_that_are_not_finite_mark_their_image() -> None:
    """One pixel is enough, although the mean leaves out its score, NaN."""

    class Dividing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(3, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.head(x) / (x[:, :1] != 0), LOGITS)

    rows = data()
    rows[3][0][0, 0, 0] = 0
    callback = lgm.GradientMetrics(["entropy"])
    run_on(callback, rows, Dividing(), call)
    assert callback.results["finite"].to_pylist() == [True, True, True, False, True]
    assert callback.results["entropy"].is_valid().to_pylist() == [True] * 5


def test_an_aggregate_depends_on_its_image_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[2, 1, 1] = torch.inf
    assert aggregate(maps, "max").isinf().tolist() == [False, False, True, False, False]
    whole = aggregate(maps, "q90")
    monkeypatch.setattr(images, "MOST_VALUES", 40)
    assert aggregate(maps, "q90").equal(whole)
