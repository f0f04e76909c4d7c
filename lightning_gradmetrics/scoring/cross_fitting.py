"""Cross-validation of fitted scores: each row is scored by a fit on other rows, after one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import check_model
from lightning_gradmetrics.classifier.sample_axis import SampleAxis
from lightning_gradmetrics.evaluation.tasks import ID
from lightning_gradmetrics.results.finite import finite_rows
from lightning_gradmetrics.results.rows import Rows
from lightning_gradmetrics.results.sample_index import SampleIndex
from lightning_gradmetrics.results.table import merge_results, with_scores
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore, fitted_scores, plain_scores
from lightning_gradmetrics.scoring.fitting import Fitting, FittingScorer, gathered, keys_of
from lightning_gradmetrics.scoring.registry import Score, ScoreLike, resolve
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["HeldOutColumn", "Part", "assign_folds", "cross_fit", "held_out_columns", "held_out_scores"]

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Part:
    """The evidence of a batch.

    Args:
        evidence: The evidence of its samples.
        keys: A number per row, computed from its input: ``(n,)``.
        finite: Whether a row may enter a fit: ``(n,)``, bool.
    """

    evidence: Evidence
    keys: Tensor
    finite: Tensor

    @property
    def incorrect(self) -> Tensor:
        """Which predictions are incorrect ``(n,)``: 0 or 1, and -1 if the label is unknown."""
        if self.evidence.given_labels is None:
            return torch.full_like(self.keys, -1)
        return self.evidence.incorrect.long().masked_fill(self.evidence.labels < 0, -1).cpu()


@dataclass(frozen=True)
class HeldOutColumn:
    """A column of held-out scores.

    Args:
        score: The score.
        without: The dataset that all fits of the column leave out, if any.
    """

    score: FittedScore
    without: str | None = None

    @property
    def named(self) -> Score:
        """The score under the column's name."""
        name = self.score.name
        return self.score.named(name if self.without is None else f"{name} without {self.without}")


def held_out_columns(scores: Iterable[Score], roles: Mapping[str, str]) -> list[HeldOutColumn]:
    """Return the columns of the fitted scores.

    A score that is fitted on out-of-distribution samples also has one column per set that is left out of its fits, if
    there are two or more such sets.

    Args:
        scores: Scores; those that need no fit are skipped.
        roles: The role of each dataset.
    """
    ood_sets = [name for name, role in roles.items() if role != ID]
    columns = []
    for score in fitted_scores(scores):
        columns.append(HeldOutColumn(score))
        if score.fit_needs.ood and len(ood_sets) > 1:
            for name in ood_sets:
                columns.append(HeldOutColumn(score, name))
    return columns


def assign_folds(keys: Tensor, strata: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Return the fold of each row, ``(N,)``, 0 to ``folds - 1``; each stratum is split evenly.

    A row's fold depends on its key and on its stratum's other keys, not on its position. Rows of a stratum with the
    same key, such as copies of an image, share their fold.

    Args:
        keys: A number per row, ``(N,)``, int64.
        strata: The stratum of each row, ``(N,)``.
        folds: The number of folds.
        seed: The seed of the assignment.

    Example:
        >>> assign_folds(torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 1]), 2).bincount()
        tensor([3, 3])
    """
    mixed = (keys + (seed + 1) * 0x632BE59BD9B4E01) * 0x1B873593CC9E2D51
    mixed = mixed ^ (mixed >> 31)
    fold_of_row = torch.zeros_like(keys)
    for number, stratum in enumerate(torch.unique(strata)):
        in_stratum = strata == stratum
        _, rank = torch.unique(mixed[in_stratum], return_inverse=True)
        fold_of_row[in_stratum] = (rank + number) % folds
    return fold_of_row


def held_out_scores(
    model: nn.Module,
    parts: Mapping[str, Sequence[Part]],
    folds: Mapping[str, Tensor],
    columns: Sequence[HeldOutColumn],
    template: Scorer,
    progress: Progress = lambda share: None,
) -> dict[str, dict[str, Tensor]]:
    """Score every row with fits on the other folds; returns ``(N,)`` for each dataset and column.

    Args:
        model: The model.
        parts: The evidence of each dataset.
        folds: The fold of each row, by dataset.
        columns: The columns.
        template: The scorer that gathered the evidence.
        progress: Called with the completed fraction.
    """
    count = 1 + int(torch.cat(list(folds.values())).max())
    scores_by_name = {column.score.name: column.score for column in columns}
    cells = _cells(parts, folds, list(scores_by_name.values()), template, count)
    values: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
    done = 0
    for fold in range(count):
        for column in columns:
            score = _fitted(column, template, model, _seen_by(column, fold, cells))
            for name in parts:
                held_out = folds[name] == fold
                of_column = values[name].setdefault(column.named.name, torch.zeros(len(held_out)).double())
                of_column[held_out] = _scores_of(score, parts[name], held_out)
            done += 1
            progress(done / (count * len(columns)))
    return values


def _seen_by(column: HeldOutColumn, fold: int, cells: Mapping[tuple[str, int], Fitting]) -> list[Any]:
    """Return the totals for the column's fit for one fold: those of the other folds and the allowed sets."""
    totals = []
    for (name, fold_of_cell), fitting in cells.items():
        if fold_of_cell != fold and name != column.without:
            totals.append(fitting.seen)
    return totals


