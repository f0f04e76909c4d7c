"""Figures that a second process draws."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path

import matplotlib
import pyarrow as pa
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lightning_gradmetrics.cli import second_process as processes
from lightning_gradmetrics.cli.figures import Curves, Figures, matplotlib_settings
from lightning_gradmetrics.cli.second_process import second_process
from lightning_gradmetrics.pictures import log_pixels, picture_sources, takes_pixels
from lightning_gradmetrics.pictures.maps import MapGallery, _Seen
from lightning_gradmetrics.scoring.registry import resolve


@pytest.fixture(params=["1", "2"])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", request.param)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(processes, "_can_fork", lambda: True)  # the threads of the test runner are idle


def figures(directory: Path) -> Figures:
    (gallery,) = picture_sources(resolve(["gga"]))
    assert isinstance(gallery, MapGallery)
    gallery.seen["a $ b"] = _Seen(2, torch.eye(3), torch.tensor([0.1, 0.2]), torch.eye(3).expand(2, 3, 3), None)
    columns = {"dataset": ["test"] * 3, "index": [0, 1, 2], "prediction": [0, 1, 1], "label": [0, 1, 0]}
    table = pa.table({**columns, "entropy": [0.1, 0.3, 0.9], "finite": [True] * 3})
    curves = Curves(table, ["entropy"], {"test": "id"})
    return Figures(directory, [gallery], curves, with_pixels=True, settings=matplotlib_settings())


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "figures").iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("cores")
def test_a_second_process_draws_the_same_figures_with_the_same_settings(tmp_path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 7}), second_process() as process:
        finished = process.submit(figures(tmp_path / "there"))
        drawn, again = figures(tmp_path / "here")(), finished()
    assert [record["file"] for record in again.files] == ["figures/mean_maps.svg", "figures/maps_a_b.svg"]
    assert again.files == drawn.files
    assert {"maps_a_b.svg", "distributions_entropy.pdf"} < set(files(tmp_path / "here"))
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert again.pixels.keys() == drawn.pixels.keys() == {"mean_maps", "maps_a_b"}
    for name, pixels in drawn.pixels.items():
        assert (again.pixels[name] == pixels).all()


@pytest.mark.usefixtures("two_cores")
def test_what_the_function_prints_appears_at_once_on_the_standard_error_stream(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with second_process() as process:
        assert process.submit(partial(print, "on the standard output"))() is None
        captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "on the standard output\n")


@pytest.mark.usefixtures("two_cores")
def test_several_functions_run_one_after_the_other(tmp_path: Path) -> None:
    with second_process() as process:
        made = process.submit(partial((tmp_path / "a").mkdir))
        numbers = [process.submit(os.getpid) for _ in range(2)]
        listed = process.submit(partial(os.listdir, tmp_path))
        assert listed() == ["a"] and made() is None
        assert numbers[0]() == numbers[1]() != os.getpid()


@pytest.mark.usefixtures("two_cores")
def test_an_error_is_raised_where_the_result_is_read_and_ends_nothing(tmp_path: Path) -> None:
    with second_process() as process:
        finished, pid = process.submit(partial(os.listdir, tmp_path / "missing")), process.submit(os.getpid)
        with pytest.raises(RuntimeError, match=r"could not be saved: .*No such file or directory"):
            finished()
        assert pid() != os.getpid()


@pytest.mark.usefixtures("two_cores")
def test_a_process_that_is_killed_is_reported() -> None:
    with second_process() as process:
        finished = process.submit(partial(os._exit, 3))
        with pytest.raises(RuntimeError, match="ended with status 3"):
            finished()


@pytest.mark.usefixtures("two_cores")
def test_an_error_in_the_block_ends_the_second_process(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), second_process() as process:
        process.submit(partial(time.sleep, 60))
        process.submit(partial((tmp_path / "a").mkdir))
        raise KeyError("mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("two_cores")
def test_a_function_that_cannot_be_pickled_runs_here() -> None:
    with second_process() as process:
        assert process.submit(lambda: os.getpid())() == os.getpid()


@pytest.mark.usefixtures("two_cores")
def test_a_process_that_has_ended_is_not_needed() -> None:
    with second_process() as process:
        assert process._worker is not None
        process._worker.process.kill()
        process._worker.process.join()
        assert process.submit(partial(os.getpid))() == os.getpid()


def test_a_thread_that_runs_python_is_not_forked() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert not processes._can_fork()
    end.set()
    thread.join()


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_process_of_a_distributed_run_starts_a_second_one(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv(variable, "1")
    with second_process() as process:
        assert process.submit(partial(os.getpid))() == os.getpid()


def test_pixels_are_on_the_disk_when_the_logger_was_closed_before(tmp_path: Path) -> None:
    class Logger:
        experiment = SummaryWriter(tmp_path)  # type: ignore[no-untyped-call]

    Logger.experiment.close()
    assert takes_pixels(Logger())
    log_pixels([Logger()], {"a": torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()}, "mine", 0)
    assert b"mine/a" in b"".join(path.read_bytes() for path in tmp_path.iterdir())
