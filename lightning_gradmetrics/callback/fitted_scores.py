"""Fitted scores of the callback: their fit, and their states in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gradmetrics.callback.configured_fit import with_configured_states
from lightning_gradmetrics.callback.dataloaders import Names, check_datasets
from lightning_gradmetrics.callback.fitting import fitting_step
from lightning_gradmetrics.callback.stage_choice import check_fitted_in_fit
from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.classifier.sample_axis import SampleAxis
from lightning_gradmetrics.scores import FittedScore
from lightning_gradmetrics.scoring.fitting import Fitting
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.states import check_fitted, fitted_states, with_fitted_states

__all__ = ["FittedScores"]


class FittedScores(Callback):
    """The part of the callback that fits scores and stores their states in checkpoints."""

    scorer: Scorer
    split_batch: Callable[[Any], tuple[Inputs, Tensor | None]]
    prefix: str
    stages: tuple[str, ...] | None
    sample_axis: SampleAxis
    fit_on: str | None
    fitted: str | Path | None
    _fitting: tuple[Fitting, Names] | None = None
    """The fit that is running, and the roles of its dataloaders."""

    def fit(
        self, trainer: Trainer, model: LightningModule, dataloaders: Any, datasets: Mapping[str, str] | None = None
    ) -> None:
        """Fit the fitted scores on in-distribution data, before they are used.

        This runs ``trainer.predict`` over the data. A module without a ``predict_step`` runs its ``test_step`` or
        ``validation_step``, without logging. Scores that need no fit are left unchanged.

        Args:
            trainer: A trainer that this callback belongs to.
            model: The model.
            dataloaders: One or more dataloaders, of data that is not scored later.
            datasets: Names and roles of the dataloaders, if scores are fitted on both in-distribution (``"id"``) and
                out-of-distribution data.

        Raises:
            ValueError: If the trainer does not have this callback.
        """
        wanted = [score for score in self.scorer.scores if isinstance(score, FittedScore)]
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            raise ValueError("the trainer does not have this callback: pass Trainer(callbacks=[callback])")
        if not wanted:
            rank_zero_warn("none of the scores needs a fit: nothing was done")
            return
        self._fitting = (Fitting(wanted, replace(self.scorer)), check_datasets(datasets))  # type: ignore[assignment]
        try:
            with fitting_step(model, self.split_batch):
                trainer.predict(model, dataloaders, return_predictions=False)
        finally:
            self._fitting = None

    def _use_states(self, trainer: Trainer, module: LightningModule, model: nn.Module) -> None:
        """Load the states of the fitted scores from ``fitted=``, or fit them on ``fit_on=``, before their first use."""
        self.scorer.scores = with_configured_states(
            self.scorer, model, module, trainer, self.split_batch, self.fit_on, self.fitted, self.sample_axis
        )
        check_fitted(self.scorer.scores, model)

    @property
    def state_key(self) -> str:
        """Return the key of the fitted states in a checkpoint."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the fitted scores, as tensors and strings."""
        return {"fitted": fitted_states(self.scorer.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of the fitted scores from a checkpoint.

        Raises:
            ValueError: If a state was made for another score or other arguments.
        """
        self.scorer.scores = with_fitted_states(self.scorer.scores, state_dict.get("fitted", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to score fitted scores during a fit, while the weights change.

        Raises:
            ValueError: If ``stages`` contains ``"fit"`` and a score is fitted.
        """
        if trainer.enable_validation:
            check_fitted_in_fit(self.scorer.scores, self.stages)
