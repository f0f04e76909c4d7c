"""Results in a directory have the same rows as in memory, can be resumed, and never mix with another run's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.results import IncompleteResultsError, ResumeError
from lightning_gradmetrics.results.output import Output
from tests.callback.runs import Stopping, batches, mlp, trainer
from tests.models import fast_rows

SCORES = ["energy", "gradnorm", "pseudo_label(target=all)"]
ROLES = {"in": "id", "out": "far"}


def data(seed: int = 0, size: int = 23, **options: Any) -> list[DataLoader[Any]]:
    torch.manual_seed(100 + seed)
    loaders = []
    for rows in (size, 11):
        loaders.append(batches(torch.randn(rows, 4), torch.arange(rows) % 3, **options))
    return loaders


def score(
    output: Path | Output | None, stage: str = "test", loaders: Any = None, model: Any = None, **options: Any
) -> lgm.GradientMetrics:
    arguments = {"scores": SCORES, "datasets": ROLES, **options}
    callback = lgm.GradientMetrics(**arguments, output=output)
    given = data() if loaders is None else loaders
    run = getattr(trainer(callback), stage)
    run(Stopping() if model is None else model, given, **({} if stage == "predict" else {"verbose": False}))
    return callback


def interrupted(output: Path, stop_at: int = 10, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        score(output, model=Stopping(stop_at), **options)


@pytest.mark.parametrize("stage", fast_rows(["validate", "test", "predict"], ["test"]))
def test_the_directory_has_the_same_rows_as_memory(stage: str, tmp_path: Path) -> None:
    expected = score(None, stage).results
    callback = score(Output(tmp_path, rows_per_part=6), stage)
    assert callback.results.equals(expected) and lgm.read_results(tmp_path).equals(expected)
    parts = [pq.read_metadata(path).num_rows for path in sorted(tmp_path.glob("*.parquet"))]
    assert sum(parts) == 34 and len(parts) >= 4 and max(parts) < 2 * 6
    assert callback.evaluation is not None


@pytest.mark.slow
def test_other_libraries_read_the_directory(tmp_path: Path) -> None:
    duckdb, pandas, polars = map(pytest.importorskip, ("duckdb", "pandas", "polars"))
    expected = score(tmp_path).results.column("energy").to_pylist()
    assert sorted(pandas.read_parquet(tmp_path)["energy"]) == sorted(expected)
    assert sorted(polars.read_parquet(tmp_path / "*.parquet")["energy"]) == sorted(expected)
    read = duckdb.sql(f"select energy from '{tmp_path}/*.parquet'").fetchall()
    assert sorted(value for (value,) in read) == sorted(expected)


@pytest.mark.slow
def test_rows_are_not_kept_in_memory_and_are_read_on_use(tmp_path: Path) -> None:
    most = []

    class Watched(lgm.GradientMetrics):
        def on_test_batch_end(self, *arguments: Any, **options: Any) -> None:
            super().on_test_batch_end(*arguments, **options)
            most.append(sum(rows.waiting for rows in self._run.stage.rows))

    callback = Watched(SCORES, output=Output(tmp_path, rows_per_part=8))
    trainer(callback).test(Stopping(), data()[0], verbose=False)
    assert max(most) < 8 and callable(callback._results)
    assert callback.results.num_rows == 23


def test_decisions_ids_features_and_metadata_are_stored(tmp_path: Path) -> None:
    images, labels = torch.randn(9, 4), torch.arange(9) % 3
    names = [f"image_{number}.png" for number in range(9)]
    loader = DataLoader(list(zip(images, labels, names, strict=True)), 4)
    thresholds = lgm.evaluation.fit_thresholds(score(None).results, ["energy"])
    model, features = Stopping(), {"double": lambda evidence: 2 * evidence.logits}
    options = {"datasets": None, "split_batch": lambda batch: (batch[0], batch[1]), "thresholds": thresholds}
    callback = score(tmp_path, "predict", loader, model, **options, sample_id=2, columns=["features", "cosine_maps"])
    table = lgm.read_results(tmp_path)
    assert table["sample_id"].to_pylist() == names and "energy_accept" in table.column_names
    with torch.no_grad():
        hidden = model.net[:-1](images)
    torch.testing.assert_close(torch.tensor(table["features"].to_pylist()), hidden)
    assert str(table.schema.field("cosine_maps").type).startswith("fixed_size_list") and callback.results.equals(table)
    run = json.loads(table.schema.metadata[b"lightning_gradmetrics"])
    assert run["scores"]["gradnorm"]["arguments"]["temperature"] == 1.0 and len(run["model"]["weights"]) == 16
    about = json.loads(table.schema.metadata[b"lightning_gradmetrics.about"])
    assert torch.__version__.startswith(about["versions"]["torch"])
    in_memory = score(None, "predict", loader, model, **options, columns=features).results
    assert torch.tensor(in_memory["double"].to_pylist()).shape == (9, 3)


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("stop_at", fast_rows([4, 12, 30], [4]))
def test_a_resumed_run_scores_the_rest_and_ends_with_the_same_bits(stage: str, stop_at: int, tmp_path: Path) -> None:
    expected = score(None, stage).results
    interrupted(tmp_path, stop_at, stage=stage)
    with pytest.raises(IncompleteResultsError, match=f"interrupted after {stop_at if stop_at < 23 else 31} rows"):
        lgm.read_results(tmp_path)
    model = Stopping()
    left = lgm.unfinished(dict(zip(ROLES, data(), strict=True)), tmp_path)
    callback = score(tmp_path, stage, left, model, resume=True)
    assert callback.results.equals(expected)
    assert model.seen <= 34 - stop_at + 4 and callback.evaluation is not None


@pytest.mark.slow
def test_a_resumed_run_over_whole_dataloaders_scores_no_row_twice(tmp_path: Path) -> None:
    expected = score(None).results
    interrupted(tmp_path, 12)
    model = Stopping()
    assert score(tmp_path, model=model, resume=True).results.equals(expected)
    assert model.seen == 34  # Lightning runs the step; the callback scores the rest only
    assert score(tmp_path, resume=True).results.equals(expected)  # complete already
    assert len(pq.read_table(tmp_path)) == 34


def test_a_different_batch_size_causes_a_warning_and_loses_no_row(tmp_path: Path) -> None:
    expected = score(None).results
    interrupted(tmp_path, 12)
    with pytest.warns(UserWarning, match="batch_size.in is 4 and this run's is 5"):
        callback = score(tmp_path, loaders=lgm.unfinished(data(batch_size=5), tmp_path), resume=True)
    assert callback.results["index"].equals(expected["index"])
    found, wanted = (torch.tensor(table["gradnorm"].to_pylist()) for table in (callback.results, expected))
    torch.testing.assert_close(found, wanted)


REFUSED = {
    "its model.weights is": {"model": lambda: Stopping(seed=1)},
    "its scores.gradnorm is": {"scores": ["energy", "pseudo_label(target=all)"]},
    "its scores.gradnorm.arguments.temperature is 1.0 and this run's is 2.0": {
        "scores": {"energy": "energy", "gradnorm": "gradnorm(temperature=2.0)", SCORES[2]: SCORES[2]}
    },
    "its datasets.in.content is": {"loaders": lambda: data(seed=1)},
    "its datasets.in.rows is 23 and this run's is 24": {"loaders": lambda: data(size=24)},
    "its datasets.in.order is 'in order' and this run's is 'unknown'": {"loaders": lambda: data(shuffle=True)},
    "its roles.out is 'far' and this run's is 'near'": {"datasets": {"in": "id", "out": "near"}},
    "its stage is 'test' and this run's is 'predict'": {"stage": "predict"},
    "its columns": {"columns": "features"},
}


@pytest.mark.parametrize("difference", REFUSED)
@pytest.mark.filterwarnings("ignore:.*shuffling enabled.*")
def test_a_resume_of_another_run_is_refused_by_name(difference: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    before = sorted(tmp_path.iterdir())
    options = {}
    for name, value in REFUSED[difference].items():
        options[name] = value() if callable(value) else value
    with pytest.raises(ResumeError, match=difference):
        score(tmp_path, resume=True, **options)
    assert sorted(tmp_path.iterdir()) == before
    loaders = options.get("loaders")
    if loaders is not None:
        with pytest.raises(ResumeError, match=difference):
            lgm.unfinished(loaders, tmp_path)


@pytest.mark.filterwarnings("ignore:.*shuffling enabled.*")
def test_a_shuffled_run_cannot_be_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path, loaders=data(shuffle=True), stage="predict")
    with pytest.raises(ResumeError, match="order of its dataloader is random in each run"):
        score(tmp_path, "predict", data(shuffle=True), resume=True)


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    expected = score(tmp_path).results
    with pytest.raises(FileExistsError, match="resume=True to complete them or choose another directory"):
        score(tmp_path)
    assert lgm.read_results(tmp_path).equals(expected)


def test_an_interrupted_run_prints_how_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="on fire"):
        score(tmp_path, model=Stopping(10))
    said = capsys.readouterr().err
    assert f"12 rows are committed in {tmp_path}" in said and "lightning_gradmetrics.unfinished" in said


class Stream(IterableDataset[Any]):
    """Yields 20 samples."""

    def __init__(self, first: int = 0) -> None:
        self.samples = TensorDataset(
            torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
        )
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.first, 20):
            yield self.samples[number]


class Skipping(Stream):
    """Can skip samples."""

    def skip(self, rows: int) -> Skipping:
        return Skipping(self.first + rows)


@pytest.mark.filterwarnings("ignore:the index of the rows")
def test_a_stream_that_can_skip_rows_is_resumed(tmp_path: Path) -> None:
    options = {"datasets": ["stream"]}
    expected = score(None, "predict", DataLoader(Skipping(), 4), **options).results
    interrupted(tmp_path, 9, stage="predict", loaders=DataLoader(Skipping(), 4), **options)
    with pytest.raises(ResumeError, match=r"starts at the first row: pass lightning_gradmetrics\.unfinished"):
        score(tmp_path, "predict", DataLoader(Skipping(), 4), resume=True, **options)
    left = lgm.unfinished(DataLoader(Skipping(), 4), tmp_path)
    assert score(tmp_path, "predict", left, resume=True, **options).results.equals(expected)


@pytest.mark.filterwarnings("ignore:the index of the rows")
def test_a_stream_that_cannot_skip_rows_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, 9, stage="predict", loaders=DataLoader(Stream(), 4), datasets=["stream"])
    with pytest.raises(ResumeError, match=r"Stream is iterable and cannot skip the 12 rows.*method skip\(rows\)"):
        lgm.unfinished(DataLoader(Stream(), 4), tmp_path)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="resume=True needs output="):
        lgm.GradientMetrics(resume=True)
    with pytest.raises(TypeError, match="output= is a int"):
        lgm.GradientMetrics(output=3)
    with pytest.raises(ValueError, match="columns= names 'feature'; available: features, cosine_maps"):
        lgm.GradientMetrics(columns="feature")


def test_labels_beyond_the_classes_are_also_dropped_from_earlier_parts(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 7, 1])
    loader = batches(torch.randn(10, 4), labels, batch_size=2)
    with pytest.warns(UserWarning, match="no labels are used"):
        callback = score(Output(tmp_path, rows_per_part=2), "test", loader, datasets=["mine"])
    assert callback.results["label"].null_count == 10


class Files(Dataset[Any]):
    """A user-defined dataset."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), float(index)), index % 3


