"""Wrong arguments, data and outputs: each error is one sentence on the problem, the allowed values and the remedy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from tests.callback.runs import Stepped, batches, column, mlp, numbers, test_run

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"scores": "gradnrom"}, r"unknown score 'gradnrom'; did you mean 'gradnorm'"),
    ({"scores": []}, r"no score was given"),
    ({"scores": ["energy", "energy"]}, r"energy.*(twice|duplicate|rename)"),
    ({"scores": 3}, r"score"),
    ({"scores": ["gradnorm(temprature=2)"]}, r"gradnorm.*temprature.*temperature"),
    ({"scores": ["gradnorm(temperature=0)"]}, r"temperature"),
    ({"scores": ["energy(temperature=-1)"]}, r"temperature"),
    ({"scores": ["energy(temperature=warm)"]}, r"temperature"),
    ({"scores": ["gradnorm(p=0)"]}, r"\bp\b"),
    ({"datasets": "test"}, r"datasets='test'; expected a list of names"),
    ({"datasets": 3}, r"datasets=3; expected a list of names"),
    ({"datasets": []}, r"datasets= is empty; expected one name per dataloader"),
    ({"datasets": ["a", "a"]}, r"the same name twice \(a, a\)"),
    ({"datasets": ["a", ""]}, r"has the name ''; expected a word"),
    ({"datasets": ["a", 3]}, r"has the name 3; expected a word"),
    ({"datasets": {"a": "id", "b": 1}}, r"datasets\['b'\]=1; a role is a word: 'id'"),
    ({"datasets": {"a": "ID", "b": "far"}}, r"datasets\['a'\]='ID'; in-distribution data has the role 'id'"),
    ({"datasets": {"a": "in-distribution"}}, r"in-distribution data has the role 'id'"),
    ({"datasets": {"a": "id", "far": "near", "b": "far"}}, r"a dataset 'far' and a group of that name.*rename one"),
    ({"datasets": {"testing": {"a": "id"}}}, r"the stage 'testing'; the stages are fit, validate, test, predict"),
    ({"datasets": {"test": {"a": "id"}, "predict": ["b", "b"]}}, r"datasets\['predict'\]= has the same name twice"),
    ({"head": 3}, r"head= is an int; expected the name of a module.*head='fc'"),
    ({"submodule": nn.Linear(2, 2)}, r"submodule= is a Linear; expected the name of a module.*submodule='net'"),
    ({"split_batch": "x"}, r"split_batch= is a str; expected a callable from a batch"),
    ({"logits_fn": 1}, r"logits_fn= is an int; expected a callable from the model's output"),
    ({"engine": "autoo"}, r"unknown engine 'autoo'; available: auto"),
    ({"engine": None}, r"unknown engine None; available: auto"),
    ({"prefix": ""}, r"prefix=''; expected a word"),
    ({"prefix": 3}, r"prefix=3; expected a word"),
    ({"metrics": ["auroc", "acc"]}, r"metrics= names 'acc'; available: auroc"),
    ({"metrics": "AUROC"}, r"metrics= names 'AUROC'; available: auroc"),
    ({"metrics": 3}, r"metrics=3; expected names of metrics"),
    ({"stages": ()}, r"stages=\(\); expected one or more of 'fit', 'validate', 'test', 'predict'"),
    ({"stages": "testing"}, r"stages='testing'; expected one or more"),
    ({"stages": 3}, r"stages=3; expected one or more"),
    ({"resamples": -1}, r"resamples=-1; expected a whole number of at least 0"),
    ({"resamples": 2.5}, r"resamples=2.5; expected a whole number"),
    ({"resamples": True}, r"resamples=True; expected a whole number"),
    ({"thresholds": {"energy": 1.0}}, r"thresholds= is a dict; expected the result of .*fit_thresholds"),
    ({"profile": "unifrom"}, r"unifrom.*uniform"),
    ({"profile": {"p": 2}}, r"no argument 'p'; .*objective, norm"),
    ({"profile": {"norm": 0}}, r"norm=0.*above 0"),
    ({"profile": 3}, r"profile=3; expected True, the name of an objective.*mapping"),
    ({"top_k": ["energy"]}, r"top_k=\['energy'\]; expected a mapping from a score's name to a number"),
    ({"top_k": 5}, r"top_k=5; expected a mapping"),
    ({"top_k": {"energi": 2}}, r"top_k= names the score 'energi'"),
    ({"top_k": {"energy": 0}}, r"'energy': 0.*at least 1"),
    ({"top_k": {"energy": 2.5}}, r"'energy': 2.5.*whole number"),
    ({"top_k": {"energy": True}}, r"'energy': True.*whole number"),
    ({"scores": {3: "energy"}}, r"scores= has the name 3; expected a word for each score"),
    ({"scores": {"": "energy"}}, r"a score with an empty name; expected a word"),
    ({"scores": {"label": "energy"}}, r"the name 'label', which is a column of the results.*rename"),
    ({"scores": {"energy": 3}}, r"a score is a name.*got int"),
    ({"scores": None}, r"a score is a name.*got NoneType"),
    ({"scores": "gradnorm(2)"}, r"cannot read the score 'gradnorm\(2\)'; write name\(argument=value"),
    ({"scores": "gradnorm("}, r"cannot read the score 'gradnorm\('; write name\(argument=value"),
    ({"scores": "gradnorm(target=2.weight)"}, r"cannot read.*with quotes around texts.*target='layer4\.\*'"),
    ({"scores": "gradnorm(p=-1)"}, r"got p=-1; allowed: the p of a p-norm, a number above 0"),
    ({"scores": "gradnorm(p=nan)"}, r"got p='nan'; allowed: the p of a p-norm"),
    ({"scores": "gradnorm(temperature=inf)"}, r"got temperature=inf; allowed: a finite number above 0"),
    ({"scores": "gradnorm(factor=none)"}, r"got factor='none'; allowed: 'both', 'output'"),
    ({"scores": "gradnorm(target=3)"}, r"got target=3; allowed: text, a callable"),
    ({"scores": "uniform(statistic=median)"}, r"got statistic='median'; allowed: max, min, mean"),
    ({"scores": "knn(k=0)"}, r"got k=0; allowed: a whole number of at least 1"),
    ({"scores": "knn(k=two)"}, r"got k='two'; allowed: a whole number of at least 1"),
    ({"datasets": {"a": "id "}}, r"datasets\['a'\]='id '; in-distribution data has the role 'id'"),
    ({"datasets": {"id": "far"}}, r"a dataset 'id' with the role 'far'.*rename the dataset"),
    (
        {"datasets": {"test": {"a": "id"}, "val": ["b"]}},
        r"the stage 'val'; the stages are fit, validate, test, predict",
    ),
    ({"head": ""}, r"head= is empty; expected the name of a module.*head='fc'"),
    ({"submodule": ""}, r"submodule= is empty; expected the name of a module"),
    ({"metrics": ["far_auroc"]}, r"metrics= names 'far_auroc'; available: auroc.*'ood_fpr95'"),
    ({"resamples": "100"}, r"resamples='100'; expected a whole number"),
    ({"output": 3}, r"output= is an? int; expected a directory"),
    ({"resume": True}, r"resume=True needs output=, the directory of the interrupted run"),
    ({"columns": "feature"}, r"columns= names 'feature'; available: features, cosine_maps"),
    ({"columns": 3}, r"columns= is an? int; expected names"),
    ({"columns": {"finite": len}}, r"columns= names 'finite', which is already a column of the results: rename it"),
    ({"sample_id": 3.5}, r"sample_id= is a float; expected a key of the batch"),
    ({"print_summary": "yes"}, r"print_summary='yes'; expected True or False"),
    ({"fit_on": "test"}, r"fit_on='test'; expected one of 'train', 'val'"),
    ({"fitted": 3}, r"fitted=3; expected a folder of states that .*save_fitted wrote"),
    ({"pixels": 3}, r"pixels= is an? int; expected lightning_gradmetrics.Pixels"),
    ({"pixels": {"ignore": 3}}, r"pixels= has no argument 'ignore'; its arguments are: ignore_index"),
]


@pytest.mark.parametrize(("options", "words"), ARGUMENTS, ids=[str(options)[:60] for options, _ in ARGUMENTS])
def test_arguments_are_checked_before_a_run(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        lgm.GradientMetrics(**{"scores": "energy", **options})


class Outputs(nn.Module):
    """A network whose output has an unusual form."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = mlp(5, 8, 3), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


