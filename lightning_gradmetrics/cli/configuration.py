"""Finds the configuration, and reads the settings of a run as checked values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["Settings", "configuration_directory", "option_names"]


def configuration_directory() -> Path:
    """Return ``conf/``: inside the installed package, or next to it in a source checkout.

    Raises:
        FileNotFoundError: If it is in neither location.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"conf/ is missing from {package} and from its parent folder: install the package again")


def option_names(group: str) -> list[str]:
    """Return the names of the options of a configuration group, such as ``model``."""
    return sorted(path.stem for path in (configuration_directory() / group).glob("*.yaml"))


@dataclass(frozen=True)
class Settings:
    """The settings of a run that are plain values.

    Args:
        batch_size: Samples per batch.
        num_workers: Worker processes of each dataloader.
        seed: The seed of every random choice.
        every_score: Whether to compute every score of ``conf/score``.
        resamples: Bootstrap resamples for the intervals; 0 for none.
        cross_validation_folds: The number of folds for the cross-validation of fitted scores; ``None`` fits them once.
        cost_batch_size: The number of samples on which time and memory of every score are measured; ``None`` skips
            this.
        fitted_folder: A folder with the fitted states of an earlier run; ``None`` fits the scores.
        report: Whether to write the report.
        auac_aufc: Whether to show and write the areas under the accuracy and F1 curves.
        resume: Whether to complete an interrupted run in the same directory.
        share_scores: Whether the jobs of a sweep read scores and fits that another job has computed.
        leaderboard: ``title``, ``notes``, ``challengers`` and ``originals`` of the file ``leaderboard.json``; ``None`` writes none.
    """

    batch_size: int
    num_workers: int
    seed: int
    every_score: bool
    resamples: int
    cross_validation_folds: int | None
    cost_batch_size: int | None
    fitted_folder: Path | None
    report: bool
    auac_aufc: bool
    resume: bool
    share_scores: bool
    leaderboard: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, config: DictConfig) -> Settings:
        """Read and check the settings of a configuration.

        Raises:
            ValueError: If a value has the wrong type or is out of range.
        """
        folder = config.fitted_folder
        return cls(
            batch_size=_whole(config, "batch_size", 1),
            num_workers=_whole(config, "num_workers", 0),
            seed=_whole(config, "seed", 0),
            every_score=_switch(config, "every_score"),
            resamples=_whole(config, "resamples", 0),
            cross_validation_folds=_whole_or_none(config, "cross_validation_folds", 2),
            cost_batch_size=_whole_or_none(config, "cost_batch_size", 1),
            fitted_folder=None if folder is None else Path(str(folder)).expanduser(),
            report=_switch(config, "report"),
            auac_aufc=_switch(config, "auac_aufc"),
            resume=_switch(config, "resume"),
            share_scores=_switch(config, "share_scores"),
            leaderboard=_mapping_or_none(config, "leaderboard"),
        )


def _whole(config: DictConfig, key: str, least: int) -> int:
    value: Any = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be a whole number of at least {least}, got {value!r}")
    return value


def _whole_or_none(config: DictConfig, key: str, least: int) -> int | None:
    if config[key] is None:
        return None
    try:
        return _whole(config, key, least)
    except ValueError as error:
        raise ValueError(f"{error}; {key}=null switches it off") from None


def _mapping_or_none(config: DictConfig, key: str) -> Mapping[str, Any] | None:
    value: Any = config.get(key)
    if value is None or isinstance(value, Mapping):
        return value
    raise ValueError(f"{key} must be null or a mapping, got {value!r}")


def _switch(config: DictConfig, key: str) -> bool:
    value: Any = config[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value
