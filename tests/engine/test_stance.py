"""The stance of torch.compile: models with compiled parts run uncompiled, and the caller's stance is there again afterwards."""

import pytest
import torch
from torch import nn

from lightning_gradmetrics import gradient_statistics
from lightning_gradmetrics.engine.compilation import stance
from lightning_gradmetrics.engine.compilation.stance import compiling, eager

pytestmark = pytest.mark.slow


@pytest.fixture(params=["set by torch's own function", "set by the public block"])
def compiled(request, monkeypatch):
    if request.param == "set by the public block":
        monkeypatch.setattr(stance, "_private_stance", lambda name: None)
    else:
        torch.compile(lambda x: x, backend="eager")
        assert stance._private_stance("force_eager") is not None
    return torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")


def test_blocks_set_and_restore_the_stance(compiled):
    zero = torch.zeros(2)
    with eager():
        assert not compiled(zero).any()
        with compiling(nn.Linear(2, 2)) as is_possible:
            assert is_possible and compiled(zero).all()
        with pytest.raises(KeyError), eager():
            raise KeyError
        assert not compiled(zero).any()
    assert compiled(zero).all()
    with torch.compiler.set_stance("force_eager"):
        with compiling(nn.Linear(2, 2)):
            assert compiled(zero).all()
        with eager():
            pass
        assert not compiled(zero).any()


def test_calls_in_compiled_parts_are_intercepted(compiled):
    model = nn.Sequential(torch.compile(nn.Linear(4, 5), backend="eager"), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    model(x)
    for _ in range(4):
        found = gradient_statistics(model, x, "pseudo_label").norm(2)
    torch.testing.assert_close(found, gradient_statistics(model, x, "pseudo_label", engine="reference").norm(2))
    torch.testing.assert_close(compiled(x), x + 1)
