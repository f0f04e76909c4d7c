"""What a tracer notes during a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from lightning_gradmetrics.engine.calls import OpeningMode
from lightning_gradmetrics.engine.host_reads import ReadWatch
from lightning_gradmetrics.engine.outline import Outline
from lightning_gradmetrics.engine.plan import Plan, Source

__all__ = ["TracerState"]


class TracerState(OpeningMode):
    """The notes of a tracer. Each is made when it is first used, because a known path needs few of them.

    Args:
        plan: The plan of the calls.
        parameters: The chosen parameters by name.
        size: The number of samples.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor], size: int) -> None:
        super().__init__()
        self.plan, self.parameters, self.size = plan, parameters, size
        self.device = next(iter(parameters.values())).device

    @cached_property
    def outline(self) -> Outline:
        """The calls."""
        return Outline()

    @cached_property
    def reads(self) -> ReadWatch:
        """What Python reads from tensors."""
        return ReadWatch(self.plan.reads, self.size)

    @cached_property
    def anchor(self) -> Tensor:
        """A leaf at which the graphs of all uses of parameters end."""
        return torch.zeros((), device=self.device, requires_grad=True)

    @cached_property
    def _tracked(self) -> dict[int, Source]:
        """The chosen parameters, and tensors derived from them, by the identity of the tensor."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    @cached_property
    def _roots(self) -> dict[Source, tuple[str, ...]]:
        """The parameters behind each source."""
        return {name: (name,) for name in self.parameters}

    @cached_property
    def _expected(self) -> Counter[str]:
        """The number of uses of each parameter."""
        return Counter()
