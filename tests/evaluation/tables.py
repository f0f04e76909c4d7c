"""Synthetic results that the tests share."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

ROLES = {"test": "id", "mnist": "far", "textures": "far", "letters": "near"}
SIZES = {"test": 300, "mnist": 80, "textures": 60, "letters": 50}
SCORES = ["good", "fair", "twin", "noise"]


def table(seed: int = 0, **changes: object) -> pa.Table:
    """Return results in which "good" detects errors and shifts, "fair" does so weakly, "noise" not at all; "twin" equals "fair"."""
    rng = np.random.default_rng(seed)
    dataset = np.repeat(list(SIZES), list(SIZES.values()))
    size = len(dataset)
    wrong = (rng.random(size) < 0.2) & (dataset == "test")
    signal = 1.5 * wrong + 1.5 * (dataset != "test") + rng.normal(size=size)
    columns = {
        "dataset": dataset,
        "index": np.concatenate([np.arange(n) for n in SIZES.values()]),
        "prediction": wrong.astype(int),
        "label": pa.array([0 if name == "test" else None for name in dataset], pa.int64()),
        "good": 100 * signal,
        "fair": np.round(signal + 2 * rng.normal(size=size), 1),
        "twin": 1e-30 * np.round(signal + 2 * rng.normal(size=size), 1),
        "noise": rng.normal(size=size) - 50,
        "finite": np.ones(size, dtype=bool),
    }
    columns["twin"] = 1e-30 * columns["fair"]
    return pa.table({**columns, **changes})
