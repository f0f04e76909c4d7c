"""User-defined scores: a function, a registered function and a fitted score in a generated package."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import Evidence, FittedScore, register
from lightning_gradmetrics.scoring.registry import RECIPES, make, resolve
from tests.models import Module, cnn, images

PACKAGE = '''
import torch
from lightning_gradmetrics.scores import FittedScore, register
from lightning_gradmetrics.scoring.arguments import Positive


@register("baseline", "a test")
def top_two(evidence, *, scale: Positive = 1.0):
    """Negative distance of the two largest logits."""
    first, second = evidence.logits.topk(2, 1).values.unbind(1)
    return scale * (second - first)


@register("gradient", "a test")
class norm_above_mean(FittedScore):
    """GradNorm minus its mean over in-distribution data."""

    p: Positive = 1.0

    def measure(self, evidence):
        return {"norm": evidence.gradient("uniform").norm(self.p)}

    def accumulate(self, evidence, measured):
        return {"sum": measured["norm"].sum(), "count": torch.tensor(len(measured["norm"]))}

    def finish(self, total):
        return {"mean": total["sum"] / total["count"]}

    def score(self, measured, state):
        return state["mean"] - measured["norm"]
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a package with two scores; what it registers is removed again."""
    (tmp_path / "my_scores").mkdir()
    (tmp_path / "my_scores" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    yield str(tmp_path)
    for name in ("top_two", "norm_above_mean"):
        RECIPES.pop(name, None)
    sys.modules.pop("my_scores", None)


def logit_range(evidence: Evidence) -> Tensor:
    return evidence.logits.amin(1) - evidence.logits.amax(1)


def head_norm(evidence: Evidence, *, p: float = 2.0) -> Tensor:
    return evidence.gradient("pseudo_label").norm(p)


def test_a_plain_function_is_a_score() -> None:
    model, x = cnn(), images(4)
    logits = model(x)
    values = lgm.score(model, x, logit_range)["logit_range"]
    torch.testing.assert_close(values, logits.amin(1) - logits.amax(1))
    assert [s.recipe.family for s in resolve([logit_range, head_norm])] == ["baseline", "gradient"]
    named = resolve(
        {"mine": logit_range, "other": lambda e: e.logits.amax(1), "half": functools.partial(head_norm, p=1.0)}
    )
    assert [score.name for score in named] == ["mine", "other", "half"]
    assert set(lgm.score(model, x, {"mine": logit_range, "gradnorm": {"temperature": 2}})) == {"mine", "gradnorm"}


def test_a_package_of_scores_works_in_the_callback(package: str, tmp_path: Path) -> None:
    callback = lgm.GradientMetrics(["my_scores.top_two(scale=2.0)", "my_scores.norm_above_mean", logit_range])
    loader = DataLoader(TensorDataset(images(12), torch.zeros(12).long()), 5)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback])
    model = Module(cnn())
    callback.fit(trainer, model, loader)
    trainer.test(model, loader, verbose=False)
    names = ["top_two(scale=2.0)", "norm_above_mean", "logit_range"]
    assert callback.score_names == names and callback.results.num_rows == 12
    assert abs(float(torch.tensor(callback.results["norm_above_mean"].to_numpy()).mean())) < 1e-5


def wrong_scalar(evidence: Evidence) -> Tensor:
    return evidence.logits.mean()


def wrong_column(evidence: Evidence) -> Tensor:
    return evidence.logits.mean(1, keepdim=True)


def wrong_type(evidence: Evidence) -> list:
    return evidence.logits.mean(1).tolist()


def wrong_face(logits: Tensor) -> Tensor:
    return logits.amax(1)


