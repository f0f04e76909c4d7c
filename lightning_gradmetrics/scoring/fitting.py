"""Fits scores on a stream of batches, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.batches import BatchCopy, labels_in, split_batch
from lightning_gradmetrics.classifier.forward import check_model, map_tensors, tensors_in
from lightning_gradmetrics.classifier.labels import described, is_like_labels, token_numbers
from lightning_gradmetrics.classifier.sample_axis import SampleAxis, samples_first
from lightning_gradmetrics.results.finite import finite_rows
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.dry_run import Needs, needs_of
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.fitted import FittedScore, fitted_scores, plain_scores
from lightning_gradmetrics.scoring.positions import sampled_rows
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.states import fingerprint
from lightning_gradmetrics.scoring.step import StepObserver
from lightning_gradmetrics.scoring.text_step import token_ids
from lightning_gradmetrics.scoring.totals import RunningTotal, Tensors, add, row_keys

__all__ = ["Fitting", "FittingScorer", "fit", "gathered"]


@dataclass
class FittingScorer(Scorer):
    """Collects the evidence, including labels, that fits and unfitted scores need."""

    def needs(self, classes: int) -> Needs:
        """Return the needs of the scores for this number of classes."""
        if classes not in self._needs:
            contributions = [score.contribution for score in fitted_scores(self.scores)]
            self._needs[classes] = needs_of([*contributions, *plain_scores(self.scores)], classes)
        return self._needs[classes]

    def check_labels(self, labels: Tensor | None, logits: Tensor, dataset: str | None) -> None:
        """Accept any labels; each score skips or refuses unlabelled samples in its fit."""


@dataclass
class Fitting:
    """Accumulates the data that scores are fitted on.

    Args:
        scores: The scores to fit.
        template: The scorer whose settings (head, logits_fn, engine) are used.
        left_out: The number of samples left out because of NaN or Inf.
    """

    scores: Sequence[FittedScore]
    template: Scorer
    left_out: int = 0
    _running: dict[str, RunningTotal] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.scorer: Scorer = FittingScorer(
            tuple(self.scores), self.template.head, self.template.logits_fn, self.template.engine
        )
        self._needs: dict[str, Needs] = {}
        for score in self.scores:
            self._running[score.name] = RunningTotal()
            self._needs[score.name] = score.fit_needs

    def add(self, batch: ObservedBatch, evidence: Evidence, keep: Tensor | None = None) -> None:
        """Add a batch; rows that are not finite are left out and counted.

        Args:
            batch: The batch.
            evidence: The evidence that the scores need.
            keep: The samples to use ``(N,)``, bool; repeats of a distributed sampler are not used.
        """
        finite = finite_rows(batch.inputs, [batch.logits], batch.size).to(batch.logits.device)
        keep = torch.ones_like(finite) if keep is None else keep.to(finite.device)
        if batch.tokens is not None:
            self._add_tokens(batch, evidence, keep)
            return
        self.left_out += int((keep & ~finite).sum())
        if not evidence.has_positions:
            self.add_rows(evidence, keep & finite, keys_of(batch))
            return
        needs_features = any(needs.features for needs in self._needs.values())
        sampled = sampled_rows(evidence, keep & finite, keys_of(batch), needs_features)
        if sampled is not None:
            rows, keys = sampled
            self.add_rows(rows, torch.ones(len(keys), dtype=torch.bool, device=finite.device), keys)

    def _add_tokens(self, batch: ObservedBatch, evidence: Evidence, keep: Tensor) -> None:
        """Add the tokens of the texts that ``keep`` marks; each token is one row."""
        assert batch.tokens is not None
        finite = batch.logits.isfinite().all(1)
        is_used = keep.repeat_interleave(batch.tokens.lengths.to(keep.device)).to(finite.device)
        self.left_out += int((is_used & ~finite).sum())
        self.add_rows(evidence, is_used & finite, row_keys(batch.logits))

    def add_rows(self, evidence: Evidence, known: Tensor, keys: Tensor) -> None:
        """Add the rows of a batch where ``known`` ``(N,)`` is true; ``keys`` ``(N,)`` determine their order."""
        for score in self.scores:
            wanted = known
            if evidence.given_ood is not None and not self._needs[score.name].ood:
                wanted = known & ~evidence.given_ood.to(known.device)
            if wanted.any():
                self._running[score.name].add(score.contribution(evidence.rows(wanted), keys[wanted.cpu()]))

    @property
    def seen(self) -> tuple[int, dict[str, Tensors]]:
        """The accumulated totals, which processes exchange."""
        return self.left_out, {name: running.total for name, running in self._running.items()}

    def finish(
        self, model: nn.Module, seen: Sequence[tuple[int, dict[str, Tensors]]] | None = None
    ) -> dict[str, FittedScore]:
        """Return the fitted scores by name.

        Args:
            model: The model that the scores are fitted for.
            seen: The totals of all processes; ``None`` for those of this process.

        Raises:
            ValueError: If a score received no sample.
        """
        parts = [self.seen] if seen is None else seen
        counts, contributions = zip(*parts, strict=True)
        if sum(counts):
            warnings.warn(f"{sum(counts)} samples with NaN or Inf were left out of the fit", stacklevel=2)
        totals = {score.name: _total_of(score.name, contributions) for score in self.scores}
        empty = [name for name, total in totals.items() if not total]
        if empty:
            raise ValueError(
                f"no finite in-distribution sample to fit {', '.join(empty)} on: pass a dataloader that yields some"
            )
        head = self.scorer.found_head or self.template.found_head or self.scorer.head
        model_id = fingerprint(model)
        fitted = {}
        for score in self.scores:
            own_head = head if self._needs[score.name].features else None
            fitted[score.name] = score.fitted(totals[score.name], model_id, own_head)
        return fitted


def _total_of(name: str, contributions: Sequence[Mapping[str, Tensors]]) -> Tensors:
    """Return the total of all processes' contributions to one score."""
    return add([contribution[name] for contribution in contributions])


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    scores: ScoreLike | Iterable[ScoreLike],
    *,
    ood: Iterable[Any] = (),
    sample_axis: SampleAxis = 0,
    **options: Any,
) -> list[FittedScore]:
    """Fit scores without a Trainer.

    Args:
        model: A classifier in eval mode, on the device of the batches.
        batches: Batches of in-distribution data, as a dataloader yields them: ``(inputs, labels)``, a tensor, or a
            mapping.
        scores: The scores to fit.
        ood: Batches of out-of-distribution data, for detectors that are fitted on both kinds.
        sample_axis: The axis of the samples in the inputs, as in :func:`lightning_gradmetrics.score`.
        **options: ``head``, ``logits_fn`` and ``engine``, as in :func:`lightning_gradmetrics.score`.

    Returns:
        The fitted scores, ready for :func:`lightning_gradmetrics.score`.

    Raises:
        ValueError: If a score needs no fit, or there are no samples.

    Example:
        >>> import lightning_gradmetrics as lgm
        >>> model, batches = nn.Linear(4, 3), [torch.randn(16, 4), torch.randn(16, 4)]
        >>> fitted = lgm.fit(model, batches, ["gradorth", "kfac_influence"])
        >>> list(lgm.score(model, torch.randn(2, 4), fitted))
        ['gradorth', 'kfac_influence']
    """
    wanted = resolve(scores)
    plain = plain_scores(wanted)
    if plain:
        raise ValueError(f"the scores {', '.join(score.name for score in plain)} need no fit")
    fitting = Fitting(fitted_scores(wanted), Scorer(wanted, **options))
    check_model(model)
    _check_batches("batches", batches)
    _check_batches("ood", ood)
    for kind, stream in ((False, batches), (True, ood)):
        for batch, evidence in gathered(model, stream, fitting.scorer, kind, sample_axis):
            fitting.add(batch, evidence)
    return list(fitting.finish(model).values())


