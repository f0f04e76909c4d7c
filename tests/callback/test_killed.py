"""Runs that are killed, interrupted or out of disk space: nothing is lost, nothing is scored twice."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import lightning_gradmetrics as lgm
from lightning_gradmetrics.results import files
from lightning_gradmetrics.results.output import Output
from tests.callback.forked import run_forked
from tests.callback.runs import Stopping
from tests.callback.test_output import SCORES, data, score

SETUP = """
import random

SIZE = 1200


class Slow(Stopping):
    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    def step(self, batch):
        time.sleep(self.pause)
        return super().step(batch)


def score(directory, stage, pause, started):
    class Announced(lgm.GradientMetrics):
        def _start(self, *arguments):
            super()._start(*arguments)
            os.write(started, b"x")

    output = Output(Path(directory), resume=True, rows_per_part=24)
    judged = directory.endswith("test-SIGTERM")  # one of the runs is evaluated and summarised too
    options = {"resamples": 20} if judged else {"metrics": (), "print_summary": False}
    callback = Announced(SCORES, datasets=ROLES, output=output, **options)
    loaders = lgm.unfinished(dict(zip(ROLES, data(size=SIZE))), directory)
    getattr(trainer(callback), stage)(Slow(pause), loaders)


def start(directory, stage="test", pause=0):
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        return child
    status = 1
    try:
        score(directory, stage, pause, writer)
        status = 0
    except SystemExit as stopped:
        status = stopped.code or 0
    finally:
        os._exit(status)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""

KILLED = """
moments, killed = random.Random(0), 0
for _ in range(20):
    child = start(f"{sys.argv[1]}/killed")
    time.sleep(moments.uniform(0, 0.09))
    os.kill(child, signal.SIGKILL)
    killed += ended(child) == -signal.SIGKILL
for name in ("killed", "undisturbed"):
    assert ended(start(f"{sys.argv[1]}/{name}")) == 0
"""

SIGNALLED = """
outcomes = {}
for stage in ("test", "predict"):
    for name in ("SIGINT", "SIGTERM"):
        directory = f"{sys.argv[1]}/{stage}-{name}"
        child = start(directory, stage, pause=0.01)  # the signal comes long before the end
        while len(list(Path(directory).glob("*.parquet"))) < 3:  # of 51 parts
            time.sleep(0.001)
        os.kill(child, getattr(signal, name))
        outcomes[f"{stage}-{name}"] = ended(child), ended(start(directory, stage))
print(json.dumps([killed, outcomes]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_runs_that_are_killed_or_interrupted_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """SIGKILL at twenty moments, and SIGINT and SIGTERM, in real trainers: the rows of the resumed runs are bit-identical."""
    (killed, outcomes), said = run_forked(SETUP + KILLED + SIGNALLED, tmp_path)
    expected = lgm.read_results(tmp_path / "undisturbed")
    assert killed >= 12  # the others ended before the signal came
    assert lgm.read_results(tmp_path / "killed").equals(expected) and expected.num_rows == 1211
    assert not list((tmp_path / "killed").glob(".tmp-*"))
    assert outcomes == {
        "test-SIGINT": [1, 0],
        "test-SIGTERM": [143, 0],
        "predict-SIGINT": [1, 0],
        "predict-SIGTERM": [143, 0],
    }
    assert said.count("rows are committed in") == 4 and "resume=True" in said
    for name in outcomes:
        assert lgm.read_results(tmp_path / name).equals(expected), name


def full_disk(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Simulate a full disk after some parts."""
    fsync, left = os.fsync, [2 * parts]  # the file, and its directory

    def flush(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", flush)


def test_a_full_disk_is_reported_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = score(None).results
    with monkeypatch.context() as patched:
        full_disk(patched, parts=2)
        with pytest.raises(
            OSError, match=r"could not write 8 rows to .*No space left.*free some space and resume"
        ) as raised:
            score(Output(tmp_path, rows_per_part=8))
    assert raised.value.errno == errno.ENOSPC
    assert "16 rows are committed" in capsys.readouterr().err
    assert [pq.read_metadata(path).num_rows for path in sorted(tmp_path.glob("*.parquet"))] == [8, 8]
    assert not list(tmp_path.glob(".tmp-*"))
    assert score(tmp_path, resume=True).results.equals(expected)


@pytest.mark.slow
def test_a_small_file_system_fills_up_and_the_run_resumes(tmp_path: Path) -> None:
    """The same on a real file system of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        with pytest.raises(OSError, match=r"could not write .*No space left"):
            score(Output(tmp_path / "results", rows_per_part=8), loaders=data(size=200), columns="features")
        committed = lgm.read_results(tmp_path / "results", incomplete=True)
        assert 8 <= committed.num_rows < 211
        subprocess.run(["mount", "-o", "remount,size=4m", str(tmp_path)], check=True)
        options = {"loaders": data(size=200), "columns": "features", "resume": True}
        assert score(tmp_path / "results", **options).results.num_rows == 211
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    """The first run is still writing."""

    class Second(Stopping):
        def step(self, batch: Any) -> Any:
            if self.seen == 8:
                with pytest.raises(RuntimeError, match="another process is writing results"):
                    score(tmp_path / "results")
            return super().step(batch)

    assert score(tmp_path / "results", model=Second()).results.num_rows == 34
    assert SCORES[0] in lgm.read_results(tmp_path / "results").column_names
