"""Language models: scores of tokens, sequences and spans of generated text."""

from lightning_gradmetrics.language.generation import score_generation
from lightning_gradmetrics.language.scored import ScoredGeneration
from lightning_gradmetrics.language.watching import watching_generation

__all__ = ["ScoredGeneration", "score_generation", "watching_generation"]
