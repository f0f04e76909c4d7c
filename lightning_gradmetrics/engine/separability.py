"""Proves from the basic operations of two traces that a forward pass treats each sample separately.

Each operation listed here keeps the samples apart as long as it does not mix positions of the sample axis. If all
operations of a model are listed, no batch can couple its samples, and batches need no check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from lightning_gradmetrics.engine.dependence import SAMPLES, Operation
from lightning_gradmetrics.engine.layouts import Layout, Step, UnprovenError

__all__ = ["layouts_apart"]


def layouts_apart(
    two: Sequence[Operation], three: Sequence[Operation], inputs: Sequence[int], logits: int
) -> tuple[dict[int, Layout], bool] | None:
    """Return the layout of each tensor with samples, if every operation keeps the samples apart and the logits are ``(N, C)``.

    A number computed from all samples may only be read by Python. A plan compares these numbers in each batch, but such
    a number, like the length of the longest text, may still differ for one sample alone.

    Args:
        two: The operations with two samples.
        three: The operations with three samples.
        inputs: The serial numbers of the tensors with samples, in ``three``.
        logits: The serial number of the logits, in ``three``.

    Returns:
        The layouts by serial number, and whether Python reads a number computed from all samples; ``None`` without a
        proof.
    """
    layouts: dict[int, Layout] = dict.fromkeys(inputs, Layout(0))
    uniform: set[int] = set()
    numbers: set[int] = set()
    for small, large in zip(two, three, strict=True):
        if large.name in _CONSTANT:
            uniform.update(large.output_serials)
        elif numbers.intersection(large.input_serials) or _is_number_of_all(large):
            if not _stays_a_number(large, numbers | layouts.keys()):
                return None
            numbers.update(large.output_serials)
        elif large.depends & SAMPLES and not uniform.issuperset(large.input_serials):
            try:
                found = _layouts_of(small, large, layouts, uniform)
            except (UnprovenError, IndexError, TypeError):
                return None
            layouts.update(zip(large.output_serials, found, strict=True))
        elif _stays_uniform(small, large, uniform):
            uniform.update(large.output_serials)
    return (layouts, bool(numbers)) if layouts.get(logits) == Layout(0) else None


_REDUCING = frozenset(["all", "any", "max", "min", "amax", "amin", "sum", "count_nonzero"])


def _is_number_of_all(operation: Operation) -> bool:
    """Return whether an operation computes one number from all samples."""
    return operation.name in _REDUCING and operation.outputs == ((),) and bool(operation.depends & SAMPLES)


def _stays_a_number(operation: Operation, known: Set[int]) -> bool:
    """Return whether numbers computed from all samples are only read by Python, or only lead to other such numbers."""
    return known >= set(operation.input_serials) and all(shape == () for shape in operation.outputs)


_CONSTANT = frozenset(
    ["zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"]
)
"""Operations whose results are the same at all positions."""

_SAME = "expand view _unsafe_view unsqueeze squeeze transpose t permute select slice clone detach alias _to_copy"
_UNIFORM = frozenset([*_SAME.split(), "embedding", "gather", "mm", "addmm", "linear", "lift_fresh"])
"""Operations whose results are the same for all samples if their arguments are."""


def _stays_uniform(small: Operation, large: Operation, uniform: set[int]) -> bool:
    """Return whether results that do not depend on the samples are the same for all of them."""
    if small.outputs == large.outputs:
        return True
    if (large.name not in _UNIFORM and not large.pointwise) or not large.input_serials:
        return False
    for number, serial in enumerate(large.input_serials):
        if serial not in uniform and small.inputs[number] != large.inputs[number]:
            return False
    return True


def _layouts_of(small: Operation, large: Operation, layouts: Mapping[int, Layout], uniform: set[int]) -> list[Layout]:
    known = []
    for number, serial in enumerate(large.input_serials):
        layout = layouts.get(serial)
        grown = small.inputs[number] != large.inputs[number]
        counts_up = large.name == "index" and number == 1 and len(large.inputs) == 3  # checked by the rule
        if layout is None and grown and serial not in uniform and not counts_up:
            raise UnprovenError
        known.append(layout)
    step = Step(large, known)
    name = large.name.rstrip("_") if large.name not in _RULES else large.name
    if name in _RULES:
        found = _RULES[name](step)
    elif large.pointwise:
        found = _aligned(step)
    else:
        raise UnprovenError
    return [found] * len(large.outputs) if isinstance(found, Layout) else found


# -- operations by family ---------------------------------------------------------------------------------------------


def _aligned(step: Step) -> Layout:
    """Element by element: the axes of all arguments are aligned at the end."""
    ndim, places = len(step.operation.outputs[0]), set()
    for layout, shape in zip(step.layouts, step.operation.inputs, strict=True):
        if layout is not None:
            places.add(layout.moved(layout.dim + ndim - len(shape)))
    if len(places) != 1:
        raise UnprovenError
    return places.pop()


def _reshaped(step: Step) -> Layout:
    """Reshape: keeps the order of all entries and splits the axes differently."""
    layout, old, new = step.first, step.shape, step.operation.outputs[0]
    before = math.prod(old[: layout.dim]) * layout.outer
    after = math.prod(old[layout.dim + 1 :]) * layout.inner
    for dim, size in enumerate(new):
        outer, left = divmod(before, math.prod(new[:dim]) or 1)
        inner, right = divmod(after, math.prod(new[dim + 1 :]) or 1)
        if not left and not right and size == 3 * outer * inner and size:
            return Layout(dim, outer, inner)
    raise UnprovenError


def _permuted(step: Step) -> Layout:
    ndim = len(step.shape)
    order = [dim % ndim for dim in step.operation.arguments["dims"]]
    return step.first.moved(order.index(step.first.dim))


def _transposed(step: Step) -> Layout:
    ndim, arguments = len(step.shape), step.operation.arguments
    pair = [arguments.get("dim0", 0) % ndim, arguments.get("dim1", 1) % ndim]
    if step.first.dim in pair and ndim > 1:
        return step.first.moved(pair[1 - pair.index(step.first.dim)])
    return step.first


def _expanded(step: Step) -> Layout:
    return step.first.moved(step.first.dim + len(step.operation.outputs[0]) - len(step.shape))


def _along(step: Step) -> Layout:
    """Operations along other axes, which keep these axes."""
    if step.first.dim in step.dims():
        raise UnprovenError
    return step.first


def _along_dims(step: Step) -> Layout:
    if step.first.dim in step.dims("dims"):
        raise UnprovenError
    return step.first


def _removed(step: Step) -> Layout:
    """Operations that remove other axes."""
    dims = step.dims()
    if step.first.dim in dims:
        raise UnprovenError
    return step.first.moved(step.first.dim - sum(dim < step.first.dim for dim in dims))


def _reduced(step: Step) -> Layout:
    removed = _removed(step)
    return step.first if step.operation.arguments.get("keepdim") else removed


def _sliced(step: Step) -> Layout:
    dim = step.operation.arguments.get("dim", 0) % len(step.shape)
    if dim == step.first.dim and step.operation.outputs[0] != step.shape:
        raise UnprovenError
    return step.first


def _unfolded(step: Step) -> Layout:
    if step.first.dim == step.operation.arguments["dimension"] % len(step.shape):
        raise UnprovenError
    return step.first


def _rows(step: Step) -> Layout:
    """Operations that treat each position of the first axis separately."""
    if step.first.dim != 0 or step.operation.outputs[0][0] != step.shape[0]:
        raise UnprovenError
    return step.first


def _batch_norm(step: Step) -> Layout:
    if step.operation.arguments.get("training", False) or step.operation.arguments.get("train", False):
        raise UnprovenError
    return _rows(step)


def _before_shape(step: Step) -> Layout:
    if step.first.dim >= len(step.shape) - len(step.operation.arguments["normalized_shape"]):
        raise UnprovenError
    return step.first


def _joined(step: Step) -> Layout:
    """Concatenation along another axis."""
    dim = step.operation.arguments.get("dim", 0) % len(step.operation.outputs[0])
    places = {layout for layout in step.layouts if layout is not None}
    if len(places) != 1 or next(iter(places)).dim == dim:
        raise UnprovenError
    for shape in step.operation.inputs:
        if len(shape) != len(step.operation.outputs[0]) and shape != (0,):
            raise UnprovenError
    return places.pop()


def _gathered(step: Step) -> Layout:
    """Gather along another axis; the values may be the same for all samples."""
    source, index = step.layouts
    if index is None or source not in (None, index) or index.dim == step.operation.arguments["dim"] % len(step.shape):
        raise UnprovenError
    return index


def _picked(step: Step) -> Layout:
    """Indexing: positions of another axis, the same for all samples or one per sample, ``x[arange(N), positions]``."""
    layout, chosen = step.layouts[0], {dim for _, dim in step.operation.chosen}
    indices = step.operation.inputs[1:]
    if layout is None or layout.dim in chosen or step.layouts[1] is not None:
        raise UnprovenError
    if len(indices) == 1 and len(indices[0]) == 1 and len(chosen) == 1:
        return layout
    if len(indices) != 2 or layout != Layout(0) or not chosen <= {1}:
        raise UnprovenError
    return _along_first_index(step)


def _along_first_index(step: Step) -> Layout:
    """Return the layout of ``x[samples, positions]``, where the first index counts up and both are broadcast."""
    _, samples, positions = step.operation.inputs
    ndim = max(len(samples), len(positions))
    long = [dim for dim, size in enumerate(samples) if size != 1]
    if len(long) != 1:
        raise UnprovenError
    found = Layout(long[0] + ndim - len(samples))
    other = step.layouts[2]
    if other is not None and other.moved(other.dim + ndim - len(positions)) != found:
        raise UnprovenError
    return found


def _stacked(step: Step) -> Layout:
    """Stacking along a new axis."""
    dim = step.operation.arguments.get("dim", 0) % len(step.operation.outputs[0])
    places = set(step.layouts)
    layout = places.pop()
    if places or layout is None:
        raise UnprovenError
    return layout.moved(layout.dim + (dim <= layout.dim))


def _strided_rows(step: Step) -> Layout:
    """``as_strided``: keeps the shape, with strides that keep each sample contiguous."""
    arguments, shape = step.operation.arguments, step.shape
    in_one_piece = arguments["stride"][0] == math.prod(shape[1:]) and not arguments.get("storage_offset")
    if step.first != Layout(0) or list(arguments["size"]) != list(shape) or not in_one_piece:
        raise UnprovenError
    return step.first


def _product(step: Step, skip: int = 0) -> Layout:
    """Matrix product, after ``skip`` summands: the contracted axis is not the sample axis."""
    left, right = step.layouts[skip], step.layouts[skip + 1]
    ndim = len(step.operation.inputs[skip])
    if any(layout is not None for layout in step.layouts[:skip]):
        raise UnprovenError
    if left is not None and right is not None:
        if left == right and left.dim == 0 and ndim == 3:
            return left
        raise UnprovenError
    layout, summed = (left, ndim - 1) if left is not None else (right, ndim - 2)
    if layout is None or layout.dim == summed:
        raise UnprovenError
    return layout


def _shifted_product(step: Step) -> Layout:
    return _product(step, 1)


def _looked_up(step: Step) -> Layout:
    """Embedding: a table and indices."""
    table, indices = step.layouts
    if table is not None or indices is None:
        raise UnprovenError
    return indices


def _attention(step: Step) -> list[Layout]:
    """Attention: queries, keys and values of the same sample, and possibly a mask."""
    for layout in step.layouts[:3]:
        if layout is None or layout.dim != 0 or layout != step.layouts[0]:
            raise UnprovenError
    for layout, shape in zip(step.layouts[3:], step.operation.inputs[3:], strict=True):
        if layout is not None and layout.moved(layout.dim + len(step.shape) - len(shape)) != step.layouts[0]:
            raise UnprovenError
    first = step.layouts[0]
    assert first is not None
    return [first] * len(step.operation.outputs)


_FAMILIES: dict[Callable[[Step], Any], str] = {
    _reshaped: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze alias clone detach _to_copy lift_fresh "
    "contiguous flatten",
    _permuted: "permute",
    _transposed: "transpose t",
    _expanded: "expand",
    _along: "_softmax _log_softmax softmax log_softmax cumsum cumprod split split_with_sizes unsafe_split unsafe_chunk "
    "chunk narrow glu sort topk",
    _along_dims: "roll flip",
    _removed: "select unbind",
    _reduced: "sum mean amax amin var std var_mean std_mean logsumexp prod any all max min argmax argmin "
    "linalg_vector_norm norm",
    _sliced: "slice",
    _unfolded: "unfold",
    _rows: "convolution _convolution mkldnn_convolution cudnn_convolution native_group_norm max_pool1d max_pool2d max_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d constant_pad_nd "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d upsample_nearest1d upsample_nearest2d "
    "upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d pixel_shuffle pixel_unshuffle im2col mkldnn_max_pool2d",
    _batch_norm: "native_batch_norm batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training",
    _before_shape: "native_layer_norm _fused_rms_norm rms_norm",
    _joined: "cat",
    _stacked: "stack",
    _strided_rows: "as_strided as_strided_",
    _aligned: "hardswish hardsigmoid hardtanh relu6 _prelu_kernel copy masked_fill",
    _product: "mm bmm matmul mv linear",
    _shifted_product: "addmm baddbmm",
    _looked_up: "embedding",
    _gathered: "gather",
    _picked: "index",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "scaled_dot_product_attention _scaled_dot_product_fused_attention_overrideable",
}
_RULES: dict[str, Callable[[Step], Any]] = {}
for _family, _names in _FAMILIES.items():
    _RULES.update(dict.fromkeys(_names.split(), _family))
