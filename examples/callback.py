"""The callback in a Trainer: an unchanged LightningModule, named dataloaders, scores beside baselines."""

from __future__ import annotations

from _digits import QUIET, digit_loaders, trained_classifier
from lightning.pytorch import Trainer

import lightning_gradmetrics as lgm


def main() -> None:
    """Score known and unknown digits, and print how well each score finds errors and unknown digits."""
    loaders = digit_loaders()
    model = trained_classifier(loaders)
    callback = lgm.GradientMetrics(
        ["max_softmax", "energy", "gradnorm", "pseudo_label(target='all')"],
        datasets={"digits": "id", "unknown": "near"},
        resamples=200,
    )
    trainer = Trainer(callbacks=[callback], **QUIET)
    trainer.test(model, [loaders["test"], loaders["unknown"]], verbose=False)

    print(f"{'score':30} {'task':18} AUROC x 100")
    for metric in callback.evaluation.find(metric="auroc"):
        print(
            f"{metric['score']:30} {metric['task']:18} {100 * metric['value']:.1f} "
            f"({100 * metric['low']:.1f} to {100 * metric['high']:.1f})"
        )
    least_certain = callback.results.sort_by([("max_softmax", "descending")]).slice(0, 5)
    print("The five least certain samples:", least_certain.select(["dataset", "index", "prediction"]).to_pylist())


if __name__ == "__main__":
    main()
