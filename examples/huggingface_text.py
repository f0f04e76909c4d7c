"""
A Hugging Face text classifier
==============================

Score batches that are mappings and outputs that have ``.logits``. The weights are random, so nothing is downloaded.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

import lightning_gradmetrics as lgm


def main() -> None:
    """Score four token sequences."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 200, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    for name, values in lgm.score(model, batch, ["max_softmax", "gradnorm", "gradnorm(target='all')"]).items():
        print(f"{name:24}", [round(value, 4) for value in values.tolist()])


if __name__ == "__main__":
    main()
