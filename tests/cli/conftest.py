"""The command in this process: faster than a subprocess, for tests that do not need one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from lightning_gradmetrics.cli.command import main

Command = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run ``gradmetrics ARGUMENTS`` in an empty folder; environment, import path and modules are restored afterwards."""

    def run(*arguments: str) -> CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gradmetrics", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        for name in ("HYDRA_FULL_ERROR", "GRADMETRICS_ONE_LINE_ERRORS", "TORCH_CPP_LOG_LEVEL"):
            monkeypatch.setenv(name, "")  # so that it is restored
            os.environ.pop(name)
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        printed = capsys.readouterr()
        return CompletedProcess(list(arguments), code, printed.out, printed.err)

    yield run
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
