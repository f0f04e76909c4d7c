"""Every logger receives scalars and pictures in its own format, or a warning explains why it receives no pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import lightning_gradmetrics as lgm
from tests.callback.runs import batches, test_run
from tests.models import Module, images

ROLES = {"ours": "id", "noise": "far"}
SCORES = ["max_softmax", "pseudo_label(target='all')"]
KEY = "gradmetrics/noise/pseudo_label.target_all/ood_auroc"
CURVES = {"roc_misclassification_ours", "risk_coverage_misclassification_ours", "roc_ood_noise"}
CURVES |= {"distributions_max_softmax", "distributions_pseudo_label_target_all_"}


def logged(logger: Logger, **options: Any) -> lgm.GradientMetrics:
    """Return the callback after a test run with a logger."""
    torch.manual_seed(0)
    callback = lgm.GradientMetrics(SCORES, datasets=ROLES, print_summary=False, **options)
    loaders = [batches(images(24) + shift, torch.randint(0, 5, (24,))) for shift in (0, 1)]
    test_run(callback, Module(), loaders, logger=logger)
    return callback


@pytest.mark.slow
def test_tensorboard_gets_scalars_histograms_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = logged(TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert events.Scalars(KEY)[0].value == pytest.approx(
        callback.evaluation.find(score="pseudo_label(target=all)", task="ood", dataset="noise", metric="auroc")[0][
            "value"
        ]
    )
    assert set(tags["images"]) == {f"gradmetrics/{name}" for name in CURVES}
    wanted = {f"gradmetrics/{name}/{score}" for name in ROLES for score in ("max_softmax", "pseudo_label.target_all")}
    assert set(tags["histograms"]) == wanted
    histogram = events.Histograms("gradmetrics/noise/max_softmax")[0].histogram_value
    assert histogram.num == 24


@pytest.mark.slow
def test_csv_gets_scalars_and_png_files(tmp_path: Path) -> None:
    logged(CSVLogger(tmp_path, name="", version=""))
    assert KEY in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    files = {path.stem: path for path in (tmp_path / "figures").glob("*.png")}
    assert set(files) == CURVES and all(path.read_bytes().startswith(b"\x89PNG") for path in files.values())


@pytest.mark.slow
def test_wandb_offline_gets_scalars_images_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    try:
        logged(logger, top_k={"max_softmax": 3})
        folder = Path(logger.experiment.dir)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert KEY in summary
    for name in (*CURVES, "results", "largest"):
        assert f"gradmetrics/{name}" in summary, name
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.rglob("*.table.json")}
    assert tables["results"]["columns"][:4] == ["dataset", "index", "prediction", "label"]
    assert len(tables["results"]["data"]) == 48
    assert (
        len(tables["largest"]["data"]) == 6 and tables["largest"]["data"][0][-1] == "Image"
    )  # the pixels are an artifact


@pytest.mark.slow
def test_mlflow_gets_scalars_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'runs'}")
    logged(logger)
    client, run = logger.experiment, logger.run_id
    assert KEY in client.get_run(run).data.metrics
    names = {entry.path.rpartition("/")[2] for entry in client.list_artifacts(run, "gradmetrics")}
    assert names == CURVES


class Silent(Logger):
    """A logger of scalars only."""

    experiment = None
    name = version = "silent"

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.metrics = dict(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters."""


def test_a_logger_without_pictures_causes_a_warning() -> None:
    with pytest.warns(UserWarning, match="Silent gets no pictures: it has no log_image"):
        logged(silent := Silent())
    assert KEY in silent.metrics
