"""What the operations of two and of three samples show about a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from lightning_gradmetrics.engine.planning.mixing import has_hidden_results, mixes_samples
from lightning_gradmetrics.engine.planning.planned_values import planned_masks
from lightning_gradmetrics.engine.planning.separability import Proof, proof_of
from lightning_gradmetrics.engine.planning.unused import do_not_matter, unused_calls, unused_operations
from lightning_gradmetrics.engine.task import Task
from lightning_gradmetrics.engine.tracing.dependence import (
    DependenceTrace,
    Operation,
    choice_by_data,
    hides_reads,
    selection_of_samples,
)
from lightning_gradmetrics.engine.tracing.detaches import used_operations
from lightning_gradmetrics.engine.tracing.graph import runs_custom_code
from lightning_gradmetrics.engine.tracing.layouts import Layout
from lightning_gradmetrics.engine.tracing.model_state import ForwardState
from lightning_gradmetrics.engine.tracing.outline import Outline
from lightning_gradmetrics.engine.tracing.trace import CallTrace

__all__ = ["Findings", "Traced", "findings_of", "without_proof"]


class Traced(NamedTuple):
    """A traced forward pass.

    Args:
        calls: Its calls of torch functions.
        logits: Its logits, with their graph.
        operations: Its basic operations.
        outline: Its outline.
    """

    calls: CallTrace
    logits: Tensor
    operations: DependenceTrace
    outline: Outline


class Findings(NamedTuple):
    """What the operations show.

    Args:
        operations: Those of two and of three samples that were examined.
        selection: The operation that selects some samples by comparing them with the others; ``""`` if there is none.
        reads_inside: Whether a torch call reads a number of the samples itself.
        layouts: The layout of each tensor with samples, by serial number; ``None`` if samples are not proven to stay apart.
        masks: What a plan expects of masks that select rows.
        is_by_data: Whether the layout of rows may depend on the data.
        mixes: Whether an operation may combine samples.
        sorted: The tensors with rows in the order of a sort: the number of its indices, by serial number.
        unused: The numbers of the calls whose results do not reach the logits.
    """

    operations: tuple[list[Operation], list[Operation]]
    selection: str
    reads_inside: bool
    layouts: dict[int, Layout] | None
    masks: tuple[int | None, ...]
    is_by_data: bool
    mixes: bool
    sorted: dict[int, int]
    unused: frozenset[int] = frozenset()


def findings_of(task: Task, two: Traced, three: Traced, state: ForwardState, random: bool) -> Findings:
    """Return what the operations show, without those that do not reach the logits if only the others keep samples apart.

    Args:
        task: Three samples.
        two: The forward pass of two of them.
        three: That of all three.
        state: The state of the model before a forward pass.
        random: Whether it draws random numbers, of which an unused operation may change those of others.
    """
    findings = _findings(two, three, frozenset())
    if findings.layouts is not None or random or three.outline.has_hooks or three.outline.stores_through_hooks:
        return findings
    if runs_custom_code(three.logits):  # its backward pass may read what no operation of the forward pass reads
        return findings
    unused = unused_operations(two.operations, three.operations, (two.logits, three.logits), [*task.model.buffers()])
    if not unused or not do_not_matter(task, three.calls, three.operations, unused, three.logits, state):
        return findings
    calls = unused_calls(three.calls, three.operations, unused)
    return _findings(two, three, unused)._replace(unused=calls)


def without_proof(findings: Findings) -> Findings:
    """Return the findings as if the order of the rows were unknown."""
    return findings._replace(layouts=None, is_by_data=True, sorted={})


def _findings(two: Traced, three: Traced, unused: Collection[int]) -> Findings:
    """Return what the operations show without the unused ones."""
    many, end = three.operations, three.operations.serial(three.logits)
    operations = (
        used_operations(two.operations, [two.logits], unused),
        used_operations(many, [three.logits], unused),
    )
    reads_inside, selection = hides_reads(many.operations), selection_of_samples(*operations)
    is_by_data = bool(choice_by_data(*operations, strict=False))
    proof = Proof(None, False, {}) if is_by_data else proof_of(*operations, many.samples, end)
    masks = planned_masks(three.calls, many, operations[1])
    hidden = has_hidden_results(two.operations, many, three.calls.calls, three.logits)
    layouts = None if hidden or reads_inside or masks is None else proof.layouts
    mixes = hidden
    if layouts is None:
        is_by_data = bool(choice_by_data(*operations))
        mixes = hidden or (not is_by_data and (proof.regroups or mixes_samples(*operations, end)))
    return Findings(operations, selection, reads_inside, layouts, masks or (), is_by_data, mixes, proof.sorted)