OUTPUTS: list[tuple[Callable[[Tensor], Any], dict[str, Any], str]] = [
    (lambda z: (z, z), {}, r"no logits in the model's output of type tuple.*pass logits_fn="),
    (lambda z: {"scores": z}, {}, r"no logits in the model's output of type dict.*pass logits_fn="),
    (lambda z: z[:, None], {}, r"shape \(4, 1, 3\).*which axis holds the classes"),
    (lambda z: z[:, 0], {}, r"shape \(4,\); expected \(N, C\)"),
    (lambda z: z.softmax(1), {}, r"probabilities, and scores need logits.*head="),
    (lambda z: z, {"logits_fn": lambda z: z.tolist()}, r"logits_fn returned a list.*expected a tensor \(N, C\)"),
    (lambda z: z, {"logits_fn": lambda z: z["logits"]}, r"logits_fn failed.*It takes the model's output"),
    (lambda z: z, {"logits_fn": lambda z: z.logits}, r"failed for an output of type Tensor with AttributeError"),
    (
        lambda z: z,
        {"logits_fn": lambda z: torch.cat(z, "c")},
        r"(?s)logits_fn failed.* with TypeError.*returns the logits",
    ),
    (lambda z: z, {"split_batch": lambda b: (b["x"], b["y"])}, r"split_batch failed for a batch that is a list of 2"),
    (lambda z: z, {"logits_fn": lambda z: z.argmax(1)}, r"shape \(4,\).*expected \(N, C\)"),
    (lambda z: z, {"logits_fn": lambda z: z.long()}, r"logits.*int64.*floating"),
    (lambda z: z, {"split_batch": lambda b: b[0]}, r"split_batch returned a tensor.*expected a pair"),
    (lambda z: z, {"split_batch": lambda b: (b[0], b[1], 1)}, r"split_batch returned a tuple of 3 entries.*pair"),
    (lambda z: z, {"split_batch": lambda b: (b[0], b[1][:2])}, r"split_batch returned labels.*shape \(4,\), or None"),
    (lambda z: z, {"split_batch": lambda b: (b[0], b[0])}, r"split_batch returned labels.*one class number per sample"),
    (lambda z: z, {"head": "fc"}, r"no linear layer 'fc'"),
    (lambda z: z, {"submodule": "network"}, r"no submodule 'network'; its children are: net"),
    (lambda z: z, {"datasets": ["a", "b"]}, r"names 2 datasets \(a, b\), but test has 1 dataloader"),
]


