"""Pictures of cosine similarity maps: what is kept, where it goes, and what the report shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.gallery import MapGallery, log_pictures, write_pictures
from lightning_gradmetrics.report import ReportError, write_report
from lightning_gradmetrics.runs import write_run
from lightning_gradmetrics.scores import resolve
from tests.models import Module, images


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
    seen = callback.gallery.seen["inside"]
    table = callback.results.to_pydict()
    values = sorted(v for v, d in zip(table["gga"], table["dataset"], strict=True) if d == "inside")
    assert seen.values.tolist() == pytest.approx(values[:3] + values[-3:])
    assert seen.count == 11 and seen.images.shape == (6, 3, 8, 8)
    cosines = lgm.scores.geometry.csm.mean_cosine(seen.maps)
    torch.testing.assert_close(cosines.double(), seen.values, rtol=1e-5, atol=1e-6)
    mean = lgm.scores.geometry.csm.mean_cosine((seen.total / seen.count)[None])
    assert mean.item() == pytest.approx(sum(values) / 11, rel=1e-5)
    assert len(callback.gallery.seen["out side/1"].values) == 5


def test_no_gallery_without_a_score_that_looks_at_maps(tmp_path: Path) -> None:
    assert scored(tmp_path, ["entropy", "odin"]).gallery is None
    assert MapGallery.of(resolve(["entropy", "gga_detector(classes=3)"])).probe.classes == 3


def test_samples_that_are_not_finite_are_left_out() -> None:
    gallery = MapGallery.of(resolve("gga"))
    maps = torch.eye(3).repeat(4, 1, 1)
    maps[1, 0, 0] = float("nan")
    evidence = lgm.evidence.Evidence(torch.zeros(4, 3), probes={gallery.probe: maps})
    gallery.add("a", torch.randn(4, 7), evidence, {"gga": torch.tensor([0.0, 1, float("inf"), 3])})
    assert gallery.seen["a"].count == 2 and gallery.seen["a"].images is None
    assert [p.name for p in gallery.pictures()] == ["mean_maps", "maps_a"]


def test_loggers_get_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = scored(tmp_path, ["gga(classes=3)"], TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"mean_maps", "maps_inside", "maps_out_side_1"}
    assert set(events.Tags()["images"]) == {f"gradmetrics/{name}" for name in names}

    class Wandb:
        def __init__(self) -> None:
            self.found: dict[str, tuple] = {}

        def log_image(self, key: str, images: list, step: int) -> None:
            self.found[key] = images[0].shape

    class Other:
        experiment = None

    log_pictures([Other(), wandb := Wandb()], callback.gallery.pictures(), "mine", 0)
    assert set(wandb.found) == {f"mine/{name}" for name in names}
    assert all(shape[2] == 3 for shape in wandb.found.values())


def test_the_report_shows_them(tmp_path: Path) -> None:
    callback = scored(tmp_path / "logs", ["entropy", "gga"])
    run = tmp_path / "run"
    figures = write_pictures(callback.gallery.pictures(), run)
    again = write_pictures(callback.gallery.pictures(), tmp_path / "again")
    assert all((run / f["file"]).read_bytes() == (tmp_path / "again" / f["file"]).read_bytes() for f in again)
    write_run(run, callback.results, callback.evaluation, callback.scorer.scores, model={}, figures=figures)
    text = write_report(run).read_text()
    assert text.count('<img src="data:image/svg+xml;base64,') == 3
    assert "Cosine similarity maps of out side/1" in text and ">Pictures</h2>" in text
    path = run / "metrics.json"
    content = json.loads(path.read_text())
    for file, words in (
        ("../x.svg", "inside the run directory"),
        ("metrics.json", "no picture"),
        ("a.svg", "not exist"),
    ):
        path.write_text(json.dumps({**content, "figures": [{"file": file}]}))
        with pytest.raises(ReportError, match=words):
            write_report(run)
