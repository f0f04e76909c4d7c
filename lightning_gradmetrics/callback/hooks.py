"""The hooks that Lightning calls: each starts, continues or ends a run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_gradmetrics.callback.index_recording import IndexRecording
from lightning_gradmetrics.callback.run import Run

__all__ = ["RunHooks"]


def _before(step: str) -> Callable[..., None]:
    """Return the hook before a batch of a step."""

    def hook(
        self: RunHooks,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._run is not None:
            self._run.start_batch(pl_module, step, batch)

    return hook


class RunHooks(Callback):
    """Starts, continues and ends a run when Lightning calls its hooks."""

    _run: Run | None = None
    _indices: IndexRecording
    _finished = False

    def _start(self, trainer: Trainer, module: LightningModule, dataloaders: Any) -> None:
        """Start a run over the dataloaders of a stage."""
        raise NotImplementedError

    def _finish(self, trainer: Trainer) -> dict[str, float]:
        """End the run, and return the metrics to log."""
        raise NotImplementedError

    def _interrupted(self, run: Run) -> str:
        """Keep the scored rows after an error or a signal, and return advice for the user."""
        raise NotImplementedError

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.predict_dataloaders)

    on_validation_batch_start = _before("validation_step")
    on_test_batch_start = _before("test_step")
    on_predict_batch_start = _before("predict_step")

    def on_validation_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._run is not None:
            self._run.end_batch(batch_idx, dataloader_idx, batch)
            if trainer.received_sigterm:  # Lightning's prediction loop would go on to its end
                raise SIGTERMException(128 + signal.SIGTERM)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.sanity_checking:
            self._indices.pause()
        else:
            self.on_test_epoch_end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        pl_module.log_dict(self._finish(trainer), sync_dist=trainer.world_size > 1)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        metrics = self._finish(trainer)
        if not metrics:
            return
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop observing, keep the scored rows, and print how to resume."""
        self._indices.stop()
        run, self._run = self._run, None
        if run is None:
            return
        run.stop()
        advice = self._interrupted(run)
        if advice and trainer.is_global_zero:
            print(f"\n{advice}", file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop observing, and warn about a run without samples."""
        self._indices.stop()
        run, self._run = self._run, None
        if run is not None:
            run.close()
        if stage != "fit" and not self._finished:
            rank_zero_warn(
                f"the {stage} run returned no samples (are its dataloaders empty?): the results have no rows"
            )
