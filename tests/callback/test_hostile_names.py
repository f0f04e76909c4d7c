"""Names of datasets and scores that would break out of a directory, a page or a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.pictures.base import Picture, write_pictures
from lightning_gradmetrics.pictures.cosine_map_figure import csm_figure
from lightning_gradmetrics.report import write_report, write_run
from lightning_gradmetrics.scoring.registry import resolve
from tests.callback.runs import Stepped, trainer

SCRIPT = "<script>alert(1)</script>"
DATASETS = {f"../../{SCRIPT}": "id", "/tmp/[bold]far[/bold]\x1b[2J": "far\n[red]", "..": "near"}
SCORES = {f"../up{SCRIPT}": "energy", "[bold]max[/bold]\x1b[31m": "max_softmax", "/etc/a\nb": "gradnorm"}


def loaders() -> list[DataLoader[Any]]:
    torch.manual_seed(0)
    made = []
    for size in (30, 20, 20):
        made.append(DataLoader(TensorDataset(torch.rand(size, 3, 8, 8), torch.arange(size) % 3), 8))
    return made


def files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .*")  # newlines in the names
def test_names_stay_inside_the_run_directory_and_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "one" / "two" / "three" / "run"
    module = Stepped(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
    callback = lgm.GradientMetrics(SCORES, datasets=DATASETS, top_k={next(iter(SCORES)): 3}, profile=True)
    trainer(callback).test(module, loaders(), verbose=False)
    before = set(map(str, Path("/tmp").glob("*bold*"))) | set(map(str, Path("/root").glob("*a*b*")))
    callback.save(run)
    page = callback.report(run / "report.html", data=dict(zip(DATASETS, loaders(), strict=True))).read_text()
    after = set(map(str, Path("/tmp").glob("*bold*"))) | set(map(str, Path("/root").glob("*a*b*")))
    assert files(tmp_path) == files(run) and before == after
    assert SCRIPT not in page and "&lt;script&gt;alert(1)&lt;/script&gt;".replace("/", "/<wbr>") in page.replace(
        "&lt;/", "&lt;/<wbr>"
    ).replace("<wbr><wbr>", "<wbr>")
    assert SCRIPT not in callback._repr_html_()
    shown = capsys.readouterr().out + callback.summary(200)
    assert "[bold]max[/bold]" in shown and "\x1b" not in shown


def test_a_hostile_name_of_a_picture_is_a_file_name(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    names = ["maps/../../x/0", "/abs/y", "..", "maps/a\nb", "maps/a\x1bb", "fine/name"]
    records = write_pictures([Picture(name, name, "", Figure(), "Maps") for name in names], tmp_path / "run")
    assert len({record["file"] for record in records}) == len(names)
    assert records[-1]["file"] == "figures/fine/name.svg"
    for record in records:
        path = (tmp_path / "run" / record["file"]).resolve()
        assert path.is_file() and path.is_relative_to((tmp_path / "run" / "figures").resolve())
        assert record["file"].isprintable()
    assert files(tmp_path) == files(tmp_path / "run")


def test_fitted_states_and_results_stay_inside_their_directories(tmp_path: Path) -> None:
    model, images = nn.Sequential(nn.Linear(4, 3)), torch.randn(20, 4)
    scores = list(resolve({"../../../evil\n": "gradorth"}))
    lgm.scores.save_fitted(lgm.fit(model, [images], scores), tmp_path / "a" / "states")
    output = tmp_path / "a" / "results"
    callback = lgm.GradientMetrics(["energy"], datasets=["../../x"], output=output)
    trainer(callback).test(Stepped(nn.Linear(4, 3)), DataLoader(TensorDataset(images), 8), verbose=False)
    assert {path.parent for path in files(tmp_path)} == {tmp_path / "a" / "states", output}
    assert lgm.read_results(output)["dataset"].to_pylist() == ["../../x"] * 20


CLASSES = [SCRIPT, "../../up", "[red]$\\frac{", "a\x1b[2J\nb"]


def segmentation_run(directory: Path) -> lgm.GradientMetrics:
    torch.manual_seed(0)
    rows = TensorDataset(torch.rand(6, 3, 8, 8), torch.randint(0, 4, (6, 8, 8)))
    pixels = lgm.Pixels(segments=1, maps=2, class_names=CLASSES)
    callback = lgm.GradientMetrics(["energy", "max_softmax"], pixels=pixels, output=directory)
    trainer(callback).test(Stepped(nn.Conv2d(3, 4, 1)), DataLoader(rows, 3), verbose=False)
    return callback


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .*")
def test_class_names_are_escaped_in_pages_pictures_and_terminals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "one" / "two" / "run"
    callback = segmentation_run(run / "results")
    assert set(callback.segments["class_name"].to_pylist()) <= set(CLASSES)
    assert callback.class_metrics["class_name"].to_pylist()[0] in CLASSES
    callback.save(run)
    callback.write_maps(run / "maps")
    model = {"name": "Conv2d", "parameters": 16, "class_names": CLASSES}
    write_run(run, callback.results, callback.evaluation, callback.scorer.scores, model=model)
    pages = [write_report(run, run / "report.html").read_text(), callback.report(run / "other.html").read_text()]
    figure = csm_figure(torch.rand(1, 4, 4), class_names=CLASSES)
    figure.savefig(run / "maps.svg")
    pages += [path.read_text() for path in run.rglob("*.svg")]
    assert len(pages) > 3 and not any(SCRIPT in page or "\x1b" in page for page in pages)
    assert "\x1b" not in capsys.readouterr().out + callback.summary(200)
    assert files(tmp_path) == files(run)