@pytest.mark.parametrize(("change", "options", "words"), OUTPUTS, ids=[words[:40] for _, _, words in OUTPUTS])
def test_outputs_of_other_forms(change: Callable[[Tensor], Any], options: dict[str, Any], words: str) -> None:
    callback = lgm.GradientMetrics("energy", **options)
    with pytest.raises((ValueError, TypeError), match=words):
        test_run(callback, Stepped(Outputs(change)), batches(numbers(8, 5), torch.arange(8) % 3))


LABELS: list[tuple[str, Tensor, str | None]] = [
    ("a column", torch.arange(8)[:, None] % 3, None),
    ("int32", (torch.arange(8) % 3).int(), None),
    ("uint8", (torch.arange(8) % 3).byte(), None),
    ("floats", (torch.arange(8) % 3).double(), None),
    ("a column of floats", (torch.arange(8) % 3).float()[:, None], None),
    ("one-hot", nn.functional.one_hot(torch.arange(8) % 3), None),
    ("one-hot floats", nn.functional.one_hot(torch.arange(8) % 3).double(), None),
    ("soft", torch.full((8, 3), 1 / 3), r"a tensor \(4, 3\) of float32"),
    ("numbers of each class", torch.full((8, 3), 2), r"a tensor \(4, 3\) of int64"),
    ("numbers", torch.linspace(0, 1, 8), r"a tensor \(4,\) of float32"),
    ("not finite", torch.full((8,), float("nan")), r"a tensor \(4,\) of float32"),
    ("positions", torch.arange(8), r"go up to [37], but the model has 3 classes"),
    ("from one", torch.arange(8) % 3 + 1, r"go up to 3, but the model has 3 classes, 0 to 2"),
    ("maps", torch.zeros(8, 2, 2).long(), r"a tensor \(4, 2, 2\) of int64"),
]


