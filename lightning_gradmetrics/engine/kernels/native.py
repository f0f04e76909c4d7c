"""The compiled kernels: built at first use with the system's C compiler, kept in the user's cache directory.

Without a compiler, or with ``LIGHTNING_GRADMETRICS_NATIVE=0``, every caller takes its plain torch form.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.gradients.statistics import Moment, Moments

__all__ = ["native_products", "native_rows", "native_squares", "native_sums", "supports"]

VARIABLE = "LIGHTNING_GRADMETRICS_NATIVE"
SOURCE = Path(__file__).with_name("native.c")
SOURCES = (SOURCE, Path(__file__).with_name("gram.c"))
KEYS: tuple[Moment, ...] = ("sum", 2.0, 1.0, "max", "min")
DEFINES = {"float": ("-DREAL=float", "-DSINGLE"), "double": ("-DREAL=double",)}
REALS = {torch.float32: "float", torch.float64: "double"}
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-w")
TASKS = 4
"""Pieces of work for each thread at least, where samples are few."""

TILE_MULTIPLE = 12
"""A multiple of the rows of a tile on every machine."""

SMALL = 16384
"""Entries below which one thread does the work."""

_Size = tuple[int, ...]
_Three = ctypes.c_int64 * 3
_local = threading.local()


class _Job(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "g", "out", "scratch", "rows", "positions")]
        + [(name, ctypes.c_int64) for name in ("scratch_bytes", "samples", "groups", "pieces", "mode")]
        + [(name, ctypes.c_int64) for name in ("row_count", "columns", "channels", "layout")]
        + [(name, _Three) for name in ("size", "pad", "out_size")]
        + [("x_sample", ctypes.c_int64), ("x_channel", ctypes.c_int64), ("x_step", _Three)]
        + [("g_sample", ctypes.c_int64), ("g_channel", ctypes.c_int64), ("g_step", _Three)]
        + [("next", ctypes.c_int), ("worker", ctypes.c_int)]
    )


class _RowJob(ctypes.Structure):
    _fields_ = (
        [("x", ctypes.c_void_p), ("out", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("samples", "pieces", "columns", "x_sample", "mode")]
        + [("next", ctypes.c_int)]
    )


class _SumJob(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "g", "out")]
        + [(name, ctypes.c_int64) for name in ("samples", "channels", "positions")]
        + [(f"{t}_{axis}", ctypes.c_int64) for t in "xg" for axis in ("sample", "channel", "position")]
        + [("next", ctypes.c_int)]
    )


class _GramJob(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "g", "out", "scratch")]
        + [(name, ctypes.c_int64) for name in ("scratch_bytes", "samples", "groups", "channels", "columns")]
        + [(name, _Three) for name in ("size", "out_size", "kernel", "stride", "pad", "dilation")]
        + [(f"{t}_{axis}", ctypes.c_int64) for t in "xg" for axis in ("sample", "channel", "position")]
        + [("next", ctypes.c_int), ("worker", ctypes.c_int)]
    )


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lightning_gradmetrics"


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
    except OSError:
        return platform.processor() + platform.machine()


def _build(real: str) -> Path | None:
    """The compiled library for one floating type, from the cache or fresh; None without a compiler."""
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None
    about = [*(source.read_text() for source in SOURCES), *FLAGS, real, compiler, _processor()]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    for directory in (_cache_directory(), Path(tempfile.gettempdir()) / f"lightning_gradmetrics-{os.getuid()}"):
        target = directory / f"native-{real}-{key}.so"
        if target.exists() or _compile(compiler.split(), real, target):
            return target
    return None


def _compile(compiler: Sequence[str], real: str, target: Path) -> bool:
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            command = [*compiler, *FLAGS, *DEFINES[real], str(SOURCE), "-o", str(fresh), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            fresh.replace(target)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


@functools.cache
def _library(dtype: torch.dtype) -> Any:
    """The loaded library for a floating type, or None where it cannot be had."""
    if dtype not in REALS or os.environ.get(VARIABLE) == "0" or os.name != "posix":
        return None
    path = _build(REALS[dtype])
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.scratch_bytes.restype = ctypes.c_int64
    library.scratch_bytes.argtypes = [ctypes.c_int64] * 3
    library.gram_scratch_bytes.restype = ctypes.c_int64
    library.gram_scratch_bytes.argtypes = [ctypes.c_int64] * 3
    for function in (library.products, library.row_statistics, library.position_statistics, library.squares):
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int], None
    return library


@functools.cache
def _parallel() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch has loaded: one pool of threads serves both."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None


def supports(tensor: Tensor, wanted: Iterable[Moment]) -> bool:
    """Whether the compiled kernels give these moments of tensors like this one.

    Args:
        tensor: A tensor of the type and on the device in question.
        wanted: The moments to compute.
    """
    return tensor.device.type == "cpu" and set(wanted) <= set(KEYS) and _library(tensor.dtype) is not None


def _threads() -> int:
    return torch.get_num_threads() if _parallel() else 1


def _scratch(size: int) -> Tensor:
    """Memory for packed operands, kept between calls: fresh pages would cost more than the packing."""
    held: Tensor | None = getattr(_local, "scratch", None)
    if held is None or len(held) < size:
        _local.scratch = held = torch.empty(size, dtype=torch.uint8)
    return held


def _moments(out: Tensor, wanted: Iterable[Moment]) -> Moments:
    """From partial statistics ``(N, pieces, 5)``."""
    reduce = {"max": lambda v: v.amax(1), "min": lambda v: v.amin(1)}
    parts = ((key, out[..., KEYS.index(key)]) for key in wanted)
    if out.shape[1] == 1:
        return {key: part.squeeze(1) for key, part in parts}
    return {key: reduce.get(key, lambda v: v.sum(1))(part) for key, part in parts}  # type: ignore[arg-type]


def _mode(wanted: Iterable[Moment]) -> int:
    return int(not set(wanted) <= {"sum", 2.0})


def native_rows(flat: Tensor, wanted: Iterable[Moment]) -> Moments:
    """Moments of the rows of ``(N, D)``, in one pass over them. See :func:`supports`."""
    keys = frozenset(wanted)
    flat = flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
    (samples, columns), threads = flat.shape, _threads()
    pieces = 1 if samples >= TASKS * threads else max(1, min(TASKS * threads, columns // 4096))
    out = torch.empty(samples, pieces, len(KEYS), dtype=torch.float64)
    job = _RowJob(flat.data_ptr(), out.data_ptr(), samples, pieces, columns, flat.stride(0), _mode(keys))
    threads = threads if flat.numel() > SMALL else 1
    _library(flat.dtype).row_statistics(ctypes.byref(job), _parallel(), threads)
    return _moments(out, keys)


def native_sums(g: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums over the last axis of ``g`` and of ``x g``, ``(N, C, P)`` each, in one pass; without ``x`` zeros."""
    tensors = [g] if x is None else [g, x]
    if not any(all(t.shape[dim] == 1 or t.stride(dim) == 1 for t in tensors) for dim in (1, 2)):
        tensors = [t.contiguous() for t in tensors]
    strides = [(t.stride(0), t.stride(1), 1 if t.shape[2] == 1 else t.stride(2)) for t in tensors]
    out = torch.empty(2, *g.shape[:2], dtype=torch.float64)
    pointers = (tensors[1].data_ptr() if x is not None else None, tensors[0].data_ptr(), out.data_ptr())
    job = _SumJob(*pointers, *g.shape, *strides[-1], *strides[0])
    threads = _threads() if g.numel() > SMALL else 1
    _library(g.dtype).position_statistics(ctypes.byref(job), _parallel(), threads)
    return out[0], out[1]


