"""Scores of Oberdiek et al.: a statistic of the gradient, and errors predicted from many by a meta-classifier."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.scores.classifiers import classified, column_scale, standardised
from lightning_gradmetrics.scoring.evidence import Evidence, ParameterGradients, Target
from lightning_gradmetrics.scoring.features import FEATURES, feature_columns, several
from lightning_gradmetrics.scoring.fitted import Tensors, register_fitted
from lightning_gradmetrics.scoring.registry import register

__all__ = ["oberdiek", "uniform"]

CLASSIFIERS = ("logistic", "network")


@register("gradient", "Oberdiek et al. 2018, arXiv:1805.08440")
def uniform(evidence: Evidence, *, statistic: str = "l1", target: Target = "head", temperature: float = 1.0) -> Tensor:
    r"""Negative statistic of the gradient of the cross-entropy to the uniform distribution.

    The counterpart of ``pseudo_label``, with the same statistics. The gradient falls as the prediction gets less
    certain: the statistic itself is the negative, but of ``min`` it is the score. ``l1`` is ``gradnorm``.
    """
    value = evidence.gradient("uniform", target, temperature=temperature).statistic(statistic)
    return value if statistic == "min" else -value


@register_fitted("gradient", "Oberdiek et al. 2018, arXiv:1805.08440")
class oberdiek:
    r"""Probability that the prediction is wrong, by a classifier of the gradient's statistics.

    The features are max, min, mean, standard deviation, L1 and L2 norm of the gradient's entries, standardised. The
    classifier is fitted with scikit-learn on labelled data that the model was not trained on, to predict the model's
    errors; it is kept as tensors and applied in plain torch.

    ``classifier``: ``"logistic"`` (logistic regression) or ``"network"`` (one hidden layer of 32). ``target``: as
    everywhere. ``levels``: ``"all"``, ``"layer"``, ``"parameter"``, or several as ``"all+layer"``. ``objectives``:
    ``"pseudo_label"``, ``"uniform"``, or both as ``"pseudo_label+uniform"``. ``seed``: of the network.
    """

    @staticmethod
    def measure(
        evidence: Evidence,
        *,
        classifier: str = "logistic",
        target: Target = "all",
        levels: str = "all",
        objectives: str = "pseudo_label",
        seed: int = 0,
    ) -> Tensors:
        """The features ``(N, F)``."""
        if classifier not in CLASSIFIERS:
            raise ValueError(f"unknown classifier {classifier!r}; available: {', '.join(CLASSIFIERS)}")
        gradients = [evidence.gradient_per_parameter(objective, target) for objective in several(objectives)]
        return {"features": torch.cat([_features(gradient, several(levels)) for gradient in gradients], 1)}

    @staticmethod
    def accumulate(evidence: Evidence, measured: Tensors, **_: Any) -> Tensors:
        """The features, and which predictions are wrong; -1 where the label is not known."""
        unknown = evidence.labels < 0
        return {
            "rows/features": measured["features"].double(),
            "rows/wrong": evidence.wrong.long().masked_fill(unknown, -1),
        }

    @staticmethod
    def finish(total: Tensors, *, classifier: str = "logistic", seed: int = 0, **_: Any) -> Tensors:
        """Fit the classifier."""
        known = (total["rows/wrong"] >= 0) & total["rows/features"].isfinite().all(1)
        features, wrong = total["rows/features"][known], total["rows/wrong"][known]
        _check_errors(int(wrong.sum()), len(wrong))
        scale = column_scale(features)
        return {**scale, **_layers(standardised(features, scale), wrong, classifier, seed)}

    @staticmethod
    def score(measured: Tensors, state: Tensors, **_: Any) -> Tensor:
        """Apply it: the probability of an error."""
        return classified(measured["features"], state)


def _features(gradient: ParameterGradients, levels: tuple[str, ...]) -> Tensor:
    """The features; a mean that is only rounding, as of a softmax layer's gradient, which sums to zero, is zero."""
    columns = feature_columns(gradient, levels)
    columns = columns.reshape(len(columns), columns.shape[1] // len(FEATURES), len(FEATURES))
    mean, std = columns[..., FEATURES.index("mean")], columns[..., FEATURES.index("std")]
    cleaned = torch.where(mean.abs() <= 1e-6 * std, torch.zeros_like(mean), mean)
    return torch.stack([cleaned if name == "mean" else columns[..., i] for i, name in enumerate(FEATURES)], -1).flatten(
        1
    )


def _check_errors(errors: int, count: int) -> None:
    if not count:
        raise ValueError(
            "the data to fit 'oberdiek' on hold no labelled sample: give batches (inputs, labels) with labels from 0"
        )
    if errors in (0, count):
        found = "no error" if not errors else "only errors"
        raise ValueError(
            f"the model makes {found} on the {count} samples to fit 'oberdiek' on, and it learns to tell errors from "
            "the rest: give labelled data that the model was not trained on, or more of it"
        )


def _layers(features: Tensor, wrong: Tensor, classifier: str, seed: int) -> Tensors:
    """The classifier: ``weight`` ``(F,)`` and ``bias``, behind ``weight1`` ``(F, H)`` and ``bias1`` if it has them."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    x, y = features.numpy(), wrong.numpy()
    if classifier == "logistic":
        fitted = LogisticRegression(max_iter=2000, tol=1e-8).fit(x, y)
        return {
            "weight": torch.from_numpy(fitted.coef_[0].copy()),
            "bias": torch.tensor(float(fitted.intercept_[0])).double(),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is a setting here
        fitted = MLPClassifier((32,), alpha=1e-2, max_iter=300, random_state=seed).fit(x, y)
    (weight1, weight), (bias1, bias) = fitted.coefs_, fitted.intercepts_
    arrays = {"weight1": weight1, "bias1": bias1, "weight": weight[:, 0], "bias": bias[0]}
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in arrays.items()}
