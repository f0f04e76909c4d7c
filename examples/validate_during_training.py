"""
Validate during training
========================

Watch a score while the model trains: metrics of every validation epoch go to the TensorBoard log.
"""

from __future__ import annotations

from _digits import QUIET, DigitClassifier, digit_loaders
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_gradmetrics as lgm


def main() -> None:
    """Train for four epochs, and print the names that the callback logged."""
    seed_everything(0, verbose=False)
    loaders = digit_loaders()
    callback = lgm.GradientMetrics(["max_softmax", "gradnorm"])
    logger = TensorBoardLogger(".", name="tensorboard")
    trainer = Trainer(max_epochs=4, callbacks=[callback], log_every_n_steps=1, **{**QUIET, "logger": logger})
    trainer.fit(DigitClassifier(), loaders["train"], loaders["held_out"])

    logged = sorted(name for name in trainer.callback_metrics if "gradnorm" in name)
    print("logged in every epoch:", *logged, sep="\n  ")
    print(f"tensorboard --logdir {logger.log_dir}")


if __name__ == "__main__":
    main()
