"""Language models: scores of tokens, sequences and spans of generated text."""

from lightning_gradmetrics.language.generation import score_generation
from lightning_gradmetrics.language.scored import ScoredGeneration

__all__ = ["ScoredGeneration", "score_generation"]
