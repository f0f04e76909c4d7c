"""What the jobs of a sweep share: scores of batches and fitted states, each computed by the first job that needs it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradmetrics.callback import GradientMetrics
from lightning_gradmetrics.callback.describing import PACKAGES, describe_score, described
from lightning_gradmetrics.classifier.forward import tensors_in
from lightning_gradmetrics.classifier.mutable_parts import module_of
from lightning_gradmetrics.cli.configuration import Settings
from lightning_gradmetrics.cli.data.sets import EvaluationData
from lightning_gradmetrics.cli.progress import notice
from lightning_gradmetrics.cli.shared_scorer import SharedScorer, Values
from lightning_gradmetrics.results.identity import tensors_hash, weights_hash
from lightning_gradmetrics.results.replacing import replaced
from lightning_gradmetrics.scores import FittedScore, Score, load_fitted, save_fitted
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["SharedFolder", "fit_data_key", "shared_folder"]

FOLDER = "shared"
"""The folder in the directory of a sweep."""

PLAIN = (str, int, float, bool, type(None))


def shared_folder(
    settings: Settings, callback: GradientMetrics, model: nn.Module, trainer: Trainer
) -> SharedFolder | None:
    """Return the folder that the jobs of a sweep share; ``None`` outside a sweep, and where nothing can be shared.

    Args:
        settings: The settings of the run.
        callback: The callback of the run.
        model: The scored model.
        trainer: The trainer.
    """
    hydra = HydraConfig.get()
    is_sweep = hydra.mode == RunMode.MULTIRUN
    if not is_sweep or not settings.share_scores or settings.resume or trainer.world_size > 1:
        return None
    versions = list(map(importlib.metadata.version, PACKAGES))
    about = {
        "model": [type(model).__qualname__, weights_hash(model), repr(model), _source_of(model)],
        "model settings": [text for text in hydra.overrides.task if text.lstrip("+~").startswith("model")],
        "logits_fn": _name_of(callback.scorer.logits_fn),
        "head": callback.scorer.head,
        "engine": callback.scorer.engine,
        "submodule": callback.submodule,
        "precision": str(trainer.precision),
        "device": str(trainer.strategy.root_device),
        "versions": versions,
    }
    return SharedFolder(Path(hydra.runtime.cwd) / hydra.sweep.dir / FOLDER, about)


def _name_of(function: Callable[..., object]) -> Any:
    """Return what identifies a function; an object is only equal to itself."""
    return [function.__module__, described(function)] if hasattr(function, "__qualname__") else repr(function)


def _source_of(model: nn.Module) -> list[str]:
    """Return the source code of the user's classes in a model: a forward pass may change without its weights."""
    sources = []
    for kind in sorted(set(map(type, model.modules())), key=str):
        if not module_of(kind).startswith("torch."):
            try:
                sources.append(inspect.getsource(kind))
            except (OSError, TypeError):
                sources.append(repr(kind))
    return sources


@dataclass(frozen=True)
class SharedFolder:
    """A folder of scores and fitted states, with one file per score, model and settings.

    Files are replaced in one step, so that jobs may run at the same time: each then computes what the other has not
    written yet.

    Args:
        folder: The folder.
        about: Everything besides the score and the batch that its values depend on.
    """

    folder: Path
    about: Mapping[str, Any]

    def scorer(self, scorer: Scorer) -> SharedScorer:
        """Return a scorer that reads the stored values."""
        from safetensors.torch import load_file

        known: Values = {}
        for score in scorer.scores:
            path = self._path(score)
            if path is not None and path.is_file():
                known[score.name] = load_file(path)
        return SharedScorer(scorer.scores, scorer.head, scorer.logits_fn, scorer.engine, known=known)

    def store(self, scorer: SharedScorer) -> None:
        """Add the values that a run computed to the stored ones."""
        from safetensors.torch import load_file, save_file

        for score in scorer.scores:
            path, added = self._path(score), scorer.added.get(score.name)
            if path is None or not added:
                continue
            stored = load_file(path) if path.is_file() else {}
            with replaced(path) as file:
                save_file({**stored, **added}, file)
        if scorer.read:
            notice(f"{len(scorer.read)} of {len(scorer.scores)} scores: read from another job of this sweep")

    def load_fits(self, scores: Iterable[FittedScore], data: str, model: nn.Module) -> dict[str, FittedScore]:
        """Return the scores whose states another job fitted on the same data.

        Args:
            scores: Scores without a state.
            data: The key of the data that they are fitted on.
            model: The scored model.
        """
        fitted = {}
        for score in scores:
            folder = self._fit_folder(score, data)
            if folder is not None and folder.is_dir():
                (loaded,) = load_fitted([score], folder, model)
                fitted[score.name] = loaded
        return fitted  # type: ignore[return-value]

    def store_fit(self, score: FittedScore, data: str) -> None:
        """Store a state that was fitted on data with this key."""
        folder = self._fit_folder(score.with_state(None, None, None), data)
        if folder is not None and not folder.is_dir():
            with replaced(folder) as temporary:
                save_fitted([score], temporary)

    def _path(self, score: Score) -> Path | None:
        key = _score_key(score)
        return None if key is None else self.folder / f"{self._hash(key)}.safetensors"

    def _fit_folder(self, score: FittedScore, data: str) -> Path | None:
        key = _score_key(score)
        return None if key is None else self.folder / "fits" / self._hash([score.name, key, data])

    def _hash(self, key: Any) -> str:
        return hashlib.sha256(json.dumps([key, self.about], sort_keys=True).encode()).hexdigest()[:32]


def _score_key(score: Score) -> Any:
    """Return the method, its source code, the arguments and the state of a score; ``None`` if an argument is an object."""
    if not all(map(_is_plain, score.arguments.values())):
        return None
    try:
        source = inspect.getsource(score.recipe.method)
    except (OSError, TypeError):
        return None
    return [source, describe_score(score)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def fit_data_key(
    data: EvaluationData, loaders: Mapping[str, DataLoader[Any]], roles: Mapping[str, str], callback: GradientMetrics
) -> str | None:
    """Return a hash of every batch that scores are fitted on; ``None`` if the user's own dataloaders decide on the batches.

    Args:
        data: The data of the run.
        loaders: The dataloaders of the data to fit on.
        roles: Their roles.
        callback: The callback, which splits batches.
    """
    datasets = [*data.fit.values(), data.train]
    if any(isinstance(dataset, DataLoader) for dataset in datasets):
        return None
    digest = hashlib.sha256(json.dumps([list(loaders), dict(roles)]).encode())
    with isolate_rng(include_cuda=False):  # transforms may draw from each generator
        for loader in loaders.values():
            for batch in loader:
                inputs, labels = callback.split_batch(batch)
                tensors = list(tensors_in([inputs, [] if labels is None else labels]))
                names = map(str, range(len(tensors)))
                digest.update(tensors_hash(zip(names, tensors, strict=True)).encode())
    return digest.hexdigest()
