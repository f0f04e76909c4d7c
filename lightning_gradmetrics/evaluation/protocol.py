"""Evaluate a table of per-sample scores: metrics, intervals, comparisons and statements."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_gradmetrics.evaluation.bootstrap import Replicates
from lightning_gradmetrics.evaluation.comparisons import compare
from lightning_gradmetrics.evaluation.entries import fill_interval, with_groups
from lightning_gradmetrics.evaluation.intervals import FEWEST, FEWEST_SPARE
from lightning_gradmetrics.evaluation.judging import Judged, Question, judge_rows, judge_stream
from lightning_gradmetrics.evaluation.reading import chosen_columns, is_dataset
from lightning_gradmetrics.evaluation.record import Evaluation
from lightning_gradmetrics.evaluation.statements import statements_of
from lightning_gradmetrics.evaluation.streams import COLUMNS, file_dataset, stream_of
from lightning_gradmetrics.evaluation.tasks import DetectionTask
from lightning_gradmetrics.meters.functional.counts import check_rate
from lightning_gradmetrics.meters.functional.histogram import check_bins
from lightning_gradmetrics.results.reading import read_results

__all__ = ["compare_with_each", "evaluate"]

BASELINE = "max_softmax"
"""The default baseline that scores are compared with."""

MOST_EXACT_ROWS = 2_000_000
"""Up to this number of rows, a results directory is read into memory and its values are exact."""

BINS = 16_384
"""The number of bins of each score above that."""


def evaluate(
    results: Any,
    scores: Sequence[str],
    roles: Mapping[str, str],
    baselines: Sequence[str] = (),
    *,
    baseline: str | None = None,
    rate: float = 0.95,
    ood_share: float = 0.5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    cluster: str | None = None,
    bins: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Evaluation:
    """Evaluate scores on a per-sample results table: metrics, intervals and comparisons.

    There are three tasks. *Misclassification*, on each in-distribution dataset: incorrect rows (positive) against
    correct ones. *OOD*, on every other dataset: its rows (positive) against all in-distribution rows. *Joint*, on every
    other dataset: its rows and the incorrect in-distribution rows (positive) against correct in-distribution rows, in a
    mixture with the fraction ``ood_share`` of out-of-distribution rows. A group of several datasets also gets the mean
    over them, with equal weights. Labels of out-of-distribution data are ignored.

    Intervals show how much the numbers would vary with other test samples, not with another training run. AUROC has
    DeLong's interval on the logit scale, ``fpr95`` an interval from order statistics, and everything else percentiles
    of bootstrap resamples, which all scores share. With too few rows, no interval is computed. Up to 5,000 rows the
    bootstrap is exact; above, rows get Poisson weights and scores are grouped into cells, as ``settings["bootstrap"]``
    states. Intervals are not corrected for the number of comparisons.

    A results directory or an Arrow dataset with more than 2 million rows is read batch by batch in constant memory:
    scores go into bins, a note states how far an AUROC can be off, and random blocks of rows are resampled.

    Args:
        results: Columns ``dataset``, ``index``, ``prediction``, ``label`` (null or negative where unknown), one per score, and
            ``finite`` (rows where it is false are left out of all metrics), as an Arrow table, record batches or
            dataset, a pandas or Polars data frame, the results directory of a run (``output=``), or a Parquet file.
        scores: The columns to evaluate, higher = more uncertain.
        roles: Each dataset's role: ``"id"`` for in-distribution data, any other word for a group of
            out-of-distribution data.
        baselines: The elements of ``scores`` that use no gradient.
        baseline: The score that all others are compared with; by default ``max_softmax`` if it is among the scores,
            else the first of ``baselines``.
        rate: The true-positive rate of ``fpr95``.
        ood_share: The fraction of out-of-distribution rows in the mixture of the joint task, in (0, 1).
        resamples: The number of bootstrap resamples; 0 for no intervals and no comparisons.
        level: The level of the intervals.
        seed: The seed of the resamples.
        cluster: The column that names the cluster of each row; clusters are resampled as a whole.
        bins: The number of bins of each score, at least 1,024, for constant memory at any number of rows; by default
            16,384 above 2 million rows of a directory or an Arrow dataset, and exact values otherwise.
        progress: Called with the fraction of the resamples that is done.

    Returns:
        Metrics, comparisons, statements, datasets and notes.

    Raises:
        FileNotFoundError: If a directory contains no results.
        TypeError: If the results are of an unknown kind, or the roles are no mapping.
        ValueError: If a column, a role or a score is missing, an argument is out of range, a row appears twice, or a
            directory lacks rows.

    Example:
        >>> import pyarrow as pa
        >>> columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
        >>> table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
        >>> evaluation = evaluate(table, ["entropy"], {"test": "id"}, baselines=["entropy"])
        >>> evaluation.find(metric="auroc")[0]["value"]
        1.0

    Reference:
        Jaeger et al.: A Call to Reflect on Evaluation Practices for Failure Detection in Image Classification,
        ICLR 2023.
    """
    _check(scores, baselines, baseline, rate, ood_share, level)
    _check_roles(roles)
    resamples, seed = _whole("resamples", resamples), _whole("seed", seed)
    question = Question(list(scores), roles, rate, ood_share, resamples, level, seed, cluster, progress)
    judged = _judged(results, question, check_bins(bins))
    metrics, replicates = _with_means(judged, rate)
    for entry in metrics:
        fill_interval(entry, replicates, level, rate)
    named = _baseline(scores, baselines, baseline)
    comparisons = []
    if judged.resamples and named is not None:
        comparisons = compare(metrics, replicates, named, baselines, level, rate)
    settings = {
        "scores": list(scores),
        "baselines": list(baselines),
        "baseline": named,
        "roles": dict(roles),
        "rate": rate,
        "ood_share": ood_share,
        "resamples": judged.resamples,
        "level": level,
        "seed": seed,
        "bootstrap": judged.bootstrap,
        "bins": judged.bins,
    }
    return Evaluation(
        metrics=metrics,
        comparisons=comparisons,
        statements=statements_of(comparisons, level),
        datasets=judged.datasets,
        notes=judged.notes + _protocol_notes(judged.tasks, scores, named, judged.resamples, rate),
        settings=settings,
    )


def compare_with_each(
    results: Any,
    scores: Sequence[str],
    roles: Mapping[str, str],
    others: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the comparisons of all scores with each of several others, from one set of resamples.

    Args:
        results: As in :func:`evaluate`.
        scores: The columns to evaluate.
        roles: Each dataset's role.
        others: The scores to compare with.
        resamples: The number of bootstrap resamples.
        seed: The seed of the resamples.

    Returns:
        The comparisons, those with the first of ``others`` first: equal to those of :func:`evaluate` with each as ``baseline``.
    """
    rate, level = 0.95, 0.95
    for other in others:
        _check(scores, (), other, rate, 0.5, level)
    resamples, seed = _whole("resamples", resamples), _whole("seed", seed)
    question = Question(list(scores), roles, rate, 0.5, resamples, level, seed, None, None)
    metrics, replicates = _with_means(_judged(results, question, None), rate)
    comparisons = []
    for other in others:
        comparisons += compare(metrics, replicates, other, (), level, rate)
    return comparisons


