"""Gives fitted scores their states: from a folder, or from a fit on the trainer's own data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_gradmetrics.callback.dataloaders import loader_list
from lightning_gradmetrics.classifier.sample_axis import SampleAxis
from lightning_gradmetrics.scores import FittedScore, Score, load_fitted
from lightning_gradmetrics.scoring.fitting import fit
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["FIT_ON", "check_fit_source", "note_loaders", "with_configured_states"]

FIT_ON = ("train", "val")
"""The dataloaders that scores can be fitted on."""

LOADERS: WeakKeyDictionary[Trainer, dict[str, Any]] = WeakKeyDictionary()
"""The dataloaders of the last fit of each trainer, which forgets those that were passed to ``fit`` when it tests."""

SplitBatch = Callable[[Any], tuple[Any, Any]]


def check_fit_source(fit_on: str | None, fitted: str | Path | None) -> None:
    """Check the arguments ``fit_on`` and ``fitted`` of the callback.

    Raises:
        ValueError: If ``fit_on`` is unknown, or both are given.
        TypeError: If ``fitted`` is not a path.
    """
    if fit_on is not None and fit_on not in FIT_ON:
        raise ValueError(f"fit_on={fit_on!r}; expected one of {', '.join(map(repr, FIT_ON))}, or None")
    if fitted is not None and not isinstance(fitted, (str, Path)):
        raise TypeError(
            f"fitted={fitted!r}; expected a folder of states that lightning_gradmetrics.scores.save_fitted wrote"
        )
    if fit_on is not None and fitted is not None:
        raise ValueError("fit_on and fitted exclude each other: scores are fitted, or their states are loaded")


def with_configured_states(
    scorer: Scorer,
    model: nn.Module,
    module: LightningModule,
    trainer: Trainer,
    split: SplitBatch,
    fit_on: str | None,
    fitted: str | Path | None,
    sample_axis: SampleAxis = 0,
) -> tuple[Score, ...]:
    """Return the scores with the states that are still missing, from a folder or from a fit.

    Args:
        scorer: The scores and their settings.
        model: The model that is scored.
        module: The user's module.
        trainer: The trainer.
        split: Returns the inputs and labels of a batch.
        fit_on: ``"train"``, ``"val"``, or ``None`` for no fit.
        fitted: A folder of states, or ``None``.
        sample_axis: The axis of the samples in the model's inputs.

    Raises:
        ValueError: If there is no such dataloader, or a state does not belong to the model.
        FileNotFoundError: If the folder lacks a state.
    """
    missing = []
    for position in missing_places(scorer.scores):
        missing.append(scorer.scores[position])
    if not missing or (fit_on is None and fitted is None):
        return tuple(scorer.scores)
    made: Sequence[Score]
    if fitted is not None:
        made = load_fitted(missing, fitted, model)
    else:
        batches = _batches(_loader(trainer, module, str(fit_on)), split, trainer, module)
        options: dict[str, Any] = {"head": scorer.head, "logits_fn": scorer.logits_fn, "engine": scorer.engine}
        with torch.inference_mode(False), torch.no_grad():
            made = fit(model, batches, missing, sample_axis=sample_axis, **options)  # type: ignore[arg-type]
    scores = list(scorer.scores)
    for position, score in zip(missing_places(scores), made, strict=True):
        scores[position] = score
    return tuple(scores)


def missing_places(scores: Sequence[Score]) -> list[int]:
    """Return the positions of the fitted scores that have no state."""
    positions = []
    for position, score in enumerate(scores):
        if isinstance(score, FittedScore) and score.state is None:
            positions.append(position)
    return positions


def note_loaders(trainer: Trainer) -> None:
    """Store the dataloaders of a fit for later fits of scores."""
    LOADERS[trainer] = _loaders(trainer)


def _loaders(trainer: Trainer) -> dict[str, Any]:
    """Return the training and validation dataloaders that a trainer has now, by name."""
    loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders}
    return {name: loader for name, loader in loaders.items() if loader is not None}


def _batches(loader: Any, split: SplitBatch, trainer: Trainer, module: LightningModule) -> Iterator[tuple[Any, Any]]:
    """Yield the inputs and labels of each batch, on the device of the module."""
    for loader_of_dataset in loader_list(loader, True):
        for batch in loader_of_dataset:
            yield split(trainer.strategy.batch_to_device(batch, module.device))


def _loader(trainer: Trainer, module: LightningModule, name: str) -> Any:
    """Return the training or validation dataloader of an earlier fit, the data module or the module.

    Raises:
        ValueError: If there is none.
    """
    known = {**LOADERS.get(trainer, {}), **_loaders(trainer)}
    if name in known:
        return known[name]
    data: Any = getattr(trainer, "datamodule", None)
    hook = f"{name}_dataloader"
    if data is not None and getattr(type(data), hook) is not getattr(LightningDataModule, hook):
        data.setup("fit")
        return getattr(data, hook)()
    if getattr(type(module), hook) is not getattr(LightningModule, hook):
        return getattr(module, hook)()
    raise ValueError(
        f"fit_on={name!r}: there is no {name} dataloader. Pass datamodule= to the trainer, fit before you test, or call "
        "GradientMetrics.fit(trainer, model, dataloader)"
    )
