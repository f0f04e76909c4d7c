"""Rows that are not independent are resampled by whole clusters."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.evaluation.bootstrap import weight_blocks
from lightning_gradmetrics.evaluation.tasks import rows_of


def table(copies: int, clusters: int = 60) -> pa.Table:
    """Rows of a noisy score; each row of a cluster is repeated."""
    generator = np.random.default_rng(0)
    label = generator.integers(2, size=clusters).repeat(copies)
    score = (label[::copies] + generator.normal(size=clusters)).repeat(copies)
    columns = {"prediction": np.ones(len(label), dtype=int), "label": 1 - label, "score": score}
    number = np.arange(clusters).repeat(copies)
    return pa.table({"dataset": ["a"] * len(label), "index": np.arange(len(label)), "text": number, **columns})


@pytest.mark.parametrize("copies", [3, 100])
def test_repeated_rows_of_a_cluster_do_not_narrow_the_intervals(copies: int) -> None:
    """Values and draws equal those of one row per cluster; 100 copies make 6,000 rows, for which scores are grouped into cells."""
    once = evaluate(table(1), ["score"], {"a": "id"}, resamples=50, cluster="text").find(metric="auroc")
    several = evaluate(table(copies), ["score"], {"a": "id"}, resamples=50, cluster="text").find(metric="auroc")
    alone = evaluate(table(copies), ["score"], {"a": "id"}, resamples=50).find(metric="auroc")
    for key in ("value", "low", "high"):
        assert several[0][key] == pytest.approx(once[0][key], rel=1e-9)
    assert alone[0]["high"] - alone[0]["low"] < 0.8 * (several[0]["high"] - several[0]["low"])


def test_all_rows_of_a_cluster_have_one_weight_and_clusters_are_drawn_with_replacement() -> None:
    rows, _ = rows_of(table(4), ["score"], {"a": "id"}, "text")
    ((_, weights),) = weight_blocks(rows, 7, 0)
    by_cluster = weights.view(60, 4, 7)
    assert bool((by_cluster == by_cluster[:, :1]).all()) and torch.equal(
        by_cluster[:, 0].sum(0), torch.full((7,), 60.0)
    )


def test_too_few_clusters_have_no_intervals() -> None:
    evaluation = evaluate(table(20, clusters=9), ["score"], {"a": "id"}, resamples=20, cluster="text")
    assert evaluation.find(metric="auroc")[0]["low"] is None
    assert 'dataset "a" has 9 clusters: no intervals below 10' in evaluation.notes


def test_clusters_may_be_text_or_fractions_and_none_may_be_missing() -> None:
    whole = table(3)
    numbers = whole["text"].to_numpy()
    wanted = evaluate(whole, ["score"], {"a": "id"}, resamples=20, cluster="text").find(metric="auroc")
    for values in ([f"text {number}" for number in numbers], numbers / 100):
        named = whole.set_column(whole.column_names.index("text"), "text", pa.array(values))
        assert evaluate(named, ["score"], {"a": "id"}, resamples=20, cluster="text").find(metric="auroc") == wanted
    for missing in (None, float("nan")):
        values = [missing, *(numbers[1:] / 100)]
        broken = whole.set_column(whole.column_names.index("text"), "text", pa.array(values, pa.float64()))
        with pytest.raises(ValueError, match="1 rows have no value in the column 'text'"):
            evaluate(broken, ["score"], {"a": "id"}, cluster="text")
