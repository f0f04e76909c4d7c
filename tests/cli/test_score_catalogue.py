"""The registry, the configuration and the documentation agree."""

from __future__ import annotations

import inspect
import re
from io import StringIO
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console

import lightning_gradmetrics as lgm
from lightning_gradmetrics.cli.score_catalogue import lines, markdown, stub
from lightning_gradmetrics.cli.score_list import scores_table
from lightning_gradmetrics.scores import Score
from lightning_gradmetrics.scoring.registry import RECIPES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "conf" / "score").glob("*.yaml"))


def entries(path: Path) -> dict[str, object]:
    return OmegaConf.to_container(OmegaConf.merge({"seed": 0}, OmegaConf.load(path)), resolve=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_makes_scores(path: Path) -> None:
    """The names begin with the file's name or, in a file of several scores, with the score's."""
    for name, node in entries(path).items():
        if name != "seed":
            score = instantiate(node)
            assert isinstance(score, Score) and name.startswith(score.recipe.name)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_score_has_a_file_with_its_defaults(name: str) -> None:
    node = dict(entries(ROOT / "conf" / "score" / f"{name}.yaml")[name])
    assert node.pop("_target_") == f"lightning_gradmetrics.scores.{name}"
    assert node == RECIPES[name].defaults


def test_the_page_and_the_stub_are_up_to_date() -> None:
    """Otherwise run ``python -m lightning_gradmetrics.cli.score_catalogue``."""
    assert (ROOT / "docs" / "scores.md").read_text(encoding="utf-8") == markdown()
    assert (ROOT / "lightning_gradmetrics/scores/__init__.pyi").read_text(encoding="utf-8") == stub()


@pytest.mark.parametrize("name", lgm.scores.NAMES)
def test_every_argument_is_documented_and_the_paper_linked(name: str) -> None:
    text, recipe = RECIPES[name].documentation, RECIPES[name]
    arguments, reference = text.partition("Args:")[2], text.partition("Reference:")[2]
    for argument in recipe.defaults:
        assert f"\n    {argument}: " in arguments, argument
    assert "https://" in reference
    for paper in re.findall(r"arXiv:([\d.]+)", recipe.paper):
        assert f"https://arxiv.org/abs/{paper}" in reference


@pytest.mark.parametrize("name", lgm.scores.NAMES)
def test_help_and_signature_show_the_score(name: str) -> None:
    """``help``, editors and Sphinx find the function or class of that name, its docstring and its arguments."""
    score = getattr(lgm.scores, name)
    assert inspect.isroutine(score) or inspect.isclass(score)
    assert score.__name__ == name and inspect.getdoc(score) == RECIPES[name].documentation
    if name in ("pytorch_ood", "views"):
        return  # their arguments are those of a detector, or another score
    shown = [p for p in inspect.signature(score).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {p.name: p.default for p in shown} == RECIPES[name].defaults
    assert not any(isinstance(p.annotation, str) for p in shown)


@pytest.mark.parametrize("line", lines(), ids=lambda line: line.name)
def test_every_line_is_filled(line) -> None:
    assert line.paper and line.needs and line.cost and line.sign in ("score", "-score", "1 - score")
    assert line.summary.endswith(".") and line.summary[0].isupper()
    assert ("egative" in line.summary.split()[0]) == (line.sign == "-score")


def test_known_needs_and_costs_are_in_the_table() -> None:
    """Needs and costs come from dry runs; some are known in advance."""
    by_name = {line.name: line for line in lines()}
    assert by_name["entropy"].needs == "logits" and by_name["entropy"].cost == "free"
    assert by_name["gradnorm"].needs == "head" and by_name["gradnorm"].sign == "-score"
    assert by_name["exgrad"].cost == "free; target='all': one forward and C backwards"
    assert by_name["el2n"].needs == "logits, labels" and by_name["grand"].needs == "labels, backward"
    assert by_name["gradorth"].needs == "head, fit" and by_name["gradorth"].sign == "-score"
    assert by_name["regrad"].needs == "backward" and by_name["regrad"].cost == "separate passes"
    assert by_name["oberdiek"].needs == "backward, fit (labels)"
    assert by_name["confounding_detector"].needs == "backward, fit (in- and out-of-distribution data)"
    assert by_name["confounding_detector"].cost == "fitted once, then one forward and 1 backward"


def test_the_command_lists_every_score() -> None:
    console = Console(width=400, record=True, file=StringIO())
    console.print(scores_table())
    shown = console.export_text()
    for line in lines():
        assert line.name in shown
        assert line.cost.split(";")[0] in shown
    assert all(name in shown for name in RECIPES)
