"""Results on disk: parts, the manifest, and the state after a kill or with a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_gradmetrics.results.parts import ResultsWriter, ResumeError
from lightning_gradmetrics.results.reading import IncompleteResultsError, committed_rows, read_results
from lightning_gradmetrics.results.stored import StoredResults

RUN = {"scores": ["entropy"], "model": "abc"}


def rows(indices: range | list[int], dataset: str = "val") -> pa.Table:
    values = np.asarray(list(indices), dtype=np.int64)
    columns = {"dataset": [dataset] * len(values), "index": values, "entropy": values / 7}
    return pa.table(columns)


def test_a_complete_run_is_read_in_the_order_of_the_datasets(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, RUN, rows_per_part=3) as writer:
        writer.add(rows([3, 0]))
        writer.add(rows([2, 1]))
        writer.add(rows([1, 0], "far"))
        writer.finish({"val": 4, "far": 2})
    table = read_results(tmp_path)
    assert table["dataset"].to_pylist() == ["val"] * 4 + ["far"] * 2
    assert table["index"].to_pylist() == [0, 1, 2, 3, 0, 1]
    assert json.loads(table.schema.metadata[b"lightning_gradmetrics"]) == RUN
    assert len(list(tmp_path.glob("part-*.parquet"))) == 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_other_libraries_read_the_directory(tmp_path: Path) -> None:
    duckdb, pandas, polars = map(pytest.importorskip, ("duckdb", "pandas", "polars"))
    with ResultsWriter(tmp_path, RUN, rows_per_part=2) as writer:
        for index in range(5):
            writer.add(rows([index]))
        writer.finish({"val": 5})
    assert sorted(pandas.read_parquet(tmp_path)["index"]) == list(range(5))
    assert polars.read_parquet(tmp_path / "*.parquet")["index"].sort().to_list() == list(range(5))
    counted = duckdb.sql(f"select count(*), sum(index) from read_parquet('{tmp_path}/*.parquet')")
    assert counted.fetchall() == [(5, 10)]


def test_gaps_and_repetitions_are_named(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path / "gap", RUN) as writer:
        writer.add(rows([0, 2, 5]))
        writer.finish({"val": 6})
    with pytest.raises(IncompleteResultsError, match=r"lacks rows of 'val': indices 1, 3, 4$"):
        read_results(tmp_path / "gap")
    with ResultsWriter(tmp_path / "twice", RUN) as writer:
        writer.add(rows([0, 1, 1]))
        writer.finish({"val": 2})
    with pytest.raises(IncompleteResultsError, match=r"more than once: indices 1$"):
        read_results(tmp_path / "twice")


def test_a_part_that_was_removed_or_changed_is_refused(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, RUN, rows_per_part=2) as writer:
        writer.add(rows([0, 1]))
        writer.add(rows([2, 3]))
        writer.finish({"val": None})
    last = sorted(tmp_path.glob("part-*.parquet"))[-1]
    manifest = tmp_path / "_manifest.json"
    for path in (last, manifest):
        content = path.read_bytes()
        path.write_bytes(content[:-9])
        with pytest.raises(IncompleteResultsError, match=f"{path.name} is damaged"):
            read_results(tmp_path)
        path.write_bytes(content)
    pq.write_table(rows([2]), last)
    with pytest.raises(IncompleteResultsError, match="has 1 rows, but the manifest lists 2"):
        read_results(tmp_path)
    last.unlink()
    with pytest.raises(IncompleteResultsError, match="has 0 rows, but the manifest lists 2"):
        read_results(tmp_path)


def test_an_interrupted_run_is_read_only_on_request_and_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ResultsWriter(tmp_path, RUN) as writer:
        writer.add(rows([0, 1]))
        raise KeyboardInterrupt
    with pytest.raises(IncompleteResultsError, match="interrupted after 2 rows"):
        read_results(tmp_path)
    assert read_results(tmp_path, incomplete=True).num_rows == 2
    assert committed_rows(tmp_path).indices["val"].tolist() == [0, 1]
    with ResultsWriter(tmp_path, RUN, resume=True) as writer:
        writer.add(rows([2]))
        writer.finish({"val": 3})
    assert read_results(tmp_path)["index"].to_pylist() == [0, 1, 2]


def test_resuming_another_run_names_the_difference(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, RUN) as writer:
        writer.add(rows([0]))
    with pytest.raises(FileExistsError, match="resume=True"):
        ResultsWriter(tmp_path, RUN)
    with pytest.raises(ResumeError, match="its model is 'abc' and this run's is 'xyz'"):
        ResultsWriter(tmp_path, {**RUN, "model": "xyz"}, resume=True)
    with pytest.raises(ResumeError, match="its scores is"):
        ResultsWriter(tmp_path, {"model": "abc"}, resume=True)


def test_rows_without_an_index_are_counted(tmp_path: Path) -> None:
    unknown = rows([0]).set_column(1, "index", pa.array([None], pa.int64()))
    with ResultsWriter(tmp_path, RUN) as writer:
        writer.add(unknown)
        writer.finish({"val": 1})
    assert read_results(tmp_path)["index"].to_pylist() == [None]
    assert committed_rows(tmp_path).unknown == {"val": 1}


@pytest.mark.slow
def test_two_writers_cannot_share_a_directory(tmp_path: Path) -> None:
    with ResultsWriter(tmp_path, RUN), pytest.raises(RuntimeError, match="another process is writing results"):
        ResultsWriter(tmp_path, RUN, resume=True)
    ResultsWriter(tmp_path, RUN, resume=True).close()


def test_an_empty_directory_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="contains no results"):
        read_results(tmp_path)


def test_the_file_of_a_finished_run_is_read(tmp_path: Path) -> None:
    """The command and ``callback.save`` write one file; reading it and evaluating its directory need no other name."""
    rows = {"dataset": ["val", "val", "far"], "index": [0, 1, 0], "entropy": [0.2, 0.4, 0.9], "finite": [True] * 3}
    pq.write_table(pa.table(rows), tmp_path / "results.parquet")
    assert read_results(tmp_path).equals(pa.table(rows))
    assert StoredResults(tmp_path).rows == 3


KILLED = """
import os, random, signal, sys, time
import numpy as np
import pyarrow as pa
from lightning_gradmetrics.results.parts import ResultsWriter
from lightning_gradmetrics.results.reading import committed_rows
from pathlib import Path