@functools.lru_cache(maxsize=512)
def _offsets(
    channels: int, lanes: int, plane: _Size, kernel: _Size, out: _Size, stride: _Size, dilation: _Size
) -> tuple[Tensor, Tensor]:
    """Where each row (channel, kernel entry) and each output position starts in the input as the kernel sees it."""
    pitch = (plane[1] * plane[2], plane[2], 1)

    def grid(size: _Size, step: _Size) -> Tensor:
        axes = [torch.arange(n) * s * p * lanes for n, s, p in zip(size, step, pitch, strict=True)]
        return (axes[0][:, None, None] + axes[1][:, None] + axes[2]).flatten()

    channel = torch.arange(channels)
    starts = channel // lanes * lanes * math.prod(plane) + channel % lanes
    # Rows of a tile should be neighbours in memory: kernel entries of a plane, or channels of interleaved planes.
    rows = (
        starts[:, None] + grid(kernel, dilation) if lanes == 1 else grid(kernel, dilation)[:, None] + starts
    ).flatten()
    rows = torch.cat([rows, rows[:1].expand(-len(rows) % TILE_MULTIPLE)])
    return rows.int(), grid(out, stride).int()


def _layout(x: Tensor, size: _Size, plane: _Size) -> int:
    """0: the input can stay where it is; 1: planes of a channel; 2: planes of several, where those are neighbours."""
    if x.is_contiguous() and size == plane:
        return 0
    return 2 if x.stride(1) == 1 and math.prod(size) > 1 else 1


