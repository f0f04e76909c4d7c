r"""
LightningCLI
============

Add the callback from the command line; the program itself does not mention it::

    python lightning_cli.py test --trainer.callbacks+=lightning_gradmetrics.GradientMetrics \
      '--trainer.callbacks.scores=["max_softmax","gradnorm(temperature=2)"]'
"""

from __future__ import annotations

import sys

from _digits import DigitClassifier, digit_loaders
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

ARGUMENTS = [
    "test",
    "--trainer.callbacks+=lightning_gradmetrics.GradientMetrics",
    '--trainer.callbacks.scores=["max_softmax","gradnorm(temperature=2)"]',
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
]


class Digits(LightningDataModule):
    """The handwritten digits 0 to 7."""

    def train_dataloader(self) -> object:
        """Return the training digits."""
        return digit_loaders()["train"]

    def test_dataloader(self) -> object:
        """Return the test digits."""
        return digit_loaders()["test"]


def main() -> None:
    """Run the given command line, or the one above if none is given."""
    LightningCLI(DigitClassifier, Digits, args=sys.argv[1:] or ARGUMENTS)


if __name__ == "__main__":
    main()
