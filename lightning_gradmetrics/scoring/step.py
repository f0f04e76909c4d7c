"""Watching the steps that somebody else runs, and gathering what the scores need of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_gradmetrics.classifier.forward import Inputs, call, check_inputs, check_model, preserved
from lightning_gradmetrics.classifier.head import capturing, install
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["Watch"]


class Watch:
    """A model that is watched from the start of a step to its end.

    Args:
        scorer: Says what is needed of a step.
        model: The model.

    Example:
        >>> from lightning_gradmetrics.scores import resolve
        >>> model = nn.Sequential(nn.Linear(4, 3)).eval()
        >>> watch, batch = Watch(Scorer(resolve("gradnorm")), model), torch.randn(5, 4)
        >>> watch.start()
        >>> _ = model(batch)  # the step
        >>> watch.stop()
        >>> watch.scorer(watch.evidence(batch, None))["gradnorm"].shape
        torch.Size([5])
    """

    def __init__(self, scorer: Scorer, model: nn.Module) -> None:
        self.scorer = scorer
        self.model = model
        self._capture = scorer.capture(model)
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Forget the last step and put the hooks on."""
        self._capture.clear()
        self._handles = install(self._capture)

    def stop(self) -> None:
        """Take the hooks off; no harm where there are none."""
        while self._handles:
            self._handles.pop().remove()

    def evidence(
        self, inputs: Inputs, labels: Tensor | None, outside: Tensor | None = None, dataset: str | None = None
    ) -> Evidence:
        """What the scores need of the step's batch; with a forward of its own where the step's could not be watched.

        Args:
            inputs: The model's inputs in the step.
            labels: True labels ``(N,)``, or ``None``.
            outside: Which samples are out-of-distribution ``(N,)``, where that is known.
            dataset: The name of the data set, for messages.
        """
        check_model(self.model)
        check_inputs(self.model, inputs)
        if not self._capture.calls and not self._capture.outputs:  # no step, or one of a compiled or a cached model
            with preserved(self.model), capturing(self._capture), torch.no_grad(), eager():
                call(self.model, inputs)
        evidence = self.scorer.evidence(self._capture, self.model, inputs, labels, outside, dataset)
        self._capture.clear()
        return evidence