def native_products(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    wanted: Iterable[Moment],
) -> Moments:
    """Moments of a convolution's per-sample weight gradients, none of which is written to memory. See :func:`supports`.

    Args:
        x: The layer's input, ``(N, C_in, *S)``, with any strides.
        g: The gradient of its output, ``(N, C_out, *S')``, of the same type, with at least one position.
        kernel_size: One integer a spatial dimension, at most three.
        stride: The same.
        padding: The same.
        dilation: The same.
        groups: Number of groups.
        wanted: The moments to compute.
    """
    keys, missing = frozenset(wanted), 3 - len(kernel_size)

    def three(values: Iterable[int], fill: int) -> _Size:
        return (fill,) * missing + tuple(values)

    library, threads, samples = _library(g.dtype), _threads(), len(g)
    size, out_size, pad = three(x.shape[2:], 1), three(g.shape[2:], 1), three(padding, 0)
    channels, columns = x.shape[1] // groups, g.shape[1] // groups
    plane = tuple(s + 2 * p for s, p in zip(size, pad, strict=True))
    layout = _layout(x, size, plane)
    lanes = library.tile_rows() if layout == 2 else 1
    geometry = three(kernel_size, 1), out_size, three(stride, 1), three(dilation, 1)
    rows, positions = _offsets(channels, lanes, plane, *geometry)
    panels = -(-columns // library.tile_columns())
    pieces = (
        1 if samples * groups >= TASKS * threads else max(1, min(panels, -(-TASKS * threads // (samples * groups))))
    )
    packed = -(-channels // lanes) * lanes * math.prod(plane) if layout else 0
    each = library.scratch_bytes(-(-panels // pieces), len(positions), packed)
    scratch = _scratch(each * threads + 64)
    out = torch.empty(samples, groups * pieces, len(KEYS), dtype=torch.float64)
    start = -(-scratch.data_ptr() // 64) * 64
    pointers = (x.data_ptr(), g.data_ptr(), out.data_ptr(), start, rows.data_ptr(), positions.data_ptr())
    counts = (each, samples, groups, pieces, _mode(keys), channels * math.prod(kernel_size), columns, channels, layout)
    steps = [(t.stride(0), t.stride(1), _Three(*three(t.stride()[2:], 0))) for t in (x, g)]
    job = _Job(*pointers, *counts, _Three(*size), _Three(*pad), _Three(*out_size), *steps[0], *steps[1])
    library.products(ctypes.byref(job), _parallel(), threads)
    return _moments(out, keys)


def native_squares(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution's per-sample weight gradients by Gram matrices: sum, sum of squares, and what the latter is at most.

    The arguments are those of :func:`native_products`. The last result is ``(sum_p |g_p| |x_p|)^2`` for each sample and
    group, the sum of squares if no two positions cancelled. Each is ``(N, groups)``.
    """
    missing, threads, library = 3 - len(kernel_size), _threads(), _library(g.dtype)

    def three(values: Iterable[int], fill: int) -> Any:
        return _Three(*(fill,) * missing, *values)

    flat = [_steady(t.flatten(2)) for t in (x, g)]
    each = library.gram_scratch_bytes(flat[0].shape[2], flat[1].shape[2], (kernel_size[-1] + 1) * g.shape[-1])
    scratch = _scratch(each * threads + 64)
    out = torch.empty(len(g), groups, 3, dtype=torch.float64)
    job = _GramJob(
        *(t.data_ptr() for t in (*flat, out)),
        -(-scratch.data_ptr() // 64) * 64,
        *(each, len(g), groups, x.shape[1] // groups, g.shape[1] // groups),
        *(three(x.shape[2:], 1), three(g.shape[2:], 1), three(kernel_size, 1)),
        *(three(stride, 1), three(padding, 0), three(dilation, 1)),
        *(step for t in flat for step in t.stride()),
    )
    library.squares(ctypes.byref(job), _parallel(), threads)
    return out[..., 0], out[..., 1], out[..., 2]


def _steady(flat: Tensor) -> Tensor:
    """``(N, C, P)`` with channels or positions as neighbours in memory."""
    return flat if 1 in flat.stride()[1:] else flat.contiguous()
