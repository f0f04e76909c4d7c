"""
A meta-classifier of errors
===========================

Fit a classifier that predicts errors from gradients (Oberdiek et al. 2018) on held-out labels.
"""

from __future__ import annotations

from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer

import lightning_gradmetrics as lgm


def main() -> None:
    """Fit ``oberdiek`` on held-out digits, and compare it with max softmax on test digits."""
    loaders = digit_loaders()
    model = trained_classifier(loaders)
    callback = lgm.GradientMetrics(["max_softmax", "gradnorm", "oberdiek"])
    trainer = Trainer(callbacks=[callback], **QUIET)
    callback.fit(trainer, model, loaders["held_out"])
    trainer.test(model, loaders["test"], verbose=False)
    for metric in callback.evaluation.find(metric="auroc", task="misclassification"):
        errors, auroc = metric["count_positive"], 100 * metric["value"]
        print(f"{metric['score']:12} detects {errors} errors with AUROC {auroc:.1f}")
    roles = callback.evaluation.settings["roles"]
    lgm.plot.risk_coverage(callback.results, roles).figure.savefig("risk_coverage.png")


if __name__ == "__main__":
    main()
