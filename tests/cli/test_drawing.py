"""Figures that a second process saves."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from lightning_gradmetrics.cli.drawing import saving
from lightning_gradmetrics.pictures.base import Picture, Saving, write_pictures


@pytest.fixture(params=[1, 2])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def picture() -> Picture:
    figure = Figure(figsize=(2, 2))
    axes = figure.add_axes((0.2, 0.2, 0.7, 0.7))
    axes.plot([0, 1], label="a $ b")
    axes.legend()
    return Picture("curve", "", "", figure)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "figures").iterdir()}


@pytest.mark.slow
@pytest.mark.usefixtures("cores")
def test_a_second_process_writes_the_same_files_with_the_same_settings(tmp_path: Path) -> None:
    figures: list[Saving] = []
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 7}):
        write_pictures([picture()], tmp_path / "here", pdf=True)
        records = write_pictures([picture()], tmp_path / "there", pdf=True, schedule=figures.append)
        with saving(figures):
            pass
    assert [record["file"] for record in records] == ["figures/curve.svg"]
    assert files(tmp_path / "there") == files(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.usefixtures("cores")
def test_an_error_is_raised_after_the_block(tmp_path: Path) -> None:
    figures = [(partial(Figure().savefig, tmp_path / "missing" / "a.svg"), {})]
    with pytest.raises((RuntimeError, OSError), match="No such file or directory"), saving(figures):
        pass


@pytest.mark.slow
def test_an_error_in_the_block_ends_the_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(KeyError, match="mine"), saving([(partial(Figure().savefig, tmp_path / "a.svg"), {})]):
        raise KeyError("mine")
    assert not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_pickled_is_saved_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().xaxis.set_major_formatter(lambda value, position: "x")
    with saving([(partial(figure.savefig, tmp_path / "a.svg"), {})]):
        assert (tmp_path / "a.svg").exists()
