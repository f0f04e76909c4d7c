"""The hooks that Lightning calls: each starts, continues or ends a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_gradmetrics.callback.configured_fit import note_loaders
from lightning_gradmetrics.callback.index_recording import IndexRecording
from lightning_gradmetrics.callback.module import processes_of_run
from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.run import Run
from lightning_gradmetrics.callback.signals import note_sigterm, stop_after_sigterm

__all__ = ["RunHooks"]


def _before(step: str) -> Callable[..., None]:
    """Return the hook that runs before each batch of a step."""

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
    fit_on: str | None = None
    _finished = False
    _processes = Processes()
    """The processes of the current run."""
    _signals: Callable[[], None] | None = None
    """Restores the handling of SIGTERM after the run."""

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle: everything except the current run."""
        forgotten: dict[str, Any] = {
            "_run": None,
            "_fitting": None,
            "_processes": Processes(),
            "_signals": None,
            "_drawn": (None, None, []),
        }
        return {**vars(self), **forgotten, "_indices": IndexRecording()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the dataloaders of the fit, if scores are fitted on one of them."""
        if self.fit_on is not None:
            note_loaders(trainer)

    def _start(self, trainer: Trainer, module: LightningModule, dataloaders: Any) -> None:
        """Start a run over the dataloaders of a stage."""
        raise NotImplementedError

    def _finish(self, trainer: Trainer) -> dict[str, float]:
        """End the run, and return the metrics to log."""
        raise NotImplementedError

    def _interrupted(self, run: Run) -> Callable[[], str] | None:
        """Keep the scored rows after an error or a signal, and return a function that returns advice for the user."""
        raise NotImplementedError

    def _join(self, trainer: Trainer) -> Processes:
        """Return the processes of a new run; from now on a failure in one ends all of them."""
        self._leave()
        self._processes = processes_of_run(trainer)
        if self._processes.count > 1:
            self._signals = note_sigterm(trainer)
        return self._processes

    def _leave(self) -> Processes:
        """Clear the processes of the run, and return them."""
        processes, self._processes = self._processes, Processes()
        if self._signals is not None:
            self._signals()
            self._signals = None
        return processes

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
            stop_after_sigterm(trainer)
            self._processes.check()

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
        """Stop observing, notify the other processes, keep the scored rows, and print how to resume."""
        self._indices.stop()
        run, self._run = self._run, None
        self._processes.raise_alarm(exception)
        advice = None
        if run is not None:
            run.stop()
            advice = self._interrupted(run)
        self._leave().wait_for_others()
        text = advice() if advice is not None and trainer.is_global_zero else ""
        if text:
            print(f"\n{text}", file=sys.stderr, flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop observing, and warn about a run without samples."""
        self._indices.stop()
        run, self._run = self._run, None
        self._leave()
        if run is not None:
            run.close()
        if stage != "fit" and not self._finished:
            rank_zero_warn(
                f"the {stage} run returned no samples (are its dataloaders empty?): the results have no rows"
            )