directory, total = Path(sys.argv[1]), 4000


def score():
    done = committed_rows(directory).indices.get("val", np.array([], dtype=np.int64))
    left = np.setdiff1d(np.arange(total), done)
    with ResultsWriter(directory, {"scores": []}, rows_per_part=40, resume=True) as writer:
        for start in range(0, len(left), 8):
            index = left[start : start + 8]
            writer.add(pa.table({"dataset": ["val"] * len(index), "index": index, "entropy": index / 7}))
        writer.finish({"val": total})


def start():
    child = os.fork()
    if child == 0:
        score()
        os._exit(0)
    return child


moments = random.Random(0)
killed = 0
for _ in range(20):
    child = start()
    time.sleep(moments.uniform(0.01, 0.08))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
assert os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]) == 0
print(killed)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_a_run_that_is_killed_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """SIGKILL at twenty moments, then one run to the end: the table of an undisturbed run."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    table = read_results(tmp_path)
    assert table["index"].to_pylist() == list(range(4000))
    assert np.array_equal(table["entropy"].to_numpy(), np.arange(4000) / 7)
    assert not list(tmp_path.glob(".tmp-*"))


FULL = """
import resource, signal, sys
import numpy as np
import pyarrow as pa
from lightning_gradmetrics.results.parts import ResultsWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = ResultsWriter(sys.argv[1], {}, rows_per_part=10)
writer.add(pa.table({"dataset": ["val"] * 10, "index": np.arange(10)}))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
index = np.random.default_rng(0).integers(0, 2**60, 5000)
writer.add(pa.table({"dataset": ["val"] * 5000, "index": index}))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_a_disk_that_is_full_leaves_the_committed_parts(tmp_path: Path) -> None:
    """A limit on file sizes simulates a full disk, because the write fails in the same place."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "could not write 5000 rows" in done.stderr
    assert "free some space and resume the run" in done.stderr
    assert read_results(tmp_path, incomplete=True).num_rows == 10
    assert not list(tmp_path.glob(".tmp-*"))