def _cells(
    parts: Mapping[str, Sequence[Part]],
    folds: Mapping[str, Tensor],
    scores: Sequence[FittedScore],
    template: Scorer,
    count: int,
) -> dict[tuple[str, int], Fitting]:
    """Return the contribution of each fold of each dataset to a fit; a fit adds up some of them."""
    cells = {}
    for name in parts:
        for fold in range(count):
            cells[name, fold] = Fitting(scores, template)
            for batch, in_fold in _split(parts[name], folds[name] == fold):
                known = (in_fold & batch.finite).to(batch.evidence.given_logits.device)
                cells[name, fold].add_rows(batch.evidence, known, batch.keys)
    return cells


def _split(parts: Sequence[Part], rows: Tensor) -> Iterator[tuple[Part, Tensor]]:
    """Yield each batch with its section of ``rows`` ``(N,)``."""
    start = 0
    for batch in parts:
        end = start + len(batch.keys)
        yield batch, rows[start:end]
        start = end


def _fitted(column: HeldOutColumn, template: Scorer, model: nn.Module, seen: list[Any]) -> FittedScore:
    """Return the column's score fitted on the totals in ``seen``; an error names the column."""
    try:
        return Fitting([column.score], template).finish(model, seen)[column.score.name]
    except ValueError as error:
        raise ValueError(f"in the cross-validation of {column.named.name!r}: {error}") from error


def _scores_of(score: Score, parts: Sequence[Part], rows: Tensor) -> Tensor:
    """Return a score of the marked rows, in their order, on the CPU."""
    scorer, values = Scorer((score,)), [torch.zeros(0).double()]
    for batch, marked in _split(parts, rows):
        if score.needs.labels:
            scorer.check_labels(batch.evidence.given_labels, batch.evidence.given_logits, None)
        if marked.any():
            evidence = batch.evidence.rows(marked.to(batch.evidence.given_logits.device))
            values.append(scorer(evidence)[score.name].cpu().double())
    return torch.cat(values)


def cross_fit(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    scores: ScoreLike | Iterable[ScoreLike],
    roles: Mapping[str, str],
    *,
    folds: int = 5,
    seed: int = 0,
    progress: Progress = lambda share: None,
    sample_axis: SampleAxis = 0,
    **options: Any,
) -> pa.Table:
    """Return out-of-fold scores: fitted scores evaluated on their own data by cross-validation.

    The evidence of every row is gathered once. The rows of each dataset are split into folds, with errors and correct
    predictions spread evenly. A row's fold depends on its input, not on its position, so copies of an image share a
    fold. Each fold is scored by a fit on the others. A score that is fitted on out-of-distribution samples has several
    columns: ``<score>`` is fitted on samples of all sets, ``<score> without <set>`` on none of that set. Use the latter
    to evaluate the score on that set.

    Args:
        model: A classifier in eval mode.
        batches: Batches ``(inputs, labels)`` of each dataset, as a dataloader yields them.
        scores: The scores; those that need no fit are computed as usual.
        roles: The role of each dataset: ``"id"``, or a group of out-of-distribution sets. The model must not have been
            trained on the data.
        folds: The number of folds.
        seed: The seed of the folds.
        progress: Called with the completed fraction of the fits.
        sample_axis: The axis of the samples in the inputs, as in :func:`lightning_gradmetrics.score`.
        **options: ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        A results table: ``dataset``, ``index``, ``prediction``, ``label``, the scores, ``finite``.

    Raises:
        ValueError: If a dataset has no role or fewer rows than folds, or if a score learns errors and there are fewer
            errors or fewer correct predictions than folds.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> batches = [(torch.randn(40, 2, 4), torch.randint(3, (40,)))]
        >>> scores = ["entropy", "combination(detector=errors,target=head)"]
        >>> table = cross_fit(model, {"test": batches}, scores, {"test": "id"}, folds=4)
        >>> table.column_names[4:], table.num_rows
        (['entropy', 'combination(detector=errors,target=head)', 'finite'], 40)
    """
    wanted = resolve(scores)
    check_model(model)
    for name in batches:
        if name not in roles:
            raise ValueError(f"no role for the dataset {name!r}: add it to roles, as in {{{name!r}: 'id'}}")
    scorer = FittingScorer(wanted, **options)
    columns = held_out_columns(wanted, {name: roles[name] for name in batches})
    parts, tables = {}, {}
    for name, stream in batches.items():
        parts[name], tables[name] = _gather(model, name, stream, scorer, roles[name] != ID, sample_axis)
    fold_of_rows = _folds_of(parts, roles, columns, folds, seed)
    held_out = held_out_scores(model, parts, fold_of_rows, columns, scorer, progress) if columns else {}
    for name, fold_of_row in fold_of_rows.items():
        all_rows = torch.ones_like(fold_of_row, dtype=torch.bool)
        values = {}
        for score in plain_scores(wanted):
            values[score.name] = _scores_of(score, parts[name], all_rows)
        tables[name] = with_scores(tables[name], {**values, **held_out.get(name, {})})
    return merge_results(list(tables.values()), list(tables))


