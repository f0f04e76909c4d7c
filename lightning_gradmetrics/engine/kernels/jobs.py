"""The arguments of the compiled kernels, as ctypes copies of the C structs in ``csrc``.

The sizes of the structs are compared with those in C when a library is loaded.
"""

from __future__ import annotations

import ctypes

__all__ = [
    "JOB_SIZES",
    "GramJob",
    "GroupNormJob",
    "GroupNormLastJob",
    "LaneJob",
    "LinearGramJob",
    "LookupJob",
    "NormJob",
    "ProductJob",
    "RankingJob",
    "ResampledJob",
    "ResidualJob",
    "RowJob",
    "SegmentJob",
    "SoftmaxJob",
    "SoftmaxPowerJob",
    "SoftmaxRowJob",
    "SortingJob",
    "SumJob",
    "Triple",
]

Triple = ctypes.c_int64 * 3
"""One integer per spatial dimension."""

_Fields = list[tuple[str, type]]


def _fields(kind: type, names: str) -> _Fields:
    return [(name, kind) for name in names.split()]


def _pointers(names: str) -> _Fields:
    return _fields(ctypes.c_void_p, names)


def _integers(names: str) -> _Fields:
    return _fields(ctypes.c_int64, names)


def _triples(names: str) -> _Fields:
    return _fields(Triple, names)


def _counters(names: str) -> _Fields:
    return _fields(ctypes.c_int, names)


class ProductJob(ctypes.Structure):
    """``product_job`` of ``products.c``."""

    _fields_ = (
        _pointers("x g out scratch rows positions scale weight packed products totals bias")
        + _integers("scratch_bytes samples groups pieces mode threads row_count columns channels layout")
        + _triples("size pad out_size")
        + _integers("x_sample x_channel")
        + _triples("x_step")
        + _integers("g_sample g_channel")
        + _triples("g_step")
        + _counters("next worker lost")
    )


class RowJob(ctypes.Structure):
    """``row_job`` of ``rows.c``."""

    _fields_ = _pointers("x out") + _integers("samples pieces columns x_sample mode") + _counters("next")


class SegmentJob(ctypes.Structure):
    """``segment_job`` of ``rows.c``."""

    _fields_ = (
        _pointers("x columns step left right known known_step undo out")
        + _integers("samples segments outputs mode merged")
        + _counters("next")
    )


class SumJob(ctypes.Structure):
    """``sum_job`` of ``sums.c``."""

    _fields_ = (
        _pointers("x g out rows scaled mean variance weight")
        + _fields(ctypes.c_double, "eps")
        + _integers("samples channels positions")
        + _integers("x_sample x_channel x_position g_sample g_channel g_position normalised")
        + _counters("next")
    )


class GroupNormJob(ctypes.Structure):
    """``group_norm_job`` of ``group_norm.c``."""

    _fields_ = (
        _pointers("x g mean scale weight rows product")
        + _integers("samples groups channels positions")
        + _counters("next")
    )


class GroupNormLastJob(ctypes.Structure):
    """``group_norm_last_job`` of ``group_norm_last.c``."""

    _fields_ = (
        _pointers("x g weight bias mean scale rows y")
        + _fields(ctypes.c_double, "eps")
        + _integers("samples groups channels positions")
        + _counters("next")
    )


class SoftmaxJob(ctypes.Structure):
    """``softmax_job`` of ``softmax.c``."""

    _fields_ = _pointers("z out") + _integers("samples classes positions z_sample z_class") + _counters("next")


class SoftmaxRowJob(ctypes.Structure):
    """``softmax_row_job`` of ``softmax.c``."""

    _fields_ = _pointers("z out") + _integers("samples classes z_sample narrow with_roots") + _counters("next")


class SoftmaxPowerJob(ctypes.Structure):
    """``softmax_power_job`` of ``softmax.c``."""

    _fields_ = (
        _pointers("z top odds second out")
        + _fields(ctypes.c_double, "power complement")
        + _integers("samples classes z_sample narrow")
        + _counters("next")
    )


