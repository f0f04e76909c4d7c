"""Scores NumPy arrays with a model that is loaded once per process, for batch engines such as Ray and Spark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs, check_model, logits_in, map_tensors
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.states import check_fitted
from lightning_gradmetrics.scoring.step import StepObserver

__all__ = ["ArrayScorer"]

Array = np.ndarray[Any, Any]


class ArrayScorer:
    """Scores batches of NumPy arrays.

    Args:
        make_model: Returns the model; called once, in the process that scores.
        scores: As in :func:`lightning_gradmetrics.score`.
        device: The device of the model; by default a GPU if there is one.
        head: As in :func:`lightning_gradmetrics.score`.
        logits_fn: As in :func:`lightning_gradmetrics.score`.
        engine: As in :func:`lightning_gradmetrics.score`.

    Raises:
        TypeError: If ``make_model`` is not callable, or does not return a module.
        ValueError: If a score is unknown or not fitted for the model.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
        *,
        device: str | None = None,
        head: str | None = None,
        logits_fn: Callable[[Any], Tensor] = logits_in,
        engine: str = "auto",
    ) -> None:
        if isinstance(make_model, nn.Module) or not callable(make_model):
            raise TypeError(
                f"the model is a {type(make_model).__name__}; expected a callable without arguments that returns the model, so "
                "that each process loads it once"
            )
        model = make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"make_model returned a {type(model).__name__}; expected a torch.nn.Module")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.scorer = Scorer(resolve(scores), head, logits_fn, engine)
        check_model(self.model)
        check_fitted(self.scorer.scores, self.model)
        self._observer = StepObserver(self.scorer, self.model)

    def __call__(self, inputs: Inputs, labels: Tensor | None = None) -> dict[str, Array]:
        """Return the column ``prediction``, one column per score, and ``finite``, ``(N,)`` each.

        Args:
            inputs: Tensors or arrays, in the types that the model takes.
            labels: True labels ``(N,)``, for scores that need them.
        """
        placed = map_tensors(inputs, lambda tensor: tensor.to(self.device))
        with torch.no_grad():
            batch = replace(self._observer.own(placed), labels=labels)
        scores = self.scorer(self.scorer.evidence(self.model, batch))
        columns = {"prediction": batch.logits.argmax(1).cpu().numpy()}
        finite = batch.logits.isfinite().all(1).cpu()
        for name, values in scores.items():
            columns[name] = values.detach().cpu().double().numpy()
            finite &= values.detach().isfinite().cpu()
        return {**columns, "finite": finite.numpy()}
