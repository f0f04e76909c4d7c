"""Scores: named recipes from evidence to an uncertainty, higher = more uncertain."""

from lightning_gradmetrics.scores.combination import combination
from lightning_gradmetrics.scores.confounding import confounding, confounding_detector, purview
from lightning_gradmetrics.scores.dropout import mc_dropout
from lightning_gradmetrics.scores.expected import exgrad, fisher_trace
from lightning_gradmetrics.scores.fisher import kfac_influence
from lightning_gradmetrics.scores.geometry import gga, gga_detector
from lightning_gradmetrics.scores.gradients import feature_norm, gradnorm, gradnorm_kl, pseudo_label
from lightning_gradmetrics.scores.gradorth import gradorth
from lightning_gradmetrics.scores.labelled import el2n, grand
from lightning_gradmetrics.scores.logits import (
    energy,
    entropy,
    gradtrust,
    log_likelihood,
    margin,
    max_logit,
    max_softmax,
)
from lightning_gradmetrics.scores.oberdiek import oberdiek, uniform
from lightning_gradmetrics.scores.perturbation import odin
from lightning_gradmetrics.scores.pytorch_ood_adapter.adapter import pytorch_ood
from lightning_gradmetrics.scores.regrad import regrad
from lightning_gradmetrics.scoring.fitted import FittedRecipe, FittedScore, register_fitted
from lightning_gradmetrics.scoring.registry import RECIPES, Recipe, Score, ScoreLike, make, register, resolve
from lightning_gradmetrics.scoring.states import check_fitted, load_fitted, save_fitted

__all__ = [
    "RECIPES",
    "FittedRecipe",
    "FittedScore",
    "Recipe",
    "Score",
    "ScoreLike",
    "check_fitted",
    "combination",
    "confounding",
    "confounding_detector",
    "el2n",
    "energy",
    "entropy",
    "exgrad",
    "feature_norm",
    "fisher_trace",
    "gga",
    "gga_detector",
    "gradnorm",
    "gradnorm_kl",
    "gradorth",
    "gradtrust",
    "grand",
    "kfac_influence",
    "load_fitted",
    "log_likelihood",
    "make",
    "margin",
    "max_logit",
    "max_softmax",
    "mc_dropout",
    "oberdiek",
    "odin",
    "pseudo_label",
    "purview",
    "pytorch_ood",
    "register",
    "register_fitted",
    "regrad",
    "resolve",
    "save_fitted",
    "uniform",
]
