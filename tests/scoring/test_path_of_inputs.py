"""The path of the inputs of ``score`` through the package, which docs/architecture.md describes."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm

ROOT = Path(lgm.__file__).parent


class Recorder:
    """Records the functions of the package that receive a tensor, and how often the batch size is computed."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.functions: list[tuple[str, str]] = []
        self.sizes = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        if event != "call" or not path.is_relative_to(ROOT):
            return
        self.sizes += code.co_name == "batch_size"
        arguments = (frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        if any(argument is self.inputs for argument in arguments):
            self.functions.append((str(path.relative_to(ROOT)), f"{code.co_name}:{code.co_firstlineno}"))


@pytest.mark.parametrize(("score", "sizes"), [("entropy", 0), ("gradnorm", 0), ("gradnorm(target=all)", 1)])
def test_the_inputs_take_no_detour(score: str, sizes: int) -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4)
    lgm.score(model, inputs, [score])  # imports, and plans the model
    recorded = Recorder(inputs)
    sys.setprofile(recorded)
    try:
        lgm.score(model, inputs, [score])
    finally:
        sys.setprofile(None)
    visits = [file for file, _ in groupby(recorded.functions, key=lambda function: function[0])]
    named = {function for function in recorded.functions if "<lambda>" not in function[1]}
    assert len(named) <= 11
    assert len({file.split("/")[0] for file in visits}) == 2
    assert max(map(visits.count, visits)) == 2
    assert recorded.sizes == sizes
