"""Pictures of cosine similarity maps: which samples are kept, and that loggers and the report show them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.gradients import cosine_map_summaries
from lightning_gradmetrics.pictures import MapGallery, ScoredBatch, log_pictures, write_pictures
from lightning_gradmetrics.report import ReportError, write_report, write_run
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import resolve
from tests.models import Module, images


def gallery(callback: lgm.GradientMetrics) -> MapGallery | None:
    """The maps of a run, or None."""
    return next((source for source in callback.sources if isinstance(source, MapGallery)), None)


def batch(inputs: torch.Tensor, scores: dict[str, torch.Tensor], evidence: Evidence | None = None) -> ScoredBatch:
    """A batch of the dataset a, whose samples are all finite."""
    index = torch.arange(len(inputs))
    evidence = evidence or Evidence(torch.zeros(len(inputs), 3))
    return ScoredBatch("a", index, index.clone(), index.clone(), index >= 0, inputs, evidence, scores)


def scored(folder: Path, scores: list[str], logger: object = False) -> lgm.GradientMetrics:
    loaders = [DataLoader(TensorDataset(images(n), torch.zeros(n).long()), batch_size=4) for n in (11, 5)]
    callback = lgm.GradientMetrics(scores, datasets={"inside": "id", "out side/1": "far"})
    trainer = Trainer(
        accelerator="cpu", logger=logger, callbacks=[callback], enable_progress_bar=False, default_root_dir=folder
    )
    trainer.validate(Module().eval(), loaders, verbose=False)
    return callback


def test_the_extremes_and_the_mean_of_all_samples_are_kept(tmp_path: Path) -> None:
    callback = scored(tmp_path, ["entropy", "gga"])
    seen = gallery(callback).seen["inside"]
    table = callback.results.to_pydict()
    values = sorted(v for v, d in zip(table["gga"], table["dataset"], strict=True) if d == "inside")
    assert seen.values.tolist() == pytest.approx(values[:3] + values[-3:])
    assert seen.count == 11 and seen.images.shape == (6, 3, 8, 8)
    cosines = cosine_map_summaries.mean_cosine(seen.maps)
    torch.testing.assert_close(cosines.double(), seen.values, rtol=1e-5, atol=1e-6)
    mean = cosine_map_summaries.mean_cosine((seen.total / seen.count)[None])
    assert mean.item() == pytest.approx(sum(values) / 11, rel=1e-5)
    assert len(gallery(callback).seen["out side/1"].values) == 5


def test_no_gallery_without_a_score_that_uses_maps(tmp_path: Path) -> None:
    assert gallery(scored(tmp_path, ["entropy", "odin"])) is None
    assert MapGallery.of(resolve(["entropy", "gga_detector(classes=3)"])).probe.classes == 3


def test_samples_that_are_not_finite_are_left_out() -> None:
    gallery = MapGallery.of(resolve("gga"))
    maps = torch.eye(3).repeat(4, 1, 1)
    maps[1, 0, 0] = float("nan")
    evidence = Evidence(torch.zeros(4, 3), probes={gallery.probe: maps})
    gallery.add(batch(torch.randn(4, 7), {"gga": torch.tensor([0.0, 1, float("inf"), 3])}, evidence))
    assert gallery.seen["a"].count == 2 and gallery.seen["a"].images is None
    assert [p.name for p in gallery.pictures()] == ["mean_maps", "maps_a"]


def test_repeated_samples_are_removed_from_every_field() -> None:
    inputs = {"x": torch.arange(4.0)[:, None], "scale": torch.tensor(2.0)}
    whole = batch(torch.zeros(4, 1), {"s": torch.arange(4.0)}, Evidence(torch.eye(4)))
    assert whole.without_repeats() is whole
    found = replace(whole, inputs=inputs, index=torch.tensor([3, -1, 5, -1])).without_repeats()
    assert (
        found.index.tolist() == [3, 5] and found.prediction.tolist() == [0, 2] and found.finite.tolist() == [True] * 2
    )
    assert found.inputs["x"].flatten().tolist() == found.scores["s"].tolist() == [0, 2]
    assert found.inputs["scale"].item() == 2 and torch.equal(found.evidence.given_logits, torch.eye(4)[[0, 2]])


def test_maps_of_several_processes_equal_those_of_one() -> None:
    torch.manual_seed(0)
    whole, parts = MapGallery.of(resolve("gga")), [MapGallery.of(resolve("gga")) for _ in range(2)]
    for number in range(4):
        maps, values = torch.rand(5, 3, 3), torch.rand(5)
        found = batch(torch.rand(5, 3, 4, 4), {"gga": values}, Evidence(torch.zeros(5, 3), probes={whole.probe: maps}))
        whole.add(found)
        parts[number % 2].add(found)
    parts[0].join([part.kept() for part in parts])
    one, other = whole.seen["a"], parts[0].seen["a"]
    assert one.count == other.count == 20
    for key in ("values", "maps", "images", "total"):
        torch.testing.assert_close(getattr(one, key), getattr(other, key))


@pytest.mark.slow
def test_loggers_get_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = scored(tmp_path, ["gga(classes=3)"], TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"mean_maps", "maps_inside", "maps_out_side_1"}
    assert set(events.Tags()["images"]) >= {f"gradmetrics/{name}" for name in names}

    class Wandb:
        def __init__(self) -> None:
            self.found: dict[str, tuple] = {}

        def log_image(self, key: str, images: list, step: int) -> None:
            self.found[key] = images[0].shape

    class Other:
        experiment = None

    with pytest.warns(UserWarning, match="Other gets no pictures"):
        log_pictures([Other(), wandb := Wandb()], gallery(callback).pictures(), "mine", 0)
    assert set(wandb.found) == {f"mine/{name}" for name in names}
    assert all(shape[2] == 3 for shape in wandb.found.values())


@pytest.mark.slow
def test_the_report_shows_the_pictures(tmp_path: Path) -> None:
    callback = scored(tmp_path / "logs", ["entropy", "gga"])
    run = tmp_path / "run"
    figures = write_pictures(gallery(callback).pictures(), run)
    again = write_pictures(gallery(callback).pictures(), tmp_path / "again")
    assert all((run / f["file"]).read_bytes() == (tmp_path / "again" / f["file"]).read_bytes() for f in again)
    write_run(run, callback.results, callback.evaluation, callback.scorer.scores, model={}, figures=figures)
    text = write_report(run).read_text()
    assert text.count('<img src="data:image/svg+xml;base64,') == 3
    assert "Cosine similarity maps of out side/1" in text and ">Pictures</h2>" in text
    path = run / "metrics.json"
    content = json.loads(path.read_text())
    for file, words in (
        ("../x.svg", "inside the run directory"),
        ("metrics.json", "not a picture"),
        ("a.svg", "not exist"),
    ):
        path.write_text(json.dumps({**content, "figures": [{"file": file}]}))
        with pytest.raises(ReportError, match=words):
            write_report(run)
