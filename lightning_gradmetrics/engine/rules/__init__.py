"""Rules for layer families, one small file each, registered by the torch function that a layer calls."""

from lightning_gradmetrics.engine.rules import convolution, embedding, linear, norm, recurrent
from lightning_gradmetrics.engine.rules.base import RULES, Call, Rule, bind, rule

__all__ = ["RULES", "Call", "Rule", "bind", "convolution", "embedding", "linear", "norm", "recurrent", "rule"]
