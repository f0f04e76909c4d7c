"""Where the samples are in the results of each basic operation that keeps them apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from lightning_gradmetrics.engine.tracing.index_layouts import gathered, joined_at, looked_up, picked, put, scattered
from lightning_gradmetrics.engine.tracing.layouts import Layout, RegroupedError, Shape, Step, UnprovenError

__all__ = ["LAYOUT_RULES", "aligned"]


def aligned(step: Step) -> Layout:
    """Element by element: the axes of all arguments are aligned at the end."""
    ndim, layouts = len(step.operation.outputs[0]), set()
    for layout, shape in zip(step.layouts, step.operation.inputs, strict=True):
        if layout is not None:
            layouts.add(layout.moved(layout.dim + ndim - len(shape)))
    if len(layouts) > 1:
        raise RegroupedError
    if not layouts:
        raise UnprovenError
    return layouts.pop()


def _reshaped(step: Step) -> Layout:
    """Reshape: the order of all entries stays, and the axes are split differently, in the same way for every batch."""
    small = step.small
    layouts = _split(step.first, step.shape, step.operation.outputs[0], 3)
    common = [layout for layout in _split(step.first, small.inputs[0], small.outputs[0], 2) if layout in layouts]
    if not common:
        raise RegroupedError
    return common[0]


def _split(layout: Layout, old: Shape, new: Shape, samples: int) -> list[Layout]:
    """Return the layouts that fit a tensor after a reshape."""
    before = math.prod(old[: layout.dim]) * layout.outer
    after = math.prod(old[layout.dim + 1 :]) * layout.inner
    layouts = []
    for dim, size in enumerate(new):
        outer, left = divmod(before, math.prod(new[:dim]) or 1)
        inner, right = divmod(after, math.prod(new[dim + 1 :]) or 1)
        if not left and not right and size == samples * outer * inner and size:
            layouts.append(Layout(dim, outer, inner))
    return layouts


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


def _kept(step: Step) -> Layout:
    """Return the layout after an operation on each entry, or one that adds or removes the last axis."""
    if step.first.dim >= min(len(step.shape), len(step.operation.outputs[0])):
        raise UnprovenError
    return step.first


def _bucketized(step: Step) -> Layout:
    """Return the layout after a search for each entry among constants, whose number is the same for every batch."""
    if step.small.inputs[1:] != step.operation.inputs[1:]:
        raise UnprovenError
    return step.first


def _tiled(step: Step) -> Layout:
    """Repeated: copies of a whole axis follow one another."""
    repeats = step.operation.arguments["repeats"]
    dim = step.first.dim + len(repeats) - len(step.shape)
    return Layout(dim, repeats[dim] * step.first.outer, step.first.inner)


def _along(step: Step) -> Layout:
    """Return the layout after an operation that works along other axes and keeps them."""
    if step.first.dim in step.dims():
        raise UnprovenError
    return step.first


def _along_dims(step: Step) -> Layout:
    if step.first.dim in step.dims("dims"):
        raise UnprovenError
    return step.first


def _removed(step: Step) -> Layout:
    """Return the layout after an operation that removes other axes."""
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
    """Return the layout after an operation that treats each position of the first axis separately."""
    if step.first.dim != 0 or step.operation.outputs[0][0] != step.shape[0]:
        raise UnprovenError
    return step.first


def _rows_of_all(step: Step) -> Layout:
    """The same for operations on several tensors with one row per sample."""
    layout = step.layouts[0]
    if (
        layout is None
        or layout.dim != 0
        or set(step.layouts) != {layout}
        or step.operation.outputs[0][0] != step.shape[0]
    ):
        raise UnprovenError
    return layout


def _planes(step: Step) -> Layout:
    """Return the layout after an operation on the last one, two or three axes; its name contains their number."""
    axes = int(re.findall(r"(\d)d", step.operation.name)[-1])
    if step.first.dim >= len(step.shape) - axes:
        raise UnprovenError
    return step.first


def _matrices(step: Step) -> list[Layout]:
    """Return the layouts after an operation on the last two axes."""
    if step.first.dim >= len(step.shape) - 2:
        raise UnprovenError
    return [step.first] * len(step.operation.outputs)


def _distances(step: Step) -> Layout:
    """Return the layout of the distances of the rows of two matrices."""
    layout = aligned(step)
    if layout.dim >= len(step.operation.outputs[0]) - 2:
        raise UnprovenError
    return layout


def _diagonal(step: Step) -> Layout:
    ndim, arguments = len(step.shape), step.operation.arguments
    pair = {arguments.get("dim1", 0) % ndim, arguments.get("dim2", 1) % ndim}
    if step.first.dim in pair:
        raise UnprovenError
    return step.first.moved(step.first.dim - sum(dim < step.first.dim for dim in pair))


def _on_diagonals(step: Step) -> Layout:
    ndim, arguments = len(step.shape), step.operation.arguments
    pair = {arguments.get("dim1", -2) % (ndim + 1), arguments.get("dim2", -1) % (ndim + 1)}
    if pair != {ndim - 1, ndim} or step.first.dim >= ndim - 1:
        raise UnprovenError
    return step.first


def _crossed(step: Step) -> Layout:
    layout = aligned(step)
    if layout.dim == step.operation.arguments.get("dim", -1) % len(step.operation.outputs[0]):
        raise UnprovenError
    return layout


def _padded(step: Step) -> Layout:
    """Padding of other axes; a positive and a negative width on the sample axis would shift the samples."""
    widths = step.operation.arguments["pad"]
    place = 2 * (len(step.shape) - 1 - step.first.dim)
    if any(widths[place : place + 2]):
        raise UnprovenError
    return step.first


def _batch_norm(step: Step) -> Layout | list[Layout]:
    """Batch norm: with running statistics, or of samples that are channels, as in an instance norm."""
    if step.operation.arguments.get("training", False) or step.operation.arguments.get("train", False):
        return _norm_of_channels(step)
    return _rows(step)


def _norm_of_channels(step: Step) -> list[Layout]:
    layout, outputs = step.layouts[0], step.operation.outputs
    if layout is None or layout.dim != 1 or step.operation.written or len(outputs) != 3:
        raise UnprovenError
    statistics = layout.moved(0)
    if any(other not in (None, statistics) for other in step.layouts[1:]):
        raise UnprovenError
    return [layout, statistics, statistics]


def _before_shape(step: Step) -> Layout:
    if step.first.dim >= len(step.shape) - len(step.operation.arguments["normalized_shape"]):
        raise UnprovenError
    return step.first


def _joined(step: Step) -> Layout:
    """Concatenated along another axis."""
    dim = step.operation.arguments.get("dim", 0) % len(step.operation.outputs[0])
    layouts = {layout for layout in step.layouts if layout is not None}
    if len(layouts) != 1 or next(iter(layouts)).dim == dim:
        raise UnprovenError
    for shape in step.operation.inputs:
        if len(shape) != len(step.operation.outputs[0]) and shape != (0,):
            raise UnprovenError
    return layouts.pop()


def _stacked(step: Step) -> Layout:
    """Stacked along a new axis."""
    dim = step.operation.arguments.get("dim", 0) % len(step.operation.outputs[0])
    layouts = set(step.layouts)
    layout = layouts.pop()
    if layouts or layout is None:
        raise UnprovenError
    return layout.moved(layout.dim + (dim <= layout.dim))


def _strided(step: Step) -> Layout:
    """As strided: the entries stay where they are."""
    if not step.operation.arguments["keeps_entries"]:
        raise UnprovenError
    return step.first


def _product(step: Step, skip: int = 0) -> Layout:
    """Matrix product, after ``skip`` summands: the contracted axis is not the sample axis."""
    left, right = step.layouts[skip], step.layouts[skip + 1]
    ndim = len(step.operation.inputs[skip])
    if left is not None and right is not None:
        if left == right and left.dim == 0 and ndim == 3:
            return left
        raise UnprovenError
    layout, summed = (left, ndim - 1) if left is not None else (right, ndim - 2)
    if layout is None or layout.dim == summed:
        raise UnprovenError
    return layout


def _shifted_product(step: Step) -> Layout:
    """Matrix product and a summand, which may have the same samples."""
    layout, summand = _product(step, 1), step.layouts[0]
    ndim = len(step.operation.outputs[0])
    if summand is not None and summand.moved(summand.dim + ndim - len(step.shape)) != layout:
        raise UnprovenError
    return layout


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


def _lstm(step: Step) -> list[Layout]:
    """One direction of an LSTM layer: rows ``(T, N, ...)``, states ``(N, ...)`` and weights, as in ``rules/recurrence.py``."""
    rows, *others = step.layouts
    states, weights = others[:2], others[2:]
    if rows is None or rows.dim != 1 or any(layout is not None for layout in weights):
        raise UnprovenError
    if any(layout not in (None, rows.moved(0)) for layout in states):
        raise UnprovenError
    return [rows] * len(step.operation.outputs)


_FAMILIES: dict[Callable[[Step], Any], str] = {
    _reshaped: "view _unsafe_view reshape _reshape_alias unsqueeze squeeze alias clone detach _to_copy lift_fresh "
    "contiguous flatten",
    _permuted: "permute",
    _transposed: "transpose t",
    _expanded: "expand",
    _tiled: "repeat",
    _kept: "view_as_real view_as_complex",
    _bucketized: "bucketize",
    _along: "_softmax _log_softmax softmax log_softmax cumsum cumprod split split_with_sizes unsafe_split unsafe_chunk "
    "chunk narrow glu sort topk index_select logcumsumexp cummax cummin _safe_softmax _fft_c2c _fft_r2c _fft_c2r",
    _along_dims: "roll flip rot90",
    _removed: "select unbind",
    _reduced: "sum mean amax amin var std var_mean std_mean logsumexp prod any all max min argmax argmin "
    "linalg_vector_norm norm median nanmedian kthvalue mode",
    _sliced: "slice",
    _unfolded: "unfold",
    _rows: "convolution _convolution mkldnn_convolution cudnn_convolution native_group_norm pixel_shuffle pixel_unshuffle "
    "channel_shuffle im2col col2im affine_grid_generator",
    _rows_of_all: "grid_sampler_2d grid_sampler_3d max_unpool2d max_unpool3d",
    _planes: "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "adaptive_max_pool2d adaptive_max_pool3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa "
    "upsample_bicubic2d _upsample_bicubic2d_aa upsample_trilinear3d",
    _matrices: "tril triu linalg_inv_ex linalg_cholesky_ex _linalg_eigh _linalg_svd linalg_qr _linalg_det _linalg_slogdet "
    "linalg_matrix_exp",
    _distances: "_cdist_forward _euclidean_dist",
    _diagonal: "diagonal",
    _on_diagonals: "diag_embed",
    _crossed: "linalg_cross",
    scattered: "scatter scatter_add scatter_reduce",
    joined_at: "index_add index_copy",
    _padded: "constant_pad_nd",
    _batch_norm: "native_batch_norm batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training",
    _before_shape: "native_layer_norm _fused_rms_norm rms_norm",
    _joined: "cat",
    _stacked: "stack",
    _strided: "as_strided as_strided_",
    aligned: "log_sigmoid_forward polar complex hardswish hardsigmoid hardtanh relu6 _prelu_kernel copy fill zero masked_fill",
    _product: "mm bmm matmul mv linear",
    _shifted_product: "addmm baddbmm",
    looked_up: "embedding",
    gathered: "gather",
    picked: "index",
    put: "index_put",
    _lstm: "lightning_gradmetrics::lstm_hidden lightning_gradmetrics::lstm_cells",
    _attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "scaled_dot_product_attention _scaled_dot_product_fused_attention_overrideable",
}
LAYOUT_RULES: dict[str, Callable[[Step], Any]] = {}
for _family, _names in _FAMILIES.items():
    LAYOUT_RULES.update(dict.fromkeys(_names.split(), _family))
"""For each basic operation, where the samples are in its results."""
