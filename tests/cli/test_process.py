"""The end of the command's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, sys, threading, time
from lightning_gradmetrics.cli import process

class Freed:
    def __del__(self):
        print("freed")

kept = Freed()

def late():
    time.sleep(0.2)
    print("thread")

def main():
    threading.Thread(target=late).start()
    atexit.register(print, "registered")
    {ending}

process.main = main
process.run_process()
"""


@pytest.mark.parametrize(
    ("ending", "status", "words"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(130)", 130, ""),
        ("sys.exit('a message')", 1, "a message"),
        ("raise ValueError('an error')", 1, "ValueError: an error"),
    ],
)
def test_it_keeps_its_status_and_frees_no_object(tmp_path: Path, ending: str, status: int, words: str) -> None:
    """Threads end and functions of ``atexit`` run first."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(ending=ending))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=100)
    assert done.returncode == status and done.stdout.split() == ["thread", "registered"]
    assert words in done.stderr and bool(words) == bool(done.stderr)
