"""A score as a postprocessor of OpenOOD v1.5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import as_rows, call, logits_in, preserved
from lightning_gradmetrics.export.bound import BoundScore
from lightning_gradmetrics.scoring.registry import ScoreLike

__all__ = ["openood"]


def openood(score: ScoreLike, **options: Any) -> type[Any]:
    """Return a score as the class of an OpenOOD v1.5 postprocessor, for its ``Evaluator`` and leaderboard.

    ``Evaluator(net, id_name="cifar10", postprocessor=lgm.export.openood("trust")())``. ``setup`` fits a fitted score on
    ``id_loader_dict["train"]``; the out-of-distribution loaders are not read. ``postprocess`` returns the predictions and
    the confidences, which are the negative scores. If OpenOOD is installed, the class is derived from its
    ``BasePostprocessor``, as its evaluator requires. There are no hyperparameters to search, so ``APS_mode`` is false.

    Args:
        score: A name such as ``"gradnorm"``, a score, or any other form that
            :func:`lightning_gradmetrics.score` accepts; it must not need labels.
        **options: ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        The class; its only argument is OpenOOD's ``config``, which may be left out.

    Raises:
        ValueError: If the score is unknown or needs true labels.

    Example:
        >>> net, images = torch.nn.Linear(4, 3).eval(), torch.randn(5, 4)
        >>> postprocessor = openood("energy")()
        >>> postprocessor.setup(net, {}, {})
        >>> prediction, confidence = postprocessor.postprocess(net, images)
        >>> prediction.shape, confidence.shape
        (torch.Size([5]), torch.Size([5]))

    Reference:
        J. Zhang et al., "OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection", 2023,
        https://arxiv.org/abs/2306.09301
    """
    BoundScore(score, options)  # raises early if the score cannot be exported
    return type("ScorePostprocessor", (_Postprocessor, *_bases()), {"exported": score, "options": options})


def _bases() -> tuple[type[Any], ...]:
    try:
        from openood.postprocessors import BasePostprocessor  # type: ignore[import-not-found]
    except ImportError:
        return ()
    return (BasePostprocessor,)


class _Postprocessor:
    """The interface of OpenOOD's ``BasePostprocessor``."""

    exported: ScoreLike
    options: Mapping[str, Any]
    APS_mode = False
    hyperparam_search_done = True

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.args_dict: dict[str, Any] = {}
        self.bound = BoundScore(type(self).exported, dict(type(self).options))

    def setup(self, net: nn.Module, id_loader_dict: Mapping[str, Any], ood_loader_dict: Mapping[str, Any]) -> None:
        """Fit the score on the training data, if it needs a fit and has no state."""
        if not self.bound.is_ready:
            net.eval()
            self.bound.fit(net, _batches(id_loader_dict["train"], net))

    def postprocess(self, net: nn.Module, data: Any) -> tuple[Tensor, Tensor]:
        """Return predictions and confidences of a batch, ``(N,)`` each."""
        logits_fn = self.bound.options.get("logits_fn", logits_in)
        with preserved(net), torch.no_grad():
            prediction = as_rows(logits_fn(call(net, data))).argmax(1)
        return prediction, -self.bound.values(net, data)

    def inference(self, net: nn.Module, data_loader: Iterable[Any], progress: bool = True) -> tuple[Any, Any, Any]:
        """Return predictions, confidences and labels of a loader as arrays ``(N,)``."""
        rows: list[tuple[Any, Any, Any]] = []
        for batch in data_loader:
            prediction, confidence = self.postprocess(net, batch["data"].to(_device(net)))
            rows.append((prediction.cpu().numpy(), confidence.cpu().numpy(), np.asarray(batch["label"])))
        predictions, confidences, labels = zip(*rows, strict=True)
        return (
            np.concatenate(predictions).astype(int),
            np.concatenate(confidences),
            np.concatenate(labels).astype(int),
        )


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _batches(loader: Iterable[Any], net: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels from OpenOOD's batches, which are mappings with ``data`` and ``label``."""
    for batch in loader:
        yield batch["data"].to(_device(net)), torch.as_tensor(batch["label"]).to(_device(net))
