"""
A language model
================

Score a language model's answers while they are generated, and again afterwards.

The weights are random and the token ids made up, so nothing is downloaded. Load a trained model
with ``AutoModelForCausalLM.from_pretrained``, and its tokenizer with
``AutoTokenizer.from_pretrained``.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_gradmetrics as lgm


def model() -> LlamaForCausalLM:
    """Return a small Llama with tied weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Score answers during generation, and score the same answers again."""
    network = model()
    prompts = {
        "input_ids": torch.tensor([[0, 1, 7], [1, 9, 4]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    scores = ["nll", "entropy", "pseudo_label"]
    with lgm.watching_generation(network, scores) as watch:
        ids = network.generate(**prompts, max_new_tokens=8, do_sample=False)
    watched = watch.result(ids)
    print(watched.table.select(["tokens", "nll/mean", "entropy/max"]))

    answers = ids[:, 3:]
    more_scores = [*scores, "semgrad", "gradnorm(target=tied)"]
    rescored = lgm.score_generation(network, prompts, answers, more_scores)
    print(rescored.table.select(["nll/mean", "semgrad", "gradnorm(target=tied)"]))
    print(rescored.spans([[(0, 4), (4, 8)], [(2, 6)]]))


if __name__ == "__main__":
    main()