@pytest.mark.parametrize(("kind", "labels", "words"), LABELS, ids=[kind for kind, _, _ in LABELS])
def test_labels_are_converted_or_one_warning_describes_them(kind: str, labels: Tensor, words: str | None) -> None:
    callback = lgm.GradientMetrics("energy", datasets=["mine"])
    data = batches(numbers(8, 5), labels)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        test_run(callback, Stepped(mlp(5, 8, 3)), data)
    about = [str(one.message) for one in heard if "labels" in str(one.message)]
    if words is None:
        assert callback.results["label"].to_pylist() == [n % 3 for n in range(8)] and not about
    else:
        assert set(callback.results["label"].to_pylist()) == {None} and len(about) == 1
        assert re.search(words, about[0]) and "split_batch=" in about[0] and "'mine'" in about[0]


def test_a_binary_classifier_with_boolean_labels() -> None:
    callback = lgm.GradientMetrics("energy")
    test_run(callback, Stepped(mlp(5, 8, 2)), batches(numbers(8, 5), torch.arange(8) % 2 == 1))
    assert callback.results["label"].to_pylist() == [n % 2 for n in range(8)]


def test_several_classes_of_one_sample_are_refused() -> None:
    labels = nn.functional.one_hot(torch.arange(8) % 3)
    labels[5] = torch.tensor([1, 0, 1])
    for given in (labels, labels.float()):
        with pytest.raises(
            ValueError, match=r"several classes of one sample.*one class at a time as a binary classifier"
        ):
            test_run(lgm.GradientMetrics("energy"), Stepped(mlp(5, 8, 3)), batches(numbers(8, 5), given))


def test_a_multi_label_model_of_transformers_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    net = mlp(5, 3)
    net.config = transformers.PretrainedConfig(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"Sequential is configured as a multi-label model"):
        lgm.score(net, numbers(4, 5), "energy")


@pytest.mark.parametrize("labels", [torch.arange(8) % 2 == 1, (torch.arange(8) % 2).double()[:, None]])
def test_a_binary_classifier_with_one_logit(labels: Tensor) -> None:
    """Scores of the logits are those of (0, z); the head's gradient has one row, that of z."""
    net, x = mlp(5, 8, 1), numbers(8, 5)
    names = ["max_softmax", "entropy", "margin", "energy", "pseudo_label", "gradnorm", "grand"]
    callback = lgm.GradientMetrics(names[:-1])
    test_run(callback, Stepped(net), batches(x, labels))
    z = net(x)
    both = torch.cat([torch.zeros_like(z), z], 1)
    assert callback.results["prediction"].to_pylist() == both.argmax(1).tolist()
    assert callback.results["label"].to_pylist() == [n % 2 for n in range(8)]
    plain = lgm.score(nn.Identity(), both, names[:4])
    found = lgm.score(net, x, names, torch.arange(8) % 2)
    for name, values in plain.items():
        torch.testing.assert_close(column(callback, name), values)
        torch.testing.assert_close(found[name], values)
    for number in range(8):
        target = both[number].argmax()[None]
        loss = nn.functional.cross_entropy(both[number : number + 1], target)
        (gradient,) = torch.autograd.grad(loss, net[-1].weight, retain_graph=True)
        torch.testing.assert_close(column(callback, "pseudo_label")[number], gradient.abs().sum())
        loss = nn.functional.cross_entropy(both[number : number + 1], torch.tensor([number % 2]))
        gradients = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
        torch.testing.assert_close(found["grand"][number], squares.sqrt())


class TakesFirst(Stepped):
    def step(self, batch: Any) -> Any:
        first = batch["a"] if isinstance(batch, dict) else batch[0]
        return self(first if isinstance(first, Tensor) else first[0])


class TakesSecond(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch[1])


X = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
PLACES: list[tuple[str, type[Stepped], tuple[Any, ...], bool]] = [
    ("index, x, y", TakesSecond, (torch.arange(8), X, Y), True),
    ("y, x", TakesSecond, (Y, X), False),
    ("x, y, weight", TakesFirst, (X, Y, torch.rand(8)), True),
    ("x, weight, y", TakesFirst, (X, torch.rand(8), Y), False),
    ("x", TakesFirst, (X,), True),
]


@pytest.mark.parametrize(("kind", "step", "tensors", "clear"), PLACES, ids=[place[0] for place in PLACES])
def test_labels_are_found_anywhere_in_a_batch(
    kind: str, step: type[Stepped], tensors: tuple[Any, ...], clear: bool
) -> None:
    callback = lgm.GradientMetrics("energy")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        test_run(callback, step(mlp(5, 8, 3)), batches(*tensors))
    warned = any("no labels are used for the dataset 'dataloader_0'" in str(one.message) for one in heard)
    assert warned == (not clear)
    expected = Y.tolist() if clear and len(tensors) > 1 else [None] * 8
    assert callback.results["label"].to_pylist() == expected


@pytest.mark.parametrize("key", ["label", "labels", "target", "targets", "y"])
def test_labels_of_mappings_that_the_step_empties(key: str) -> None:
    class Pops(Stepped):
        def step(self, batch: Any) -> Any:
            batch.pop(key)
            return self(**batch)

    rows = [{"input": x, key: int(y)} for x, y in zip(X, Y, strict=True)]
    callback = lgm.GradientMetrics(["energy", "grand"])
    test_run(callback, Pops(mlp(5, 8, 3)), DataLoader(rows, 4))
    assert callback.results["label"].to_pylist() == Y.tolist()


def test_two_entries_that_may_be_the_labels() -> None:
    """The entry after the inputs is used, as Lightning's own examples do, and one warning names the other."""
    callback = lgm.GradientMetrics("energy")
    with pytest.warns(UserWarning, match=r"third entry.*could be the labels too.*split_batch=") as heard:
        test_run(callback, TakesFirst(mlp(5, 8, 3)), batches(X, Y, Y.flip(0)))
    assert callback.results["label"].to_pylist() == Y.tolist()
    assert sum("could be the labels too" in str(one.message) for one in heard) == 1


@pytest.mark.parametrize("names", [("a", "label", "target"), ("a", "y", "category")])
def test_two_entries_of_a_mapping_that_may_be_the_labels(names: tuple[str, ...]) -> None:
    """A second entry with a name of labels, or one beside an entry ``y`` that the model receives as an input."""

    class TakesBoth(Stepped):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.net(x)

        def step(self, batch: Any) -> Any:
            return self(batch["a"], batch.get("y"))

    rows = [dict(zip(names, (x, y, 2 - y), strict=True)) for x, y in zip(X, Y, strict=True)]
    callback = lgm.GradientMetrics("energy")
    words = rf"entry '{names[2]}'.*could be the labels too; the entry '{names[1]}' is used.*split_batch="
    with pytest.warns(UserWarning, match=words):
        test_run(callback, TakesBoth(mlp(5, 8, 3)), DataLoader(rows, 4))
    assert callback.results["label"].to_pylist() == Y.tolist()


def test_labels_that_the_model_receives_by_name_are_no_inputs() -> None:
    class WithLoss(Stepped):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

        def step(self, batch: Any) -> Any:
            return self(batch[0], labels=batch[1])

    callback = lgm.GradientMetrics("energy")
    test_run(callback, WithLoss(mlp(5, 8, 3)), batches(X, Y))
    assert callback.results["label"].to_pylist() == Y.tolist()


def test_labels_of_minus_one_and_one_cause_a_warning() -> None:
    """Negative labels are unknown, and a dataset may have some; these leave one class without a label."""
    module, signs = Stepped(mlp(5, 8, 1)), 2 * (torch.arange(8) % 2) - 1
    with pytest.warns(UserWarning, match=r"are -1 and 1.*If -1 is a class, pass split_batch="):
        test_run(lgm.GradientMetrics("energy"), module, batches(X, signs))
    test_run(lgm.GradientMetrics("energy"), module, batches(X, torch.tensor([-1, 0, 1, 1, 0, 1, 0, 1])))