def _with_means(judged: Judged, rate: float) -> tuple[list[dict[str, Any]], Replicates]:
    """Return the metrics and their replicates, with the means over groups of datasets."""
    means, replicates = with_groups(judged.metrics, judged.replicates, rate)
    return [*judged.metrics, *means], replicates


def _judged(results: Any, question: Question, bins: int | None) -> Judged:
    """Evaluate in memory or in a stream, depending on the size and kind of the results."""
    if question.cluster is not None and bins is not None:
        raise ValueError("cluster= and bins= exclude each other: clusters are resampled in memory")
    if bins is None and not isinstance(results, (str, Path)) and not is_dataset(results):
        return judge_rows(results, question)
    stream = stream_of(results)
    is_small = bins is None and stream.rows <= MOST_EXACT_ROWS
    if is_small or question.cluster is not None:
        return judge_rows(_in_memory(results, stream.columns, question), question)
    return judge_stream(stream, question, BINS if bins is None else bins)


def _in_memory(results: Any, present: Sequence[str], question: Question) -> Any:
    """Return the results; those of a file as a dataset, and those of a directory as a table of the needed columns."""
    if not isinstance(results, (str, Path)):
        return results
    if Path(results).is_file():
        return file_dataset(results)
    clusters = [] if question.cluster is None else [question.cluster]
    wanted = chosen_columns(present, [*COLUMNS, *question.scores, *clusters], ["finite"])
    return read_results(results, columns=wanted)


