"""Scores of tokens in padded texts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm


class Tagger(nn.Module):
    """Logits of each token from its own embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids))
        return logits


def test_padding_has_no_value_and_changes_none() -> None:
    torch.manual_seed(0)
    model, ids = Tagger().eval(), torch.randint(11, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    padded = lgm.score(model, {"input_ids": ids, "attention_mask": mask}, ["entropy", "gradnorm"])
    short = lgm.score(model, {"input_ids": ids[1:, :3], "attention_mask": mask[1:, :3]}, ["entropy", "gradnorm"])
    for name, values in padded.items():
        assert torch.equal(values.isnan(), mask == 0)
        torch.testing.assert_close(values[1:, :3], short[name])


def test_padding_on_the_left_needs_positions() -> None:
    model, ids = Tagger().eval(), torch.randint(11, (2, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(ValueError, match="pad on the right, pass position_ids"):
        lgm.score(model, inputs, "entropy")
    found = lgm.score(model, {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, "entropy")["entropy"]
    assert torch.equal(found.isnan(), mask == 0)
