"""Renders the page of the report from the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lightning_gradmetrics.report.answers import Answer, answers
from lightning_gradmetrics.report.curves import clustered, spearman
from lightning_gradmetrics.report.decisions import decisions
from lightning_gradmetrics.report.main_table import all_metrics, main_table, marks, paired_table
from lightning_gradmetrics.report.notes import configuration, details, notes, shortened
from lightning_gradmetrics.report.panels import (
    Panel,
    distribution_panels,
    drawn_rows,
    risk_panels,
    roc_panel,
    roc_panels,
)
from lightning_gradmetrics.report.plots import CARD_SIZE
from lightning_gradmetrics.report.questions import REFERENCE, Question, find_questions
from lightning_gradmetrics.report.run import Picture, Run, picture_source
from lightning_gradmetrics.report.samples import KEPT, accuracies, listed_samples, sample_tables, thresholds
from lightning_gradmetrics.report.texts import Text, coloured_texts
from lightning_gradmetrics.report.wording import counted, interval, paper_link, percent, role_title, signed, whole

__all__ = ["PAGE", "leaders_of", "render", "samples_to_show", "source_of", "texts_to_show"]


def anchor(title: str) -> str:
    """Return the id of a section."""
    return title.lower().replace(" ", "-")


def breakable(name: str) -> Markup:
    """Return a name that a browser may break after an underscore or a slash."""
    return Markup(re.sub(r"([_/(])", r"\1<wbr>", str(escape(name))))


PAGE = Environment(
    loader=PackageLoader("lightning_gradmetrics.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
PAGE.filters.update(percent=percent, signed=signed, whole=whole, role=role_title, anchor=anchor, breakable=breakable)
PAGE.globals.update(counted=counted, interval=interval, paper_link=paper_link, marks=marks, shortened=shortened)


def render(run: Run) -> str:
    """Return the report as one HTML document."""
    questions = find_questions(run)
    answered = answers(run, questions)
    names = run.detectors
    leaders = leaders_of(questions, names)
    content: dict[str, Any] = {
        "answers": answered,
        "panels": _card_panels(run, answered),
        "table": main_table(run),
        "first": distribution_panels(run, leaders),
        "rest": distribution_panels(run, [name for name in names if name not in leaders]),
        "rocs": roc_panels(run, questions),
        "risks": risk_panels(run),
        "operating": _operating(run, leaders),
        "paired": paired_table(run),
        "agreement": _agreement(run, names),
        "pictures": _pictures(run),
        "texts": coloured_texts(run, [*run.label_readers, *leaders]),
        "samples": {name: sample_tables(run, name) for name in _audited(run, leaders)},
        "notes": notes(run),
        "metrics": all_metrics(run),
        "details": details(run),
        "configuration": configuration(run),
    }
    files = {"css": Markup(source_of("report.css")), "js": Markup(source_of("report.js"))}
    return PAGE.get_template("report.html.j2").render(run=run, files=files, kept=KEPT, **content)


def _card_panels(run: Run, found: Sequence[Answer]) -> list[Panel | None]:
    """Return the ROC curves of each card."""
    panels = []
    for number, answer in enumerate(found):
        panels.append(roc_panel(run, answer.question, f"answer{number}", CARD_SIZE))
    return panels


def samples_to_show(run: Run) -> dict[str, list[int]]:
    """Return the indices of the samples that the report of a run lists, by dataset."""
    return listed_samples(run, _audited(run, leaders_of(find_questions(run), run.detectors)))


def texts_to_show(run: Run) -> dict[str, list[Text]]:
    """Return the coloured texts that the report of a run shows, by score."""
    return coloured_texts(run, [*run.label_readers, *leaders_of(find_questions(run), run.detectors)])


def source_of(name: str) -> str:
    """Return the text of a file in the folder of templates."""
    assert PAGE.loader is not None
    return PAGE.loader.get_source(PAGE, name)[0]


def leaders_of(questions: Sequence[Question], names: Sequence[str], most: int = 7) -> list[str]:
    """Return max softmax, then the best score of each question, the second best of each, and so on."""
    chosen = [REFERENCE] if REFERENCE in names else []
    for rank in range(3):
        for question in questions:
            chosen += question.leaders()[1:][rank : rank + 1]
    return list(dict.fromkeys([*chosen, *names]))[:most]


def _audited(run: Run, leaders: Sequence[str]) -> list[str]:
    """Return the scores whose extreme samples are listed: the leaders, and scores that read the true label."""
    return [*run.label_readers, *leaders] if run.finite_rows() else []


def _operating(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Return the accuracies of each labelled in-distribution dataset, and the rejection rates at a threshold."""
    retained = {}
    for name, rows in run.finite_rows().items():
        if run.role_of(name) == "id" and rows.incorrect.any():
            retained[name] = accuracies(rows, names)
    headings, rejected = thresholds(run, names)
    shown = rejected if headings[1:] else {}
    return {"accuracies": retained, "headings": headings, "thresholds": shown, "decisions": decisions(run)}


def _agreement(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Return the rank correlations over the in-distribution rows, with similar scores next to each other."""
    rows = drawn_rows(run)
    inside = list(run.split_by_role(rows)[0].values()) or list(rows.values())
    correlations: Mapping[tuple[str, str], float] = spearman(inside, names) if inside and len(names) > 1 else {}
    return {"names": clustered(names, correlations), "values": correlations}


def _pictures(run: Run) -> dict[str, list[tuple[Picture, Markup]]]:
    """Return the pictures of the run by section."""
    sections: dict[str, list[tuple[Picture, Markup]]] = {}
    for picture in run.pictures:
        sections.setdefault(picture.section, []).append((picture, picture_source(run.directory / picture.file)))
    return sections
