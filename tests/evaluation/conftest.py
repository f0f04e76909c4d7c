"""An evaluation that the tests share."""

from __future__ import annotations

import pytest

from lightning_gradmetrics.evaluation import (
    Evaluation,
    evaluate,
)
from tests.evaluation.tables import ROLES, SCORES, table


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(table(), SCORES, ROLES, ["fair", "noise"], resamples=300)
