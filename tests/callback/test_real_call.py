"""The callback scores the model call that the step makes, whatever else the step does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scoring import scorer
from tests.callback.runs import Stepped, assert_scores, batches, column, mlp, numbers, test_run, trainer

SCORES = ["max_softmax", "gradnorm", "pseudo_label(target=all)", "odin"]
LOGIT_AND_HEAD = ["max_softmax", "energy", "gradnorm", "pseudo_label"]


class CallsItself(Stepped):
    def step(self, batch: Any) -> Any:
        return self(3 * batch[0] + 1)


class CallsItsNetwork(Stepped):
    """Has a ``forward`` for users, but the step calls the network with a prepared batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)

    def step(self, batch: Any) -> Any:
        return self.net(3 * batch[0] + 1)


class CallsByKeyword(Stepped):
    def step(self, batch: Any) -> Any:
        return self.net(input=3 * batch[0] + 1)


@pytest.mark.parametrize("kind", [CallsItself, CallsItsNetwork, CallsByKeyword])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_the_received_inputs_are_scored(kind: type[Stepped], stage: str) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = lgm.GradientMetrics(SCORES)
    getattr(trainer(callback), stage)(kind(net), batches(x, torch.arange(8) % 3))
    assert_scores(callback, net, 3 * x + 1, SCORES)
    assert callback.results["label"].to_pylist() == [n % 3 for n in range(8)]


class ChangesEverything(Stepped):
    """Changes the input before the call, the logits after it, and the batch."""

    def step(self, batch: Any) -> Any:
        x, y = batch
        x.mul_(3).add_(1)
        logits = self(x)
        x.zero_()
        y.fill_(0)
        return logits.sigmoid_()


class NormalisesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2)
        return self.head(self.body(x).tanh())


def test_captured_tensors_do_not_change_afterwards() -> None:
    x, y = numbers(8, 5), torch.arange(8) % 3
    net = mlp(5, 8, 3)
    callback = lgm.GradientMetrics(SCORES)
    test_run(callback, ChangesEverything(net), batches(x.clone(), y.clone()))
    assert_scores(callback, net, 3 * x + 1, SCORES)
    assert callback.results["label"].to_pylist() == y.tolist()


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_a_model_that_normalises_in_place_is_given_its_inputs_once() -> None:
    x, model = numbers(8, 5), NormalisesInPlace().double().eval()
    before = x.clone()
    found = lgm.score(model, x, SCORES)
    assert torch.equal(x, before)
    plain = nn.Sequential(model.body, nn.Tanh(), model.head)
    expected = lgm.score(plain, 2 * (x - 0.5), SCORES[:3])
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
    callback = lgm.GradientMetrics(SCORES[:3])
    test_run(callback, Stepped(model), batches(x.clone(), torch.arange(8) % 3))
    assert_scores(callback, plain, 2 * (before - 0.5), SCORES[:3])


class HiddenState(nn.Module):
    """Returns different logits in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.calls = nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x + self.calls)


def test_a_forward_pass_that_does_not_give_the_logits_of_the_step_is_refused() -> None:
    data = batches(numbers(8, 5), torch.arange(8) % 3)
    with pytest.raises(ValueError, match=r"different logits .*step.*submodule="):
        test_run(lgm.GradientMetrics("pseudo_label(target=all)"), Stepped(HiddenState().double()), data)
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    test_run(callback, Stepped(HiddenState().double()), data)
    assert callback.results.num_rows == 8


class Twice(Stepped):
    """Calls the model once for the loss and once for the accuracy."""

    def step(self, batch: Any) -> Any:
        self(batch[0])
        return self(batch[0])


def test_repeated_equal_calls_count_once() -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = lgm.GradientMetrics(SCORES)
    test_run(callback, Twice(net), batches(x, torch.arange(8) % 3))
    assert_scores(callback, net, x, SCORES)


class InPieces(Stepped):
    def step(self, batch: Any) -> Any:
        return [self(part) for part in batch[0].split(3)]


def test_consecutive_parts_of_the_batch_are_joined() -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = lgm.GradientMetrics(SCORES)
    test_run(callback, InPieces(net), batches(x, torch.arange(8) % 3))
    assert_scores(callback, net, x, SCORES)


def test_calls_that_only_add_up_to_the_batch_are_refused() -> None:
    class Views(Stepped):
        def step(self, batch: Any) -> Any:
            half = batch[0][:2]
            return self(half), self(half + 1)

    with pytest.raises(ValueError, match=r"2 times: some calls received the rows of the batch.*Call the model once"):
        test_run(lgm.GradientMetrics("energy"), Views(mlp(5, 8, 3)), batches(numbers(8, 5), torch.arange(8) % 3))


class Parts(Stepped):
    """``forward`` classifies; the step calls the parts, with the projector last."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__(nn.Linear(5, 8))
        self.classifier, self.projector = nn.Linear(8, 3), nn.Linear(8, 3)
        self.shift = shift
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.net(x).tanh())

    def step(self, batch: Any) -> Any:
        h = self.net(batch[0] + self.shift).tanh()
        return self.classifier(h), self.projector(h)