def _check_batches(argument: str, batches: Any) -> None:
    """Refuse one batch in the place of several: its rows would be taken for batches."""
    is_pair = isinstance(batches, tuple) and len(batches) == 2 and is_like_labels(batches[1])
    if isinstance(batches, (Tensor, Mapping)) or is_pair or not isinstance(batches, Iterable):
        raise TypeError(
            f"{argument}= is {described(batches)}; expected a dataloader or another iterable of batches. Pass one batch in a "
            f"list, as in {argument}=[batch]"
        )


def gathered(
    model: nn.Module, batches: Iterable[Any], scorer: Scorer, ood: bool, sample_axis: SampleAxis = 0
) -> Iterator[tuple[ObservedBatch, Evidence]]:
    """Yield each batch with its evidence, observed in a forward pass on the model's device.

    Args:
        model: A classifier in eval mode.
        batches: Batches as a dataloader returns them.
        scorer: The scorer that needs the evidence.
        ood: Whether the samples are out-of-distribution.
        sample_axis: The axis of the samples in the inputs.
    """
    observer, device = StepObserver(scorer, model), next(model.parameters()).device
    for batch in batches:
        inputs, labels = split_batch(batch)
        moved = map_tensors(inputs, lambda tensor: tensor.to(device))
        with samples_first(model, moved, sample_axis) as (placed, stated):
            observed = replace(observer.own(placed), sample_axis=stated)
            if sample_axis != 0:  # the first axis of the inputs is not as long as the labels
                labels = labels_in(batch, observed.size)
            labelled = _with_labels(observer, observed, batch, labels, ood, inputs)
            evidence = scorer.evidence(model, labelled)
        yield labelled, evidence


def _with_labels(
    observer: StepObserver, seen: ObservedBatch, batch: Any, labels: Tensor | None, ood: bool, inputs: Any
) -> ObservedBatch:
    """Return an observed batch with its labels, and with the kind of its samples."""
    device = seen.logits.device
    flags = torch.full((seen.size,), ood, device=device)
    if token_ids(seen) is not None:
        labels = BatchCopy(batch).labels(seen.size, None, (), token_numbers)
        return observer.tokens(replace(seen, ood=flags), labels, inputs)
    if labels is not None and labels.ndim != seen.logits.ndim - 1:
        labels = None
    return replace(seen, labels=None if labels is None else labels.to(device), ood=flags)


def keys_of(batch: ObservedBatch) -> Tensor:
    """Return an integer for each sample ``(N,)``: a hash of its inputs, or of its logits if no input has a sample axis."""
    rows = []
    for tensor in tensors_in(batch.inputs):
        if tensor.ndim and len(tensor) == batch.size:
            rows.append(tensor)
    return row_keys(rows or [batch.logits])
