"""A scorer that reads the scores of a batch if another job of the sweep has computed them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import tensors_in
from lightning_gradmetrics.results.identity import tensors_hash
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["SharedScorer", "batch_key"]

Values = dict[str, dict[str, Tensor]]
"""Scores ``(N,)`` by the name of the score and the key of the batch."""


def batch_key(batch: ObservedBatch) -> str | None:
    """Return a hash of every bit of a batch's inputs, labels and logits; ``None`` if it cannot be shared.

    Args:
        batch: A batch of samples. Batches of positions and of tokens, and batches of unknown inputs, cannot be shared.
    """
    if batch.inputs is None or batch.tokens is not None or batch.logits.ndim != 2:
        return None
    tensors = [("logits", batch.logits)]
    if batch.labels is not None:
        tensors.append(("labels", batch.labels))
    for number, tensor in enumerate(tensors_in(batch.inputs)):
        tensors.append((str(number), tensor))
    return tensors_hash(tensors)


@dataclass
class SharedScorer(Scorer):
    """Computes the scores of a batch that no other job has stored for the same batch, and reads the others.

    Args:
        known: The stored scores of this model.
        added: The scores that were computed here.
        read: The names of the scores that were read.
    """

    known: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    added: Values = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    _parts: dict[frozenset[str], Scorer] = field(default_factory=dict, init=False, repr=False)
    _current: tuple[Scorer, str | None] | None = field(default=None, init=False, repr=False)

    def evidence(self, model: nn.Module, batch: ObservedBatch) -> Evidence:
        """Return the evidence that the scores without a stored value need from a batch."""
        key = batch_key(batch)
        missing = [score.name for score in self.scores if key not in self.known.get(score.name, {})]
        scorer = self._part(frozenset(missing))
        evidence = scorer.evidence(model, batch)
        self._current, self.found_head = (scorer, key), scorer.found_head
        return evidence

    def __call__(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return the scores of the batch of the last evidence, ``(N,)`` by name."""
        assert self._current is not None
        scorer, key = self._current
        computed = scorer(evidence)
        values = {}
        for score in self.scores:
            name = score.name
            if name not in computed:
                values[name] = self.known[name][str(key)].to(evidence.given_logits.device)
                self.read.add(name)
                continue
            values[name] = computed[name]
            if key is not None:
                self.added.setdefault(name, {})[key] = computed[name].detach().cpu()
        return values

    def _part(self, names: frozenset[str]) -> Scorer:
        """Return the scorer of some of the scores; ``looks`` are always computed."""
        if names not in self._parts:
            scores = []
            for score in self.scores:
                if score.name in names:
                    scores.append(score)
            self._parts[names] = Scorer(tuple(scores), self.head, self.logits_fn, self.engine, self.looks)
        return self._parts[names]
