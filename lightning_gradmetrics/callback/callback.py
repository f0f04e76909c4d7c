"""The Lightning callback: scores every sample that a ``Trainer`` validates, tests or predicts, and evaluates the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_gradmetrics.callback import arguments as checks
from lightning_gradmetrics.callback.columns import Columns, SampleIds, check_columns, check_sample_id
from lightning_gradmetrics.callback.configured_fit import check_fit_source
from lightning_gradmetrics.callback.dataloaders import (
    Datasets,
    check_datasets,
    check_stages,
    dataset_roles,
    names_of_stage,
    rows_of_loaders,
)
from lightning_gradmetrics.callback.evaluating import evaluate_detectors
from lightning_gradmetrics.callback.fitted_scores import FittedScores
from lightning_gradmetrics.callback.hooks import RunHooks
from lightning_gradmetrics.callback.index_recording import IndexRecording
from lightning_gradmetrics.callback.labels import BatchReader
from lightning_gradmetrics.callback.logged import logged_metrics
from lightning_gradmetrics.callback.module import (
    check_sharding,
    check_spawned,
    check_split,
    is_side_by_side,
    scored_model,
)
from lightning_gradmetrics.callback.outcome import Outcome, model_facts
from lightning_gradmetrics.callback.pixel_outcome import PixelOutcome
from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.pytorch_lightning import also_callback_of_pytorch_lightning
from lightning_gradmetrics.callback.run import Run
from lightning_gradmetrics.callback.stage_choice import Loaders, StageNotices
from lightning_gradmetrics.callback.stages import FitStage, ScoreStage, Stage
from lightning_gradmetrics.callback.storing import is_limited, store_of
from lightning_gradmetrics.callback.text_outcome import TextOutcome, evaluate_tokens, logged_of_tokens
from lightning_gradmetrics.classifier.batches import split_batch
from lightning_gradmetrics.classifier.forward import Inputs, logits_in
from lightning_gradmetrics.classifier.sample_axis import SampleAxis, check_sample_axis
from lightning_gradmetrics.evaluation import Evaluation, Thresholds
from lightning_gradmetrics.pictures import PictureSource, check_top_k, picture_sources
from lightning_gradmetrics.pictures.pixels.settings import Pixels
from lightning_gradmetrics.pictures.pixels.source import PixelResults
from lightning_gradmetrics.results.output import Output, check_output
from lightning_gradmetrics.results.rows import Rows, empty_results
from lightning_gradmetrics.results.stores import Results
from lightning_gradmetrics.scores import FittedScore
from lightning_gradmetrics.scoring.layer_profile import Profile
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["GradientMetrics"]


class GradientMetrics(Outcome, PixelOutcome, TextOutcome, FittedScores, RunHooks):
    """Scores every sample at validate, test and predict time, and evaluates the scores.

    Logit and head scores reuse the forward pass that Lightning runs; all other scores share one further forward pass.
    Scores are computed for the model call inside the step, with its arguments and logits. The model is left unchanged.

    Args:
        scores: Names such as ``"gradnorm"`` or ``"gradnorm(temperature=2.0)"``, ``Score`` objects, or a mapping from
            column name to either.
        datasets: Names of the dataloaders, in order, or a mapping from name to role: ``"id"`` is in-distribution; any
            other word names a group of out-of-distribution sets, such as ``"near"`` or ``"far"``. Either form can be
            given by stage, as in ``{"test": {"mine": "id", "other": "far"}}``. If the dataloaders are a mapping, its
            keys are the names.
        head: The name of the classification head, a linear layer; found automatically if its output is what the model
            returns.
        submodule: The name of the submodule to score, if that is not the ``LightningModule`` itself.
        split_batch: A function from a batch to ``(inputs, labels or None)``.
        logits_fn: A function from the model's output to its logits ``(N, C)``.
        engine: The engine of the scores that need a backward pass, as in
            :func:`lightning_gradmetrics.gradient_statistics`.
        sample_axis: The axis of the samples in the model's inputs, as in :func:`lightning_gradmetrics.score`: 1 for time
            first ``(T, N, D)``, or a mapping from arguments to axes, with ``None`` for an argument that all samples share.
        prefix: The start of the names of the logged metrics; several callbacks of one Trainer need different ones.
        metrics: The metrics to log: any of ``"auroc"``, ``"fpr95"``, ``"aurc"``, ``"e_aurc"``, ``"augrc"``, ``"aupr"``
            and ``"aupr_in"``. These names cover every task except the joint one; a name such as ``"joint_auroc"`` or
            ``"ood_fpr95"`` selects one task. Every metric is logged in every epoch, as NaN where it is undefined.
        stages: The stages to score: any of ``"fit"`` (validation during a fit), ``"validate"`` (that and
            ``trainer.validate``), ``"test"`` and ``"predict"``. By default all; validation during a fit only if
            ``datasets`` matches its dataloaders.
        resamples: Bootstrap resamples for the intervals in ``evaluation``; 0, the default, for none.
        thresholds: The result of :func:`lightning_gradmetrics.evaluation.fit_thresholds`; each threshold adds a column
            ``<score>_accept`` to the results.
        profile: Whether to compute the gradient norm of every layer: true, the name of an objective, or a mapping with
            ``objective`` and ``norm``. It costs one more forward pass, and one more backward pass unless a score uses
            the same objective.
        top_k: How many of the highest-scoring samples of each dataset to list, by score, as in ``{"pseudo_label":
            20}``; with thumbnails if the inputs are images.
        output: A directory. Results of ``validate``, ``test`` and ``predict`` are written there as Parquet files during
            the run, every 100,000 rows or every minute, and are not kept in memory;
            :func:`lightning_gradmetrics.read_results` reads them. ``metrics=()`` also skips the evaluation at the end.
        resume: Whether to complete the results of an interrupted run in ``output``: rows that are already stored are
            not scored again. With :func:`lightning_gradmetrics.unfinished` the model does not run on them either.
        columns: Further columns of the results: ``"features"`` (the head's input) and ``"cosine_maps"``, or a mapping
            from name to a function of :class:`~lightning_gradmetrics.scoring.evidence.Evidence` that returns ``(N,
            ...)``.
        sample_id: The entry of a batch that names its samples, such as ``"path"``, or a callable from the batch to one
            id per sample. The ids become the column ``sample_id``.
        print_summary: Whether to print the main table after ``validate``, ``test`` and ``predict``.
        fit_on: ``"train"`` or ``"val"``: the dataloader on which fitted scores are fitted before their first use. It is
            taken from an earlier fit, the data module or the module. Call :meth:`fit` to choose other data.
        fitted: A folder of states written by :func:`lightning_gradmetrics.scores.save_fitted`.
        pixels: Settings for segmentation models (ignored labels, aggregates, segments, metrics and maps), such as
            ``lightning_gradmetrics.Pixels(ignore_index=255)``, or a mapping of its arguments.

    Attributes:
        results: After a run, a ``pyarrow.Table`` with one row per sample: dataset, index, prediction, label, one column
            per score, and ``finite``, which is false if the input, the logits or a score contain NaN or Inf; such a row
            is kept but excluded from every metric. ``index`` is the position in the dataloader's dataset (for a
            ``Subset``, the position in the subset), or null if it is unknown. An interrupted run keeps the rows scored
            so far. With several processes, rank 0 has all rows, each once; every other rank has only its own.
        sources: The picture sources of the run. The loggers receive their pictures, and :meth:`pictures` returns them.
            With several processes, rank 0 has the pictures of all samples.
        evaluation: The metrics, as returned by :func:`lightning_gradmetrics.evaluation.evaluate`.
        tokens: After a run over texts, a ``pyarrow.Table`` with one row per scored token.
        token_evaluation: The metrics of wrong tokens after a run over texts; intervals resample texts.

    Raises:
        ValueError: If a score or an objective is unknown, or an argument is invalid.
        TypeError: If an argument has the wrong type.
        FileExistsError: When a run starts, if ``output`` contains results and ``resume`` is false.
        ResumeError: When a run starts, if ``output`` contains the results of another model, other scores, arguments, data
            or another order; the message names the difference.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = GradientMetrics(["gradnorm", "max_softmax"], datasets={"cifar10": "id", "svhn": "far"})
        >>> callback.score_names
        ['gradnorm', 'max_softmax']
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
        datasets: Datasets = None,
        head: str | None = None,
        submodule: str | None = None,
        split_batch: Callable[[Any], tuple[Inputs, Tensor | None]] = split_batch,
        logits_fn: Callable[[Any], Tensor] = logits_in,
        engine: str = "auto",
        sample_axis: SampleAxis = 0,
        prefix: str = "gradmetrics",
        metrics: Sequence[str] = checks.DEFAULT_METRICS,
        stages: str | Sequence[str] | None = None,
        resamples: int = 0,
        thresholds: Thresholds | None = None,
        profile: bool | str | Mapping[str, Any] = False,
        top_k: Mapping[str, int] | None = None,
        output: str | Path | Output | None = None,
        resume: bool = False,
        columns: str | Sequence[str] | Columns = (),
        sample_id: str | int | SampleIds | None = None,
        print_summary: bool = True,
        fit_on: str | None = None,
        fitted: str | Path | None = None,
        pixels: Pixels | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        logits_fn = checks.check_callable("logits_fn", logits_fn, "from the model's output to its logits (N, C)")
        self.split_batch = checks.check_callable("split_batch", split_batch, "from a batch to (inputs, labels or None)")
        self.scorer = Scorer(
            checks.check_scores(resolve(scores)), checks.check_name("head", head, "fc"), logits_fn, engine
        )
        self.datasets = check_datasets(datasets)
        self.submodule = checks.check_name("submodule", submodule, "net")
        self.sample_axis = check_sample_axis(sample_axis)
        self.prefix = checks.check_prefix(prefix)
        self.metrics = checks.check_metrics(metrics)
        self.stages = check_stages(stages)
        self.resamples = checks.check_resamples(resamples)
        self.thresholds = checks.check_thresholds(thresholds)
        self.profile = Profile.of(profile)
        self.top_k = check_top_k(self.score_names, {} if top_k is None else top_k)
        self.output = check_output(output, resume)
        self.columns = check_columns(columns, self.score_names)
        self.sample_id = check_sample_id(sample_id)
        self._results: Results = empty_results(self.score_names)
        self.print_summary = checks.check_flag("print_summary", print_summary)
        check_fit_source(fit_on, fitted)
        self.fit_on, self.fitted = fit_on, fitted
        self.evaluation: Evaluation | None = None
        self.token_evaluation: Evaluation | None = None
        self.pixels = Pixels.of(pixels)
        self._pixels = PixelResults(self.pixels)
        self.sources: list[PictureSource] = []
        self._run: Run | None = None
        self._indices = IndexRecording()
        self._model: dict[str, Any] = {}
        self._finished = False
        self._logged: set[str] = set()
        self._notices = StageNotices()
        also_callback_of_pytorch_lightning(GradientMetrics)

    def scored_model(self, model: LightningModule) -> nn.Module:
        """Return the part of a module that is scored: the one named by ``submodule=``, or the one that defines the forward."""
        return scored_model(model, self.submodule, self.scorer.head)

    def _start(self, trainer: Trainer, module: LightningModule, dataloaders: Any) -> None:
        self._run = None
        stage = str(trainer.state.fn.value)  # type: ignore[union-attr]
        counted = Loaders(dataloaders, not is_side_by_side(trainer))
        names = names_of_stage(self.datasets, stage) if self._fitting is None else self._fitting[1]
        is_fitted = any(isinstance(score, FittedScore) for score in self.scorer.scores)
        if self._fitting is None and not self._notices.is_scored(stage, self.stages, is_fitted, names, counted):
            self._finished = True
            self._indices.pause()
            return
        processes, model, self._model = self._join(trainer), self.scored_model(module), model_facts(module)
        datasets, roles = counted.names(names, stage), dataset_roles(names, counted.names(names, stage))
        check_sharding(trainer.strategy, self.scorer.scores, model)
        check_split(dict(zip(datasets, counted.all, strict=True)), processes)
        is_fit = self._fitting is not None
        check_spawned(trainer, stage, self.output is not None, is_fit)
        vectors, has_ids = ((), False) if is_fit else (list(self.columns), self.sample_id is not None)
        rows = rows_of_loaders(datasets, counted.all, self.score_names, processes, vectors, has_ids)
        made: Stage
        if self._fitting is not None:
            made = FitStage(self._fitting[0], rows, roles if isinstance(names, Mapping) else None)
        else:
            if names is None:
                self._notices.of_roles(datasets)
            self._use_states(trainer, module, model)
            checks.check_targets(self.scorer.scores, model)
            made = self._score_stage(trainer, model, rows, counted.all, roles, processes)
        reader = BatchReader(self.split_batch, processes.warn, self.pixels)
        context = trainer.precision_plugin.forward_context
        drawn, transfers = self._indices.of_loaders(counted.all), self._indices.transfers(trainer, module)
        ids = None if is_fit else self.sample_id
        self._run = Run(made, model, drawn, transfers, roles, reader, context, processes, ids, self.sample_axis)

    def _score_stage(
        self,
        trainer: Trainer,
        model: nn.Module,
        rows: Sequence[Rows],
        loaders: Sequence[Any],
        roles: Mapping[str, str],
        processes: Processes,
    ) -> ScoreStage:
        """Return a stage that scores, with new picture sources and a new store of its results."""
        stage = str(trainer.state.fn.value)  # type: ignore[union-attr]
        self._pixels = PixelResults(self.pixels)
        self.sources = [*picture_sources(self.scorer.scores, self.profile, self.top_k), self._pixels]
        looks = [*(source.look for source in self.sources), *self.columns.values()]
        store = store_of(
            None if stage == "fit" else self.output,
            rows,
            loaders,
            self.thresholds,
            self.scorer,
            model,
            roles,
            self._described(stage),
            processes,
            is_limited(trainer, stage),
        )
        return ScoreStage(replace(self.scorer, looks=looks), rows, store, self.sources, self.columns, self._pixels)

    def _described(self, stage: str) -> dict[str, Any]:
        """Return the arguments that change the results, besides the scores and the model."""
        names = ("submodule", "split_batch", "columns", "sample_id", "sample_axis")
        return {"stage": stage, **{name: getattr(self, name) for name in names}, "logits_fn": self.scorer.logits_fn}

    def _finish(self, trainer: Trainer) -> dict[str, float]:
        """Store the fitted scores, or gather the rows and evaluate them. The logged metrics are the same on every rank."""
        if self._run is not None:
            self._run.finish()
        run, self._run, self._finished = self._run, None, True
        if run is None:
            return {}
        self._indices.pause()
        metrics = self._gathered(trainer, run, self._processes)
        self._leave()
        return metrics

    def _gathered(self, trainer: Trainer, run: Run, processes: Processes) -> dict[str, float]:
        """Gather the rows of all processes and return the metrics to log, or finish a fit."""
        if isinstance(run.stage, FitStage):
            fitted = run.stage.fitted(run.model, processes)
            self.scorer.scores = tuple(fitted.get(score.name, score) for score in self.scorer.scores)
            return {}
        stage = run.stage
        stage.note_missing(processes, run.skipped.of_datasets, run.skipped.selected)
        with closing(stage.store):
            parts = processes.gather((processes.together(stage.store.share), stage.kept()))
            metrics = processes.from_first(lambda: self._evaluated(trainer, stage, run.roles, parts))
        self._results = self._pixels.results = stage.store.results()
        return metrics

    def _evaluated(
        self, trainer: Trainer, stage: ScoreStage, roles: Mapping[str, str], parts: Sequence[tuple[Any, list[Any]]]
    ) -> dict[str, float]:
        """On rank 0: evaluate the rows of all processes, and pass the pictures to the loggers."""
        stage.store.join([shared for shared, _ in parts])
        stage.join([kept for _, kept in parts])
        self._results = self._pixels.results = stage.store.results()
        if self.output is not None and not self.metrics:
            return {}
        judged = stage.store.judged(self.score_names)
        are_texts = any(rows.are_texts for rows in stage.rows)
        scores = self.scorer.scores
        self.evaluation = evaluate_detectors(judged, scores, roles, self.resamples, labels_are_inputs=are_texts)
        if are_texts:
            self.token_evaluation = evaluate_tokens(self._results, scores, self.resamples)
        self._log(trainer)
        logged = logged_metrics(self.evaluation.metrics, self.prefix, self.metrics, self._logged)
        logged.update(self._pixels.logged(self.prefix))
        logged.update(logged_of_tokens(self.token_evaluation, self.prefix, self.metrics))
        self._logged.update(logged)
        return logged

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Discard the last run's results, and record the indices of the next run."""
        self._results, self._finished, self._is_set_up = empty_results(self.score_names), False, True
        self.evaluation = self.token_evaluation = None
        self._logged, self._notices = set(), StageNotices()
        self._indices.watch(trainer)

    def _interrupted(self, run: Run) -> Callable[[], str] | None:
        if not isinstance(run.stage, ScoreStage):
            return None
        run.stage.store.interrupt()
        self._results = self._pixels.results = run.stage.store.results()
        return run.stage.store.advice


also_callback_of_pytorch_lightning(GradientMetrics)
