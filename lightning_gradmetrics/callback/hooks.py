"""Lightning's hooks, in one place: a callback that hands every batch of validate, test and predict to a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.stages import Stage
from lightning_gradmetrics.classifier.forward import Inputs, batch_size
from lightning_gradmetrics.scoring.step import Watch

__all__ = ["StageCallback", "processes_of", "scored_model"]


class StageCallback(Callback):
    """Watches the steps that a ``Trainer`` runs.

    A subclass says what is done with them: :meth:`begin`, :meth:`end`, and ``split_batch``, from a batch to its inputs and
    labels.
    """

    split_batch: Callable[[Any], tuple[Inputs, Tensor | None]]

    def __init__(self) -> None:
        super().__init__()
        self._stage: Stage | None = None
        self._watch: Watch | None = None
        self._finished = False

    def begin(self, trainer: Trainer, model: nn.Module, dataloaders: Any) -> Stage:
        """The stage that takes the batches of these dataloaders.

        Args:
            trainer: Runs them.
            model: The part of the module that is scored.
            dataloaders: One dataloader or several.
        """
        raise NotImplementedError

    def end(self, trainer: Trainer, model: nn.Module, stage: Stage) -> dict[str, float]:
        """After the last batch: metrics by their logged names, the same on every rank."""
        raise NotImplementedError

    def scored_model(self, model: LightningModule) -> nn.Module:
        """The part of a module that is scored."""
        return scored_model(model)

    # The run: its start, a batch, its end

    def _start(self, trainer: Trainer, pl_module: LightningModule, dataloaders: Any) -> None:
        model = self.scored_model(pl_module)
        self._stage = self.begin(trainer, model, dataloaders)
        self._watch = Watch(self._stage.scorer, model)

    def _take(self, trainer: Trainer, batch: Any, place: int) -> None:
        assert self._watch is not None and self._stage is not None
        self._watch.stop()
        inputs, labels = self.split_batch(batch)
        if not batch_size(inputs):
            return
        with trainer.precision_plugin.forward_context():
            outside = self._stage.outside(place, batch_size(inputs))
            evidence = self._watch.evidence(inputs, labels, outside, self._stage.rows[place].dataset)
        self._stage.add(place, inputs, labels, evidence)

    def _finish(self, trainer: Trainer) -> dict[str, float]:
        assert self._watch is not None and self._stage is not None
        stage, self._stage, self._finished = self._stage, None, True
        return self.end(trainer, self._watch.model, stage)

    # What Lightning calls

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._finished = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.predict_dataloaders)

    def on_validation_batch_start(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._watch is not None
        self._watch.start()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._take(trainer, batch, dataloader_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if not trainer.sanity_checking:
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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: D102
        if self._watch is not None:
            self._watch.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        if self._watch is not None:
            self._watch.stop()
        self._stage = self._watch = None
        if stage != "fit" and not self._finished:
            rank_zero_warn(
                f"the {stage} run gave no samples (are its dataloaders empty?): the results table has no rows"
            )


def processes_of(trainer: Trainer) -> Processes:
    """The trainer's processes, as this one sees them."""
    return Processes(trainer.world_size, trainer.global_rank)


def scored_model(pl_module: LightningModule, name: str | None = None) -> nn.Module:
    """The named submodule, or the module itself, or its only child where the module has no forward.

    Raises:
        ValueError: If there is no such submodule, or it is not clear which to take.
    """
    children = {key: child for key, child in pl_module.named_children() if next(child.parameters(), None) is not None}
    if name is not None:
        if name not in dict(pl_module.named_modules()):
            raise ValueError(
                f"{type(pl_module).__name__} has no submodule {name!r}; its children are: {', '.join(children) or 'none'}"
            )
        return pl_module.get_submodule(name)
    if type(pl_module).forward is not LightningModule.forward:
        return pl_module
    if len(children) != 1:
        raise ValueError(
            f"{type(pl_module).__name__} has no forward, and {len(children)} children with parameters ({', '.join(children)}): "
            "name the one to score, as in GradientMetrics(submodule='net')"
        )
    return next(iter(children.values()))
