"""Segmentation in several real processes has the rows, metrics and intervals of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.callback.forked import run_forked

PIXELS = """
from tests.models import Module
from tests.scoring.segmenters import HEADS


def work(rank):
    torch.manual_seed(0)
    net, rows = HEADS["bilinear"](), []
    for _ in range(9):
        rows.append((torch.randn(3, 8, 9), torch.randint(5, (16, 19))))
    callback = lgm.GradientMetrics(["max_softmax", "pseudo_label"], pixels={"segments": 3, "maps": 2})
    ddp(callback, count).test(Module(net.eval()), DataLoader(rows, 2), verbose=False)
    return {
        "rows": callback.results.to_pydict(),
        "metrics": callback.pixel_metrics.to_pylist(),
        "segments": callback.segments.num_rows,
        "maps": sorted(picture.name for picture in callback.pictures() if picture.section == "Maps"),
    }


count = 2
codes, both, _ = launch(count, work)
assert codes == [0, 0], both
count = 1
print(json.dumps([work(0), both[0]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_two_processes_have_the_pixels_of_one(tmp_path: Path) -> None:
    """With nine images the sampler repeats one, which is counted once."""
    (alone, both), _ = run_forked(PIXELS, tmp_path)
    for key in ("index", "pixels", "prediction"):
        assert both["rows"][key] == alone["rows"][key]
    for key in ("error", "miou", "pseudo_label"):
        assert both["rows"][key] == pytest.approx(alone["rows"][key], rel=1e-6)
    assert both["segments"] == alone["segments"] > 0 and both["maps"] == alone["maps"]
    names = ("unit", "task", "score", "metric", "within")
    expected = {tuple(row[name] for name in names): row for row in alone["metrics"]}
    assert {tuple(row[name] for name in names) for row in both["metrics"]} == expected.keys()
    for row in both["metrics"]:
        one = expected[tuple(row[name] for name in names)]
        assert row["value"] == pytest.approx(one["value"], rel=1e-6, nan_ok=True)
        for end in ("low", "high", "difference_low", "difference_high"):
            assert row[end] == pytest.approx(one[end], abs=0.01, nan_ok=True), (row, one)
