"""
Your own score
==============

Write a score as a function of the evidence. Use it wherever a score's name is accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import Evidence


def gini_impurity(evidence: Evidence) -> Tensor:
    """Return the Gini impurity ``1 - sum_c p_c^2`` of the softmax, ``(N,)``."""
    return 1 - evidence.logits.softmax(1).square().sum(1)


def main() -> None:
    """Score a batch with the new score and with a built-in one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    scores = lgm.score(model, torch.rand(5, 1, 8, 8), [gini_impurity, "gradnorm"])
    for name, values in scores.items():
        print(f"{name:15}", [round(value, 4) for value in values.tolist()])


if __name__ == "__main__":
    main()
