"""Fits thresholds on held-out rows, and accepts or rejects samples with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_gradmetrics.classifier.hints import did_you_mean
from lightning_gradmetrics.evaluation.reading import as_table, finite_rows, float_column, known_labels
from lightning_gradmetrics.evaluation.risk_rules import JointRisk, LearnThenTest, SelectiveRisk
from lightning_gradmetrics.evaluation.row_classes import ID, dataset_numbers
from lightning_gradmetrics.evaluation.rules import Conformal, Coverage, Rule, TruePositiveRate

__all__ = ["Thresholds", "conformal_p_values", "count_accepted", "fit_thresholds"]

RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (TruePositiveRate, Coverage, Conformal, SelectiveRisk, LearnThenTest, JointRisk)
}
"""Every rule by its name."""

KEYS = ("values", "rows", "rule", "guarantee", "coverage", "together")


@dataclass(frozen=True)
class Thresholds:
    """One threshold per score; a sample is accepted if its score does not exceed it.

    Args:
        values: The threshold of each score.
        rows: The number of rows that the thresholds were fitted on.
        rule: The rule's name and arguments.
        guarantee: The guarantee in one sentence; it holds for each score separately, unless ``together``.
        coverage: The fraction of the fitted in-distribution rows that each threshold accepts.
        together: Whether the guarantee holds for samples that all thresholds accept.

    Example:
        >>> table = pa.table({"entropy": [0.1, 0.2, 0.3, 9.0]})
        >>> fitted = fit_thresholds(table, ["entropy"], tpr=0.75)
        >>> fitted.apply(table)["entropy_accept"].to_pylist()
        [True, True, True, False]
        >>> Thresholds.from_json(fitted.to_json()) == fitted
        True
    """

    values: Mapping[str, float]
    rows: int
    rule: Mapping[str, Any]
    guarantee: str
    coverage: Mapping[str, float]
    together: bool = False

    def to_json(self) -> str:
        """Return the thresholds as JSON text; numbers are read back exactly."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Thresholds:
        """Return the thresholds from the result of :meth:`to_json`.

        Raises:
            ValueError: If the text is something else.
        """
        content: Any = json.loads(text)
        if not isinstance(content, dict) or set(content) != set(KEYS):
            raise ValueError(f"this JSON has no thresholds: it needs the keys {', '.join(KEYS)}; fit them again")
        return cls(**content)

    def apply(self, results: Any) -> pa.Table:
        """Add a column ``<score>_accept`` for each threshold: true where the score does not exceed the threshold.

        Thresholds with a joint guarantee also add ``accept``, which is true where all of them accept. A row whose
        score is missing or NaN, or that is flagged as not finite, is rejected.

        Args:
            results: A results table.

        Returns:
            The table with the added columns.

        Raises:
            ValueError: If the results lack a score that has a threshold.
        """
        table = as_table(results)
        usable = finite_rows(table, [])
        accept = usable.copy()
        for score, threshold in self.values.items():
            passes = usable & (float_column(table, score) <= threshold)
            accept &= passes
            table = _with_column(table, f"{score}_accept", passes)
        return _with_column(table, "accept", accept) if self.together else table