def test_forward_determines_the_head_among_several_layers() -> None:
    x, module = numbers(8, 5), Parts()
    callback = lgm.GradientMetrics(SCORES[:3])
    test_run(callback, module, batches(x, torch.arange(8) % 3))
    assert_scores(callback, nn.Sequential(module.net, nn.Tanh(), module.classifier), x, SCORES[:2])
    torch.testing.assert_close(
        column(callback, SCORES[2]), lgm.score(module, x, SCORES[2], head="classifier")[SCORES[2]].double()
    )


def test_prepared_inputs_of_called_parts() -> None:
    """Head scores come from the step; the model's inputs are unknown, so scores of the full network are refused."""
    x, module = numbers(8, 5), Parts(shift=1.0)
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    data = batches(x, torch.arange(8) % 3)
    test_run(callback, module, data)
    assert_scores(callback, nn.Sequential(module.net, nn.Tanh(), module.classifier), x + 1, LOGIT_AND_HEAD)
    with pytest.raises(ValueError, match=r"different logits .*submodule="):
        test_run(lgm.GradientMetrics("pseudo_label(target=all)"), module, data)


class WithCopy(Stepped):
    """The step also calls a copy of the network, which returns equal logits in the first batch."""

    def __init__(self) -> None:
        super().__init__(mlp(5, 8, 3))
        self.copied, self.number = copy.deepcopy(self.net), 0

    def step(self, batch: Any) -> Any:
        self.number += 1
        return self.copied(self.number * batch[0]), self(batch[0])


def test_the_head_is_the_models_and_not_that_of_a_copy_that_the_step_calls() -> None:
    x, module = numbers(8, 5), WithCopy()
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    test_run(callback, module, batches(x, torch.arange(8) % 3))
    assert_scores(callback, module.net, x, LOGIT_AND_HEAD)


class StudentAndTeacher(Stepped):
    """The step calls the teacher's parts, and ``forward`` is the student's."""

    def __init__(self) -> None:
        super().__init__(mlp(5, 8, 3))
        self.teacher = mlp(5, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def step(self, batch: Any) -> Any:
        return self.teacher[2](self.teacher[1](self.teacher[0](batch[0])))


def test_a_step_that_calls_other_layers_than_forward_is_refused() -> None:
    x, module = numbers(8, 5), StudentAndTeacher()
    data = batches(x, torch.arange(8) % 3)
    for score in ("max_softmax", "gradnorm"):
        with pytest.raises(ValueError, match=r"ends in 'net.2', which the step does not call.*head=.*submodule="):
            test_run(lgm.GradientMetrics(score), module, data)
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD, head="teacher.2")
    test_run(callback, module, data)
    assert_scores(callback, module.teacher, x, LOGIT_AND_HEAD)


class CallsNothing(Stepped):
    def step(self, batch: Any) -> Any:
        return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the step did not call Sequential")
def test_a_step_that_calls_no_model_is_refused() -> None:
    torch.compile(torch.neg, backend="eager")(torch.ones(2))  # something else in the process is compiled
    with pytest.raises(ValueError, match=r"for any batch.*submodule="):
        test_run(lgm.GradientMetrics("energy", submodule="net"), CallsNothing(mlp(5, 3)), batches(numbers(4, 5)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["max_softmax", "gradnorm(target=all)"], ["energy", "pseudo_label"]),
        (["energy", "odin"], ["max_softmax", "gradnorm(target=all)"]),
    ],
)
def test_two_callbacks_do_not_observe_each_other(first: list[str], second: list[str]) -> None:
    net, x = mlp(5, 8, 3), numbers(8, 5)
    one, other = lgm.GradientMetrics(first), lgm.GradientMetrics(second, prefix="other")
    module = Stepped(net)
    trainer(one, other).test(module, batches(x, torch.arange(8) % 3), verbose=False)
    assert_scores(one, net, x, first)
    assert_scores(other, net, x, second)
    assert "test_step" not in vars(module)


