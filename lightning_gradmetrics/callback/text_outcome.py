"""Results of a run over texts besides the rows of the texts: the scored tokens and their metrics."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from lightning_gradmetrics.callback.evaluating import evaluate_detectors
from lightning_gradmetrics.callback.logged import logged_metrics
from lightning_gradmetrics.evaluation import Evaluation
from lightning_gradmetrics.results.stores import Results
from lightning_gradmetrics.results.tokens import SEQUENCE, has_tokens, token_table
from lightning_gradmetrics.scores import Score

__all__ = ["TextOutcome", "evaluate_tokens", "logged_of_tokens"]

ID = "id"


class TextOutcome:
    """The part of the callback that presents the tokens of texts."""

    token_evaluation: Evaluation | None
    results: pa.Table

    @property
    def tokens(self) -> pa.Table:
        """The scored tokens, one per row, with text, position, label, prediction and scores.

        Raises:
            ValueError: If the last run was not over texts.
        """
        return token_table(self.results)


def evaluate_tokens(results: Results, scores: Sequence[Score], resamples: int) -> Evaluation | None:
    """Return the metrics of wrong tokens; ``None`` if the results are not of texts.

    Tokens that are not the model's most probable prediction are the positives. Intervals resample texts.

    Args:
        results: The results, or a function that reads them.
        scores: The scores of the run.
        resamples: Bootstrap resamples for the intervals.
    """
    table = results() if callable(results) else results
    if not has_tokens(table) or not table.num_rows:
        return None
    tokens = token_table(table)
    numbered = tokens.set_column(
        tokens.column_names.index("index"), "index", pa.array(range(tokens.num_rows), pa.int64())
    )
    roles = dict.fromkeys(pc.unique(tokens["dataset"]).to_pylist(), ID)
    of_tokens = [score for score in scores if score.name in tokens.column_names]
    return evaluate_detectors(numbered, of_tokens, roles, resamples, cluster=SEQUENCE)


def logged_of_tokens(evaluation: Evaluation | None, prefix: str, metrics: Sequence[str]) -> dict[str, float]:
    """Return the token metrics by their logged names, ``prefix/dataset/score/token_task_metric``."""
    if evaluation is None:
        return {}
    logged = {}
    entries = [entry for entry in evaluation.metrics if entry["dataset"] is not None]
    for name, value in logged_metrics(entries, prefix, metrics).items():
        prefix_and_score, _, metric = name.rpartition("/")
        logged[f"{prefix_and_score}/token_{metric}"] = value
    return logged
