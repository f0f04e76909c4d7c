"""Builds the library of compiled kernels at first use with the system's C compiler and loads it once per process.

Without a compiler, or with ``LIGHTNING_GRADMETRICS_NATIVE=0``, there is no library and every caller uses plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_gradmetrics.engine.kernels.cache import (
    BUILD_PREFIX,
    cache_folders,
    discard,
    intact_libraries,
    publish,
    sweep,
)
from lightning_gradmetrics.engine.kernels.jobs import JOB_SIZES
from lightning_gradmetrics.engine.kernels.operators import is_traced

__all__ = ["SWITCH", "describe_kernels", "library_for", "parallel_runner", "plain_kernels"]

SWITCH = "LIGHTNING_GRADMETRICS_NATIVE"
"""The environment variable that switches the compiled kernels off with the value ``0``."""

SOURCES = tuple(sorted(Path(__file__).with_name("csrc").glob("*.[ch]")))
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-fPIC", "-w")
DEFINES = {torch.float32: ("-DREAL=float", "-DSINGLE"), torch.float64: ("-DREAL=double",)}
COMPILE_SECONDS = 120
JOBS = (
    "products",
    "row_statistics",
    "segment_statistics",
    "position_statistics",
    "squares",
    "linear_squares",
    "depthwise",
    "grouped",
    "class_residuals",
    "looked_up_rows",
    "norm_weight_rows",
    "group_norm_gradients",
    "group_norm_last",
    "softmax_maps",
    "softmax_rows",
    "softmax_powers",
    "ranking_totals",
    "resampled_totals",
    "words_to_sort",
    "counts_of_sorted",
)
"""The kernel functions; each takes a job, a thread runner and a number of threads."""

SCRATCH_SIZES = (
    "scratch_bytes",
    "gram_scratch_bytes",
    "depthwise_scratch_bytes",
    "grouped_scratch_bytes",
    "resampled_scratch_bytes",
)
"""The functions that return the memory that one thread needs for packed operands."""


class Kernels(NamedTuple):
    """A loaded library, or the reason why there is none."""

    library: Any
    state: str


class _BuildError(Exception):
    """No library could be built."""


_suspended = False


def library_for(dtype: torch.dtype, in_graph: bool = False) -> Any:
    """Return the loaded library for a floating type, or None.

    Args:
        dtype: The floating type.
        in_graph: Whether the kernel is called by an operator, so that a traced graph can contain the call.
    """
    return None if _suspended or (is_traced() and not in_graph) else _kernels(dtype).library


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Use plain torch instead of the compiled kernels inside the block."""
    global _suspended
    before, _suspended = _suspended, True
    try:
        yield
    finally:
        _suspended = before


def describe_kernels(dtype: torch.dtype = torch.float32) -> str:
    """Return whether the kernels for a floating type are compiled, and if not, why.

    Compiles them if that has not happened yet.

    Args:
        dtype: ``torch.float32`` or ``torch.float64``; half precision is computed in float32.

    Returns:
        One line, such as ``"compiled: /home/me/.cache/lightning_gradmetrics/float32-...so"``.
    """
    return _kernels(dtype).state


@functools.cache
def _kernels(dtype: torch.dtype) -> Kernels:
    reason = _why_off(dtype)
    if reason:
        return Kernels(None, f"plain torch: {reason}")
    try:
        library, path = _first_loadable(_compiler(), dtype)
    except _BuildError as error:
        warnings.warn(
            f"the kernels could not be compiled, so gradient statistics take up to twice as long: {error}. Repair the "
            f"compiler, or set {SWITCH}=0 to hide this warning",
            stacklevel=2,
        )
        return Kernels(None, f"plain torch: {error}")
    return Kernels(library, f"compiled: {path}" if path.exists() else "compiled, for this process only")


