"""Calls that the guards of torch.compile repeat: every change of the model has the right gradients in the next call."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.engine.compilation import compiled as compiled_plans
from lightning_gradmetrics.engine.compilation import guarded_calls

SOURCE = """
import enum, functools, math, os, sys, types
from collections import OrderedDict
import torch
from torch import nn
from torch.nn import functional as F

FACTORS = {{"a": [1.0]}}
FACTOR = 1.0
SPACE = types.SimpleNamespace(v=1.0)

def function(x, k=1.0, *, factors=[1.0]):
    return x * k * factors[0]

class Helper:
    k = 1.0
    def __init__(self):
        self.f = 1.0
    def apply(self, x):
        return x * self.k

class Settings:
    k = 1.0

class Special(Settings):
    pass

class Other(type):
    k = 1.0

class Meta(metaclass=Other):
    pass

class Layer(nn.Module):
    def forward(self, x):
        return x

@torch.compiler.allow_in_graph
def untraced(x):
    return x * FACTOR

@torch.compiler.assume_constant_result
def constant():
    return FACTOR

TANH = nn.Tanh()
MAP = map

class Base(nn.Module):
    inherited = 1.0
    factors = [1.0]
    def method(self, x):
        return x
    @staticmethod
    def static(x):
        return x
    @classmethod
    def shared(cls, x):
        return x

class Doubled(Base):
    def method(self, x):
        return x * 2

class Model(Base):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(8))
        self.f, self.flag, self.list, self.dict, self.pair = 1.0, False, [1.0], {{"v": 1.0}}, (1.0, 2.0)
        self.space, self.name, self.count, self.seen, self.helper = types.SimpleNamespace(v=1.0), "f", 0, [], Helper()
        self.function, self.rest = function, nn.ModuleList()
        self.ordered, self.zero, self.special = OrderedDict(a=1.0, b=2.0), 0.0, Special()
    @property
    def derived(self):
        return self.f
    def forward(self, x):
        h = self.act(self.a(x))
        {line}
        return self.b(h)
