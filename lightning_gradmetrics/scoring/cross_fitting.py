"""Cross-validation of fitted scores: every row is scored by a fit that never saw it, after one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import check_model
from lightning_gradmetrics.evaluation.tasks import ID
from lightning_gradmetrics.results.table import Rows, finite_rows, merge_results, sample_indices, with_scores
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore, row_keys
from lightning_gradmetrics.scoring.fitting import Fitting, FittingScorer, gathered
from lightning_gradmetrics.scoring.registry import Score, ScoreLike, resolve
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["Part", "Plan", "cross_fit", "deal", "held_out_scores", "plans_of"]

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Part:
    """What is kept of a batch.

    Args:
        evidence: What the scores look at.
        keys: A number a row, made of its input: ``(n,)``.
        finite: Whether a row may enter a fit: ``(n,)``, bool.
    """

    evidence: Evidence
    keys: Tensor
    finite: Tensor

    @property
    def wrong(self) -> Tensor:
        """Which predictions are wrong ``(n,)``: 0 or 1, and -1 where the label is not known."""
        if self.evidence.given_labels is None:
            return torch.full_like(self.keys, -1)
        return self.evidence.wrong.long().masked_fill(self.evidence.labels < 0, -1).cpu()


@dataclass(frozen=True)
class Plan:
    """A column of held-out scores: a score, and the data set that none of its fits sees, if there is one."""

    score: FittedScore
    without: str | None = None

    @property
    def named(self) -> Score:
        """The score under the column's name."""
        name = self.score.name
        return self.score.named(name if self.without is None else f"{name} without {self.without}")


def plans_of(scores: Iterable[Score], roles: Mapping[str, str]) -> list[Plan]:
    """The columns of the fitted scores: one each; where out-of-distribution samples enter the fit, also one a set left out.

    A set can be left out where there is another one.

    Args:
        scores: Scores; those that need no fit are passed over.
        roles: The role of each data set.
    """
    others = [name for name, role in roles.items() if role != ID]
    plans = []
    for score in (score for score in scores if isinstance(score, FittedScore)):
        leave = others if score.fit_needs.outside and len(others) > 1 else []
        plans += [Plan(score), *(Plan(score, name) for name in leave)]
    return plans


def deal(keys: Tensor, strata: Tensor, folds: int, seed: int = 0) -> Tensor:
    """The fold of each row, ``(N,)``, 0 to ``folds - 1``; each stratum is dealt out evenly.

    A row's fold depends on its key and on its stratum's other keys, not on its position. Rows of a stratum with the
    same key, such as copies of an image, share their fold.

    Args:
        keys: A number a row, ``(N,)``, int64.
        strata: The stratum of each row, ``(N,)``.
        folds: The number of folds.
        seed: Of the order in which they are dealt.

    Example:
        >>> deal(torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 1]), 2).bincount()
        tensor([3, 3])
    """
    mixed = (keys + (seed + 1) * 0x632BE59BD9B4E01) * 0x1B873593CC9E2D51
    mixed, dealt = mixed ^ (mixed >> 31), torch.zeros_like(keys)
    for number, stratum in enumerate(torch.unique(strata)):
        here = strata == stratum
        _, place = torch.unique(mixed[here], return_inverse=True)
        dealt[here] = (place + number) % folds
    return dealt


def held_out_scores(
    model: nn.Module,
    kept: Mapping[str, Sequence[Part]],
    dealt: Mapping[str, Tensor],
    plans: Sequence[Plan],
    like: Scorer,
    progress: Progress = lambda share: None,
) -> dict[str, dict[str, Tensor]]:
    """Every row's scores, by fits on the rows of the other folds: for each data set and column ``(N,)``.

    Args:
        model: The model.
        kept: What is kept of each data set.
        dealt: The fold of each row, by data set.
        plans: The columns.
        like: The scorer that gathered the evidence.
        progress: Called with the share that is done.
    """
    folds = 1 + int(max(fold.max() for fold in dealt.values()))
    cells = _cells(kept, dealt, list({plan.score.name: plan.score for plan in plans}.values()), like, folds)
    found = {name: {plan.named.name: torch.zeros(len(dealt[name])).double() for plan in plans} for name in kept}
    for done, (fold, plan) in enumerate(((fold, plan) for fold in range(folds) for plan in plans), 1):
        seen = [cells[cell].seen for cell in cells if cell[1] != fold and cell[0] != plan.without]
        score = _fitted(plan, like, model, seen)
        for name, parts in kept.items():
            held_out = dealt[name] == fold
            found[name][plan.named.name][held_out] = _scores_of(score, parts, held_out)
        progress(done / (folds * len(plans)))
    return found


def _cells(
    kept: Mapping[str, Sequence[Part]],
    dealt: Mapping[str, Tensor],
    scores: Sequence[FittedScore],
    like: Scorer,
    folds: int,
) -> dict[tuple[str, int], Fitting]:
    """What each fold of each data set adds to a fit: a fit is the sum of the cells that it may see."""
    cells = {}
    for name, parts in kept.items():
        for fold in range(folds):
            cells[name, fold] = Fitting(scores, like)
            for part, here in _split(parts, dealt[name] == fold):
                known = (here & part.finite).to(part.evidence.given_logits.device)
                cells[name, fold].add_rows(part.evidence, known, part.keys)
    return cells


def _split(parts: Sequence[Part], rows: Tensor) -> Iterable[tuple[Part, Tensor]]:
    """The batches, and what ``rows`` ``(N,)`` says of the rows of each."""
    return zip(parts, torch.split(rows, [len(part.keys) for part in parts]), strict=True)


