"""Step 1: build scores, data, model, callback and trainer from the configuration, and check their compatibility."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.classifier.forward import Inputs, batch_size, call, preserved, tensors_in
from lightning_gradmetrics.cli.configuration import Settings
from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.factories import build_data, build_model, build_scores
from lightning_gradmetrics.cli.interrupted import check_directory, output_of
from lightning_gradmetrics.cli.progress import notice, trainer_progress
from lightning_gradmetrics.cli.second_process import usable_cores
from lightning_gradmetrics.cli.sharing import SharedFolder, shared_folder
from lightning_gradmetrics.scores import FittedScore, Score

__all__ = ["Experiment", "prepare"]


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs, built and checked.

    Args:
        settings: The plain settings.
        scores: All scores of the configuration.
        data: The data.
        model: The model.
        callback: Scores the samples; with cross-validation it has no fitted scores.
        trainer: Runs the model.
        directory: The run directory.
        description: A description of the model for the report.
        shared: What the jobs of a sweep share, or ``None``.
    """

    settings: Settings
    scores: tuple[Score, ...]
    data: EvaluationData
    model: LightningModule
    callback: GradientMetrics
    trainer: Trainer
    directory: Path
    description: dict[str, Any]
    shared: SharedFolder | None = None

    @property
    def fitted_scores(self) -> list[FittedScore]:
        """The scores that need a fit."""
        return [score for score in self.scores if isinstance(score, FittedScore)]


def prepare(config: DictConfig) -> Experiment:
    """Build everything that a run needs.

    Args:
        config: The composed configuration.

    Raises:
        ValueError: If a value is wrong, or the model cannot process the data.
    """
    settings = Settings.of(config)
    directory = Path(HydraConfig.get().runtime.output_dir)
    check_directory(directory, settings.resume)
    seed_everything(settings.seed, verbose=False)
    _check_processes(config.trainer)
    scores = build_scores(config, settings.every_score)
    data = build_data(config.data)
    model = build_model(config.model, data)
    _check_top_k(config.callback.get("top_k"))
    callback = instantiate(config.callback, _partial_=True)(
        scores=_scored_by_callback(scores, settings),
        datasets=dict(data.roles),
        output=output_of(directory, settings.resume),
        print_summary=False,
    )
    callback.logs_pictures = False
    _check_model(callback, model, data, str(config.model._target_))
    progress = trainer_progress()
    callbacks = [callback, *progress.pop("callbacks")]
    trainer = instantiate(config.trainer, _partial_=True)(
        callbacks=callbacks, logger=instantiate(config.logger) or False, **progress
    )
    description = _description(config.model, model, data)
    shared = shared_folder(settings, callback, callback.scored_model(model), trainer)
    return Experiment(settings, scores, data, model, callback, trainer, directory, description, shared)


MOST_PROCESSES_PER_CORE = 4
"""More processes than cores are slow, but may be wanted to try a run; many more are a typing error."""


def _check_processes(trainer: DictConfig) -> None:
    """Refuse many more processes than processor cores: each of them loads the model and the data."""
    devices, accelerator = trainer.get("devices"), trainer.get("accelerator", "auto")
    is_on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    cores = usable_cores()
    most = MOST_PROCESSES_PER_CORE * cores
    if is_on_cpu and isinstance(devices, int) and devices > most:
        raise ValueError(
            f"trainer.devices={devices} would start as many processes on {cores} CPU cores: set trainer.devices to at most {most}"
        )


def _check_top_k(top_k: Any) -> None:
    if top_k is not None and not isinstance(top_k, Mapping):
        raise ValueError(f"callback.top_k must map scores to numbers, as in {{grand: 20}}, got {top_k!r}")


def _scored_by_callback(scores: tuple[Score, ...], settings: Settings) -> list[Score]:
    """Return the scores that the callback computes.

    Cross-validated scores are computed after the run. If costs are measured, scores that read labels are only timed,
    because out-of-distribution data has no labels.
    """
    if settings.fitted_folder is not None and settings.cross_validation_folds is not None:
        raise ValueError("cross_validation_folds and fitted_folder exclude each other: set one of them to null")
    has_fitted = any(isinstance(score, FittedScore) for score in scores)
    if settings.cost_batch_size is not None:
        scores = tuple(score for score in scores if not score.needs.labels)
    if settings.fitted_folder is not None and not has_fitted:
        notice("fitted_folder has no effect: none of the scores is fitted")
    if settings.cross_validation_folds is None:
        return list(scores)
    if not has_fitted:
        notice("cross_validation_folds has no effect: none of the scores is fitted")
    others = [score for score in scores if not isinstance(score, FittedScore)]
    if not others:
        raise ValueError(
            "cross-validated scores are compared with others: add one or more scores that need no fit, such as max_softmax"
        )
    return others


def _check_model(callback: GradientMetrics, model: LightningModule, data: EvaluationData, target: str) -> None:
    """Run the model on the first sample of every dataset.

    Raises:
        ValueError: If the model fails on it, or returns no logits ``(1, C)``.
    """
    scored = callback.scored_model(model)
    for dataset, loader in data.loaders(1).items():
        for batch in loader:
            inputs, _ = callback.split_batch(batch)
            _check_forward(callback, scored, inputs, f"model._target_={target}", dataset)
            break


def _check_forward(callback: GradientMetrics, model: torch.nn.Module, inputs: Inputs, name: str, dataset: str) -> None:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(inputs))
    case = f"{name} on the first batch of {dataset!r} (inputs {shapes})"
    try:
        with preserved(model), torch.no_grad():
            logits = callback.scorer.logits_fn(call(model, inputs))
    except Exception as error:
        raise ValueError(f"{case} fails: {str(error).splitlines()[0]}") from error
    if logits.ndim != 2 or len(logits) != batch_size(inputs):
        raise ValueError(f"{case} must return logits (N, C), got {tuple(logits.shape)}")


def _description(node: DictConfig, model: LightningModule, data: EvaluationData) -> dict[str, Any]:
    name = str(node._target_).rpartition(".")[2]
    checkpoint = node.get("checkpoint")
    return {
        "name": f"{name} {node.name}" if node.get("name") else name,
        "checkpoint": None if checkpoint is None else "/".join(Path(checkpoint).parts[-2:]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": len(data.classes) or None,
        "class_names": list(data.classes),
    }
