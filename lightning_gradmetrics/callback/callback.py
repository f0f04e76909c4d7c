"""The Lightning callback: it scores every sample that a ``Trainer`` validates, tests or predicts, and judges the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_gradmetrics.callback.dataloaders import dataset_roles, rows_of_loaders
from lightning_gradmetrics.callback.hooks import StageCallback, processes_of, scored_model
from lightning_gradmetrics.callback.stages import FitStage, ScoreStage, Stage
from lightning_gradmetrics.classifier.batches import split_batch
from lightning_gradmetrics.classifier.forward import Inputs, logits_of
from lightning_gradmetrics.evaluation import Evaluation, Thresholds, apply_thresholds, evaluate
from lightning_gradmetrics.evaluation.metrics import logged_metrics
from lightning_gradmetrics.pictures import (
    MapGallery,
    Picture,
    PictureSource,
    check_top_k,
    log_pictures,
    picture_sources,
)
from lightning_gradmetrics.results.table import empty_results, largest_of_each, merge_results
from lightning_gradmetrics.scores import FittedScore, ScoreLike, check_fitted, resolve
from lightning_gradmetrics.scoring.fitting import Fitting
from lightning_gradmetrics.scoring.layer_profile import Profile
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["GradientMetrics"]


class GradientMetrics(StageCallback):
    """Scores every sample at validate, test and predict time, and judges the scores.

    Scores of the logits and of the head use the forward that Lightning runs anyway; the others share one forward of
    their own. The model is left exactly as it was.

    Args:
        scores: Names, as ``"gradnorm"`` or ``"gradnorm(temperature=2.0)"``, or ``Score`` objects, or a mapping that
            names them.
        datasets: Names of the dataloaders, in their order; or a mapping from name to role: ``"id"`` is
            in-distribution, any other word names a group of out-of-distribution sets, as ``"near"`` or ``"far"``.
            Without it, a mapping of dataloaders gives its keys.
        head: The name of the classification head, a linear layer; found by itself where its output is what the model
            returns.
        submodule: The name of the submodule to score, where that is not the ``LightningModule`` itself.
        split_batch: From a batch to ``(inputs, labels or None)``.
        logits_fn: From the model's output to its logits ``(N, C)``.
        engine: The engine of the scores that need a backward pass.
        prefix: What the logged metrics' names begin with.
        resamples: Bootstrap resamples for the intervals in ``evaluation``; 0, the default, for none.
        thresholds: From :func:`lightning_gradmetrics.evaluation.fit_thresholds`: each adds a column ``<score>_accept``
            to the results.
        profile: Whether to look at the gradient norm of every layer: true, an objective's name, or the arguments
            ``objective`` and ``norm`` by name. It costs a forward, and a backward unless a score takes the same.
        top_k: How many samples with the largest scores to list of each data set, by score, as
            ``{"pseudo_label": 20}``; with their pictures where the inputs are images.

    Attributes:
        results: After a run, a ``pyarrow.Table``: dataset, index, prediction, label, one column a score, and
            ``finite``, which is false where the input, the logits or a score hold NaN or Inf: such a row is kept and
            never enters a metric. Under several processes rank 0 has all rows, each once, and the other ranks have
            their own.
        sources: What made pictures in the run; the loggers get them, and :meth:`pictures` gives them. Under several
            processes rank 0 has those of all samples.
        evaluation: The metrics, as :func:`lightning_gradmetrics.evaluation.evaluate` gives them.

    Raises:
        ValueError: If a score or an objective is unknown, or the names do not fit the dataloaders.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GradientMetrics(["gradnorm", "max_softmax"], datasets={"cifar10": "id", "svhn": "far"})
        >>> callback.scorer.scores[0].name
        'gradnorm'
    """

    def __init__(
        self,
        scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike] = (
            "max_softmax",
            "entropy",
            "energy",
            "gradnorm",
            "gradtrust",
        ),
        *,
        datasets: Sequence[str] | Mapping[str, str] | None = None,
        head: str | None = None,
        submodule: str | None = None,
        split_batch: Callable[[Any], tuple[Inputs, Tensor | None]] = split_batch,
        logits_fn: Callable[[Any], Tensor] = logits_of,
        engine: str = "auto",
        prefix: str = "gradmetrics",
        resamples: int = 0,
        thresholds: Thresholds | None = None,
        profile: bool | str | Mapping[str, Any] = False,
        top_k: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.scorer = Scorer(resolve(scores), head, logits_fn, engine)
        self.datasets = datasets
        self.submodule = submodule
        self.split_batch = split_batch
        self.prefix = prefix
        self.resamples = resamples
        self.thresholds = thresholds
        self.profile = Profile.of(profile)
        self.top_k = check_top_k(self.score_names, top_k or {})
        self.results: pa.Table = empty_results(self.score_names)
        self.evaluation: Evaluation | None = None
        self.sources: list[PictureSource] = []
        self._fitting: Fitting | None = None

    @property
    def score_names(self) -> list[str]:
        """The names of the scores: the columns of the results."""
        return [score.name for score in self.scorer.scores]

    @property
    def gallery(self) -> MapGallery | None:
        """Cosine similarity maps of a few samples, where a score looks at them."""
        return next((source for source in self.sources if isinstance(source, MapGallery)), None)

    def pictures(self) -> list[Picture]:
        """The last run's pictures, drawn anew."""
        return [picture for source in self.sources for picture in source.pictures()]

    def tables(self) -> dict[str, pa.Table]:
        """What goes with them: ``profile``, a row a data set and layer, and ``largest``, a row an example."""
        tables = {name: table for source in self.sources for name, table in source.tables().items()}
        return {**tables, "largest": largest_of_each(self.results, self.top_k)} if self.top_k else tables

    @property
    def baseline_names(self) -> list[str]:
        """The names of those scores that take no gradient."""
        return [score.name for score in self.scorer.scores if score.recipe.family == "baseline"]

    def scored_model(self, model: LightningModule) -> nn.Module:
        """The part of a module that is scored: the one named in ``submodule=``, or what has the forward."""
        return scored_model(model, self.submodule)

    def fit(
        self, trainer: Trainer, model: LightningModule, dataloaders: Any, datasets: Mapping[str, str] | None = None
    ) -> None:
        """Fit the scores that need it, on in-distribution data, before they score.

        It is a ``trainer.predict`` over the data, with all that a ``Trainer`` brings: device, precision, processes,
        progress bar. Scores that need no fit are left alone; without any, it does nothing but say so.

        Args:
            trainer: A trainer that this callback belongs to.
            model: The model.
            dataloaders: One dataloader or several, of data that is not scored later.
            datasets: Names and roles of the dataloaders, where scores are fitted on in- (``"id"``) and
                out-of-distribution data.

        Raises:
            ValueError: If the callback is not one of the trainer's.
        """
        wanted = [score for score in self.scorer.scores if isinstance(score, FittedScore)]
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            raise ValueError("this callback is not one of the trainer's: make it as Trainer(callbacks=[callback])")
        if not wanted:
            rank_zero_warn("none of the scores needs a fit: nothing was done")
            return
        kept, self.datasets = self.datasets, datasets
        self._fitting = Fitting(wanted, self.scorer)
        try:
            trainer.predict(model, dataloaders, return_predictions=False)
        finally:
            self._fitting, self.datasets = None, kept

    # The stages of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the last run."""
        super().setup(trainer, pl_module, stage)
        self.results, self.evaluation = empty_results(self.score_names), None

    def begin(self, trainer: Trainer, model: nn.Module, dataloaders: Any) -> Stage:
        """Score the samples, or fit on them."""
        rows = rows_of_loaders(self.datasets, dataloaders, self.score_names, processes_of(trainer))
        if self._fitting is not None:
            return FitStage(self._fitting, rows, self.datasets if isinstance(self.datasets, Mapping) else None)
        check_fitted(self.scorer.scores, model)
        self.sources = picture_sources(self.scorer.scores, self.profile, self.top_k)
        self.scorer.looks = [source.look for source in self.sources]
        return ScoreStage(self.scorer, rows, self.sources)

    def end(self, trainer: Trainer, model: nn.Module, stage: Stage) -> dict[str, float]:
        """Take the fitted scores, or gather the rows and judge them."""
        processes = processes_of(trainer)
        if isinstance(stage, FitStage):
            stage.finish(self.scorer, model, processes)
            return {}
        self.results = stage.results(processes)
        parts = processes.gather((self.results, stage.kept()))
        metrics = processes.from_first(lambda: self._judge(trainer, stage, parts))
        if self.thresholds is not None:
            self.results = apply_thresholds(self.results, self.thresholds)
        return metrics

    def _judge(
        self, trainer: Trainer, stage: ScoreStage, parts: Sequence[tuple[pa.Table, list[Any]]]
    ) -> dict[str, float]:
        """On rank 0: judge the rows of all processes, and give the loggers their pictures."""
        self.results = merge_results([table for table, _ in parts], stage.names)
        stage.join([kept for _, kept in parts])
        roles = dataset_roles(self.datasets, stage.names)
        self.evaluation = evaluate(self.results, self.score_names, roles, self.baseline_names, resamples=self.resamples)
        if self.sources and trainer.loggers:
            log_pictures(trainer.loggers, self.pictures(), self.prefix, trainer.global_step)
        return logged_metrics(self.evaluation.metrics, self.prefix)
