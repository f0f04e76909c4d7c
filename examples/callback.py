"""The callback in your own code: an unchanged LightningModule, named dataloaders, scores beside baselines.

Run it from anywhere: ``python examples/callback.py``. It trains a small network on handwritten digits 0 to 7 first.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from rich.console import Console

import lightning_gradmetrics as lgm
from lightning_gradmetrics.cli.data import digits
from lightning_gradmetrics.cli.models import digits_cnn
from lightning_gradmetrics.cli.tables import metrics_grids, print_grid


def main() -> None:
    """Train, score, and show what was found."""
    data = digits()
    model = digits_cnn(data)
    callback = lgm.GradientMetrics(
        ["max_softmax", "energy", "gradnorm", "pseudo_label(target='all')"],
        datasets=data.roles,  # {"digits": "id", "digits_8_9": "near", "photos": "far"}
    )
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[callback])
    trainer.test(model, data.loaders(batch_size=128), verbose=False)

    console = Console()
    for grid in metrics_grids(callback.evaluation, callback.scorer.scores, console.width):
        print_grid(console, grid)
    least_sure = callback.results.sort_by([("max_softmax", "descending")]).slice(0, 5)
    console.print("The five least certain samples:", least_sure.to_pylist())


if __name__ == "__main__":
    main()