def _fitted(plan: Plan, like: Scorer, model: nn.Module, seen: list[Any]) -> FittedScore:
    """The plan's score fitted on what was seen; an error says whose it is."""
    try:
        return Fitting([plan.score], like).finish(model, seen)[plan.score.name]
    except ValueError as error:
        raise ValueError(f"in the cross-validation of {plan.named.name!r}: {error}") from error


def _scores_of(score: Score, parts: Sequence[Part], rows: Tensor) -> Tensor:
    """A score of the marked rows, in their order, on the CPU."""
    scorer, found = Scorer((score,)), [torch.zeros(0).double()]
    for part, here in _split(parts, rows):
        if score.needs.labels:
            scorer.check_labels(part.evidence.given_labels, part.evidence.given_logits, None)
        if here.any():
            evidence = part.evidence.rows(here.to(part.evidence.given_logits.device))
            found.append(scorer(evidence)[score.name].cpu().double())
    return torch.cat(found)


def cross_fit(
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    scores: ScoreLike | Iterable[ScoreLike],
    roles: Mapping[str, str],
    *,
    folds: int = 5,
    seed: int = 0,
    progress: Progress = lambda share: None,
    **options: Any,
) -> pa.Table:
    """Scores of data that are fitted on those data themselves, and never on the row that is scored.

    The evidence of every row is gathered once and kept. The rows of each data set are dealt into folds, errors and
    right predictions each evenly; a row's fold follows from its input, not from its position, so that copies of an image
    do not stand on both sides. Each fold is scored by a fit on the others. Of a score that is fitted on
    out-of-distribution samples, the column of its name has seen other samples of each set: a column ``<score> without
    <set>`` has seen none of that set, and is the one to judge on it.

    Args:
        model: A classifier in eval mode.
        batches: Batches ``(inputs, labels)`` of each data set, as a dataloader gives them.
        scores: Scores to fit; those that need no fit are in the table as they are.
        roles: The role of each data set: ``"id"``, or a group of out-of-distribution sets. The model must not have been
            trained on the data.
        folds: The number of folds.
        seed: Of the folds.
        progress: Called with the share of the fits that is done.
        **options: ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        A results table: ``dataset``, ``index``, ``prediction``, ``label``, the scores, ``finite``.

    Raises:
        ValueError: If a data set has no role or fewer rows than there are folds, or errors are learnt and there are
            fewer of them, or of right predictions, than folds.

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
    if unknown := [name for name in batches if name not in roles]:
        raise ValueError(f"no role for the data set {unknown[0]!r}: add it to roles, as in {{{unknown[0]!r}: 'id'}}")
    scorer, plans = FittingScorer(wanted, **options), plans_of(wanted, {name: roles[name] for name in batches})
    kept, tables = {}, {}
    for name, stream in batches.items():
        kept[name], tables[name] = _gather(model, name, stream, scorer, roles[name] != ID)
    dealt = _deal_all(kept, roles, plans, folds, seed)
    found = held_out_scores(model, kept, dealt, plans, scorer, progress) if plans else {name: {} for name in kept}
    for name, parts in kept.items():
        everything = torch.ones(len(dealt[name]), dtype=torch.bool)
        columns = {s.name: _scores_of(s, parts, everything) for s in wanted if not isinstance(s, FittedScore)}
        tables[name] = with_scores(tables[name], {**columns, **found[name]})
    return merge_results(list(tables.values()), list(tables))


def _gather(
    model: nn.Module, name: str, batches: Iterable[Any], scorer: Scorer, outside: bool
) -> tuple[list[Part], pa.Table]:
    """What is kept of a data set, and its rows without scores."""
    rows, parts = Rows(name, (), sample_indices(batches)), []
    for inputs, evidence in gathered(model, batches, scorer, outside):
        rows.add(inputs, evidence.given_logits, evidence.given_labels, {})
        parts.append(Part(evidence, row_keys(inputs), finite_rows(inputs, [evidence.given_logits]).cpu()))
    return parts, rows.table()


def _deal_all(
    kept: Mapping[str, Sequence[Part]],
    roles: Mapping[str, str],
    plans: Sequence[Plan],
    folds: int,
    seed: int,
) -> dict[str, Tensor]:
    """The folds of every data set, after a look at whether the data are enough."""
    empty = [name for name, parts in kept.items() if not parts]
    if empty:
        raise ValueError(f"the data set {empty[0]!r} gave no samples: leave it out")
    left_out = sum(int((~part.finite).sum()) for parts in kept.values() for part in parts)
    if left_out:
        warnings.warn(f"{left_out} samples with NaN or Inf were left out of the fits", stacklevel=3)
    wrong = {name: torch.cat([part.wrong for part in parts]) for name, parts in kept.items()}
    learnt = any(plan.score.fit_needs.labels for plan in plans)
    for name, flags in wrong.items():
        _check_size(name, flags, folds, learnt and roles[name] == ID)
    keys = {name: torch.cat([part.keys for part in parts]) for name, parts in kept.items()}
    return {
        name: deal(keys[name], flags if roles[name] == ID else torch.zeros_like(flags), folds, seed)
        for name, flags in wrong.items()
    }


def _check_size(name: str, wrong: Tensor, folds: int, learnt: bool) -> None:
    """Refuse fewer rows, or where errors are learnt fewer errors or right predictions, than folds."""
    if not 2 <= folds <= len(wrong):
        raise ValueError(f"folds is {folds}; it must lie between 2 and {len(wrong)}, the rows of {name!r}")
    errors, right = int((wrong == 1).sum()), int((wrong == 0).sum())
    if learnt and min(errors, right) < folds:
        raise ValueError(
            f"there are {errors} errors and {right} right predictions in {name!r}, and a score that learns errors needs "
            f"{folds} or more of each, one a fold: give more labelled data, or fewer folds"
        )