def test_probabilities_of_one_class_are_found_in_small_batches() -> None:
    """A batch of four says little: all logits may be between 0 and 1."""
    net = nn.Sequential(*mlp(5, 8, 1), nn.Sigmoid()).double()
    with pytest.warns(UserWarning, match=r"only logit is between 0 and 1.*logits_fn=torch.logit"):
        test_run(lgm.GradientMetrics("energy"), Stepped(net), batches(X, Y % 2))
    test_run(lgm.GradientMetrics("energy"), Stepped(net), batches(X[:4], Y[:4] % 2))


def test_an_entry_that_may_be_labels_is_named() -> None:
    rows = [{"a": x, "category": int(y)} for x, y in zip(X, Y, strict=True)]
    callback = lgm.GradientMetrics("energy")
    with pytest.warns(UserWarning, match="'category'.*split_batch="):
        test_run(callback, TakesFirst(mlp(5, 8, 3)), DataLoader(rows, 4))


def test_all_rows_have_nan_or_inf() -> None:
    callback = lgm.GradientMetrics("energy")
    test_run(callback, Stepped(mlp(5, 8, 3)), batches(X * float("nan"), Y))
    assert set(callback.results["finite"].to_pylist()) == {False} and callback.evaluation is not None


@pytest.mark.parametrize(
    "score", ["gradnorm(target='layer9.*')", "pseudo_label(target='fc.weight')", "gradnorm(target=tied)"]
)
def test_a_target_without_parameters_is_refused_before_the_first_batch(score: str) -> None:
    class CallsNothing(Stepped):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            pytest.fail("the step ran")

    with pytest.raises(
        ValueError, match=r"chooses no parameter of .*; its parameters are: net.0.weight, .*Pass one of"
    ):
        test_run(lgm.GradientMetrics(score), CallsNothing(mlp(5, 8, 3)), batches(X, Y))


@pytest.mark.parametrize(
    "batches", [X, (X, Y), {"x": X}, 3], ids=["a tensor", "one labelled batch", "one mapping", "a number"]
)
def test_one_batch_in_the_place_of_several(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"batches= is a.*expected a dataloader.*in a list, as in batches=\[batch\]"):
        lgm.fit(mlp(5, 8, 3), batches, "knn")


def test_a_principal_subspace_needs_two_features() -> None:
    with pytest.raises(ValueError, match=r"has 1 number, and the principal subspace needs at least 2.*knn"):
        lgm.fit(mlp(5, 1, 3), [X], "vim")


@pytest.mark.parametrize("name", ["label", "energy"])
def test_columns_of_text_are_refused_by_evaluate(name: str) -> None:
    columns = {
        "dataset": ["a"] * 3,
        "index": [0, 1, 2],
        "prediction": [0, 1, 0],
        "label": [0, 0, 0],
        "energy": [1.0, 2, 3],
    }
    table = pa.table({**columns, name: ["x", "y", "z"]})
    with pytest.raises(
        ValueError, match=rf"column '{name}' contains values of type string; expected .*numbers.*convert"
    ):
        lgm.evaluation.evaluate(table, ["energy"], {"a": "id"})


@pytest.mark.parametrize("function", [lambda evidence: evidence.logits.mean(0), lambda evidence: [1, 2, 3, 4]])
def test_a_column_without_one_entry_per_sample_is_refused(function: Callable[[Any], Any]) -> None:
    callback = lgm.GradientMetrics("energy", columns={"mine": function})
    with pytest.raises(
        ValueError, match=r"column 'mine' returned a .* for a batch of 4 samples; expected .*\(4, ...\)"
    ):
        test_run(callback, Stepped(mlp(5, 8, 3)), batches(X, Y))


def test_scored_rows_are_kept_when_a_batch_is_refused() -> None:
    class Fails(Stepped):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch[0])
            if batch_idx == 1:
                self(2 * batch[0])

    callback = lgm.GradientMetrics("energy")
    with pytest.raises(ValueError, match="8 rows in 2 calls"):
        test_run(callback, Fails(mlp(5, 8, 3)), batches(X, Y))
    assert callback.results["index"].to_pylist() == [0, 1, 2, 3]
