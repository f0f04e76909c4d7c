"""The page: sections in the order in which a reader wants them; a section with nothing to say is left out."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath

from lightning_gradmetrics.report.details import details
from lightning_gradmetrics.report.drawing import start_drawing
from lightning_gradmetrics.report.markup import Markup, join, tag
from lightning_gradmetrics.report.run import Run
from lightning_gradmetrics.report.sections import (
    agreement,
    distributions,
    findings,
    most_uncertain,
    notes,
    out_of_distribution,
    pictures,
    scores,
    wrong_predictions,
)
from lightning_gradmetrics.report.style import CSS, SCRIPT
from lightning_gradmetrics.report.tables import counted, data_table

__all__ = ["render"]


def render(run: Run) -> str:
    """The whole report as one HTML document."""
    drawing = start_drawing(run)
    sections = {
        "Scores": scores(run),
        "What the figures say": findings(run),
        "Notes": notes(run, drawing),
        "Distributions": distributions(drawing),
        "Finding out-of-distribution samples": out_of_distribution(drawing),
        "Finding wrong predictions": wrong_predictions(drawing),
        "Which scores agree": agreement(drawing),
        "Most uncertain samples": most_uncertain(run, drawing),
    }
    for section, content in pictures(run).items():
        sections[section] = join(sections.get(section), content)
    sections["Run details"] = details(run)
    title = f"Gradient uncertainty report: {run.model.get('name') or 'unnamed model'}"
    body = join(
        tag("header", tag("h1", title), _introduction(run)),
        _sections({name: content for name, content in sections.items() if content}),
        tag("script", Markup(SCRIPT)),
    )
    return f"<!DOCTYPE html>\n{tag('html', _head(title), tag('body', body), lang='en')}\n"


def _head(title: str) -> Markup:
    meta = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">')
    return tag("head", meta, tag("title", title), tag("style", Markup(CSS)))


def _sections(contents: dict[str, Markup]) -> Markup:
    anchors = {title: title.lower().replace(" ", "-") for title in contents}
    links = [tag("a", title, href=f"#{anchor}") for title, anchor in anchors.items()]
    parts = [tag("section", tag("h2", title), contents[title], id=anchor) for title, anchor in anchors.items()]
    return join(tag("nav", links, aria_label="Sections"), tag("main", parts))


def _introduction(run: Run) -> Markup:
    checkpoint = PurePath(str(run.model.get("checkpoint") or ""))
    facts = [
        counted(run.model.get("parameters"), "parameter"),
        counted(run.model.get("classes"), "class"),
        f"checkpoint {checkpoint.name}" if checkpoint.suffix else None,
    ]
    known = ", ".join(fact for fact in facts if fact)
    rows = sum(len(rows) for rows in run.rows.values())
    sentence = tag(
        "p",
        tag("b", str(run.model.get("name") or "The model")),
        f" ({known})" if known else "",
        f" was run on {counted(rows, 'sample')} from {counted(len(run.rows), 'data set')}, and each sample was given ",
        f"{_families(run)}. A score is an uncertainty: higher means less certain.",
        [" Made ", tag("time", run.created.replace("T", " ").replace("+00:00", " UTC")), "."] if run.created else None,
    )
    return join(sentence, data_table(run) if run.datasets else None)


def _families(run: Run) -> str:
    count = Counter("baseline" if score.family == "baseline" else "gradient" for score in run.scores)
    words = [("gradient", "gradient score"), ("baseline", "baseline score")]
    return " and ".join(counted(count[family], noun) or "" for family, noun in words if count[family]) or "no score"
