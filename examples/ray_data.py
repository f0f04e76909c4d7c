"""Ray Data: score a dataset batch by batch in worker processes (``pip install 'ray[data]'``)."""

from __future__ import annotations

import numpy as np
import ray
import torch
from torch import nn

import lightning_gradmetrics as lgm


class Scorer:
    """A model that each worker loads once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a batch with one column per score."""
        scores = lgm.score(self.model, torch.from_numpy(batch["data"]), ["max_softmax", "gradnorm"])
        return batch | {name: values.numpy() for name, values in scores.items()}


def main() -> None:
    """Score 100 random samples, and print the three least certain."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    samples = ray.data.from_numpy(np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32))
    scored = samples.map_batches(Scorer, batch_size=32, concurrency=1)
    least_certain = scored.sort("max_softmax", descending=True).take(3)
    print([{name: round(float(row[name]), 4) for name in ("max_softmax", "gradnorm")} for row in least_certain])


if __name__ == "__main__":
    main()
