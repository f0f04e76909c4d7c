"""The package imports its parts on first use; every public name works as the first one that a process uses."""

from __future__ import annotations

import json
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
import json, os, sys, traceback
import lightning.pytorch, pyarrow.parquet, scipy.stats, sklearn, torch, torchmetrics


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


failed = []
for name, use in json.loads(sys.argv[1]).items():
    process = os.fork()
    if not process:
        try:
            import lightning_gradmetrics as lgm
            exec(use)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        failed.append(name)
sys.exit(", ".join(failed) or None)
"""


@pytest.mark.slow
def test_every_entry_works_as_the_first_one_of_a_process() -> None:
    """Each entry has its own process; all are forks of one that has imported torch and others, but not this package."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(FIRST_USES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
