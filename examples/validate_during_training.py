"""
Validate during training
========================

Log the metrics of scores to TensorBoard in every validation epoch.
"""

from __future__ import annotations

from _digits import QUIET, DigitClassifier, digit_loaders
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_gradmetrics as lgm


def main() -> None:
    """Train for four epochs, and print the names of the logged metrics."""
    seed_everything(0, verbose=False)
    loaders = digit_loaders()
    callback = lgm.GradientMetrics(["max_softmax", "gradnorm"])
    logger = TensorBoardLogger(".", name="tensorboard")
    settings = {**QUIET, "logger": logger}
    trainer = Trainer(max_epochs=4, callbacks=[callback], log_every_n_steps=1, **settings)
    trainer.fit(DigitClassifier(), loaders["train"], loaders["held_out"])

    logged = sorted(name for name in trainer.callback_metrics if "gradnorm" in name)
    print("logged in every epoch:", *logged, sep="\n  ")
    print(f"tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main()
