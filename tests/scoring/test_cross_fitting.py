"""Cross-validation of fitted scores: no row is in its own fit, and only rows and seed determine the folds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.evaluation import evaluate
from lightning_gradmetrics.meters.functional import auroc
from lightning_gradmetrics.scoring.cross_fitting import Part, assign_folds, cross_fit, held_out_columns, held_out_scores
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.totals import row_keys
from tests.models import cnn, fast_rows, images
from tests.scores.fits import fit_batches

ERRORS = "combination(detector=errors,target=head)"
OUTSIDE = "combination(detector=ood,target=head)"
INSIDE = "combination(target=head)"
ROLES = {"mine": "id", "near": "near", "far": "far"}


def made_up(count: int, shift: float = 0.0, outside: bool = False) -> Part:
    """Evidence of a linear head on random features, wrong where the logits are close; no model needed."""
    features = torch.randn(count, 6).double() + shift
    logits = features @ torch.randn(6, 5, generator=torch.Generator().manual_seed(7)).double()
    first, second = logits.topk(2, 1).values.unbind(1)
    wrong = first - second + 0.3 * torch.randn(count) < 0.5
    evidence = Evidence(logits, features, (logits.argmax(1) + wrong) % 5, torch.full((count,), outside))
    return Part(evidence, row_keys(features), torch.ones(count, dtype=torch.bool))


def scored(kept: dict[str, Part], dealt: dict[str, Tensor], *scores: str) -> dict[str, dict[str, Tensor]]:
    plans = held_out_columns(resolve(scores), {name: ROLES[name] for name in kept})
    return held_out_scores(cnn(), {name: [part] for name, part in kept.items()}, dealt, plans, Scorer(resolve(scores)))


def area(values: Tensor, positive: Tensor) -> float:
    return float(auroc(values, positive.long()))


def test_folds_are_even_in_each_stratum() -> None:
    keys, strata = torch.randint(-(2**62), 2**62, (203,)), torch.arange(203) % 20 == 0
    dealt = assign_folds(keys, strata, 5)
    for stratum in (False, True):
        counts = dealt[strata == stratum].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1 and counts.min() >= 2


def test_folds_follow_from_key_and_seed() -> None:
    """Folds do not depend on the position, change with the seed, and are shared by copies."""
    keys, strata = torch.randint(-(2**62), 2**62, (200,)), torch.zeros(200)
    dealt, order = assign_folds(keys, strata, 4), torch.randperm(200)
    assert torch.equal(assign_folds(keys[order], strata, 4), dealt[order])
    assert torch.equal(assign_folds(keys, strata, 4), dealt)
    assert 0.4 < (assign_folds(keys, strata, 4, seed=1) != dealt).float().mean() < 0.95
    twice = assign_folds(keys.repeat(2), torch.zeros(400), 4)
    assert torch.equal(twice[:200], twice[200:])


def test_a_held_out_row_never_enters_its_fit() -> None:
    """A row's label and kind change scores in the other folds, and no score in its fold."""
    part, dealt = made_up(120), {"mine": torch.arange(120) % 3}
    before = scored({"mine": part}, dealt, ERRORS)["mine"][ERRORS]
    evidence = part.evidence
    labels = evidence.given_labels.clone()
    own = dealt["mine"] == 2
    labels[own] = (labels[own] + torch.randint(5, (int(own.sum()),))) % 5
    changed = replace(part, evidence=replace(evidence, given_labels=labels))
    after = scored({"mine": changed}, dealt, ERRORS)["mine"][ERRORS]
    assert torch.equal(before[own], after[own])
    assert (before[~own] != after[~own]).all()


