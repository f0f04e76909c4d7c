"""Scoring does not change the user's inputs, buffers, attributes or random numbers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.classifier.forward import call, gradients_enabled, preserved
from lightning_gradmetrics.classifier.mutable_parts import mutable_parts


class Normalising(nn.Module):
    """Normalises its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.sub_(0.5).mul_(2)).tanh())


class OutOfPlace(Normalising):
    """The same classifier, which does not change its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(2 * (x - 0.5)).tanh())


def everything(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return a result of every public function that runs a model."""
    scores = ["gradnorm", "gradnorm(target=all)", "odin(epsilon=0.1)", "gga", "regrad(perturbations=2)", "purview"]
    found = dict(lgm.score(model, x, scores))
    for engine in ("auto", "vmap", "reference"):
        found[engine] = lgm.gradient_statistics(model, x, "pseudo_label", engine=engine).norm(1)
        found[f"{engine} in pieces"] = lgm.gradient_statistics(model, x, "uniform", engine=engine, memory=1).norm(2)
    found["maps"] = lgm.cosine_similarity_maps(model, x)
    found["features"] = lgm.gradient_features(model, x)[0]
    found["profile"] = lgm.gradient_profile(model, x)[1]
    return found


@pytest.mark.slow
def test_inputs_changed_in_place_are_not_the_users() -> None:
    torch.manual_seed(0)
    model, plain = Normalising().double().eval(), OutOfPlace().double().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.rand(7, 6, dtype=torch.float64)
    before = x.clone()
    for _ in range(2):
        found, right = everything(model, x), everything(plain, x)
        assert torch.equal(x, before)
        for name, values in right.items():
            torch.testing.assert_close(found[name], values, msg=name)


class Stateful(nn.Module):
    """Changes everything that a forward pass can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("var", torch.ones(5))
        self.register_buffer("total", torch.zeros(()))
        self.calls, self.history, self.cache, self.plain = 0, [0], {"a": 1}, torch.ones(3)
        self.deleted = "here"

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        F.batch_norm(
            h.detach()[..., None].repeat(1, 1, 2), self.mean, self.var, training=True
        )  # no new version of the statistics
        self.total = self.total + 1
        self.calls += 1
        self.history.append(self.calls)
        self.cache["b"] = self.calls
        self.plain.mul_(2)
        self.fresh = h.detach()
        self.__dict__.pop("deleted", None)
        self.head.eval() if self.head.training else self.head.train()
        return self.head(h.tanh())


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_state_of_the_model_is_restored(engine: str) -> None:
    model, x = Stateful().eval(), torch.rand(5, 6)
    buffers = {name: (id(b), b._version, b.clone()) for name, b in model.named_buffers()}
    history, cache = model.history, model.cache
    for _ in range(2):
        lgm.score(model, x, ["gradnorm(target=all)", "gradnorm", "odin"], engine=engine)
        for name, buffer in model.named_buffers():
            identity, version, value = buffers[name]
            assert (id(buffer), buffer._version) == (identity, version) and torch.equal(buffer, value), name
        assert model.calls == 0 and model.history is history == [0] and model.cache is cache == {"a": 1}
        assert torch.equal(model.plain, torch.ones(3)) and model.deleted == "here" and not hasattr(model, "fresh")
        assert not any(module.training for module in model.modules())


@dataclass(slots=True)
class Counter:
    passes: int = 0
    seen: list[int] = field(default_factory=list)


class Counting(nn.Module):
    """Scales its logits by the number of passes so far, in an object without a ``__dict__``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.counter = nn.Linear(4, 3), Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counter.passes += 1
        self.counter.seen.append(len(x))
        return self.layer(x) * self.counter.passes


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_objects_with_slots_are_restored(engine: str) -> None:
    model, x = Counting(), torch.randn(5, 4)
    found = lgm.gradient_statistics(model, x, "uniform", engine=engine).norm(1)
    expected = lgm.gradient_statistics(copy.deepcopy(model.layer), x, "uniform", engine="reference").norm(1)
    torch.testing.assert_close(found, expected)
    assert (model.counter.passes, model.counter.seen) == (0, [])


def test_a_graph_of_the_users_survives() -> None:
    """Its backward pass would fail if scoring changed the version of its buffers."""
    model, x = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).eval(), torch.rand(5, 6)
    loss = model(x).square().sum()
    lgm.score(model, x, "gradnorm(target=all)")
    loss.backward()
    assert model[0].weight.grad is not None


