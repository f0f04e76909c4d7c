"""Meters of selective prediction."""

from __future__ import annotations

from torch import Tensor

from lightning_gradmetrics.meters import functional as F
from lightning_gradmetrics.meters.base import ScoreMeter

__all__ = ["AUGRC", "AURC", "EAURC"]


class AURC(ScoreMeter):
    """Area under the risk-coverage curve; see :func:`~lightning_gradmetrics.meters.functional.aurc`.

    Example:
        >>> import torch
        >>> meter = AURC()
        >>> meter.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
        >>> meter.compute()
        tensor(0.2778)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The AURC of all samples so far."""
        return self._call(F.aurc)  # type: ignore[no-any-return]


class EAURC(ScoreMeter):
    """Excess AURC over a perfect score; see :func:`~lightning_gradmetrics.meters.functional.eaurc`."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The excess AURC of all samples so far."""
        return self._call(F.eaurc)  # type: ignore[no-any-return]


class AUGRC(ScoreMeter):
    """Area under the generalised risk-coverage curve; see :func:`~lightning_gradmetrics.meters.functional.augrc`."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The AUGRC of all samples so far."""
        return self._call(F.augrc)  # type: ignore[no-any-return]
