"""
A Hugging Face text classifier
==============================

Score a model that takes a mapping and returns an object with ``.logits``.

The weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

import lightning_gradmetrics as lgm


def main() -> None:
    """Score four token sequences."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 200, (4, 12))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    scores = lgm.score(model, batch, ["max_softmax", "gradnorm", "gradnorm(target='all')"])
    for name, values in scores.items():
        print(f"{name:24}", [round(value, 4) for value in values.tolist()])


if __name__ == "__main__":
    main()
