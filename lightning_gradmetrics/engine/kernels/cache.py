"""Cache folders for compiled kernels, which belong to the user and which nobody else can write to.

A library is executable code, so it is loaded only if nobody except the user and the administrator can have written it,
and if its content matches the digest in its name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BUILD_PREFIX", "cache_folders", "discard", "intact_libraries", "is_private", "publish", "sweep"]

NAME = "lightning_gradmetrics"
BUILD_PREFIX = "build-"
"""Prefix of the folders of running compilations."""

OWN_PREFIX = f"{NAME}-own-"
"""Prefix of folders that are used by a single process."""

STALE_SECONDS = 600
"""Age in seconds above which a compilation's folder counts as left over from a killed process."""

MOST_LINKS = 40
"""Largest number of symbolic links on the path to a folder, the same limit as the operating system's."""

_OTHERS_CAN_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folders() -> Iterator[Path]:
    """Yield the folders for compiled kernels in order of preference; missing folders are created.

    ``$XDG_CACHE_HOME`` if it is an absolute path, the user's ``~/.cache``, the temporary folder, and finally a new folder
    that is deleted when the iteration ends, because a loaded library no longer needs its file. Folders that others can
    write to, or that are mounted ``noexec``, are left out.
    """
    for folder in _candidates():
        if _created(folder) and _is_usable(folder):
            yield folder
    try:
        sweep(Path(tempfile.gettempdir()), OWN_PREFIX)
        with tempfile.TemporaryDirectory(prefix=OWN_PREFIX, ignore_cleanup_errors=True) as own:
            if _is_usable(Path(own)):
                yield Path(own)
    except OSError:  # no usable temporary folder
        return


def _candidates() -> Iterator[Path]:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():  # the XDG specification: relative paths are invalid and ignored
        yield configured / NAME
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor a user entry exists
        home = Path()
    if home.is_absolute():
        yield home / ".cache" / NAME
    try:
        yield Path(tempfile.gettempdir()) / f"{NAME}-{os.geteuid()}"
    except FileNotFoundError:  # no usable temporary folder
        return


def _created(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    return True


def _is_usable(folder: Path) -> bool:
    """Return whether the folder is private and its file system is not mounted ``noexec``."""
    try:
        runs_code = not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
    except OSError:
        return False
    return runs_code and is_private(folder)


def is_private(folder: Path) -> bool:
    """Return whether only the user and the administrator can change the folder's content.

    Every folder and symbolic link on the path must belong to one of the two. A folder that others can write to must
    have the sticky bit, which protects its entries.
    """
    owners = {os.geteuid(), 0, Path("/").stat().st_uid}  # in a user namespace the administrator has a different number
    try:
        for step in _way_to(folder):
            if not _is_protected(step.lstat(), owners):
                return False
        last = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(last.st_mode) and last.st_uid == os.geteuid() and not last.st_mode & _OTHERS_CAN_WRITE


def _is_protected(entry: os.stat_result, owners: set[int]) -> bool:
    if entry.st_uid not in owners:
        return False
    if stat.S_ISLNK(entry.st_mode):
        return True
    return not entry.st_mode & _OTHERS_CAN_WRITE or bool(entry.st_mode & stat.S_ISVTX)


def _way_to(path: Path) -> Iterator[Path]:
    """Yield every folder and symbolic link that the operating system visits to resolve an absolute path."""
    current, waiting, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    yield current
    while waiting:
        name = waiting.pop()
        if name == "..":
            current = current.parent
            continue
        step = current / name
        yield step
        if not step.is_symlink():
            current = step
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(f"too many symbolic links in {path}")
        target = step.readlink()
        waiting += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        current = Path(target.anchor) if target.is_absolute() else current


def intact_libraries(folder: Path, stem: str) -> Iterator[Path]:
    """Yield the libraries with this name stem whose content is unchanged; delete the others with this stem."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if _is_intact(path):
            yield path
        else:
            discard(path)


def _is_intact(path: Path) -> bool:
    try:
        entry = path.lstat()
        own = entry.st_uid == os.geteuid() and not entry.st_mode & _OTHERS_CAN_WRITE
        return stat.S_ISREG(entry.st_mode) and own and path.stem.rpartition("-")[2] == _digest(path)
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def discard(path: Path) -> None:
    """Delete a file if that is possible."""
    try:
        path.unlink()
    except OSError:
        return


def publish(built: Path, folder: Path, stem: str) -> Path:
    """Move a new library into the folder in one atomic step."""
    built.chmod(0o500)
    return built.replace(folder / f"{stem}-{_digest(built)}.so")


def sweep(folder: Path, prefix: str = BUILD_PREFIX) -> None:
    """Delete the leftovers of killed compilations in the folder."""
    for leftover in folder.glob(f"{prefix}*"):
        try:
            entry = leftover.lstat()
        except OSError:  # another process has just deleted it
            continue
        own = stat.S_ISDIR(entry.st_mode) and entry.st_uid == os.geteuid()
        if own and time.time() - entry.st_mtime > STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
