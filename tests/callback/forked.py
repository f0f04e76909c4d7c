"""Runs code in several processes of one ``Trainer``; they are forked, so that nothing is imported twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_forked"]

ROOT = Path(__file__).parents[2]

LAUNCHER = """
import json, os, signal, socket, sys, time, traceback, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
import lightning_gradmetrics as lgm
from lightning_gradmetrics.results.output import Output
from tests.callback.runs import trainer
from tests.callback.test_output import ROLES, SCORES, Classifier, data

lgm.score(Classifier(), torch.randn(2, 4), "energy")  # imports what is imported late; starts no thread
FOLDER = Path(sys.argv[1])


def launch(count, work):
    # Returns, by rank, the exit code and the value or the error of each process, and the seconds since the first one ended.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(count):
        child = os.fork()
        if not child:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK="0", LOCAL_RANK=str(rank))
            in_process(rank, work)
        children[child] = rank
    codes, ends = [None] * count, []
    for _ in range(count):
        child, status = os.wait()
        codes[children[child]] = os.waitstatus_to_exitcode(status)
        ends.append(time.monotonic())
    values = []
    for rank in range(count):
        path = FOLDER / f"rank{rank}.json"
        values.append(json.loads(path.read_text()) if path.exists() else None)
        path.unlink(missing_ok=True)
    return codes, values, ends[-1] - ends[0]


def in_process(rank, work):
    status, value = 1, None
    try:
        value, status = work(rank), 0
    except SystemExit as stopped:
        status = stopped.code
    except BaseException as error:
        value = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        (FOLDER / f"rank{rank}.json").write_text(json.dumps(value))
        sys.stderr.flush()
        os._exit(status)


def ddp(callback, count, **options):
    return trainer(callback, devices=count, strategy="ddp" if count > 1 else "auto", **options)
"""


def run_forked(source: str, folder: Path, *arguments: str, timeout: float = 240) -> tuple[Any, str]:
    """Run a script after the launcher above; return its last printed line, parsed as JSON, and its standard error stream."""
    command = [sys.executable, "-c", LAUNCHER + source, str(folder), *arguments]
    environment = {}
    for name, value in os.environ.items():
        if "RANK" not in name and not name.startswith(("WORLD", "MASTER")):
            environment[name] = value
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr
