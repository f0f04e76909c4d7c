"""Measure CPU time and peak memory of scores of a language model's answers: ``python -m benchmarks language``.

Times are compared with a plain forward pass and with ``generate``. Memory is measured in a new process per row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import lightning_gradmetrics as lgm
from benchmarks.measure import environment, peak_memory, spread

__all__ = ["main"]

TOKENS = ("max_softmax", "entropy", "nll", "gradnorm", "pseudo_label")
"""Scores of tokens that need only the logits and the head."""

PROMPT, ANSWER, BATCH = 16, 64, 8


def llama() -> Any:
    """Return a Llama with 10 million random parameters and tied weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=16384, pad_token_id=0, eos_token_id=None, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).eval()


def functions() -> dict[str, Callable[[], Any]]:
    """Return the measured functions by name; the others are compared with ``forward`` or ``generate``."""
    model, ids = llama(), torch.randint(1, 16384, (BATCH, PROMPT + ANSWER))
    prompts, answers = ids[:, :PROMPT], ids[:, PROMPT:]
    options = {"max_new_tokens": ANSWER, "do_sample": False}

    def forward() -> None:
        with torch.no_grad():
            model(ids, logits_to_keep=ANSWER + 1)

    def generate() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    def watched() -> None:
        with lgm.watching_generation(model, TOKENS) as watch:
            generated = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        watch.result(generated)

    def scored(*scores: str) -> Callable[[], Any]:
        return lambda: lgm.score_generation(model, prompts, answers, scores, batch_size=BATCH)

    return {
        "forward": forward,
        "score_generation, entropy": scored("entropy"),
        "score_generation, five scores": scored(*TOKENS),
        "score_generation, semgrad": scored("semgrad"),
        "score_generation, grand": scored("grand"),
        "generate": generate,
        "generate, watching five scores": watched,
    }


def cpu_times(chosen: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each function in each round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(rounds + 1):
        for name, function in chosen.items():
            start = time.process_time()
            function()
            if number:
                times[name].append(time.process_time() - start)
    return times


def memory(name: str) -> float:
    """Return the MiB that one function adds to the peak memory of a new process."""
    command = [sys.executable, "-m", "benchmarks", "language", "--only", name]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(process.stdout.split()[-1])


def _added_memory(name: str) -> float:
    function = functions()[name]
    before = peak_memory()
    function()
    return (peak_memory() - before) / 2**20


def main(arguments: list[str]) -> None:
    """Measure, and print one line per function."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks language", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="run one function and print the MiB that it adds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.only:
        print(_added_memory(options.only))
        return
    print(environment("cpu"))
    print(f"Llama, 6 layers of width 256, vocabulary 16,384; {BATCH} texts of {PROMPT} + {ANSWER} tokens")
    times = cpu_times(functions(), options.rounds)
    for name, values in times.items():
        reference = times["generate" if name.startswith("generate") else "forward"]
        ratios = [value / base for value, base in zip(values, reference, strict=True)]
        middle, low, high = spread(ratios)
        print(
            f"{name:34} {1e3 * spread(values)[0]:8.0f} ms  {middle:5.2f} ({low:.2f} to {high:.2f})  {memory(name):7.0f} MiB"
        )