def test_a_forward_pass_of_another_callback_is_ignored() -> None:
    from lightning.pytorch import Callback

    class Looks(Callback):
        def on_test_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            module(batch[0] + 1)

        def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            module(batch[0] + 2)

    net, x = mlp(5, 8, 3), numbers(8, 5)
    callback = lgm.GradientMetrics(SCORES)
    trainer(Looks(), callback, Looks()).test(Stepped(net), batches(x, torch.arange(8) % 3), verbose=False)
    assert_scores(callback, net, x, SCORES)


@pytest.mark.slow
def test_one_callback_scores_several_models_in_turn() -> None:
    x, callback = numbers(8, 5), lgm.GradientMetrics(SCORES)
    used = trainer(callback)
    for net in (mlp(5, 8, 3), mlp(5, 8, 6, 3), nn.Sequential(nn.Flatten(), mlp(5, 3)), mlp(5, 8, 3)):
        used.test(Stepped(net), batches(x, torch.arange(8) % 3), verbose=False)
        assert_scores(callback, net, x, SCORES)


class Whole(Stepped):
    """Passes the whole batch, a mapping, to the network."""

    def step(self, batch: Any) -> Any:
        labels = batch.pop("labels")
        logits = self(**batch)
        return logits, labels


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(scale * x + shift[:, None])


class Mixed(Stepped):
    """Calls the network with arguments by position and by name."""

    def step(self, batch: Any) -> Any:
        return self(batch["x"], shift=batch["shift"], scale=2.0)


@pytest.mark.parametrize("kind", [Whole, Mixed])
def test_arguments_by_name_and_by_position(kind: type[Stepped]) -> None:
    net, x, shift = TwoInputs().double().eval(), numbers(8, 5), numbers(8)
    rows = [{"x": a, "shift": b, "labels": n % 3} for n, (a, b) in enumerate(zip(x, shift, strict=True))]
    callback = lgm.GradientMetrics(SCORES[:3])
    data = torch.utils.data.DataLoader(rows, 4)
    test_run(callback, kind(net), data)
    scale = 2.0 if kind is Mixed else 1.0
    assert_scores(callback, nn.Sequential(net.head), scale * x + shift[:, None], SCORES[:2])
    expected = lgm.score(net, (x, shift, scale), SCORES[2])[SCORES[2]]
    torch.testing.assert_close(column(callback, SCORES[2]), expected)
    assert callback.results["label"].to_pylist() == [n % 3 for n in range(8)]


class RetriesInHalves(Stepped):
    """Halves a batch that its network refuses, as after running out of memory."""

    def step(self, batch: Any) -> Any:
        try:
            return self(batch[0])
        except RuntimeError:
            return [self(half) for half in batch[0].chunk(2)]


class SmallOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(5, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise RuntimeError("out of memory")
        return self.net(x)


def test_a_call_that_raises_is_ignored() -> None:
    net, x = SmallOnly(), numbers(8, 5)
    callback = lgm.GradientMetrics(LOGIT_AND_HEAD)
    test_run(callback, RetriesInHalves(net), batches(x, torch.arange(8) % 3))
    assert_scores(callback, net.net, x, LOGIT_AND_HEAD)
    assert callback.results["label"].to_pylist() == [n % 3 for n in range(8)]


SIZES: list[int] = []
"""The number of samples of each call of ``Masked``; the callback restores lists of the model."""


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(5, 8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        SIZES.append(len(x))
        return self.net(x * mask)


class CallsWithAMask(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch[0], batch[1])


def test_the_logits_of_the_step_show_which_inputs_have_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, mask = Masked(), numbers(6, 5), numbers(6, 5).gt(0).double()
    SIZES.clear()
    seen: list[int] = []
    engine = scorer.gradient_statistics

    def statistics(*args: Any, **options: Any) -> Any:
        seen.extend(SIZES)
        return engine(*args, **options)

    monkeypatch.setattr(scorer, "gradient_statistics", statistics)
    callback = lgm.GradientMetrics(["pseudo_label(target=all)"])
    trainer(callback).predict(CallsWithAMask(net), batches(x, mask, batch_size=6))
    assert seen.count(6) == 1 and max(seen[1:]) < 6
    expected = lgm.score(net.net, x * mask, "pseudo_label(target=all)")
    torch.testing.assert_close(column(callback, "pseudo_label(target=all)"), *expected.values(), rtol=1e-9, atol=1e-12)
