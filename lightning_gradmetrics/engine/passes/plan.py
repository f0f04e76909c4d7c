"""The plan of a forward pass: what is done at each call that involves a chosen parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from lightning_gradmetrics.engine.tracing.axes import Axis
from lightning_gradmetrics.engine.tracing.host_reads import PlannedRead

__all__ = ["BROADCAST", "Fold", "Plan", "PlanError", "Source", "Step"]

Source = str | tuple[int, int]
"""A parameter by name, or an output of an earlier step that depends on parameters and not on the samples."""


class PlanError(Exception):
    """The model did not follow the plan, or a step failed.

    Args:
        message: The reason.
        step: The number of the failed step, or ``None``.
        names: The parameters concerned, if the failed step has no number.
    """

    def __init__(self, message: str, step: int | None = None, names: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.step, self.names = step, names


class DisagreementError(PlanError):
    """Collected gradients differ from those of autograd.

    Args:
        message: The reason.
        sample: The number of the sample for which they differ, if it is known.
    """

    def __init__(self, message: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.sample = sample


@dataclass(frozen=True)
class Step:
    """The plan for one call whose arguments include parameters or tensors derived from them.

    Args:
        function: The function called.
        sources: The parameters and derived tensors among its arguments, in order.
        kind: ``"derive"``: no argument depends on the samples, run it with a graph; ``"rule"``: a rule covers it;
            ``"broadcast"``: give each sample a copy, aligned to the output; ``"vmap"``: give each sample its own
            copy and map over the samples; ``"grouped"``: multiply each group of sorted rows by its own matrix;
            ``"looked_up"``: look up rows of a table by an integer of each sorted row; ``"plain"``: run it, nothing
            differentiable is returned; ``"uncovered"``: run it, these parameters need another engine.
        inputs: The sample axis of each tensor argument.
        output: The sample axis of the output.
        derived: Which outputs are derived tensors.
        root: Whether its inputs with samples do not depend on a chosen parameter.
        sort: The number of the sort by which rows are looked up.
    """

    function: Any
    sources: tuple[Source, ...]
    kind: str
    inputs: tuple[Axis | None, ...] = ()
    output: Axis | None = None
    derived: tuple[int, ...] = ()
    root: bool = False
    sort: int = 0


@dataclass(frozen=True)
class Fold:
    """A batch norm whose input is the output of a convolution that nothing else uses.

    Args:
        norm: The number of the norm's step in the plan.
        weight: The name of the norm's weight.
        bias: The name of its bias.
        mean: The name of the buffer with the running mean.
        variance: The name of the buffer with the running variance.
        eps: Added to the variance.
    """

    norm: int
    weight: str
    bias: str
    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Plan:
    """The steps in the order of the calls.

    Args:
        steps: The steps.
        uncovered: Parameters that no step can handle, and why.
        roots: The parameters behind each source.
        reads: What Python reads from tensors, in order; ``None`` if that is not compared.
        undecided: Whether the layout of an axis with several positions per sample is unknown.
        calls: For each step, the number of its call in the trace with three samples.
        folds: The batch norms that can be folded into convolutions, by the numbers of the convolutions' steps.
        selects: Whether the model reads several entries of one tensor along its first axis.
        lays_out: Whether images can be laid out channels last from the first convolution on, although there are group norms or
            shuffles of channels.
        masks: For each mask that selects rows, in order, how many entries of each sample it marks; ``None`` if it is the same for
            all batches.
        sorts: For each product of groups of sorted rows, in order, the number of the sort; only a proof shows this order.
        normalises_images: Whether a batch norm gets an input with more axes than samples, channels and one of positions.
        normalises_instances: Whether there are instance norms.
        follows_backward: Whether the proof compares the calls of custom autograd functions in each backward pass.
    """

    steps: tuple[Step, ...]
    uncovered: Mapping[str, str] = field(default_factory=dict)
    roots: Mapping[Source, frozenset[str]] = field(default_factory=dict)
    undecided: bool = False
    reads: tuple[PlannedRead, ...] | None = None
    calls: tuple[int, ...] = ()
    folds: Mapping[int, Fold] = field(default_factory=dict)
    selects: bool = False
    lays_out: bool = False
    masks: tuple[int | None, ...] = ()
    sorts: tuple[int, ...] = ()
    normalises_images: bool = True
    normalises_instances: bool = True
    follows_backward: bool = False

    def repairs_norms(self, size: int) -> bool:
        """Return whether torch may compute wrong gradients of norms in a batch of this size."""
        return self.normalises_instances or (size == 1 and self.normalises_images)

    @property
    def changes_layers(self) -> bool:
        """Whether layers of a large batch run in another way than in the model."""
        return bool(self.folds) or self.lays_out

    @cached_property
    def _names(self) -> frozenset[str]:
        """The names of the parameters that it was made for."""
        alone = [root for root in self.roots.values() if len(root) == 1]
        return frozenset().union(*alone)

    def known_parameters(self, model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """Return the parameters of a model that the plan was made for, by name, which may be the chosen ones."""
        if self._names == chosen.keys():
            return chosen
        known = {}
        for name, parameter in model.named_parameters():
            if name in self._names:
                known[name] = parameter
        return known

    def without(self, number: int, reason: str) -> Plan:
        """Return the plan without one step, whose parameters are left to other engines."""
        step = self.steps[number]
        names: frozenset[str] = frozenset().union(*map(self.roots.__getitem__, step.sources))
        steps = (*self.steps[:number], replace(step, kind="uncovered"), *self.steps[number + 1 :])
        return replace(
            self, steps=steps, uncovered={**dict.fromkeys(names, reason), **self.uncovered}, folds={}, lays_out=False
        )


_ARITHMETIC = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow")
_WITH_IN_PLACE_FORM = (*_ARITHMETIC, "lerp", "addcmul", "addcdiv")
_OPERATORS = ("add", "sub", "mul", "truediv", "pow")
_OTHERS = ("rsub", "where", "maximum", "minimum", "fmax", "fmin")
_SHAPES = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def _broadcasting() -> frozenset[str]:
    names = {*_OTHERS, *_SHAPES}
    for name in _WITH_IN_PLACE_FORM:
        names |= {name, f"{name}_"}
    for name in _OPERATORS:
        names |= {f"__{name}__", f"__r{name}__", f"__i{name}__"}
    return frozenset(names)


BROADCAST = _broadcasting()
"""Functions that only broadcast their tensor arguments."""
