"""The setting of all tests of the collector."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    torch.set_num_threads(1)  # small tensors are slower on several
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*padding='same' with even kernel.*")
        warnings.filterwarnings("ignore", ".*torch.jit.script.*")  # torch.func.jvp, the first time
        yield
