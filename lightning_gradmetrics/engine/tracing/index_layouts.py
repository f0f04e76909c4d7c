"""Where the samples are in the results of operations with indices that keep them apart."""

from __future__ import annotations

from lightning_gradmetrics.engine.tracing.layouts import Layout, Step, UnprovenError

__all__ = ["gathered", "joined_at", "looked_up", "picked", "put", "scattered"]


def gathered(step: Step) -> Layout:
    """Gather along another axis; the values may be equal at all positions."""
    source, index = step.layouts
    is_other = source not in (None, index) or _is_table(step, 0)
    if index is None or is_other or index.dim == step.operation.arguments["dim"] % len(step.shape):
        raise UnprovenError
    return index


def scattered(step: Step) -> Layout:
    """Values written to some positions of another axis, for each sample."""
    target, index, *source = step.layouts
    dim = step.operation.arguments["dim"] % len(step.shape)
    is_other = index is None or index.dim == dim or any(layout not in (None, index) for layout in (target, *source))
    is_other = is_other or (bool(source) and _is_table(step, 2)) or (bool(step.operation.written) and target != index)
    if index is None or is_other:
        raise UnprovenError
    return index


def joined_at(step: Step) -> Layout:
    """Values written to the same positions of another axis of all samples."""
    target, index, source = step.layouts
    dim = step.operation.arguments["dim"] % len(step.shape)
    is_other = source is None or source.dim == dim or index is not None or target not in (None, source)
    if source is None or is_other or step.operation.written:
        raise UnprovenError
    return source


def looked_up(step: Step) -> Layout:
    """Embedding: a table and indices."""
    table, indices = step.layouts
    if table is not None or indices is None:
        raise UnprovenError
    return indices


def picked(step: Step) -> Layout:
    """Index: some positions of another axis, or positions of it for each sample, ``x[arange(N), positions]``, or a mask."""
    if step.operation.marks:
        return _selected_by_mask(step)
    layout, chosen = step.layouts[0], {dim for _, dim in step.operation.chosen}
    indices = step.operation.inputs[1:]
    if layout is None or layout.dim in chosen or step.layouts[1] is not None:
        raise UnprovenError
    if all(other is None for other in step.layouts[1:]) and len(chosen) == len(indices):
        is_adjacent = max(chosen) - min(chosen) == len(chosen) - 1
        if layout.dim < min(chosen) and is_adjacent:
            return layout
    if len(indices) == 1 and len(indices[0]) == 1 and len(chosen) == 1:
        return layout
    if len(indices) != 2 or layout != Layout(0) or len(chosen) > 1:
        raise UnprovenError
    return _along_first_index(step)


def put(step: Step) -> Layout:
    """Constants written where a mask is true, as in ``x[mask] = 0``."""
    layout, *others = step.layouts
    is_mask = not (step.operation.chosen or step.operation.by_data)  # indices that depend on samples choose
    if layout is None or layout.dim or not is_mask or others != [layout, None] or not _covers_first_axes(step):
        raise UnprovenError
    return layout


def _covers_first_axes(step: Step) -> bool:
    mask = step.operation.inputs[1]
    return step.shape[: len(mask)] == mask


def _selected_by_mask(step: Step) -> Layout:
    """Return the layout of ``x[mask]``, if the mask selects the same number of rows of each sample."""
    layout, of_mask = step.layouts
    if layout is None or layout != of_mask or (layout.dim, layout.outer) != (0, 1):
        raise UnprovenError
    counts: set[int] = set()
    for marks in (step.small.marks, step.operation.marks):
        for start in range(0, len(marks), layout.inner):
            counts.add(sum(marks[start : start + layout.inner]))
    if len(counts) != 1 or 0 in counts or not step.small.marks:
        raise UnprovenError
    return Layout(0, inner=counts.pop())


def _along_first_index(step: Step) -> Layout:
    """Return the layout of ``x[samples, positions]``, where the first index counts up and both are broadcast."""
    _, samples, positions = step.operation.inputs
    ndim = max(len(samples), len(positions))
    long = [dim for dim, size in enumerate(samples) if size != 1]
    if len(long) != 1:
        raise UnprovenError
    layout = Layout(long[0] + ndim - len(samples))
    other = step.layouts[2]
    if other is not None and other.moved(other.dim + ndim - len(positions)) != layout:
        raise UnprovenError
    return layout


def _is_table(step: Step, number: int) -> bool:
    """Return whether an argument without samples is as long for any number of them, so that sample ``n`` would read its row ``n``."""
    return step.layouts[number] is None and step.small.inputs[number] == step.operation.inputs[number]
