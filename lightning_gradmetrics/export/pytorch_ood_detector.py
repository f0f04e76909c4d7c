"""A score as a detector of the library pytorch-ood."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.export.bound import BoundScore
from lightning_gradmetrics.scoring.registry import ScoreLike

__all__ = ["pytorch_ood"]


def pytorch_ood(score: ScoreLike, model: nn.Module | None = None, **options: Any) -> Any:
    """Return a score as a ``pytorch_ood.api.Detector``, for pytorch-ood's benchmarks and pipelines.

    ``fit(loader)`` fits a fitted score on batches ``(inputs, labels)``, and ``predict(inputs)`` returns the score
    ``(N,)``; higher = more of an outlier, in both libraries. Rows with a negative label, which marks outliers in
    pytorch-ood, are left out of the fit. The model must be in eval mode; it is left unchanged.

    Args:
        score: A name such as ``"gradnorm"``, a score, or any other form that
            :func:`lightning_gradmetrics.score` accepts; it must not need labels. A fitted score may already have a state.
        model: The classifier. It may also be given later: calling the detector with a model returns a detector of that
            model.
        **options: ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        The detector.

    Raises:
        ImportError: If pytorch-ood is not installed.
        ValueError: If the score is unknown or needs true labels.

    Example:
        >>> import torch
        >>> detector = pytorch_ood("knn(k=2)", torch.nn.Linear(4, 3).eval())
        >>> detector.fit([(torch.randn(20, 4), torch.zeros(20).long())]).predict(torch.randn(5, 4)).shape
        torch.Size([5])

    Reference:
        K. Kirchheim, M. Filax and F. Ortmeier, "PyTorch-OOD: A Library for Out-of-Distribution Detection Based on
        PyTorch", CVPR Workshops 2022, https://github.com/kkirchheim/pytorch-ood
    """
    return _detector_class()(BoundScore(score, options), model)


def _detector_class() -> type[Any]:
    """Return the class of the detectors; pytorch-ood is imported on first use."""
    try:
        from pytorch_ood.api import Detector, ModelNotSetException, RequiresFittingException
    except ImportError as error:
        raise ImportError(
            'lgm.export.pytorch_ood needs pytorch-ood: pip install "lightning-gradmetrics[pytorch-ood]"'
        ) from error

    class ScoreDetector(Detector):  # type: ignore[misc]
        """A score of lightning_gradmetrics as a detector."""

        def __init__(self, bound: BoundScore, model: nn.Module | None) -> None:
            super().__init__()
            self.bound, self.model = bound, model
            self.requires_fit = bound.requires_fit

        def __call__(self, x: Any) -> Any:
            """Return a detector of a model, or the scores of inputs."""
            if isinstance(x, nn.Module):
                return type(self)(self.bound, x)
            return self.predict(x)

        def _checked_model(self) -> nn.Module:
            if self.model is None:
                raise ModelNotSetException(f"{self.bound.score.name} needs a model: pass it to lgm.export.pytorch_ood")
            return self.model

        def fit(self, data_loader: Iterable[Any]) -> Any:
            """Fit the score on in-distribution batches."""
            bound = BoundScore(self.bound.score, self.bound.options)
            bound.fit(self._checked_model(), _inside(data_loader))
            self.bound = bound
            return self

        def predict(self, x: Tensor) -> Tensor:
            """Return the scores ``(N,)``, higher = more of an outlier."""
            model = self._checked_model()
            if not self.bound.is_ready:
                raise RequiresFittingException()
            return self.bound.values(model, x)

        def __repr__(self) -> str:
            return f"ScoreDetector({self.bound.score!r})"

    return ScoreDetector


def _inside(loader: Iterable[Any]) -> Iterable[Any]:
    """Yield the rows of each batch that have no negative label."""
    for batch in loader:
        if isinstance(batch, Tensor):
            yield batch
            continue
        inputs, labels = batch
        keep = labels >= 0
        if keep.any():
            yield inputs[keep], labels[keep]
