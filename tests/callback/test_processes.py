"""The callback in several processes of one ``Trainer``: the results of one process, and errors that end all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.callback.forked import run_forked

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")]

SAME = """
from tests.models import Module


def work(rank):
    torch.manual_seed(0)
    model = Module()
    sets = [DataLoader(TensorDataset(torch.randn(n, 3, 8, 8), torch.randint(0, 5, (n,))), 4) for n in (23, 11)]
    scores, sources = ["energy", "gradnorm", "pseudo_label(target=all)"], {"profile": True, "top_k": {"energy": 6}}
    callback = lgm.GradientMetrics(scores, datasets={"in": "id", "out": "far"}, **sources)
    used, found = ddp(callback, count), {}
    for stage in ("test", "predict"):
        getattr(used, stage)(model, sets)
        metrics = {key: float(value) for key, value in used.callback_metrics.items()}
        shown = [axes.get_title() for picture in callback.pictures() for axes in picture.figure.axes]
        tables = {name: table.to_pydict() for name, table in callback.tables().items()}
        found[stage] = {"metrics": metrics, "rows": callback.results.to_pydict(), "tables": tables, "shown": shown}
    return found


found = {}
for count in (2, 3):
    codes, found[count], _ = launch(count, work)
    assert codes == [0] * count, found
count = 1
print(json.dumps([work(0), found[2], found[3]]))
"""

FAILING = """
from lightning.pytorch.loggers import CSVLogger
from tests.models import Module


class Full(CSVLogger):
    def log_image(self, **options):
        raise OSError("the disk is full")


def fails(logger, score, **options):
    callback = lgm.GradientMetrics(score)
    vars(callback).update(options)  # past the checks of arguments, so that judging fails on rank 0
    samples = TensorDataset(torch.randn(9, 3, 8, 8), torch.zeros(9).long())
    ddp(callback, 2, logger=logger).test(Module(), DataLoader(samples, 4))


causes = {"judging": lambda: fails(False, "energy", resamples=-1), "drawing": lambda: fails(Full(FOLDER / "csv"), "gga")}
errors = []
for cause in causes.values():
    codes, values, _ = launch(2, lambda rank: cause())
    errors.append(values)
print(json.dumps(errors))
"""

STAGES = ("test", "predict")


def test_two_and_three_processes_have_the_results_of_one(tmp_path: Path) -> None:
    """Sizes that divide by none: every row once, every metric the same, on every rank, in test and in predict.

    Rank 0's pictures, and the numbers in them, are those of all samples.
    """
    (alone, *several), _ = run_forked(SAME, tmp_path)
    for ranks in several:
        for stage in STAGES:
            wanted, rows = alone[stage], ranks[0][stage]["rows"]
            assert len(rows["index"]) == 34 and wanted["metrics"]
            for key in ("dataset", "index", "prediction", "label", "finite"):
                assert rows[key] == wanted["rows"][key], key
            for key in ("energy", "gradnorm", "pseudo_label(target=all)"):
                assert rows[key] == pytest.approx(wanted["rows"][key], rel=1e-4)
            assert ranks[0][stage]["shown"] == alone[stage]["shown"]
            assert sum(title.startswith("#") for title in alone[stage]["shown"]) == 12
            for name, columns in alone[stage]["tables"].items():
                for key, values in columns.items():
                    found = ranks[0][stage]["tables"][name][key]
                    assert found == (values if isinstance(values[0], str | int) else pytest.approx(values, rel=1e-4))
            for rank in ranks:
                assert rank[stage]["metrics"] == pytest.approx(wanted["metrics"], abs=1e-6)


def test_a_failure_on_rank_0_ends_every_process(tmp_path: Path) -> None:
    """The other processes raise too, with the error of rank 0, long before gloo's timeout of 30 minutes."""
    outcomes, _ = run_forked(FAILING, tmp_path, timeout=200)
    expected = [
        "ValueError: resamples must be a whole number of at least 0, got -1",
        "OSError: the disk is full",
    ]
    for error, (first, second) in zip(expected, outcomes, strict=True):
        assert first == error
        assert second == f"RuntimeError: rank 0 failed, so rank 1 stops too. Its error: {error}"