def fit_thresholds(
    results: Any,
    scores: Sequence[str],
    rule: str = "true_positive_rate",
    *,
    roles: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Thresholds:
    """Fit thresholds on held-out rows.

    Rows that are not finite are dropped. Every rule but ``"joint_risk"`` uses in-distribution rows only. The rules and
    their arguments, with the defaults:

    - ``"true_positive_rate"``: accept the fraction ``tpr=0.95``, in (0, 1], of the fitted in-distribution rows, without a
      guarantee for other rows.
    - ``"coverage"``: accept at least the fraction ``coverage=0.95`` of all in-distribution samples (Wilks 1941).
    - ``"conformal"``: reject a new in-distribution sample with probability at most ``alpha=0.05`` (Bates et al. 2023).
    - ``"selective_risk"``: accept as many samples as possible with an error rate among them of at most ``risk=0.05``
      (Geifman & El-Yaniv 2017).
    - ``"learn_then_test"``: the same guarantee, ``risk=0.05``, from a sequence of tests; ``seed=0`` draws the half of the
      rows that proposes thresholds (Angelopoulos et al. 2021).
    - ``"joint_risk"``: accept a sample if two scores pass, with at most the fraction ``risk=0.1`` of errors and OOD samples
      among the accepted ones, if the fraction ``ood_share=0.5`` of all samples is OOD; ``seed=0`` as above.

    All guarantees but those of ``"true_positive_rate"`` and ``"conformal"`` have confidence ``1 - delta``, ``delta=0.05``.

    Args:
        results: The results table of held-out data, of any kind that
            :func:`~lightning_gradmetrics.evaluation.evaluate` accepts.
        scores: The columns to fit; for ``"joint_risk"`` the error score and the OOD score.
        rule: The name of the rule.
        roles: The role of each dataset; without roles all rows are in-distribution.
        **arguments: The arguments of the rule.

    Returns:
        The thresholds with their guarantee and coverage.

    Raises:
        ValueError: If the rule is unknown, an argument is out of range, a column or label is missing, no row is finite, or
            there are too few rows for the rule; the message then states how many rows are needed.
        TypeError: If the rule has no such argument, or ``scores`` is a text.

    Example:
        >>> table = pa.table({"entropy": [0.1, 0.2, 0.3, 9.0]})
        >>> fit_thresholds(table, ["entropy"], tpr=0.75).values
        {'entropy': 0.3}
    """
    return fit_rule(results, scores, _rule_of(rule, arguments), roles)


def _rule_of(name: str, arguments: Mapping[str, Any]) -> Rule:
    """Return a rule from its name and arguments."""
    if not isinstance(name, str) or name not in RULES:
        raise ValueError(f"unknown rule {name!r};{did_you_mean(name, RULES)} available: {', '.join(RULES)}")
    rule = RULES[name]
    allowed = {field.name: field.default for field in fields(rule)}
    for key in arguments:
        if key not in allowed:
            defaults = ", ".join(f"{argument}={default!r}" for argument, default in allowed.items())
            raise TypeError(f"the rule {name!r} has no argument {key!r}; its arguments are: {defaults}")
    return rule(**arguments)


def fit_rule(results: Any, scores: Sequence[str], rule: Rule, roles: Mapping[str, str] | None = None) -> Thresholds:
    """Return the thresholds of a rule; see :func:`fit_thresholds`."""
    if isinstance(scores, str):
        raise TypeError(f"scores= is the text {scores!r}; expected a list of columns, as in [{scores!r}]")
    if len(set(scores)) != len(scores):
        raise ValueError(f"a score is named twice: {list(scores)}; name each once")
    table = as_table(results)
    keep = finite_rows(table, scores)
    is_ood = _is_ood(table, roles)
    incorrect = np.zeros(len(table), dtype=bool)
    if rule.needs_labels:
        prediction = float_column(table, "prediction")
        label, _ = known_labels(float_column(table, "label"), prediction)
        keep &= is_ood | (~np.isnan(label) & ~np.isnan(prediction))
        incorrect = label != prediction
    if not isinstance(rule, JointRisk):
        keep &= ~is_ood
    rows = int(keep.sum())
    if not rows:
        raise ValueError("no row of the results is finite, in-distribution and, where the rule needs it, labelled")
    columns = {score: float_column(table, score)[keep] for score in scores}
    if isinstance(rule, JointRisk):
        if len(scores) != 2:
            raise ValueError(f"joint_risk needs two scores, the error score and the OOD score, got {list(scores)}")
        fits = list(rule.fit_pair(list(columns.values()), incorrect[keep], is_ood[keep]))
    else:
        fits = [rule.fit(column, incorrect[keep]) for column in columns.values()]
    values, coverage = {}, {}
    for score, fit in zip(scores, fits, strict=True):
        values[score], coverage[score] = fit.threshold, fit.coverage
    return Thresholds(values, rows, rule.to_dict(), rule.guarantee(), coverage, isinstance(rule, JointRisk))


def _is_ood(table: pa.Table, roles: Mapping[str, str] | None) -> Any:
    """Return which rows ``(N,)`` are out-of-distribution."""
    if roles is None:
        return np.zeros(len(table), dtype=bool)
    names, numbers = dataset_numbers(as_table(table, ["dataset"]))
    if unknown := sorted(set(names) - set(roles)):
        raise ValueError(f"no role for the datasets {unknown}: add each to roles, as in {{'{unknown[0]}': 'id'}}")
    return np.array([roles[name] != ID for name in names], dtype=bool)[numbers]


def count_accepted(results: Any, thresholds: Thresholds) -> list[dict[str, Any]]:
    """Return how many rows of each dataset the thresholds accept, and how many of the accepted ones are incorrect.

    Args:
        results: A results table; rows that are not finite count as rejected.
        thresholds: The result of :func:`fit_thresholds`.

    Returns:
        One record per score and dataset with the keys ``score`` (``None``: accepted by all thresholds together),
        ``dataset``, ``rows``, ``accepted``, ``labelled`` and ``incorrect``; the last two count accepted rows.

    Raises:
        ValueError: If the results lack a score that has a threshold.
    """
    table = thresholds.apply(results)
    prediction = float_column(table, "prediction")
    label, _ = known_labels(float_column(table, "label"), prediction)
    labelled = ~np.isnan(label) & ~np.isnan(prediction)
    columns: dict[str | None, str] = {score: f"{score}_accept" for score in thresholds.values}
    if thresholds.together:
        columns[None] = "accept"
    counts = []
    for dataset in table["dataset"].unique().to_pylist():
        is_here = pc.equal(table["dataset"], dataset).to_numpy(zero_copy_only=False)
        for score, column in columns.items():
            accepted = is_here & table[column].to_numpy(zero_copy_only=False)
            known = accepted & labelled
            counts.append(
                {
                    "score": score,
                    "dataset": dataset,
                    "rows": int(is_here.sum()),
                    "accepted": int(accepted.sum()),
                    "labelled": int(known.sum()),
                    "incorrect": int((known & (label != prediction)).sum()),
                }
            )
    return counts


def _with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    if name in table.column_names:
        table = table.drop_columns([name])
    return table.append_column(name, pa.array(values))


def conformal_p_values(calibration: Any, scores: Any) -> Any:
    """Return conformal p-values of scores: the fraction of calibration scores that are at least as large.

    ``p = (1 + #{calibration >= score}) / (n + 1)``. For a new in-distribution sample ``P(p <= alpha) <= alpha``.

    Args:
        calibration: Finite scores ``(n,)`` of held-out in-distribution samples.
        scores: Scores ``(N,)`` to test, maybe infinite.

    Returns:
        The p-values ``(N,)``.

    Raises:
        ValueError: If a calibration score is not finite, or there is none, or a score to test is NaN.

    Example:
        >>> conformal_p_values([1.0, 2.0, 3.0], [0.0, 2.5, 9.0]).tolist()
        [1.0, 0.5, 0.25]

    Reference:
        Bates et al.: Testing for Outliers with Conformal p-values, Annals of Statistics 2023.
    """
    calibration = np.sort(np.asarray(calibration, dtype=np.float64))
    if not len(calibration) or not np.isfinite(calibration).all():
        raise ValueError("calibration must be at least one finite score")
    tested = np.asarray(scores, dtype=np.float64)
    if np.isnan(tested).any():
        raise ValueError(
            f"{int(np.isnan(tested).sum())} of the scores are NaN, which have no p-value: drop these samples"
        )
    at_least = len(calibration) - np.searchsorted(calibration, tested, side="left")
    return (1 + at_least) / (len(calibration) + 1)
