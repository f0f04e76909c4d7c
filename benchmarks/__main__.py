"""Run a benchmark: ``python -m benchmarks NAME [options]``; ``NAME --help`` lists its options."""

from __future__ import annotations

import sys
from importlib import import_module

NAMES = (
    "callback",
    "engine",
    "evaluation",
    "first_call",
    "gga",
    "gpu",
    "intervals",
    "language",
    "large",
    "large_images",
    "meters",
    "segmentation",
    "small",
    "soak",
    "start",
    "zoo",
    "zoo_segmentation",
)


def main() -> None:
    """Run the named benchmark."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m benchmarks NAME [options]; NAME is one of: {', '.join(NAMES)}")
    import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


main()
