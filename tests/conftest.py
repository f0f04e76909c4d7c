"""What several tests share."""

from __future__ import annotations

import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and what they start, share the cores: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
