"""Files of a run are complete or absent, in a directory that is used by one run."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_gradmetrics.cli.files import RunDirectoryInUse, reserved
from lightning_gradmetrics.results.replacing import added, replaced, write_csv, write_text


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with replaced(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_after_an_error_the_old_file_is_still_there(tmp_path: Path) -> None:
    path = write_text(tmp_path / "file.txt", "old")
    with pytest.raises(RuntimeError), replaced(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_directory_replaces_a_directory(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with replaced(tmp_path / "states") as folder:
            folder.mkdir()
            (folder / name).touch()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["states"]


def test_files_are_added_when_all_are_complete(tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    with added(figures) as folder:
        (folder / "a").write_text("new")
        figures.mkdir()  # meanwhile, as when another directory is replaced
        (figures / "a").write_text("old")
        (figures / "b").touch()
    assert (figures / "a").read_text() == "new" and len(list(figures.iterdir())) == 2
    with pytest.raises(RuntimeError), added(figures) as folder:
        (folder / "c").touch()
        raise RuntimeError
    assert len(list(figures.iterdir())) == 2 and list(tmp_path.iterdir()) == [figures]


def replace_and_be_killed(folder: Path, step: str) -> None:
    """Replace a directory, and kill this process before or after a rename of it."""
    when, name = step.split()
    real = getattr(Path, name)

    def killed(self: Path, target: Path) -> None:
        if when == "after":
            real(self, target)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(Path, name, killed)
    with replaced(folder / "states") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()


def status_of_fork(work: Callable[[], None]) -> int:
    """Return the exit code of a copy of this process that does the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pytest-xdist has threads; the copy needs none of them
        child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
@pytest.mark.parametrize(
    ("step", "expected"),
    [("before rename", "old"), ("after rename", "old"), ("before replace", "old"), ("after replace", "new")],
)
def test_a_kill_while_a_directory_is_replaced_leaves_one_of_the_versions(
    step: str, expected: str, tmp_path: Path
) -> None:
    """After the next start one version is in place, and the directory can be replaced again."""
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "old").touch()
    assert status_of_fork(lambda: replace_and_be_killed(tmp_path, step)) == -signal.SIGKILL
    with reserved(tmp_path):
        assert [path.name for path in (tmp_path / "states").iterdir()] == [expected]
        assert not (tmp_path / ".states.old").exists()
    with replaced(tmp_path / "states") as folder:
        folder.mkdir()
        (folder / "newest").touch()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["newest"]


def test_csv_of_rows_with_different_keys(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [{"a": 1}, {"b": None, "a": "x,y"}])
    assert list(csv.DictReader(path.read_text().splitlines())) == [{"a": "1", "b": ""}, {"a": "x,y", "b": ""}]


HOLD = """
import sys, time
from pathlib import Path
from lightning_gradmetrics.cli.files import reserved

with reserved(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    """The refusal lasts until the first run ends, even if it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryInUse, match="another run is writing"), reserved(tmp_path):
            pass
        other.kill()
        other.wait()
        time.sleep(0.1)
        with reserved(tmp_path):
            assert list(tmp_path.iterdir()) == []
