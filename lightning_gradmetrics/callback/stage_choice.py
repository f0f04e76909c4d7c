"""Chooses the stages to score, and warns about those that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_gradmetrics.callback.dataloaders import Names, dataset_names, loader_list
from lightning_gradmetrics.scores import FittedScore, Score

__all__ = ["Loaders", "StageNotices", "check_fitted_in_fit"]


@dataclass(frozen=True)
class Loaders:
    """The dataloaders of a stage.

    Args:
        given: One or more dataloaders, as Lightning stores them.
        is_sequential: Whether they run one after the other; if they run side by side, they count as one dataset.

    Example:
        >>> Loaders({"a": [1], "b": [2]}).names(None, "test"), Loaders({"a": [1], "b": [2]}, False).names(None, "test")
        (['a', 'b'], ['dataloader_0'])
    """

    given: Any
    is_sequential: bool = True

    @property
    def all(self) -> list[Any]:
        """The dataloaders as a list."""
        return loader_list(self.given, self.is_sequential)

    def names(self, names: Names, stage: str) -> Sequence[str]:
        """Return the names of the datasets.

        Raises:
            ValueError: If their number differs from that of the dataloaders.
        """
        return dataset_names(names, self.given, self.is_sequential, stage)


@dataclass
class StageNotices:
    """Decides which stages are scored, and warns once about omissions and assumptions."""

    _said: set[str] = field(default_factory=set)

    def is_scored(
        self, stage: str, stages: Sequence[str] | None, is_fitted: bool, names: Names, loaders: Loaders
    ) -> bool:
        """Return whether to score a stage.

        By default every stage is scored. Validation during a fit is scored only if the names of the datasets match its
        dataloaders and no score is fitted, because a fitted score is valid for fixed weights only.

        Args:
            stage: The stage.
            stages: The stages to score, or ``None`` for the default.
            is_fitted: Whether a score is fitted.
            names: The names of the datasets.
            loaders: The dataloaders.
        """
        if stages is not None:
            return stage in stages or (stage == "fit" and "validate" in stages)
        if stage != "fit":
            return True
        if is_fitted:
            self._say("fitted scores are valid for fixed weights only, so the validation inside fit is not scored")
            return False
        try:
            loaders.names(names, stage)
        except ValueError as problem:
            self._say(f"the validation inside fit is not scored: {problem}")
            return False
        return True

    def of_roles(self, datasets: Sequence[str]) -> None:
        """Warn if several datasets have no roles."""
        if len(datasets) > 1:
            self._say(
                f"{len(datasets)} dataloaders and no roles: all are treated as in-distribution. Pass datasets= with a role for "
                f"each, as in {{{datasets[0]!r}: 'id', {datasets[1]!r}: 'far'}}"
            )

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            rank_zero_warn(text)


def check_fitted_in_fit(scores: Sequence[Score], stages: Sequence[str] | None) -> None:
    """Refuse fitted scores in the validation of a fit, if the user requested that stage.

    Raises:
        ValueError: If ``stages`` names that validation and a score is fitted.
    """
    fitted = [score.name for score in scores if isinstance(score, FittedScore)]
    if fitted and stages is not None and ("fit" in stages or "validate" in stages):
        raise ValueError(
            f"the fitted scores {', '.join(fitted)} cannot be scored in the validation of a fit: its weights change, and a "
            "fitted score is valid for fixed weights only. Pass stages=('test', 'predict'), or use a second callback for the scores "
            "that need no fit"
        )
