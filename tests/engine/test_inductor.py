"""Graphs that inductor compiles: the written code is called directly only if it returns what torch's complete function returns."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_gradmetrics.engine.compilation import inductor
from lightning_gradmetrics.engine.compilation.inductor import compiled_graph

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("function", "is_direct"),
    [
        (lambda a, b, x: (a @ x, b + 1), True),
        (lambda a, b, x: (a @ x, b), False),
        (lambda a, b, x: (a @ x, x.mT), False),
    ],
    ids=["new memory", "an argument", "a view of an argument"],
)
def test_results_are_those_of_the_graph(function, is_direct, monkeypatch):
    compared, are_same = [], inductor._are_same
    monkeypatch.setattr(inductor, "_are_same", lambda *args: compared.append(are_same(*args)) or compared[-1])
    arguments = [torch.randn(4, 3)], [torch.randn(2)], [torch.randn(3, 5)], None
    graph = make_fx(lambda a, b, x, labels: function(*a, *b, *x))(*arguments)
    run = compiled_graph(graph, *arguments)
    assert compared == [is_direct]
    for _ in range(2):
        arguments = [torch.randn(4, 3)], [torch.randn(2)], [torch.randn(3, 5)], None
        with torch.no_grad():
            found = run(*arguments)
        for value, expected in zip(found, graph(*arguments), strict=True):
            torch.testing.assert_close(value, expected)