class LaneJob(ctypes.Structure):
    """``lane_job`` of ``lanes.h``."""

    _fields_ = (
        _pointers("x g out scratch entries positions scale weight packed products totals bias")
        + _integers("scratch_bytes samples groups inputs outputs blocks mode entry_count")
        + _triples("size pad out_size")
        + _integers("x_sample x_channel")
        + _triples("x_step")
        + _integers("g_sample g_channel")
        + _triples("g_step")
        + _counters("next worker lost")
    )


class GramJob(ctypes.Structure):
    """``gram_job`` of ``gram.c``."""

    _fields_ = (
        _pointers("x g out scratch")
        + _integers("scratch_bytes samples groups channels columns")
        + _triples("size out_size kernel stride pad dilation")
        + _integers("x_sample x_channel x_position g_sample g_channel g_position")
        + _fields(ctypes.c_double, "cancelled")
        + _counters("next worker lost")
    )


class LinearGramJob(ctypes.Structure):
    """``linear_gram_job`` of ``linear_gram.c``."""

    _fields_ = (
        _pointers("a g bias out")
        + _integers("samples positions inputs outputs a_sample a_position g_sample g_position with_sums")
        + _fields(ctypes.c_double, "cancelled")
        + _counters("next lost")
    )


class ResidualJob(ctypes.Structure):
    """``residual_job`` of ``residuals.c``."""

    _fields_ = (
        _pointers("logits labels gradient undo") + _integers("samples classes step ignored") + _counters("unusual")
    )


class LookupJob(ctypes.Structure):
    """``lookup_job`` of ``layers.c``."""

    _fields_ = _pointers("indices g rows") + _integers("samples positions width g_sample g_position padding")


class NormJob(ctypes.Structure):
    """``norm_job`` of ``layers.c``."""

    _fields_ = (
        _pointers("x g mean variance out")
        + _fields(ctypes.c_double, "eps")
        + _integers("samples channels x_sample g_sample")
    )


class RankingJob(ctypes.Structure):
    """``ranking_job`` of ``ranking.c``."""

    _fields_ = _pointers("negatives positives harmonic out") + _integers("scores negatives_are_real positives_are_real")


class ResampledJob(ctypes.Structure):
    """``resampled_job`` of ``resampling.c``."""

    _fields_ = (
        _pointers("counts harmonic cells rows classes of_class groups sides wanted weights out scratch")
        + _fields(ctypes.c_double, "rate")
        + _integers("resamples cell_count class_count task_count harmonics")
    )


class SortingJob(ctypes.Structure):
    """``sorting_job`` of ``sorting.c``."""

    _fields_ = (
        _pointers("scores positive words negatives positives")
        + _fields(ctypes.c_double, "pairs")
        + _integers("samples below groups")
    )


JOB_SIZES: dict[str, type[ctypes.Structure]] = {
    "product_job_bytes": ProductJob,
    "row_job_bytes": RowJob,
    "segment_job_bytes": SegmentJob,
    "sum_job_bytes": SumJob,
    "softmax_job_bytes": SoftmaxJob,
    "softmax_row_job_bytes": SoftmaxRowJob,
    "softmax_power_job_bytes": SoftmaxPowerJob,
    "gram_job_bytes": GramJob,
    "linear_gram_job_bytes": LinearGramJob,
    "group_norm_job_bytes": GroupNormJob,
    "group_norm_last_job_bytes": GroupNormLastJob,
    "lane_job_bytes": LaneJob,
    "residual_job_bytes": ResidualJob,
    "lookup_job_bytes": LookupJob,
    "norm_job_bytes": NormJob,
    "ranking_job_bytes": RankingJob,
    "resampled_job_bytes": ResampledJob,
    "sorting_job_bytes": SortingJob,
}
"""The C function that returns each struct's size."""
