"""Objectives, statistics of gradient entries, and cosine similarity maps."""

from lightning_gradmetrics.gradients.cosine_maps import cosine_similarity_maps

__all__ = ["cosine_similarity_maps"]
