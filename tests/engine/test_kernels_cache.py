"""Where compiled kernels are stored, what is loaded from there, and the fallbacks."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from lightning_gradmetrics.engine import kernels
from lightning_gradmetrics.engine.kernels import ConvGeometry, cache, jobs, library, native
from lightning_gradmetrics.gradients.statistics import gradient_moments

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kernels are compiled on POSIX systems")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(c) for c in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)
ALL = frozenset({"sum", "max", "min", 1.0, 2.0})
SAME = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1))
SOURCES = library.SOURCES


def stub() -> str:
    """The kernels' functions without their bodies, which compile quickly."""
    sizes = [f"long long {name}(void) {{ return {ctypes.sizeof(job)}; }}" for name, job in jobs.JOB_SIZES.items()]
    scratch = [f"long long {name}(void) {{ return 0; }}" for name in library.SCRATCH_SIZES]
    return "\n".join([*sizes, *scratch, *(f"void {name}(void) {{}}" for name in library.JOBS)])


class Machine:
    """A machine without built kernels: a cache folder, a home, a temporary folder, and a stub of the kernels."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.cache, self.home, self.temporary = root / "cache", root / "home", root / "tmp"
        for folder in (self.cache, self.home, self.temporary):
            folder.mkdir(mode=0o700)
        self.kept = self.cache / "lightning_gradmetrics"
        patch.setenv("XDG_CACHE_HOME", str(self.cache))
        patch.setenv("HOME", str(self.home))
        patch.delenv(library.SWITCH, raising=False)
        patch.setattr(tempfile, "tempdir", str(self.temporary))
        source = root / "stub.c"
        source.write_text(stub())
        patch.setattr(library, "SOURCES", (source,))

    def state(self) -> str:
        """What a new process reports."""
        library._kernels.cache_clear()
        return kernels.describe_kernels()

    def libraries(self, folder: Path | None = None) -> list[Path]:
        return sorted((folder or self.kept).glob("*.so"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    yield Machine(tmp_path, monkeypatch)
    monkeypatch.undo()
    library._kernels.cache_clear()


def computes_moments() -> bool:
    """Return whether the moments of a convolution are right, with or without compiled kernels."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    actual, expected = kernels.conv_moments(x, g, SAME, ALL), gradient_moments(kernels.conv_gradient(x, g, SAME), ALL)
    return all(torch.allclose(actual[key], expected[key], rtol=1e-4, atol=1e-4) for key in ALL)


# -- what is built and loaded -------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_compiler
def test_kernels_are_built_once_and_kept(machine):
    machine.patch.setattr(library, "SOURCES", SOURCES)
    assert machine.state() == f"compiled: {machine.libraries()[0]}"
    (built,) = machine.kept.iterdir()
    changed = built.stat().st_mtime_ns
    machine.state()
    assert [built.stat().st_mtime_ns] == [path.stat().st_mtime_ns for path in machine.kept.iterdir()] == [changed]
    assert stat.S_IMODE(machine.kept.stat().st_mode) == 0o700
    assert not built.stat().st_mode & 0o022
    assert computes_moments()


@pytest.mark.parametrize("name", jobs.JOB_SIZES)
@needs_compiler
def test_structs_have_the_size_that_python_expects(name):
    function = getattr(library.library_for(torch.float32), name)
    assert function() == ctypes.sizeof(jobs.JOB_SIZES[name])


def truncated(path: Path) -> bytes:
    return path.read_bytes()[:-1000]


def empty(path: Path) -> bytes:
    return b""


