"""``python -m lightning_gradmetrics.report RUN_DIRECTORY [-o FILE]``: rewrite the report of a finished run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_gradmetrics.report import ReportError, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, print its path, and return the exit status: 0, or 2 if the run cannot be read."""
    description = "Write the report of a run as a single HTML file that works offline."
    parser = argparse.ArgumentParser(prog="python -m lightning_gradmetrics.report", description=description)
    parser.add_argument("run_directory", type=Path, help="contains metrics.json and results.parquet")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file to write (default: report.html in the run directory)"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_directory, options.output))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