@pytest.mark.parametrize(
    "score",
    fast_rows(
        [INSIDE, "combination(detector=lof,target=head)", "kfac_influence", "pytorch_ood(detector=KNN,k=5)", ERRORS],
        ["combination(detector=lof,target=head)", "kfac_influence"],
    ),
)
def test_held_out_scores_equal_those_of_a_fit_without_the_fold(score: str) -> None:
    """The scores equal those of separate fits, by lgm.fit, on the rows of the other folds."""
    model = cnn()
    (x, y), *_ = fit_batches(model, images)[0]
    table = cross_fit(model, {"mine": [(x[:17], y[:17]), (x[17:], y[17:])]}, score, {"mine": "id"}, folds=4)
    name = table.column_names[4]
    found = torch.from_numpy(table[name].to_numpy().copy())
    wrong = (model(x).argmax(1) != y).long()
    dealt = assign_folds(row_keys(x), wrong, 4)
    for fold in range(4):
        own = dealt == fold
        fitted = lgm.fit(model, [(x[~own], y[~own])], score)
        (expected,) = lgm.score(model, x[own], fitted).values()
        torch.testing.assert_close(found[own].float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_neither_batches_nor_their_order_matter() -> None:
    model = cnn()
    (x, y), *_ = fit_batches(model, images)[0]
    order = torch.randperm(len(x))
    whole = cross_fit(model, {"mine": [(x, y)]}, [ERRORS, INSIDE], {"mine": "id"}, folds=2)
    parts = zip(x[order].split(9), y[order].split(9), strict=True)
    mixed = cross_fit(model, {"mine": list(parts)}, [ERRORS, INSIDE], {"mine": "id"}, folds=2)
    again = cross_fit(model, {"mine": [(x, y)]}, [ERRORS, INSIDE], {"mine": "id"}, folds=2)
    other = cross_fit(model, {"mine": [(x, y)]}, [ERRORS, INSIDE], {"mine": "id"}, folds=2, seed=1)
    assert whole.equals(again) and not whole.equals(other)
    for name in whole.column_names[4:6]:
        one, two = (torch.from_numpy(table[name].to_numpy().copy()) for table in (whole, mixed))
        torch.testing.assert_close(two, one[order], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_random_labels_give_chance_level() -> None:
    """Permuted errors are at chance on held-out rows; the real ones, and the fit's own rows, are not."""
    part = made_up(400)
    evidence, dealt = part.evidence, {"mine": torch.arange(400) % 5}
    real = scored({"mine": part}, dealt, ERRORS)["mine"][ERRORS]
    assert area(real, evidence.incorrect) > 0.75
    flags = evidence.incorrect[torch.randperm(400)]
    labels = (evidence.logits.argmax(1) + flags) % 5
    permuted = replace(part, evidence=replace(evidence, given_labels=labels))
    chance = area(scored({"mine": permuted}, dealt, ERRORS)["mine"][ERRORS], flags)
    positive = int(flags.sum())
    deviation = ((400 + 1) / (12 * positive * (400 - positive))) ** 0.5  # of the rank sum of unrelated scores
    assert abs(chance - 0.5) < 4 * deviation, (chance, deviation)


@pytest.mark.slow
def test_a_set_that_is_left_out_is_in_no_fit() -> None:
    """The column without a dataset does not depend on that dataset; the plain column does."""
    kept = {"mine": made_up(90), "near": made_up(60, 0.5, True), "far": made_up(60, 4, True)}
    dealt = {name: torch.arange(len(part.keys)) % 2 for name, part in kept.items()}
    names = [OUTSIDE, f"{OUTSIDE} without near", f"{OUTSIDE} without far"]
    found = scored(kept, dealt, OUTSIDE)
    assert list(found["mine"]) == names
    moved = scored({**kept, "near": made_up(60, -3, True)}, dealt, OUTSIDE)
    for name in ("mine", "far"):
        assert torch.equal(found[name][names[1]], moved[name][names[1]])
        assert not torch.equal(found[name][names[0]], moved[name][names[0]])
    flags = torch.cat([torch.zeros(90), torch.ones(60)])
    assert area(torch.cat([found["mine"][OUTSIDE], found["far"][OUTSIDE]]), flags) > 0.95


def test_scores_of_in_distribution_data_never_see_the_other_sets() -> None:
    kept = {"mine": made_up(90), "near": made_up(60, 0.5, True), "far": made_up(60, 4, True)}
    dealt = {name: torch.arange(len(part.keys)) % 2 for name, part in kept.items()}
    alone = scored({"mine": kept["mine"]}, dealt, INSIDE, ERRORS)
    together = scored(kept, dealt, INSIDE, ERRORS)
    for name in (INSIDE, ERRORS):
        assert torch.equal(alone["mine"][name], together["mine"][name])


def test_the_table_can_be_evaluated() -> None:
    """The result has scores that need no fit beside held-out ones, flags bad rows, and accepts any loader."""
    model = cnn()
    (x, y), other = fit_batches(model, images)[0][0], fit_batches(model, images)[1][0][0]
    x = x.clone()
    x[3, 0, 0, 0] = float("nan")
    loaders = {"mine": DataLoader(TensorDataset(x, y), 16), "far": DataLoader(TensorDataset(other), 16)}
    with pytest.warns(UserWarning, match="1 samples with NaN or Inf were left out"):
        table = cross_fit(model, loaders, ["entropy", INSIDE], ROLES, folds=4)
    assert table["dataset"].to_pylist() == ["mine"] * 40 + ["far"] * 40
    assert table["finite"].to_pylist() == [i != 3 for i in range(80)]
    evaluation = evaluate(table, ["entropy", INSIDE], {"mine": "id", "far": "far"}, ["entropy"], resamples=50)
    assert [d["rows"] for d in evaluation.datasets] == [40, 40] and len(evaluation.comparisons) > 4
    (plain,) = lgm.score(model, x[4:], "entropy").values()
    torch.testing.assert_close(torch.tensor(table["entropy"].to_pylist()[4:40]), plain)


def test_wrong_cross_validations_are_explained() -> None:
    model = cnn()
    (x, y), *_ = fit_batches(model, images)[0]
    right = model(x).argmax(1)
    with pytest.raises(ValueError, match="folds is 1; it must be between 2 and 40"):
        cross_fit(model, {"mine": [(x, y)]}, INSIDE, {"mine": "id"}, folds=1)
    few = torch.where(torch.arange(40) < 3, (right + 1) % 5, right)
    with pytest.raises(ValueError, match=r"3 errors and 37 correct predictions in 'mine'.*needs 5 or more of each"):
        cross_fit(model, {"mine": [(x, few)]}, ERRORS, {"mine": "id"})
    with pytest.raises(ValueError, match=r"of 'combination.*': combination.detector=ood. is fitted on 2 or more"):
        cross_fit(model, {"mine": [(x, y)]}, OUTSIDE, {"mine": "id"})
    with pytest.raises(ValueError, match="no role for the dataset 'mine'"):
        cross_fit(model, {"mine": [(x, y)]}, INSIDE, {"other": "id"})
    with pytest.raises(ValueError, match="'mine' has no samples"):
        cross_fit(model, {"mine": []}, INSIDE, {"mine": "id"})
    with pytest.raises(ValueError, match="'el2n' needs the true label of every sample, but 40 of 40"):
        cross_fit(model, {"mine": [(x, torch.full((40,), -1))]}, ["el2n", INSIDE], {"mine": "id"})
