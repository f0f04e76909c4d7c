"""Small batches are scored together, and nobody sees a difference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import lightning_gradmetrics as lgm
from lightning_gradmetrics.callback.small_batches import SmallBatches, _few_inputs
from lightning_gradmetrics.results.output import Output
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.scorer import Scorer
from tests.callback.runs import Stopping, batches, trainer
from tests.models import fast_rows

SCORES = ["max_softmax", "entropy", "energy", "gradnorm", "gradtrust"]


class Classifier(Stopping):
    """Moves its head's weight in each step."""

    def step(self, batch: Any) -> Tensor:
        self.net[-1].weight.data *= 1.01
        return super().step(batch)


def data() -> list[Any]:
    """Two loaders with short last batches; the first has labels, one row with a NaN and one with Inf."""
    torch.manual_seed(1)
    first, second = torch.randn(23, 4), torch.randn(11, 4)
    first[5, 2], first[9] = torch.nan, torch.inf
    return [batches(first, torch.arange(23) % 3, torch.arange(23) + 100), batches(second)]


def run(stage: str = "test", model: Any = None, **options: Any) -> lgm.GradientMetrics:
    arguments = {"scores": SCORES, "datasets": {"in": "id", "out": "far"}, "print_summary": False, **options}
    callback = lgm.GradientMetrics(**arguments)
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(trainer(callback), stage)(Classifier() if model is None else model, data(), **quiet)
    return callback


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of the scores."""
    sizes: list[int] = []
    original = Scorer.__call__

    def call(self: Scorer, evidence: Evidence) -> dict[str, Tensor]:
        sizes.append(len(evidence.given_logits))
        return original(self, evidence)

    monkeypatch.setattr(Scorer, "__call__", call)
    return sizes


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmallBatches, "accepts", staticmethod(lambda batch, evidence: False))


def same(first: lgm.GradientMetrics, second: lgm.GradientMetrics) -> bool:
    tables = first.results, second.results
    finite = [table.filter(table["finite"]) for table in tables]
    names = ["dataset", "index", "prediction", "label", "finite"]  # NaN is not equal to NaN
    return finite[0].equals(finite[1]) and tables[0].select(names).equals(tables[1].select(names))


@pytest.mark.parametrize("stage", fast_rows(["validate", "test", "predict"], ["test"]))
def test_rows_equal_those_of_separate_calls(stage: str, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(stage)
    assert counted == [23, 11]
    alone(monkeypatch)
    separate = run(stage)
    assert counted[2:] == [4, 4, 4, 4, 4, 3, 4, 4, 3] and same(together, separate)
    assert together.results["finite"].to_pylist().count(False) == 2
    assert str(together.evaluation.metrics) == str(separate.evaluation.metrics)


def test_rows_scored_before_an_error_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for _ in range(2):
        callback = lgm.GradientMetrics(SCORES, datasets={"in": "id", "out": "far"}, print_summary=False)
        with pytest.raises(RuntimeError, match="on fire"):
            trainer(callback).predict(Classifier(stop_at=29), data())
        assert callback.results.num_rows == 31
        found.append(callback)
        alone(monkeypatch)
    assert same(*found)


def test_a_score_that_fails_keeps_the_rows_before_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    original, sizes = Scorer.__call__, []

    def call(self: Scorer, evidence: Evidence) -> dict[str, Tensor]:
        sizes.append(len(evidence.given_logits))
        if sizes in ([23], [23, 4, 4, 4]):
            raise ValueError(f"{sizes[-1]} rows fail")
        return original(self, evidence)

    monkeypatch.setattr(Scorer, "__call__", call)
    callback = lgm.GradientMetrics(SCORES, print_summary=False)
    with pytest.raises(ValueError, match="4 rows fail"):
        trainer(callback).predict(Classifier(), data()[0])
    assert callback.results["index"].to_pylist() == list(range(8))


def test_a_score_of_the_user_receives_each_batch(counted: list[int]) -> None:
    def from_mean(evidence: Evidence) -> Tensor:
        return (evidence.logits - evidence.logits.mean(0)).square().sum(1)

    run(scores=["energy", from_mean])
    assert max(counted) == 4 and len(counted) == 9


def test_parts_on_disk_have_their_size(tmp_path: Path) -> None:
    run(output=Output(tmp_path, rows_per_part=6), metrics=())
    parts = [pq.read_metadata(path).num_rows for path in sorted(tmp_path.glob("*.parquet"))]
    assert sum(parts) == 34 and max(parts) == 8 and lgm.read_results(tmp_path).num_rows == 34


def test_the_number_of_batches_in_memory_is_bounded(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gradmetrics.callback.small_batches.MOST_BATCHES", 2)
    run()
    assert counted == [8, 8, 7, 8, 3]


def test_batches_of_another_kind_are_scored_apart(counted: list[int]) -> None:
    class Alternating(Classifier):
        def step(self, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.seen == 4):
                return super().step(batch)

    callback = lgm.GradientMetrics(SCORES, sample_id=2, print_summary=False)
    trainer(callback).predict(Alternating(), data()[0])
    assert counted == [4, 4, 15]
    assert callback.results["sample_id"].to_pylist() == [str(number) for number in range(100, 123)]


def test_inputs_that_are_not_copied_are_tested_at_once() -> None:
    x = torch.zeros(4, 3)
    batch = ObservedBatch(x, torch.zeros(4, 2), called=torch.nn.Identity())
    assert _few_inputs(batch) is x
    assert _few_inputs(replace(batch, called=None)) is None  # the user's tensor, which may change later
    assert _few_inputs(replace(batch, inputs=torch.zeros(2, 4, 3))) is None  # not one row per sample
    assert _few_inputs(replace(batch, inputs=torch.zeros(4, 3000))) is None
