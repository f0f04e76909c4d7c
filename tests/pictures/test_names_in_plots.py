"""Names that matplotlib would parse as mathematics, or that XML does not allow."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pytest

from lightning_gradmetrics import plot

SCORE, DATASET = 'a\x07 $\\frac{$ <b>&"', "id $x_{$ \x1b &<"


@pytest.mark.slow
@pytest.mark.parametrize("draw", [plot.roc, plot.risk_coverage, plot.distributions])
def test_plots_show_any_name_literally(draw, tmp_path: Path) -> None:
    columns = {"dataset": [DATASET] * 4, "index": range(4), "prediction": [0, 1, 1, 0], "label": [0, 1, 0, 0]}
    table = pa.table({**columns, SCORE: [0.1, 0.3, 0.9, 0.2]})
    chosen = SCORE if draw is plot.distributions else [SCORE]
    figure = draw(table, {DATASET: "id"}, chosen).axes.figure
    figure.savefig(tmp_path / "plot.svg")
    comments = ElementTree.parse(
        tmp_path / "plot.svg", ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    )
    assert "a\\x07 $\\frac{$" in "".join(map(str, (node.text for node in comments.iter())))
