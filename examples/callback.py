"""
The callback in a Trainer
=========================

Score an unmodified LightningModule on named dataloaders.

The callback compares gradient scores with baselines, prints a table, and writes a report.
"""

from __future__ import annotations

from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer

import lightning_gradmetrics as lgm


def main() -> None:
    """Score known and unknown digits, write a report, and draw ROC curves."""
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
    print("Report:", callback.report("report.html", data))
    auroc = callback.evaluation.find(score="gradnorm", task="ood", metric="auroc")[0]["value"]
    print(f"gradnorm detects unknown digits with AUROC {100 * auroc:.1f}")
    least_certain = callback.results.sort_by([("max_softmax", "descending")]).slice(0, 5)
    columns = ["dataset", "index", "prediction"]
    print("Five least certain samples:", least_certain.select(columns).to_pylist())
    lgm.plot.roc(callback.results, callback.datasets, dataset="unknown").figure.savefig("roc.png")


if __name__ == "__main__":
    main()