def test_names_of_parameters_need_no_quotes() -> None:
    assert make("gradnorm(target=head.weight)").name == make("gradnorm(target='head.weight')").name


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            wrong_scalar,
            r"'wrong_scalar' returned shape \(\) for 2 samples; it must return one number per sample, shape \(2,\)",
        ),
        (wrong_column, r"'wrong_column' returned shape \(2, 1\)"),
        (wrong_type, "'wrong_type' returned list; it must return a tensor"),
        (wrong_face, r"'wrong_face' fails in its dry run .*AttributeError.* a score is a function of one Evidence"),
        (lambda e: e.logits.amax(1), "a lambda given as a score has no name"),
        ("nowhere.score", "cannot import the score 'nowhere.score': No module named 'nowhere'"),
        ("torch.float32", "'torch.float32' is a dtype, not a score"),
        ({"gradnorm": {}, "energy": {}, "": 3}, "unknown score ''|a score is a name"),
        ([{"gradnorm": {}, "energy": {}}], "a score given as a mapping has one key"),
        (["energy", "energy"], "two scores are called 'energy': rename one"),
        ([], "no score was given"),
    ],
)
def test_a_wrong_score_is_one_clear_error(score: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        lgm.GradientMetrics(score)


def test_a_score_that_branches_on_data() -> None:
    def branches(evidence: Evidence) -> Tensor:
        target = "all" if evidence.logits.abs().max() > 1.5 else "head"
        return evidence.gradient("uniform", target).norm()

    with pytest.raises(
        ValueError,
        match=r"the score 'branches' requests the gradient of the objective 'uniform' with respect to 'all'",
    ):
        lgm.score(nn.Linear(4, 3), 100 * torch.randn(2, 4), branches)


def test_missing_evidence_is_an_error() -> None:
    with pytest.raises(ValueError, match="the score 'el2n' needs true labels: pass targets="):
        make("el2n")(Evidence(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="the score 'gradnorm' requests the head's input"):
        make("gradnorm")(Evidence(torch.zeros(2, 3)))


def test_wrong_registrations_are_refused() -> None:
    def entropy(evidence: Evidence) -> Tensor:
        return evidence.logits.sum(1)

    def positional(evidence: Evidence, size: int = 3) -> Tensor:
        return evidence.logits.sum(1)

    with pytest.raises(ValueError, match="unknown family 'gradeint' of a score; did you mean 'gradient'"):
        register("gradeint", "a test")
    with pytest.raises(ValueError, match=r"the score name 'entropy' is taken by lightning_gradmetrics.scores.logits"):
        register("baseline", "a test")(entropy)
    with pytest.raises(TypeError, match="the argument 'size' of the score 'positional' must be keyword-only"):
        register("baseline", "a test")(positional)
    with pytest.raises(TypeError, match="must be a subclass of FittedScore"):
        register("baseline", "a test")(dict)
    for unnamed in (lambda evidence: evidence.logits.sum(1), functools.partial(positional), 3):
        with pytest.raises(TypeError, match="only a function or a class with a name"):
            register("baseline", "a test")(unnamed)
    with pytest.raises(TypeError, match="'half' lacks finish, score"):

        @register("baseline", "a test")
        class half(FittedScore):
            def measure(self, evidence):
                return {}

            def accumulate(self, evidence, measured):
                return {}

    with pytest.raises(TypeError, match="the argument 'size' of the fitted score 'without' needs a default"):

        class without(FittedScore):
            size: int

    with pytest.raises(TypeError, match="cannot have an argument 'state': the name is taken"):

        class taken(FittedScore):
            state: int = 3


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("gradnorm(temperature=-1)", "got temperature=-1; allowed: a finite number above 0"),
        ("energy(temperature=0)", "temperature=0"),
        ("gradnorm(temperature=warm)", "temperature='warm'"),
        ("gradnorm(temperature=True)", "temperature=True"),
        ("gradnorm(p=0)", "got p=0; allowed: the p of a p-norm"),
        ("gradnorm(target=3)", "got target=3; allowed: text, a callable"),
        ("gradnorm(factor=feature)", "got factor='feature'; allowed: 'both', 'output'"),
        ("gradnorm(factor=output,target=all)", "factor='output' is for target='head'"),
        ("pseudo_label(statistic=median)", "got statistic='median'; allowed: max, min"),
        ("exgrad(classes=1.5)", "classes=1.5; allowed: a whole number of at least 1, None"),
        ("mc_dropout(passes=0)", "passes=0"),
        ("gradorth(energy=1.5)", "energy=1.5; allowed: a number above 0 and at most 1"),
        ("oberdiek(levels=block)", "unknown level 'block'"),
        ("oberdiek(objectives=none)", "unknown objective 'none'"),
        ("kfac_influence(damping=0)", "damping=0"),
        ("gga(sign=1)", "sign=1; allowed: true or false"),
    ],
)
def test_arguments_are_checked_when_a_score_is_made(score: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(score)


@pytest.mark.parametrize("name", lgm.scores.NAMES)
def test_scores_are_pickled_by_name(name: str) -> None:
    score = make(name)
    copy = pickle.loads(pickle.dumps(score))
    assert copy.name == score.name and type(copy) is type(score) and copy.recipe.defaults == score.recipe.defaults
    assert name in ("pytorch_ood", "views") or copy.recipe is score.recipe


def test_a_fitted_score_keeps_its_state_when_pickled() -> None:
    (fitted,) = lgm.fit(nn.Linear(4, 3), [torch.randn(9, 4)], "gradorth(energy=0.5)")
    copy = pickle.loads(pickle.dumps(fitted))
    assert copy.energy == 0.5 and torch.equal(copy.state["directions"], fitted.state["directions"])
    assert pickle.loads(pickle.dumps(make(head_norm))).recipe.method is head_norm


GRADNORM = {"_target_": "lightning_gradmetrics.scores.gradnorm", "temperature": 2}
GRADORTH = {"_target_": "lightning_gradmetrics.scores.gradorth", "energy": 0.5}


@pytest.mark.parametrize(
    ("scores", "names"),
    [
        ({"gn": GRADNORM, "e": "energy"}, ["gn", "e"]),
        ([GRADNORM, GRADORTH, "energy"], ["gradnorm(temperature=2)", "gradorth(energy=0.5)", "energy"]),
        ([{"gradnorm": {"temperature": 2}}], ["gradnorm(temperature=2)"]),
        ({"gradnorm": {"temperature": 2}, "gradorth": None}, ["gradnorm", "gradorth"]),
    ],
)
def test_hydra_makes_scores(scores: object, names: list[str]) -> None:
    node = OmegaConf.create({"_target_": "lightning_gradmetrics.GradientMetrics", "scores": scores})
    callback = instantiate(node)
    assert callback.score_names == names
    assert callback.scorer.scores[0].arguments == {"temperature": 2}


@pytest.mark.parametrize(
    ("scores", "names"),
    [
        (
            [{"class_path": "lightning_gradmetrics.scores.gradnorm", "init_args": {"temperature": 2}}],
            ["gradnorm(temperature=2)"],
        ),
        (
            [{"class_path": "lightning_gradmetrics.scores.gradorth", "init_args": {"energy": 0.5}}],
            ["gradorth(energy=0.5)"],
        ),
        (["gradnorm(temperature=2)", "energy"], ["gradnorm(temperature=2)", "energy"]),
        ({"mine": "energy"}, ["mine"]),
    ],
)
def test_class_path_keeps_its_arguments(scores: object, names: list[str]) -> None:
    """As LightningCLI reads scores, through jsonargparse, and without it."""
    assert [score.name for score in resolve(scores)] == names
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(lgm.GradientMetrics, "callback")
    config = parser.parse_object({"callback": {"scores": scores}})
    callback = parser.instantiate(config).callback
    assert [name.replace("2.0", "2") for name in callback.score_names] == names


def test_class_path_with_a_wrong_argument_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"score .energy. has no argument 'nonsense'; its arguments are: temperature=1.0"
    ):
        resolve([{"class_path": "lightning_gradmetrics.scores.energy", "init_args": {"nonsense": 2}}])


def test_the_needs_of_a_score_are_found_once_and_are_not_pickled() -> None:
    calls = []

    def counted(evidence: Evidence) -> Tensor:
        calls.append(1)
        return evidence.logits.amax(1)

    score = make(counted)
    calls.clear()
    first = score.needs
    assert score.needs is first and len(calls) == 1
    again = pickle.loads(pickle.dumps(make("gga")))
    again.needs
    assert "_needs" not in copy.copy(again).__dict__ and pickle.loads(pickle.dumps(again)).needs.probes