def test_lists_of_batches_are_resumed(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Files(), batch_sampler=[[4, 3], [2], [1, 0]])

    expected = score(None, "test", loader(), datasets=["mine"]).results
    interrupted(tmp_path, 3, loaders=loader(), datasets=["mine"])
    left = lgm.unfinished(loader(), tmp_path)
    assert len(left) == 1 and score(tmp_path, "test", left, datasets=["mine"], resume=True).results.equals(expected)


def test_a_network_without_dataset_names_resumes(tmp_path: Path) -> None:
    """The model is an ``nn.Module`` inside a module, and the only dataloader has no name."""
    assert isinstance(Stopping().net, nn.Module)
    interrupted(tmp_path, 8, loaders=data()[0], datasets=None)
    assert len(lgm.unfinished(data()[0], tmp_path)) == 4


def test_sharded_models_are_refused_for_scores_of_the_whole_network() -> None:
    from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

    from lightning_gradmetrics.callback.module import check_sharding

    scores, model = lgm.GradientMetrics(SCORES).scorer.scores, mlp(4, 3)
    check_sharding(SingleDeviceStrategy(torch.device("cpu")), scores, model)
    check_sharding(FSDPStrategy(), scores[:2], model)
    with pytest.raises(
        ValueError, match=r"FSDPStrategy shards the parameters, and the scores 'pseudo_label\(target=all\)'"
    ):
        check_sharding(FSDPStrategy(), scores, model)
