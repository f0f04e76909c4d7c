"""The package imports its parts on first use; every public name works as the first one that a process uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIRST_USES = {
    "a score by name": "lgm.score(torch.nn.Linear(3, 2).eval(), torch.randn(4, 3), ['max_softmax', 'gradnorm'])",
    "the callback": "lgm.GradientMetrics(['max_softmax', 'oberdiek'])",
    "a misspelt score": "refused(lambda: lgm.score(torch.nn.Linear(3, 2), torch.randn(4, 3), 'entropi'), \"'entropy'\")",
    "a score of a built-in's name": "refused(lambda: own(), 'entropy')",
    "a fit": "lgm.fit(torch.nn.Linear(3, 2).eval(), [(torch.randn(40, 3), torch.arange(40) % 2)], 'kfac_influence')",
}

SCRIPT = """
import torch
import lightning_gradmetrics as lgm


def refused(call, words):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError("not refused")


def own():
    from lightning_gradmetrics.scoring.registry import register

    @register("baseline", paper="none")
    def entropy(evidence):
        return evidence.logits.sum(1)


{use}
"""


@pytest.mark.slow
@pytest.mark.parametrize("use", FIRST_USES)
def test_every_entry_works_as_the_first_one_of_a_process(use: str) -> None:
    script = SCRIPT.format(use=FIRST_USES[use])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