def changed_byte(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    return bytes(content)


@needs_compiler
@pytest.mark.parametrize("damage", [truncated, empty, changed_byte])
def test_a_damaged_library_is_rebuilt(machine, damage):
    machine.state()
    (path,) = machine.libraries()
    content = path.read_bytes()
    broken = damage(path)
    path.unlink()  # this process still runs what the file contained
    path.write_bytes(broken)
    path.chmod(0o700)
    assert machine.state() == f"compiled: {path}"
    assert path.read_bytes() == content


def text(folder: Path) -> bytes:
    return b"not a library"


def other_functions(folder: Path) -> bytes:
    return compiled(folder, "int answer(void) { return 42; }")


def other_struct_size(folder: Path) -> bytes:
    functions = [f"long long {name}(void) {{ return 1; }}" for name in jobs.JOB_SIZES]
    return compiled(folder, "\n".join(functions))


def compiled(folder: Path, source: str) -> bytes:
    (folder / "other.c").write_text(source)
    command = [shutil.which("cc") or "gcc", "-shared", "-fPIC", "other.c", "-o", "other.so"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "other.so").read_bytes()


@needs_compiler
@pytest.mark.parametrize("foreign", [text, other_functions, other_struct_size])
def test_a_foreign_library_with_the_right_name_is_replaced(machine, tmp_path, foreign):
    machine.state()
    (path,) = machine.libraries()
    built = tmp_path / "foreign.so"
    built.write_bytes(foreign(tmp_path))
    path.unlink()
    planted = cache.publish(built, machine.kept, path.stem.rpartition("-")[0])
    assert machine.state() == f"compiled: {path}"
    assert machine.libraries() == [path] != [planted]


@needs_compiler
def test_a_library_that_others_can_write_to_is_rebuilt(machine):
    machine.state()
    (path,) = machine.libraries()
    path.chmod(0o722)
    machine.state()
    assert not machine.libraries()[0].stat().st_mode & 0o022


@needs_compiler
def test_a_symbolic_link_is_not_loaded(machine, tmp_path):
    machine.state()
    (path,) = machine.libraries()
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    machine.state()
    assert [p.is_symlink() for p in machine.libraries()] == [False]


def test_leftovers_of_killed_compilations_are_swept(machine):
    machine.kept.mkdir(mode=0o700)
    old, running = machine.kept / "build-old", machine.kept / "build-running"
    for folder in (old, running):
        folder.mkdir()
        (folder / "kernels.so").write_bytes(b"half of it")
    hours_ago = time.time() - 7200
    os.utime(old, (hours_ago, hours_ago))
    cache.sweep(machine.kept)
    assert not old.exists() and running.exists()


@needs_compiler
@pytest.mark.slow
def test_leftovers_of_a_killed_compilation_are_not_loaded(machine, tmp_path):
    """A compiler that writes half a library and is then killed with its parent."""
    compiler = tmp_path / "slow"
    compiler.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\ntouch "$2.begun"\nexec sleep 60\n'
    )
    compiler.chmod(0o700)
    script = "from lightning_gradmetrics.engine.kernels import describe_kernels; describe_kernels()"
    environment = {**os.environ, "CC": str(compiler), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list(machine.kept.glob("build-*/*.begun")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, 9)
    (leftover,) = machine.kept.iterdir()
    assert leftover.name.startswith(cache.BUILD_PREFIX)
    hours_ago = time.time() - 7200
    os.utime(leftover, (hours_ago, hours_ago))
    assert machine.state() == f"compiled: {machine.libraries()[0]}"
    assert not leftover.exists()


# -- which folders ------------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_relative_cache_home_is_ignored(machine, tmp_path):
    machine.patch.chdir(tmp_path)
    machine.patch.setenv("XDG_CACHE_HOME", "cache")
    assert machine.state().startswith(f"compiled: {machine.home / '.cache' / 'lightning_gradmetrics'}")
    assert not machine.kept.exists()


@needs_compiler
@pytest.mark.parametrize("home", ["missing", "relative"])
def test_without_a_home_the_temporary_folder_is_used(machine, home):
    def no_home() -> Path:
        if home == "relative":
            return Path("here")
        raise RuntimeError("Could not determine home directory.")

    machine.patch.delenv("XDG_CACHE_HOME")
    machine.patch.setattr(Path, "home", no_home)
    assert machine.state().startswith(f"compiled: {machine.temporary}/lightning_gradmetrics-{os.geteuid()}")


@needs_compiler
def test_a_cache_folder_that_cannot_be_created_is_skipped(machine):
    machine.kept.write_text("a file where the folder should be")
    assert machine.state().startswith(f"compiled: {machine.home}")


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_to_is_skipped(machine):
    """This includes the administrator, whom file modes do not restrict; here the file system refuses."""

    def refuse(command, scratch):
        if scratch.startswith((str(machine.cache), str(machine.home))):
            raise OSError(30, "Read-only file system")
        run(command, scratch)

    run = library._run
    machine.patch.setattr(library, "_run", refuse)
    assert machine.state().startswith(f"compiled: {machine.temporary}")
    assert machine.libraries() == []


@needs_compiler
def test_a_noexec_file_system_is_skipped(machine):
    def statvfs(path):
        noexec = str(path).startswith(str(machine.cache))
        return type("Mount", (), {"f_flag": os.ST_NOEXEC if noexec else 0})

    machine.patch.setattr(os, "ST_NOEXEC", 8, raising=False)
    machine.patch.setattr(os, "statvfs", statvfs)
    assert machine.state().startswith(f"compiled: {machine.home}")


@needs_compiler
def test_a_folder_from_which_no_library_can_be_loaded_is_skipped(machine):
    """A security module can cause this, which no mount flag reveals."""
    load = ctypes.CDLL

    def refuse(path):
        if str(path).startswith(str(machine.cache)):
            raise OSError("failed to map segment from shared object")
        return load(path)

    machine.patch.setattr(ctypes, "CDLL", refuse)
    assert machine.state().startswith(f"compiled: {machine.home}")
    assert machine.libraries() == []


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_to_is_skipped(machine, mode):
    """Nothing is loaded from it, even if what it contains has the right name."""
    machine.state()
    machine.kept.chmod(mode)
    assert machine.state().startswith(f"compiled: {machine.home}")


@needs_compiler
def test_a_folder_inside_one_that_others_can_write_to_is_skipped(machine):
    machine.cache.chmod(0o777)
    assert machine.state().startswith(f"compiled: {machine.home}")


def test_a_sticky_folder_protects_files_of_the_user(machine):
    machine.temporary.chmod(0o1777)
    own = machine.temporary / "own"
    own.mkdir(mode=0o700)
    assert cache.is_private(own)
    machine.temporary.chmod(0o777)
    assert not cache.is_private(own)


def test_symbolic_links_are_followed_to_their_target(machine):
    link, chain, loop = (machine.home / name for name in ("link", "chain", "loop"))
    link.symlink_to(machine.temporary)
    chain.symlink_to("./link/../home/link")
    loop.symlink_to("loop")
    assert cache.is_private(chain)
    assert not cache.is_private(loop)
    machine.temporary.chmod(0o777)
    assert not cache.is_private(chain)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator can give files away")
STRANGER = 12345


@pytest.mark.slow
@needs_root
def test_a_folder_of_another_user_is_skipped(machine):
    """An attacker created the predictable folder in the shared temporary folder first."""
    machine.temporary.chmod(0o1777)
    planted = machine.temporary / f"lightning_gradmetrics-{os.geteuid()}"
    planted.mkdir(mode=0o755)
    os.chown(planted, STRANGER, STRANGER)
    for folder in (machine.cache, machine.home):
        folder.chmod(0o777)
    assert next(cache.cache_folders()).name.startswith("lightning_gradmetrics-own-")
    if shutil.which("cc"):
        machine.patch.setattr(library, "SOURCES", SOURCES)
        assert machine.state() == "compiled, for this process only"
        assert list(machine.temporary.iterdir()) == [planted] and list(planted.iterdir()) == []
        assert computes_moments()


@needs_root
def test_a_symbolic_link_of_another_user_is_not_followed(machine):
    machine.temporary.chmod(0o1777)
    link = machine.temporary / "link"
    link.symlink_to(machine.home)
    assert cache.is_private(link)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    assert not cache.is_private(link)


@needs_root
def test_a_file_of_another_user_is_not_loaded(machine):
    if not machine.state().startswith("compiled"):
        pytest.skip("no C compiler on this machine")
    (path,) = machine.libraries()
    os.chown(path, STRANGER, STRANGER)
    machine.state()
    assert machine.libraries()[0].stat().st_uid == os.geteuid()


# -- without kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [library.SWITCH, "PATH"])
def test_without_a_compiler_plain_torch_is_used(machine, variable):
    machine.patch.delenv("CC", raising=False)
    machine.patch.setenv(variable, "0")
    reasons = {"PATH": "no C compiler found (cc, gcc, clang, or $CC)", library.SWITCH: "switched off by"}
    assert machine.state().startswith(f"plain torch: {reasons[variable]}")
    assert not native.supports(torch.zeros(1), ALL)
    assert computes_moments()


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler", "/bin/false --option 'of two words'"])
def test_a_compiler_that_fails_is_reported_once(machine, compiler):
    machine.patch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=f"{compiler.split()[0]}.*Repair the compiler, or set {library.SWITCH}=0"):
        assert machine.state().startswith("plain torch: ")
    assert not native.supports(torch.zeros(1), ALL)
    assert computes_moments()
    assert machine.libraries() == [] and list(machine.temporary.glob("*own*")) == []


def test_a_compiler_that_hangs_is_stopped(machine):
    machine.patch.setenv("CC", "/bin/sh -c 'sleep 60'")
    machine.patch.setattr(library, "COMPILE_SECONDS", 0.2)
    with pytest.warns(UserWarning, match=r"took more than 0.2 seconds"):
        machine.state()


def test_a_geometry_needs_the_same_dimensions_in_each_field():
    with pytest.raises(ValueError, match="1 to 3 spatial dimensions"):
        ConvGeometry((3, 3), (1,), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="1 to 3 spatial dimensions"):
        ConvGeometry((1,) * 4, (1,) * 4, (0,) * 4, (1,) * 4)