def _gather(
    model: nn.Module, name: str, batches: Iterable[Any], scorer: Scorer, ood: bool, sample_axis: SampleAxis
) -> tuple[list[Part], pa.Table]:
    """Return the evidence of a dataset, and its rows without scores."""
    rows, parts = Rows(name, (), SampleIndex.of(batches)), []
    for batch, evidence in gathered(model, batches, scorer, ood, sample_axis):
        if batch.tokens is not None:
            raise ValueError(f"cross_fit takes classifiers of samples, and the dataset {name!r} has texts: use lgm.fit")
        rows.add(rows.index.take(batch.size), batch.inputs, batch.logits, batch.labels, {})
        finite = finite_rows(batch.inputs, [batch.logits], batch.size).cpu()
        parts.append(Part(evidence, keys_of(batch), finite))
    return parts, rows.table()


def _folds_of(
    parts: Mapping[str, Sequence[Part]],
    roles: Mapping[str, str],
    columns: Sequence[HeldOutColumn],
    folds: int,
    seed: int,
) -> dict[str, Tensor]:
    """Return the fold of each row of every dataset, after a check that there are enough rows."""
    learns_errors = any(column.score.fit_needs.labels for column in columns)
    fold_of_rows, not_finite = {}, 0
    for name, batches in parts.items():
        if not batches:
            raise ValueError(f"the dataset {name!r} has no samples: leave it out")
        incorrect, keys = _incorrect_and_keys(batches)
        for batch in batches:
            not_finite += int((~batch.finite).sum())
        _check_size(name, incorrect, folds, learns_errors and roles[name] == ID)
        strata = incorrect if roles[name] == ID else torch.zeros_like(incorrect)
        fold_of_rows[name] = assign_folds(keys, strata, folds, seed)
    if not_finite:
        warnings.warn(f"{not_finite} samples with NaN or Inf were left out of the fits", stacklevel=3)
    return fold_of_rows


def _incorrect_and_keys(batches: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """Return which predictions are incorrect, and the keys of all rows, ``(N,)`` each."""
    incorrect, keys = [], []
    for batch in batches:
        incorrect.append(batch.incorrect)
        keys.append(batch.keys)
    return torch.cat(incorrect), torch.cat(keys)


def _check_size(name: str, incorrect: Tensor, folds: int, learns_errors: bool) -> None:
    """Refuse fewer rows than folds; if errors are learnt, also fewer errors or correct predictions than folds."""
    if not 2 <= folds <= len(incorrect):
        raise ValueError(f"folds is {folds}; it must be between 2 and {len(incorrect)}, the number of rows of {name!r}")
    errors, correct = int((incorrect == 1).sum()), int((incorrect == 0).sum())
    if learns_errors and min(errors, correct) < folds:
        raise ValueError(
            f"there are {errors} errors and {correct} correct predictions in {name!r}, and a score that learns errors "
            f"needs {folds} or more of each, one per fold: give more labelled data, or fewer folds"
        )
