"""The answer tokens of a batch as rows of logits, features and labels, without prompts and padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.logit_map import IDENTITY, LogitMap, recognised_map
from lightning_gradmetrics.language.model import HeadCall, LanguageModelError
from lightning_gradmetrics.language.sequences import Padded
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.recipes import Score

__all__ = ["TokenRows", "answer_rows"]

BLOCK_LOGITS = 2**22
"""Number of logits that are scored at a time: 32 MiB in float64."""


@dataclass(frozen=True)
class TokenRows:
    """The answer tokens of a batch, one row per token, one sequence after the other.

    Args:
        logits: The logits that predict each token ``(M, V)``.
        features: The head's input ``(M, D)``.
        output: The head's output ``(M, V)``.
        labels: The tokens ``(M,)``.
        lengths: The number of tokens of each sequence.
        logit_map: The map from the head's output to the logits.
    """

    logits: Tensor
    features: Tensor
    output: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    logit_map: LogitMap = IDENTITY

    @property
    def slope(self) -> Tensor | float:
        """The derivative of the logits with respect to the head's output: the scale, or ``(M, V)`` for capped logits."""
        return self.logit_map.slope(self.output.double())

    def evidence(self, head: tuple[Tensor, Tensor | None] | None = None) -> Evidence:
        """Return the evidence of these tokens: each is one sample with V classes.

        Args:
            head: The head's weight and bias, for scores that read them.
        """
        return Evidence(self.logits, self.features, self.labels, given_head=head, given_slope=self.slope)

    def values(self, score: Score, head: tuple[Tensor, Tensor | None] | None = None) -> Tensor:
        """Return a score of these tokens, ``(M,)``.

        Args:
            score: The score.
            head: The head's weight and bias, for scores that read them.
        """
        return score(self.evidence(head))

    def blocks(self) -> Iterator[TokenRows]:
        """Yield blocks with a limited number of logits, because some scores need several copies of them."""
        rows = max(1, BLOCK_LOGITS // self.logits.shape[1])
        for start in range(0, len(self.labels), rows):
            yield self._part(slice(start, start + rows), ())

    def sequences(self) -> Iterator[TokenRows]:
        """Yield the rows of each sequence."""
        start = 0
        for length in self.lengths:
            yield self._part(slice(start, start + length), (length,))
            start += length

    def _part(self, rows: slice, lengths: tuple[int, ...]) -> TokenRows:
        features, labels = self.features[rows], self.labels[rows]
        return TokenRows(self.logits[rows], features, self.output[rows], labels, lengths, self.logit_map)


def answer_rows(call: HeadCall, batch: Padded) -> TokenRows:
    """Return the rows that predict the answers of a batch.

    Args:
        call: The forward pass of the batch.
        batch: The batch.

    Raises:
        LanguageModelError: If the logits are neither the head's output nor a scaled or capped function of it.
    """
    offset = batch.ids.shape[1] - call.logits.shape[1]
    rows, columns, labels, lengths = [], [], [], []
    for number, sequence in enumerate(batch.sequences):
        positions = sequence.positions - offset
        rows.append(torch.full_like(positions, number))
        columns.append(positions)
        labels.append(sequence.answer)
        lengths.append(len(positions))
    index = (torch.cat(rows).to(call.logits.device), torch.cat(columns).to(call.logits.device))
    logits, output = call.logits[index], call.output[index]
    logit_map = recognised_map(output, logits)
    if logit_map is None:
        raise LanguageModelError(
            "the model's logits are neither its head's output nor a scaled or capped function of it, so the gradient of the "
            "head is unknown. Pass head=, the linear layer whose output becomes the logits"
        )
    answers = torch.cat(labels).to(logits.device)
    if len(answers) and int(answers.max()) >= logits.shape[1]:
        raise LanguageModelError(
            f"an answer has the token id {int(answers.max())}, and the model's logits have {logits.shape[1]} columns: the model "
            "cannot predict this token"
        )
    return TokenRows(logits, call.features[index], output, answers, tuple(lengths), logit_map)
