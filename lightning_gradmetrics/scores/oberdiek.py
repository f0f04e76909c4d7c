"""The meta-classifier of Oberdiek et al., which predicts errors from statistics of the gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_gradmetrics.scores.classifiers import classified, column_scale, logistic, standardised, two_layers
from lightning_gradmetrics.scoring.arguments import CountOrZero
from lightning_gradmetrics.scoring.evidence import Evidence, ParameterGradients, Target
from lightning_gradmetrics.scoring.features import FEATURES, feature_columns, several
from lightning_gradmetrics.scoring.fitted import FittedScore
from lightning_gradmetrics.scoring.registry import register
from lightning_gradmetrics.scoring.totals import Tensors

__all__ = ["oberdiek"]


@register("gradient", "Oberdiek et al. 2018, arXiv:1805.08440")
class oberdiek(FittedScore):
    r"""Probability that the prediction is incorrect, by a classifier of the gradient's statistics.

    The features are max, min, mean, standard deviation, L1 and L2 norm of the gradient's entries, standardised. The
    classifier is fitted with scikit-learn on labelled data that the model was not trained on, to predict the model's
    errors. Its state consists of tensors, which are applied in plain torch.

    Args:
        classifier: ``"logistic"`` (logistic regression) or ``"network"`` (one hidden layer of 32).
        target: The parameters: ``"head"``, ``"all"``, a pattern such as ``"layer4.*"``, or a predicate on the name.
        levels: ``"all"``, ``"layer"``, ``"parameter"``, or several, as ``"all+layer"``.
        objectives: ``"pseudo_label"``, ``"uniform"``, or both, as ``"pseudo_label+uniform"``.
        seed: The seed of the network.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> _ = torch.manual_seed(0)
        >>> model, images, labels = torch.nn.Linear(4, 3), torch.randn(40, 4), torch.randint(3, (40,))
        >>> (fitted,) = lgm.fit(model, [(images, labels)], oberdiek())
        >>> lgm.score(model, images, fitted)["oberdiek"].shape
        torch.Size([40])

    Reference:
        P. Oberdiek, M. Rottmann and H. Gottschalk, "Classification Uncertainty of Deep Neural Networks Based on
        Gradient Information", ANNPR 2018, https://arxiv.org/abs/1805.08440
    """

    classifier: Literal["logistic", "network"] = "logistic"
    target: Target = "all"
    levels: str = "all"
    objectives: str = "pseudo_label"
    seed: CountOrZero = 0

    def measure(self, evidence: Evidence) -> Tensors:
        columns = []
        for objective in several(self.objectives):
            gradient = evidence.gradient_per_parameter(objective, self.target)
            columns.append(_features(gradient, several(self.levels)))
        return {"features": torch.cat(columns, 1)}

    def accumulate(self, evidence: Evidence, measured: Tensors) -> Tensors:
        unknown = evidence.labels < 0
        return {
            "rows/features": measured["features"].double(),
            "rows/incorrect": evidence.incorrect.long().masked_fill(unknown, -1),
        }

    def finish(self, total: Tensors) -> Tensors:
        known = (total["rows/incorrect"] >= 0) & total["rows/features"].isfinite().all(1)
        features, incorrect = total["rows/features"][known], total["rows/incorrect"][known]
        _check_errors(int(incorrect.sum()), len(incorrect))
        scale = column_scale(features)
        features = standardised(features, scale)
        if self.classifier == "network":
            return {**scale, **two_layers(features, incorrect, seed=self.seed)}
        return {**scale, **logistic(features, incorrect)}

    def score(self, measured: Tensors, state: Tensors) -> Tensor:
        return classified(measured["features"], state)


def _features(gradient: ParameterGradients, levels: tuple[str, ...]) -> Tensor:
    """Return the features; a mean that is zero up to rounding, as for a softmax layer's gradient, is set to zero."""
    columns = feature_columns(gradient, levels)
    columns = columns.reshape(len(columns), columns.shape[1] // len(FEATURES), len(FEATURES)).clone()
    mean, std = columns[..., FEATURES.index("mean")], columns[..., FEATURES.index("std")]
    columns[..., FEATURES.index("mean")] = mean.masked_fill(mean.abs() <= 1e-6 * std, 0)
    flat: Tensor = columns.flatten(1)
    return flat


def _check_errors(errors: int, count: int) -> None:
    if not count:
        raise ValueError(
            "the data to fit 'oberdiek' on has no labelled sample: give batches (inputs, labels) with labels from 0"
        )
    if errors in (0, count):
        kind = "no error" if not errors else "only errors"
        raise ValueError(
            f"the model makes {kind} on the {count} samples to fit 'oberdiek' on, but the fit must separate errors from "
            "correct predictions: give labelled data that the model was not trained on, or more of it"
        )
