"""Scores: named recipes from evidence to an uncertainty, higher = more uncertain."""

from lightning_gradmetrics.scores.confounding import confounding, confounding_detector, purview
from lightning_gradmetrics.scores.fitted import FittedRecipe, FittedScore, register_fitted
from lightning_gradmetrics.scores.gradients import exgrad, feature_norm, gradnorm, pseudo_label
from lightning_gradmetrics.scores.logits import energy, entropy, gradtrust, margin, max_logit, max_softmax
from lightning_gradmetrics.scores.oberdiek import oberdiek, uniform
from lightning_gradmetrics.scores.registry import RECIPES, Recipe, Score, ScoreLike, make, register, resolve
from lightning_gradmetrics.scores.states import check_fitted, load_fitted, save_fitted

__all__ = [
    "RECIPES",
    "FittedRecipe",
    "FittedScore",
    "Recipe",
    "Score",
    "ScoreLike",
    "check_fitted",
    "confounding",
    "confounding_detector",
    "energy",
    "entropy",
    "exgrad",
    "feature_norm",
    "gradnorm",
    "gradtrust",
    "load_fitted",
    "make",
    "margin",
    "max_logit",
    "max_softmax",
    "oberdiek",
    "pseudo_label",
    "purview",
    "register",
    "register_fitted",
    "resolve",
    "save_fitted",
    "uniform",
]