def _why_off(dtype: torch.dtype) -> str:
    """Return why no library can be built, or an empty string."""
    if os.environ.get(SWITCH) == "0":
        return f"switched off by {SWITCH}=0"
    if dtype not in DEFINES:
        return f"no kernels for {dtype}"
    if os.name != "posix":
        return f"no kernels for {platform.system()}"
    return "" if _compiler() else f"no C compiler found ({', '.join(COMPILERS)}, or $CC)"


def _compiler() -> list[str]:
    """Return the compiler's command, empty if there is none."""
    configured = shlex.split(os.environ.get("CC", ""))
    if configured:
        return configured
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    return []


def _first_loadable(compiler: Sequence[str], dtype: torch.dtype) -> tuple[Any, Path]:
    """Return the library from the first folder where one can be loaded, or built and loaded."""
    stem = _stem(compiler, dtype)
    failure = "there is no folder that only you can write to and that may contain executable code"
    for folder in cache_folders():
        for path in intact_libraries(folder, stem):
            library = _loaded(path)
            if library is not None:
                return library, path
            discard(path)
        try:
            path = _built(compiler, dtype, folder, stem)
        except OSError as error:  # the folder cannot be written to, or the compiler fails
            failure = str(error)
            continue
        library = _loaded(path)
        if library is not None:
            return library, path
        discard(path)
        failure = f"the library built in {folder} could not be loaded"
    raise _BuildError(failure)


def _stem(compiler: Sequence[str], dtype: torch.dtype) -> str:
    """Return a name that identifies everything the compiled code depends on."""
    content = map(Path.read_text, SOURCES)
    text = "\n".join([*content, *FLAGS, *DEFINES[dtype], *compiler, _processor()])
    return f"{str(dtype).removeprefix('torch.')}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _processor() -> str:
    """Return a description of the processor, which ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return line + platform.machine()
    return platform.machine()


def _built(compiler: Sequence[str], dtype: torch.dtype, folder: Path, stem: str) -> Path:
    """Compile a new library in the folder, the files side by side, and return its path."""
    sweep(folder)
    with tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=folder) as scratch, ThreadPoolExecutor(_cores()) as pool:

        def compiled(source: Path) -> str:
            target = str(Path(scratch) / f"{source.stem}.o")
            _run([*compiler, *FLAGS, *DEFINES[dtype], "-c", str(source), "-o", target], scratch)
            return target

        largest_first = sorted(SOURCES, key=lambda source: -source.stat().st_size)
        objects = list(pool.map(compiled, [source for source in largest_first if source.suffix == ".c"]))
        built = Path(scratch) / "kernels.so"
        _run([*compiler, *FLAGS, "-shared", *objects, "-o", str(built), "-lm"], scratch)
        return publish(built, folder, stem)


def _cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(command: Sequence[str], scratch: str) -> None:
    """Run the compiler with its temporary files in the scratch folder, so that a killed run leaves nothing elsewhere."""
    environment = {**os.environ, "TMPDIR": scratch}
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS, env=environment)
    except subprocess.TimeoutExpired as error:
        raise _BuildError(f"{command[0]} took more than {COMPILE_SECONDS} seconds") from error
    except subprocess.CalledProcessError as error:  # another folder may work, for example if this disk is full
        lines = error.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {error.returncode}"]
        raise OSError(f"{command[0]} failed: {lines[-1]}") from error


def _loaded(path: Path) -> Any:
    """Return the library in a file; ``None`` if it cannot be loaded or was built from other sources."""
    try:
        library = ctypes.CDLL(str(path))
        for name, structure in JOB_SIZES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int64, []
            if function() != ctypes.sizeof(structure):
                return None
        _declare(library)
    except (OSError, AttributeError):
        return None
    return library


def _declare(library: Any) -> None:
    """Declare the types of the functions for ctypes."""
    for name in SCRATCH_SIZES:
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 3
    for name in JOBS:
        function = getattr(library, name)
        function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]


@functools.cache
def parallel_runner() -> int | None:
    """Return the address of ``GOMP_parallel`` in torch's OpenMP runtime, so that the kernels share torch's thread pool."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None
