"""
Predict with a threshold
========================

Reject uncertain predictions: fit a threshold on held-out digits, then apply it in ``predict``.
"""

from __future__ import annotations

from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer

import lightning_gradmetrics as lgm


def main() -> None:
    """Accept 95 % of the held-out digits, and print the accepted fraction of each dataset."""
    loaders = digit_loaders()
    model = trained_classifier(loaders)
    validation = lgm.GradientMetrics(["gradnorm", "energy"])
    Trainer(callbacks=[validation], **QUIET).predict(model, loaders["held_out"])
    thresholds = lgm.evaluation.fit_thresholds(validation.results, ["gradnorm", "energy"], tpr=0.95)

    callback = lgm.GradientMetrics(
        ["gradnorm", "energy"],
        datasets={"digits": "id", "unknown": "near"},
        thresholds=thresholds,
    )
    Trainer(callbacks=[callback], **QUIET).predict(model, [loaders["test"], loaders["unknown"]])
    for dataset, rows in callback.results.to_pandas().groupby("dataset"):
        for score in ("gradnorm", "energy"):
            accepted = rows[f"{score}_accept"].mean()
            print(f"{dataset:10} {score:10} accepted {100 * accepted:.1f} %")
    plot = lgm.plot.distributions(callback.results, callback.datasets, "energy")
    plot.axes.axvline(thresholds.values["energy"], color="black", label="threshold")
    plot.axes.legend()
    plot.figure.savefig("threshold.png")


if __name__ == "__main__":
    main()