def _check(
    scores: Sequence[str],
    baselines: Sequence[str],
    baseline: str | None,
    rate: float,
    ood_share: float,
    level: float,
) -> None:
    if isinstance(scores, str) or not scores:
        raise ValueError(f"scores must be a list of at least one column name, got {scores!r}")
    named = [*baselines, *([] if baseline is None else [baseline])]
    if unknown := [name for name in named if name not in scores]:
        raise ValueError(f"the baselines {unknown} are not among the scores: {', '.join(scores)}")
    check_rate(rate, "rate")
    if check_rate(level, "level") == 1:
        raise ValueError("level must be between 0 and 1, e.g. 0.95")
    if check_rate(ood_share, "ood_share") == 1:
        raise ValueError("ood_share must be between 0 and 1, e.g. 0.5")


def _check_roles(roles: Any) -> None:
    if not isinstance(roles, Mapping) or not all(isinstance(role, str) for role in roles.values()):
        raise TypeError(
            f"roles must be a mapping from each dataset to its role, as in {{'mine': 'id', 'other': 'far'}}, got {roles!r}"
        )


def _whole(name: str, number: Any) -> int:
    """Return a number of any integral type, such as one of NumPy, as an ``int``."""
    try:
        whole = -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        whole = -1
    if whole < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {number!r}")
    return whole


def _baseline(scores: Sequence[str], baselines: Sequence[str], baseline: str | None) -> str | None:
    """Return the score that all others are compared with."""
    if baseline is not None:
        return baseline
    if BASELINE in scores:
        return BASELINE
    return baselines[0] if baselines else None


def _protocol_notes(
    tasks: Sequence[DetectionTask], scores: Sequence[str], baseline: str | None, resamples: int, rate: float
) -> list[str]:
    notes = []
    if baseline is None:
        notes.append("no baseline: scores are not compared; pass baseline=, or score max_softmax too")
    elif not resamples and len(scores) > 1:
        notes.append(f"resamples is 0: there are no intervals and no comparisons with {baseline}")
    for task in tasks if resamples else []:
        notes += _few_rows_notes(task, rate)
    return notes


def _few_rows_notes(task: DetectionTask, rate: float) -> list[str]:
    """Return notes on the intervals for which a task has too few rows."""
    positives, negatives = task.count_positive, task.count_negative
    side = "positive"
    if task.count_ood is not None and task.count_ood < positives:
        positives, side = task.count_ood, "out-of-distribution"
    if not min(positives, negatives):
        return []
    where = f'{task.task} on "{task.dataset}"'
    if negatives < min(positives, FEWEST):
        return [f"{where} has {negatives} negative samples: no intervals below {FEWEST}"]
    if positives < FEWEST:
        return [f"{where} has {positives} {side} samples: no intervals below {FEWEST}"]
    needed = math.ceil(FEWEST_SPARE / (1 - rate) - 1e-9) if rate < 1 else 0
    if positives < needed:
        return [f"{where} has {positives} {side} samples: no interval of fpr95 below {needed}"]
    return []
