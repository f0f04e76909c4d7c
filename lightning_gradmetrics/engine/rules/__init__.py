"""Rules for layer families, one small file each, registered by the torch function that a layer calls."""

from lightning_gradmetrics.engine.rules import (
    attention,
    bilinear,
    convolution,
    einsum,
    embedding,
    embedding_bag,
    linear,
    norm,
    recurrent,
)
from lightning_gradmetrics.engine.rules.base import RULES, Call, Rule, bind, rule

__all__ = [
    "RULES",
    "Call",
    "Rule",
    "attention",
    "bilinear",
    "bind",
    "convolution",
    "einsum",
    "embedding",
    "embedding_bag",
    "linear",
    "norm",
    "recurrent",
    "rule",
]