"""


def _set(owner: str, name: str, value: str):
    return f"setattr({owner}, {name!r}, {value})"


CHANGES = {
    "attribute": ("h = h * self.f", "m.f = 2.0"),
    "flag without effect on logits": ("h = h.detach() if self.flag else h", "m.flag = True"),
    "list": ("h = h * self.list[0]", "m.list[0] = 2.0"),
    "length": ("h = h * len(self.list)", "m.list.append(1)"),
    "dictionary": ("h = h * self.dict['v']", "m.dict['v'] = 2.0"),
    "absent key": ("h = h * self.dict.get('w', 1.0)", "m.dict['w'] = 2.0"),
    "tuple": ("h = h * self.pair[0]", "m.pair = (2.0, 1.0)"),
    "namespace": ("h = h * self.space.v", "m.space.v = 2.0"),
    "property": ("h = h * self.derived", "m.f = 2.0"),
    "global": ("h = h * FACTOR", "module.FACTOR = 2.0"),
    "nested global": ("h = h * FACTORS['a'][0]", "module.FACTORS['a'][0] = 2.0"),
    "global object": ("h = h * SPACE.v", "module.SPACE.v = 2.0"),
    "class attribute": ("h = h * self.inherited", "module.Base.inherited = 2.0"),
    "hidden class attribute": ("h = h * self.inherited", "m.inherited = 2.0"),
    "list of a class": ("h = h * self.factors[0]", "module.Base.factors[0] = 2.0"),
    "method": ("h = self.method(h)", "module.Base.method = lambda self, x: x * 2"),
    "method of an object": ("h = self.method(h)", "m.method = lambda x: x * 2"),
    "static method": ("h = self.static(h)", "module.Base.static = staticmethod(lambda x: x * 2)"),
    "global function": ("h = function(h)", "module.function = lambda x: x * 2"),
    "default": ("h = function(h)", "module.function.__defaults__ = (2.0,)"),
    "mutable default": ("h = function(h)", "module.function.__kwdefaults__['factors'][0] = 2.0"),
    "stored function": ("h = self.function(h)", "m.function = lambda x: x * 2"),
    "built-in name": ("h = h * len(self.list)", "module.len = lambda x: 2.0"),
    "helper": ("h = self.helper.apply(h)", "module.Helper.apply = lambda self, x: x * 2"),
    "class of a helper": ("h = h * self.helper.k", "module.Helper.k = 2.0"),
    "environment": ("h = h * float(os.environ.get('GRADMETRICS_TEST', '1'))", "os.environ['GRADMETRICS_TEST'] = '2'"),
    "absent attribute": ("h = h * getattr(self, 'absent', 1.0)", "m.absent = 2.0"),
    "absent name in a dictionary of attributes": ("h = h * self.__dict__.get('absent', 1.0)", "m.absent = 2.0"),
    "absent global": ("h = h * globals().get('ABSENT', 1.0)", "module.ABSENT = 2.0"),
    "counter": ("self.count += 1; h = h * (1 if self.count < 50 else 2)", "m.count = 60"),
    "side effect": ("self.seen.append(len(self.seen))", "m.f = 2.0"),
    "stored result": ("self.last = h", "m.f = 2.0"),
    "dropout": ("h = F.dropout(h, 0.5, self.training)", "m.train()"),
    "frozen weight": ("h = h * 1", "m.a.weight.requires_grad_(False)"),
    "other activation": ("h = h * 1", "m.act = nn.Tanh()"),
    "more layers": ("for layer in self.rest: h = layer(h)", "m.rest.append(nn.Tanh())"),
    "weights": ("h = h * 1", "m.a.weight.data.mul_(2)"),
    "new weight": ("h = h * 1", "m.a.weight = nn.Parameter(m.a.weight.detach() * 2)"),
    "tied layers": ("h = h * 1", "m.a.bias = nn.Parameter(torch.ones(8)); m.extra = m.a"),
    "buffer": ("h = h * self.scale", "m.scale.fill_(2.0)"),
    "unused parameter": ("h = h * 1", "m.unused = nn.Parameter(torch.ones(3))"),
    "hook": ("h = h * 1", "m.a.register_forward_hook(lambda m, x, y: y * 2)"),
    "first hook": ("h = h * 1", "m.a.register_forward_pre_hook(lambda m, x: (x[0] * 2,))"),
    "hook on gradients": ("h = h * 1", "m.act.register_full_backward_hook(lambda m, x, y: (x[0] * 2,))"),
    "hook on a parameter": ("h = h * 1", "m.a.weight.register_hook(lambda g: g * 2)"),
    "forward of a layer": ("h = h * 1", "m.act.forward = torch.tanh"),
    "parametrisation": ("h = h * 1", "torch.nn.utils.parametrizations.weight_norm(m.a)"),
    "code of a method": ("h = self.method(h)", "module.Base.method.__code__ = (lambda self, x: x * 2).__code__"),
    "code of a class method": (
        "h = self.shared(h)",
        "vars(module.Base)['shared'].__func__.__code__ = (lambda cls, x: x * 2).__code__",
    ),
    "base of a class": ("h = self.method(h)", "module.Model.__bases__ = (module.Doubled,)"),
    "branch while compiling": ("h = h if torch.compiler.is_compiling() else h * self.f", "m.f = 2.0"),
    "untraced function": ("h = untraced(h)", "module.FACTOR = 2.0"),
    "constant function": ("h = h * constant()", "module.FACTOR = 2.0"),
    "hook on a global module": ("h = TANH(h)", "module.TANH.register_forward_hook(lambda m, x, y: y * 2)"),
    "class of a class": ("h = h * Meta.k", "module.Other.k = 2.0"),
    "hidden attribute of a class": ("h = h * self.special.k", "module.Special.k = 2.0"),
    "order": ("h = h * list(self.ordered.values())[0]", "m.ordered.move_to_end('a')"),
    "sign of zero": ("h = h * math.copysign(1.0, self.zero)", "m.zero = -0.0"),
    "setting of torch": (
        "h = h * (2.0 if torch.get_autocast_dtype('cpu') == torch.float16 else 1.0)",
        "torch.set_autocast_dtype('cpu', torch.float16)",
    ),
    "setting through a partial function": (
        "h = h * (2.0 if functools.partial(torch.get_autocast_dtype, 'cpu')() == torch.float16 else 1.0)",
        "torch.set_autocast_dtype('cpu', torch.float16)",
    ),
    "setting through a map": (
        "h = h * (2.0 if list(MAP(torch.get_autocast_dtype, ['cpu']))[0] == torch.float16 else 1.0)",
        "torch.set_autocast_dtype('cpu', torch.float16)",
    ),
    "class of the model": (
        "h = h * 1",
        "m.__class__ = type('Other', (module.Model,), {'__module__': module.__name__, 'inherited': 2.0})",
    ),
}
"""For each kind of change a line of the forward pass, and the change."""

_NUMBERS = itertools.count()

NEVER = {
    "helper",
    "environment",
    "absent attribute",
    "absent name in a dictionary of attributes",
    "absent global",
    "stored result",
    "counter",
    "namespace",
    "global object",
    "class of a helper",
    "branch while compiling",
    "untraced function",
    "constant function",
    "hook on a global module",
    "class of a class",
    "hidden attribute of a class",
    "order",
    "sign of zero",
    "setting of torch",
    "setting through a partial function",
    "setting through a map",
}
"""Models whose calls are never repeated by guards, since these would not see the change."""


@pytest.fixture
def repeated(monkeypatch):
    """Count the calls that are repeated by guards; graphs run as they are traced, without the time of their compilation."""
    monkeypatch.setattr(compiled_plans, "compiled_graph", lambda graph, *_: graph)
    calls, moments = [], guarded_calls._Placed.moments

    def counting(self, *arguments):
        calls.append(self)
        return moments(self, *arguments)

    monkeypatch.setattr(guarded_calls._Placed, "moments", counting)
    return calls


@pytest.fixture
def make(monkeypatch):
    """Return a function that makes a model with a line in its forward pass, and the module of its class."""

    def model(line: str, name: str | None = None):
        module = types.ModuleType(name or f"gradmetrics_test_{next(_NUMBERS)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(SOURCE.format(line=line), vars(module))
        torch.manual_seed(0)
        return module.Model().eval(), module

    monkeypatch.setenv("GRADMETRICS_TEST", "1")
    return model


def _norms(model, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gradient_statistics(model, x, "pseudo_label", per_parameter=True, **options).norm(2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_between_calls_is_seen(kind, make, repeated):
    line, change = CHANGES[kind]
    model, module = make(line)
    for _ in range(4):
        _norms(model, torch.randn(6, 4), compile=True)
    assert bool(repeated) == (kind not in NEVER)
    exec(change, {"m": model, "module": module, "nn": nn, "torch": torch, "os": os})
    x = torch.randn(6, 4)
    try:
        expected = _norms(model, x, engine="reference") if kind != "dropout" else _norms(model, x)
        for _ in range(3):
            torch.testing.assert_close(_norms(model, x, compile=True), expected, rtol=1e-4, atol=1e-6)
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "first", "second"),
    [
        ("h = h * 1", "m.act = nn.Tanh()", "m.act.register_forward_hook(lambda m, x, y: y * 2)"),
        ("h = h * 1", "m.act = module.Layer()", "module.Layer.forward = lambda self, x: x * 2"),
        (
            "h = h * float(os.environ['GRADMETRICS_TEST']) if self.flag else h",
            "m.flag = True",
            "os.environ['GRADMETRICS_TEST'] = '2'",
        ),
    ],
)
def test_a_change_after_another_change_is_seen(line, first, second, make, repeated):
    model, module = make(line)
    for change in (first, second):
        for _ in range(4):
            _norms(model, torch.randn(6, 4), compile=True)
        exec(change, {"m": model, "module": module, "nn": nn, "os": os})
    assert repeated
    x = torch.randn(6, 4)
    torch.testing.assert_close(_norms(model, x, compile=True), _norms(model, x, engine="reference"))


@pytest.mark.slow
def test_a_second_module_of_the_same_name_is_seen(make, repeated):
    x = torch.randn(6, 4)
    for value in (2.0, 3.0):
        model, module = make("h = h * FACTORS['a'][0]", "gradmetrics_test_twice")
        for _ in range(4):
            _norms(model, x, compile=True)
        module.FACTORS["a"][0] = value
        torch.testing.assert_close(_norms(model, x, compile=True), _norms(model, x, engine="reference"))


@pytest.mark.slow
def test_calls_are_repeated_for_the_same_request_only(make, repeated):
    model, _ = make("h = h * 1")
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])

    def both(**options):
        count = len(repeated)
        found = gradient_statistics(model, x, compile=True, **options)
        torch.testing.assert_close(
            found.norm(2), gradient_statistics(model, x, **options).norm(2), rtol=1e-4, atol=1e-6
        )
        return len(repeated) > count

    for _ in range(3):
        both(objective="label", targets=labels)
    assert both(objective="label", targets=labels.flip(0))
    assert both(objective="label", targets=labels, per_parameter=True)
    assert not both(objective="uniform")
    assert not both(objective="label", targets=labels, statistics=["l2"])
    assert not both(objective="label", targets=labels, parameters=lambda name: name.startswith("b"))
    assert not both(objective="label", targets=labels.int())
    x = x[:3]
    assert not both(objective="label", targets=labels[:3])
    x = torch.randn(4, 6).t()
    assert not both(objective="label", targets=labels)
    x = torch.randn(6, 4)
    assert both(objective="label", targets=labels)
    with FlopCounterMode(display=False) as counter:
        assert not both(objective="label", targets=labels)
    assert counter.get_total_flops()
    with pytest.raises(ValueError, match="the labels contain 3, but the logits have 3 classes"):
        gradient_statistics(model, x, "label", targets=labels + 1, compile=True)
    assert both(objective="label", targets=labels)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_are_repeated_in_every_gradient_mode(mode, make, repeated):
    model, _ = make("h = h * 1")
    x = torch.randn(6, 4)
    for _ in range(4):
        with mode():
            _norms(model, torch.randn(6, 4) if mode is torch.inference_mode else x, compile=True)
    with mode():
        found = _norms(model, x, compile=True)
    assert repeated
    torch.testing.assert_close(found, _norms(model, x, engine="reference"), rtol=1e-4, atol=1e-6)
    assert model.a.weight.requires_grad


@pytest.mark.slow
def test_several_threads_leave_the_stance_of_the_compiler(make, repeated):
    models = [make("h = h * 1")[0] for _ in range(2)]
    x = torch.randn(6, 4)
    expected = [_norms(model, x) for model in models]
    wrong = []
    for model in models * 3:
        _norms(model, x, compile=True)

    def run(model, norms):
        for _ in range(20):
            if not torch.allclose(_norms(model, x, compile=True), norms, rtol=1e-4, atol=1e-6):
                wrong.append(model)
            _norms(model, x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compiled = torch.compile(lambda x: torch.compiler.is_compiling(), backend="eager")
    assert not wrong and repeated and compiled(x)


@pytest.mark.slow
@pytest.mark.parametrize(("transform", "shape"), [(torch.func.grad, (6, 4)), (torch.func.vmap, (2, 6, 4))])
def test_transformed_calls_are_refused_as_without_compilation(transform, shape, make, repeated):
    model, _ = make("h = h * 1")
    for _ in range(4):
        _norms(model, torch.randn(6, 4), compile=True)
    for compile in (False, True):
        with pytest.raises(RuntimeError, match="requires_grad_"):
            transform(lambda x, compile=compile: _norms(model, x, compile=compile).sum())(torch.randn(shape))


@pytest.mark.slow
def test_calls_inside_a_compiled_function_are_refused_as_without_guards(make, repeated):
    model, _ = make("h = h * 1")
    x = torch.randn(6, 4)
    for _ in range(4):
        _norms(model, x, compile=True)
    assert repeated
    for compile in (True, False):
        compiled = torch.compile(lambda x, c=compile: _norms(model, x * 1, compile=c), backend="eager")
        with pytest.raises((RuntimeError, AssertionError), match=r"compile region|not in co_names"):  # torch 2.8
            compiled(x)
    torch.testing.assert_close(_norms(model, x, compile=True), _norms(model, x), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_tensors_have_no_attributes_of_the_compiler(make, repeated):
    model, _ = make("h = h * 1")
    model.register_buffer("unused", torch.zeros(1))
    for _ in range(3):
        _norms(model, torch.randn(6, 4), compile=True)
    model.a.weight = nn.Parameter(model.a.weight.detach().clone())
    for _ in range(3):
        _norms(model, torch.randn(6, 4), compile=True)
    assert repeated
    assert not any(map(vars, (*model.parameters(), *model.buffers())))


@pytest.mark.slow
def test_a_model_with_guards_is_freed(make, repeated):
    model, _ = make("h = h * 1")
    for _ in range(4):
        _norms(model, torch.randn(6, 4), compile=True)
    assert repeated
    reference = weakref.ref(model)
    del model, repeated[:]
    gc.collect()
    assert reference() is None
