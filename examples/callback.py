"""
The callback in a Trainer
=========================

Score an unchanged LightningModule with named dataloaders: gradient scores beside baselines, a summary, a report and a plot.
"""

from __future__ import annotations

from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer

import lightning_gradmetrics as lgm


def main() -> None:
    """Score known and unknown digits: the callback prints a table, and writes a report."""
    loaders = digit_loaders()
    model = trained_classifier(loaders)
    callback = lgm.GradientMetrics(
        ["max_softmax", "energy", "gradnorm", "pseudo_label(target='all')"],
        datasets={"digits": "id", "unknown": "near"},
        resamples=200,
    )
    trainer = Trainer(callbacks=[callback], **QUIET)
    trainer.test(model, [loaders["test"], loaders["unknown"]], verbose=False)

    data = {"digits": loaders["test"].dataset, "unknown": loaders["unknown"].dataset}
    print("The report:", callback.report("report.html", data))
    found = callback.evaluation.find(score="gradnorm", task="ood", metric="auroc")[0]
    print(f"gradnorm finds unknown digits with AUROC {100 * found['value']:.1f}")
    least_certain = callback.results.sort_by([("max_softmax", "descending")]).slice(0, 5)
    print("The five least certain samples:", least_certain.select(["dataset", "index", "prediction"]).to_pylist())
    lgm.plot.roc(callback.results, callback.datasets, dataset="unknown").figure.savefig("roc.png")


if __name__ == "__main__":
    main()
