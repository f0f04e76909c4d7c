"""Compares the runs at the end of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

__all__ = ["CompareRuns"]


class CompareRuns(Callback):
    """Compares the runs of a sweep in one table at its end, like ``gradmetrics compare SWEEP_DIRECTORY``."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the comparison if there are at least two runs.

        Args:
            config: The configuration of the sweep.
            kwargs: Not used.
        """
        from lightning_gradmetrics.cli.compare import main

        directory = Path(config.hydra.sweep.dir)
        if len(list(directory.rglob("metrics.csv"))) > 1:
            main([str(directory), "--output", str(directory)])