def test_buffers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.BatchNorm1d(5, affine=False).eval()
    with preserved(model), torch.inference_mode():
        model.running_mean.add_(1)
    assert not model.running_mean.any()


class Draws(nn.Module):
    """A random factor and active dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(x)).tanh() * torch.rand(()))


def seeded(work: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return work()


@pytest.mark.filterwarnings("ignore:Draws draws random numbers")
def test_active_dropout_gives_the_same_numbers_in_every_call() -> None:
    model, x = Draws().eval(), torch.rand(6, 6)
    model.drop.train()
    first, second = (seeded(lambda: lgm.gradient_statistics(model, x, "pseudo_label").norm(1)) for _ in range(2))
    assert torch.equal(first, second)

    def alone() -> Tensor:
        losses = F.cross_entropy(logits := model(x), logits.argmax(1), reduction="none")
        rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
        return torch.stack([sum(g.abs().sum() for g in row) for row in rows])

    torch.testing.assert_close(first, seeded(alone))


@pytest.mark.filterwarnings("ignore:the dropout 'drop' is in train mode")
def test_random_numbers_of_the_caller_are_not_drawn() -> None:
    model, x = Draws().train(), torch.rand(6, 6)
    drawn = seeded(lambda: torch.rand(2).tolist())
    seeded(lambda: lgm.score(model, x, ["gradnorm(target=all)", "odin"]))
    assert torch.rand(2).tolist() == drawn


class Pair(NamedTuple):
    """Two tensors."""

    values: Tensor
    indices: Tensor


def test_named_tuples_are_preserved() -> None:
    class Takes(nn.Linear):
        def forward(self, pair: Any) -> Tensor:
            return super().forward(pair.values)

    pair = Pair(torch.rand(3, 6), torch.zeros(3))
    assert call(Takes(6, 4), [pair]).shape == (3, 4)


def test_two_threads_may_score_one_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double().eval()
    batches = [torch.rand(n, 6, dtype=torch.float64) for n in (3, 5, 4, 6)]
    right = [lgm.score(model, x, "gradnorm(target=all)")["gradnorm(target=all)"] for x in batches]
    problems: list[str] = []

    def work(number: int) -> None:
        for _ in range(10):
            found = lgm.score(model, batches[number], "gradnorm(target=all)")["gradnorm(target=all)"]
            if not torch.allclose(found, right[number], rtol=1e-9):
                problems.append(f"batch {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("model", "expected"), [(nn.LSTM(2, 3).eval(), False), (nn.Linear(2, 3).eval(), True)])
def test_cudnn_is_off_for_recurrent_layers_in_eval_mode(
    model: nn.Module, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuDNN refuses their backward pass: "cudnn RNN backward can only be called in training mode"."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with gradients_enabled(model):
        assert torch.backends.cudnn.enabled is expected
    assert torch.backends.cudnn.enabled


def test_a_hook_that_removes_itself_still_gets_its_keyword_arguments() -> None:
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).eval(), torch.randn(4, 5)
    calls: list[dict[str, Any]] = []

    def once(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)
        handle.remove()

    handle = model.register_forward_pre_hook(once, with_kwargs=True)
    lgm.score(model, x, "entropy")
    assert model._forward_pre_hooks.keys() == model._forward_pre_hooks_with_kwargs.keys() == {handle.id}
    scored = len(calls)
    model(x)
    assert len(calls) == scored + 1 and not model._forward_pre_hooks


def test_a_lazy_layer_that_scoring_initialises_can_be_called_again() -> None:
    model, x = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.randn(4, 5)
    scores = lgm.score(model, x, "entropy")["entropy"]
    logits = model(x)
    torch.testing.assert_close(scores, torch.distributions.Categorical(logits=logits).entropy(), check_dtype=False)


def test_data_of_a_model_are_not_copied() -> None:
    class Numbers(Dataset[int]):
        def __init__(self) -> None:
            self.values, self.cache = np.arange(10), {"last": 0}

    assert list(mutable_parts(Numbers(), set())) == []
    assert list(mutable_parts(SimpleNamespace(steps=[1]), set())) == [{"steps": [1]}, [1]]
