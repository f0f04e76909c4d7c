"""The command ``gradmetrics``; it imports torch only if something is to be run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lightning_gradmetrics.cli.arguments import check_arguments, own_factories
from lightning_gradmetrics.cli.configuration import configuration_directory
from lightning_gradmetrics.cli.errors import UsageError, one_line
from lightning_gradmetrics.cli.help import help_text, version_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["configuration_directory", "main"]

INTERRUPTED = 130
"""The exit status after Ctrl-C at any moment."""

FULL_ERROR = "HYDRA_FULL_ERROR"
ONE_LINE = "GRADMETRICS_ONE_LINE_ERRORS"
"""Tells child processes that :data:`FULL_ERROR` in their environment was not set by the user."""


def main() -> None:
    """Run a subcommand, or otherwise the Hydra command line; errors print one line and exit with status 1, Ctrl-C with 130."""
    arguments = sys.argv[1:]
    wants_traceback = os.environ.get(FULL_ERROR) == "1" and ONE_LINE not in os.environ
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as ending:
        if isinstance(ending.__context__, KeyboardInterrupt):  # a Trainer ends an interrupted run with status 1
            sys.exit(INTERRUPTED)
        raise
    except Exception as error:
        if wants_traceback:
            raise
        _exit_with(error)


def _dispatch(arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        COMMANDS[name](arguments[1:])
    elif "--help" in arguments or "-h" in arguments:
        print(help_text())
    elif "--version" in arguments:
        print(version_text())
    else:
        check_arguments(arguments, COMMANDS)
        _run_hydra(arguments)


def _run_hydra(arguments: Sequence[str]) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait actively delay small work on a busy machine
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # silences a warning of torch's profiler about earlier memory
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences two lines for every measured score
    if os.environ.get(FULL_ERROR) != "1":
        os.environ[ONE_LINE] = os.environ[FULL_ERROR] = "1"  # Hydra raises, and main prints one line
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # for model._target_=mine.net
    sys.argv[1:] = own_factories(arguments)
    import hydra

    hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name="config")(_job)()


def _job(config: DictConfig) -> None:
    """Run one job of Hydra. In this process, an error exits immediately, because Hydra would print a second line."""
    from hydra.core.hydra_config import HydraConfig

    from lightning_gradmetrics.cli.run import run

    launcher = HydraConfig.get().launcher._target_
    if ONE_LINE not in os.environ or not launcher.startswith("hydra._internal"):
        run(config)
        return
    try:
        run(config)
    except Exception as error:
        _exit_with(error)


def _exit_with(error: Exception) -> NoReturn:
    print(f"gradmetrics: {one_line(error)}", file=sys.stderr)
    sys.exit(1)


def _scores(arguments: Sequence[str]) -> None:
    """List the scores."""
    _no_arguments("scores", arguments)
    from rich.console import Console

    from lightning_gradmetrics.cli.score_list import scores_table

    Console().print(scores_table())


def _report(arguments: Sequence[str]) -> None:
    """Rewrite the report of a run."""
    if not arguments or arguments[0].startswith("-"):
        raise UsageError("usage: gradmetrics report DIR, where DIR contains metrics.json and results.parquet")
    from lightning_gradmetrics.report import write_report
    from lightning_gradmetrics.results.replacing import replaced

    for directory in arguments:
        path = Path(directory) / "report.html"
        with replaced(path) as file:
            write_report(Path(directory), file)
        print(path)


def _compare(arguments: Sequence[str]) -> None:
    """Compare runs."""
    from lightning_gradmetrics.cli.compare import main as compare

    compare(arguments)


def _help(arguments: Sequence[str]) -> None:
    print(help_text())


def _version(arguments: Sequence[str]) -> None:
    print(version_text())


def _no_arguments(name: str, arguments: Sequence[str]) -> None:
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        raise UsageError(f"gradmetrics {name} takes no arguments, got {argument!r}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "scores": _scores,
    "compare": _compare,
    "report": _report,
    "help": _help,
    "version": _version,
}
"""The subcommands; Hydra handles every other command line."""

if __name__ == "__main__":
    main()
