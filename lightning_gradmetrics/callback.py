"""The Lightning callback: it watches the steps that a ``Trainer`` runs and scores every sample that passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradmetrics.batches import split_batch
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.evaluation import Evaluation, Thresholds, apply_thresholds, evaluate
from lightning_gradmetrics.fitting import Fitting
from lightning_gradmetrics.forward import Inputs, batch_size, call, check_inputs, check_model, logits_of
from lightning_gradmetrics.gallery import MapGallery, log_pictures
from lightning_gradmetrics.head import Capture, capturing, install
from lightning_gradmetrics.results import Rows, empty_results, merge_results, sample_indices
from lightning_gradmetrics.scores import FittedScore, ScoreLike, check_fitted, resolve
from lightning_gradmetrics.scoring import Scorer

__all__ = ["GradientMetrics"]


class GradientMetrics(Callback):
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
        model: The name of the submodule to score, where that is not the ``LightningModule`` itself.
        batch: From a batch to ``(inputs, labels or None)``.
        logits: From the model's output to its logits ``(N, C)``.
        engine: The engine of the scores that need a backward pass.
        prefix: What the logged metrics' names begin with.
        resamples: Bootstrap resamples for the intervals in ``evaluation``; 0, the default, for none.
        thresholds: From :func:`lightning_gradmetrics.evaluation.fit_thresholds`: each adds a column ``<score>_accept``
            to the results.

    Attributes:
        results: After a run, a ``pyarrow.Table``: dataset, index, prediction, label, one column a score, and
            ``finite``, which is false where the input, the logits or a score hold NaN or Inf: such a row is kept and
            never enters a metric. Under several processes rank 0 has all rows, each once, and the other ranks have
            their own.
        gallery: Cosine similarity maps of a few samples, where a score looks at them; the loggers get their pictures.
        evaluation: The metrics, as :func:`lightning_gradmetrics.evaluation.evaluate` gives them.

    Raises:
        ValueError: If a score is unknown, or the names do not fit the dataloaders.

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
        model: str | None = None,
        batch: Callable[[Any], tuple[Inputs, Tensor | None]] = split_batch,
        logits: Callable[[Any], Tensor] = logits_of,
        engine: str = "auto",
        prefix: str = "gradmetrics",
        resamples: int = 0,
        thresholds: Thresholds | None = None,
    ) -> None:
        super().__init__()
        self.scorer = Scorer(resolve(scores), head, logits, engine)
        self.datasets = datasets
        self.model = model
        self.batch = batch
        self.prefix = prefix
        self.resamples = resamples
        self.thresholds = thresholds
        self.results: pa.Table = empty_results(self.score_names)
        self.evaluation: Evaluation | None = None
        self.gallery: MapGallery | None = None
        self._rows: list[Rows] = []
        self._capture: Capture | None = None
        self._handles: list[RemovableHandle] = []
        self._finished = False
        self._fitting: Fitting | None = None

    @property
    def score_names(self) -> list[str]:
        """The names of the scores: the columns of the results."""
        return [score.name for score in self.scorer.scores]

    # Fitted scores

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

    def scored_model(self, model: LightningModule) -> nn.Module:
        """The part of a module that is scored: the one named in ``model=``, or what has the forward."""
        return _scored_model(model, self.model)

    def _outside(self, dataloader_idx: int, size: int) -> Tensor | None:
        """When fitting with roles, whether this dataloader's samples are out-of-distribution."""
        if self._fitting is None or not isinstance(self.datasets, Mapping):
            return None
        return torch.full((size,), self.datasets[self._rows[dataloader_idx].dataset] != "id")

    def _fit_finish(self, trainer: Trainer) -> None:
        """Join what all processes accumulated, and put the fitted scores in the place of those that were not."""
        assert self._fitting is not None and self._capture is not None
        seen: list[Any] = [self._fitting.seen]
        if trainer.world_size > 1:
            seen = [None] * trainer.world_size
            torch.distributed.all_gather_object(seen, self._fitting.seen)
        fitted = self._fitting.finish(self._capture.model, seen)
        self.scorer.scores = tuple(fitted.get(score.name, score) for score in self.scorer.scores)
        self.scorer.head = self.scorer.head or self._fitting.scorer.head

    # The run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the last run."""
        self._rows, self.results, self.evaluation = [], empty_results(self.score_names), None
        self._finished = False

    def _start(self, trainer: Trainer, pl_module: LightningModule, dataloaders: Any) -> None:
        loaders = _flat(dataloaders)
        world, rank = trainer.world_size, trainer.global_rank
        self._rows = [
            Rows(name, self.score_names, sample_indices(loader, rank, world), world, rank)
            for name, loader in zip(_names(self.datasets, dataloaders), loaders, strict=True)
        ]
        unknown = [rows.dataset for rows in self._rows if rows.indices is None]
        if world > 1 and unknown:
            rank_zero_warn(
                f"the order of {', '.join(unknown)} is not known beforehand (its sampler is neither sequential nor distributed): "
                "index is the position in the run, and rows that a sampler repeated to fill up cannot be told"
            )
        self.gallery = MapGallery.of(self.scorer.scores) if self._fitting is None else None
        scorer = self.scorer if self._fitting is None else self._fitting.scorer
        self._capture = scorer.capture(_scored_model(pl_module, self.model))
        if self._fitting is None:
            check_fitted(scorer.scores, self._capture.model)

    def _watch(self) -> None:
        assert self._capture is not None
        self._capture.clear()
        self._handles = install(self._capture)

    def _unwatch(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _score(self, trainer: Trainer, batch: Any, dataloader_idx: int) -> None:
        self._unwatch()
        assert self._capture is not None
        scorer = self.scorer if self._fitting is None else self._fitting.scorer
        inputs, labels = self.batch(batch)
        if not batch_size(inputs):
            return
        model = self._capture.model
        check_model(model)
        check_inputs(model, inputs)
        with trainer.precision_plugin.forward_context():
            if not self._capture.calls and not self._capture.outputs:
                _forward(self._capture, inputs)
            outside = self._outside(dataloader_idx, batch_size(inputs))
            evidence = scorer.evidence(
                self._capture, model, inputs, labels, outside, self._rows[dataloader_idx].dataset
            )
        self._capture.clear()
        if self._fitting is None:
            found, rows = scorer(evidence), self._rows[dataloader_idx]
            rows.add(inputs, evidence.given_logits, labels, found)
            if self.gallery is not None:
                self.gallery.add(rows.dataset, inputs, evidence, found)
        else:
            self._fitting.add(inputs, evidence, self._rows[dataloader_idx].first_seen(batch_size(inputs)))

    def _finish(self, trainer: Trainer) -> dict[str, float]:
        """Gather the rows, judge them, and give the metrics by their logged names; the same on every rank."""
        self._finished = True
        if self._fitting is not None:
            self._fit_finish(trainer)
            return {}
        names = [rows.dataset for rows in self._rows]
        tables = [rows.table() for rows in self._rows]
        for name, table in zip(names, tables, strict=True):
            if not table.num_rows:
                rank_zero_warn(f"the dataloader {name!r} gave no samples: it is not in the results")
        self._rows = []
        self.results = merge_results(tables or [empty_results(self.score_names)], names)
        if trainer.world_size > 1:
            self.results = _gather(self.results, names)
        if trainer.is_global_zero:
            roles = _roles(self.datasets, names)
            self.evaluation = evaluate(
                self.results, self.score_names, roles, self.baseline_names, resamples=self.resamples
            )
            if self.gallery is not None and trainer.loggers:
                log_pictures(trainer.loggers, self.gallery.pictures(), self.prefix, trainer.global_step)
        if self.thresholds is not None:
            self.results = apply_thresholds(self.results, self.thresholds)
        metrics = {} if self.evaluation is None else _flat_metrics(self.evaluation, self.prefix)
        return _broadcast(metrics) if trainer.world_size > 1 else metrics

    @property
    def baseline_names(self) -> list[str]:
        """The names of those scores that take no gradient."""
        return [score.name for score in self.scorer.scores if score.recipe.family == "baseline"]

    # Lightning's hooks, one line each

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.val_dataloaders)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start(trainer, pl_module, trainer.predict_dataloaders)

    def on_validation_batch_start(self, *_: Any) -> None:  # noqa: D102
        self._watch()

    def on_test_batch_start(self, *_: Any) -> None:  # noqa: D102
        self._watch()

    def on_predict_batch_start(self, *_: Any) -> None:  # noqa: D102
        self._watch()

    def on_validation_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(trainer, batch, dataloader_idx)

    def on_test_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(trainer, batch, dataloader_idx)

    def on_predict_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._score(trainer, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.sanity_checking:
            self._rows = []
        else:
            pl_module.log_dict(self._finish(trainer), sync_dist=trainer.world_size > 1)

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
        self._unwatch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: D102
        self._unwatch()
        self._capture = None
        if stage != "fit" and not self._finished:
            rank_zero_warn(
                f"the {stage} run gave no samples (are its dataloaders empty?): the results table has no rows"
            )


def _flat(dataloaders: Any) -> list[Any]:
    if isinstance(dataloaders, Mapping):
        return list(dataloaders.values())
    return list(dataloaders) if isinstance(dataloaders, (list, tuple)) else [dataloaders]


def _names(datasets: Sequence[str] | Mapping[str, str] | None, dataloaders: Any) -> list[str]:
    """The data sets' names, in the order of the dataloaders.

    Raises:
        ValueError: If their number is not that of the dataloaders.
    """
    keys = list(dataloaders) if isinstance(dataloaders, Mapping) else None
    count = len(_flat(dataloaders))
    if datasets is None:
        return keys or [f"dataloader_{i}" for i in range(count)]
    names = list(datasets)
    if keys is not None and isinstance(datasets, Mapping) and set(keys) == set(names):
        return keys
    if len(names) != count or len(set(names)) != count:
        raise ValueError(
            f"datasets= names {len(names)} data sets ({', '.join(names)}), and there are {count} dataloaders"
            + (f" ({', '.join(map(str, keys))})" if keys else "")
            + "; give each dataloader one name of its own, in their order"
        )
    return names


def _roles(datasets: Sequence[str] | Mapping[str, str] | None, names: list[str]) -> dict[str, str]:
    return dict(datasets) if isinstance(datasets, Mapping) else dict.fromkeys(names, "id")


def _scored_model(pl_module: LightningModule, name: str | None) -> nn.Module:
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
            "name the one to score, as in GradientMetrics(model='net')"
        )
    return next(iter(children.values()))


def _forward(capture: Capture, inputs: Inputs) -> None:
    """A forward of its own, where the step ran none that could be watched (a compiled or a cached model)."""
    with capturing(capture), torch.no_grad(), eager():
        call(capture.model, inputs)


def _gather(table: pa.Table, names: list[str]) -> pa.Table:
    """All processes' rows on rank 0; each other rank keeps its own."""
    root = torch.distributed.get_rank() == 0
    tables = [None] * torch.distributed.get_world_size() if root else None
    torch.distributed.gather_object(table, tables)
    return merge_results(tables, names) if root else table  # type: ignore[arg-type]


def _broadcast(metrics: dict[str, float]) -> dict[str, float]:
    """Rank 0's metrics on every rank."""
    box = [metrics]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def _flat_metrics(evaluation: Evaluation, prefix: str) -> dict[str, float]:
    """The defined metrics by their logged names, ``prefix/dataset/score/task_metric``; a group has its role for a data set."""
    return {
        f"{prefix}/{r['dataset'] or r['group']}/{r['score']}/{r['task']}_{r['metric']}": r["value"]
        for r in evaluation.records
        if r["value"] is not None
    }
