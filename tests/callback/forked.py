"""Runs code in several processes of one ``Trainer``; they are forked, so that nothing is imported twice.

A process that has imported everything waits for scripts, and forks one process for each. Importing takes longer than most scripts.
"""

from __future__ import annotations

import atexit
import functools
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
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with this signal ignored
import torch
torch.set_num_threads(1)
from pathlib import Path
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
import lightning_gradmetrics as lgm
from lightning_gradmetrics.results.output import Output
from tests.callback.runs import Stopping, trainer
from tests.callback.test_output import ROLES, SCORES, data

# Import what is imported late; this starts no thread.
lgm.score(Stopping(), torch.randn(2, 4), "energy")
from matplotlib.backends import backend_agg
from lightning_gradmetrics import report
from lightning_gradmetrics.evaluation import evaluate


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


SERVER = """
def serve(request):
    # Runs a script in a new process group and returns its exit code.
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        signal.alarm(request["timeout"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        globals().update(FOLDER=Path(request["folder"]))
        sys.argv[1:] = [request["folder"], *request["arguments"]]
        status = 1
        try:
            exec(compile(request["source"], "<script>", "exec"), globals())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.killpg(child, signal.SIGKILL)  # processes that the script left behind
    except (ProcessLookupError, PermissionError):
        pass
    return status


for line in sys.stdin:
    print(serve(json.loads(line)), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """Start the process that has imported everything; it ends with this one."""
    environment = {}
    for name, value in os.environ.items():
        if "RANK" not in name and not name.startswith(("WORLD", "MASTER")):
            environment[name] = value
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", LAUNCHER + SERVER]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    process.wait()


def run_forked(source: str, folder: Path, *arguments: str, timeout: int = 240) -> tuple[Any, str]:
    """Run a script after the launcher above; return its last printed line, parsed as JSON, and its standard error stream."""
    process, streams = server(), {name: folder / f"{name}.txt" for name in ("stdout", "stderr")}
    request = {"source": source, "folder": str(folder), "arguments": arguments, "timeout": timeout}
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({**request, **{name: str(path) for name, path in streams.items()}}) + "\n")
    status = process.stdout.readline().strip()
    said = streams["stderr"].read_text()
    assert status == "0", said
    return json.loads(streams["stdout"].read_text().splitlines()[-1]), said
