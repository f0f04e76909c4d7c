"""One pass over the dataloaders of a stage: observes each step and passes its samples to the stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_gradmetrics.callback.columns import SampleIds, sample_ids
from lightning_gradmetrics.callback.drawn_indices import DrawnIndices
from lightning_gradmetrics.callback.labels import BatchReader, ReadBatch
from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.sample_rows import SampleRows
from lightning_gradmetrics.callback.skipped_batches import SkippedBatches
from lightning_gradmetrics.callback.stages import ScoreStage, Stage
from lightning_gradmetrics.callback.step_wrapper import around_next_call
from lightning_gradmetrics.callback.transfers import HOOKS, Transfers
from lightning_gradmetrics.classifier.forward import check_model
from lightning_gradmetrics.classifier.observation import Observation
from lightning_gradmetrics.classifier.sample_axis import SampleAxis, samples_first
from lightning_gradmetrics.language.observed_texts import ObservedTexts
from lightning_gradmetrics.results.sample_index import REPEATED, UNKNOWN, Indices
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.resizing import at_size
from lightning_gradmetrics.scoring.step import StepObserver
from lightning_gradmetrics.scoring.text_step import labels_of_call, token_ids

__all__ = ["Run"]

ID = "id"

OF_LOADER = (
    "its dataloader does not show which samples a batch contains (an iterable dataset, several loaders side by side, workers "
    "with in_order=False, a loader that overrides __iter__, a sampler of keys), or the number of rows differs from the number "
    "of samples. Use a DataLoader of a dataset with __getitem__, or name the samples with sample_id="
)
OF_HOOK = (
    f"a hook ({', '.join(HOOKS)}) changes the batches so that the order of their rows cannot be checked. Keep the labels and "
    "the order of the batch in the hook, or name the samples with sample_id="
)


@dataclass
class Run:
    """One pass over the dataloaders of a stage.

    Args:
        stage: Scores each batch, or accumulates it for a fit.
        model: The model that is scored.
        drawn: The indices that the dataloaders draw.
        transfers: Detects rows that moved between the dataloader and the step.
        roles: The role of each dataset.
        reader: Reads inputs and labels.
        surroundings: The context of the model's forward passes.
        processes: The processes of the run.
        sample_id: Returns the id of each sample of a batch, or ``None``.
        sample_axis: The axis of the samples in the model's inputs.
    """

    stage: Stage
    model: nn.Module
    drawn: DrawnIndices
    transfers: Transfers
    roles: Mapping[str, str]
    reader: BatchReader
    surroundings: Callable[[], AbstractContextManager[Any]]
    processes: Processes
    sample_id: SampleIds | None = None
    sample_axis: SampleAxis = 0
    skipped: SkippedBatches = field(init=False)
    _observer: StepObserver = field(init=False)
    _texts: ObservedTexts | None = field(default=None, init=False)
    _read: ReadBatch | None = None
    _given: Any = None
    _seen: Observation | None = None
    _stepped: nn.Module | None = None
    _remove: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        scorer = self.stage.scorer
        self._observer = StepObserver(scorer, self.model)
        self.skipped = SkippedBatches(type(self.model).__name__, self.processes)
        of_texts = [score for score in scorer.scores if score.needs.of_texts]
        if of_texts and isinstance(self.stage, ScoreStage):
            self._texts = ObservedTexts(self.model, of_texts, scorer.head, scorer.engine)

    def start_batch(self, module: nn.Module, step: str, batch: Any) -> None:
        """Read the batch, and observe the step that follows.

        A step with a ``dataloader_iter`` draws its own batch, so Lightning passes the previous one here.
        """
        self.stop()
        self._given = batch
        self.transfers.reaches_step(batch)
        self._read = None if batch is None else self._read_batch(batch)
        self._seen = Observation()
        self._stepped = module
        self._remove = around_next_call(module, step, self._observed)

    def _read_batch(self, batch: Any) -> ReadBatch:
        return replace(self.reader.read(batch), ids=sample_ids(self.sample_id, batch))

    @contextmanager
    def _observed(self) -> Iterator[None]:
        with self._observer.observing() as observation:
            self._seen = observation
            yield

    def end_batch(self, number: int, place: int, batch: Any) -> None:
        """Pass the samples of the observed step to the stage.

        Args:
            number: The batch's number in its dataloader.
            place: The dataloader's number.
            batch: The batch.
        """
        self.stop()
        read = self._read if batch is self._given else None
        read, observation = read or self._read_batch(batch), self._seen
        assert observation is not None
        self._read = self._seen = self._given = None
        if read.size == 0:
            return
        check_model(self.model)
        indices: Indices | None = self.drawn.of_batch(place, number)
        size = read.size if indices is None else len(indices)
        if self.stage.skips(place, size, indices):
            self.skipped.others += 1
            return
        if self._observer.is_unseen(observation, read.inputs, self._stepped):
            self._leave_out(place, number, size, indices)
            return
        self.skipped.others += 1
        with self.surroundings(), observation.surroundings(), ExitStack() as stack:
            observed = self._observer.batch(observation, read.inputs, size)
            observed = self._placed(stack, observed)
            rows = SampleRows(observed.size)
            if observation.called is not None:
                rows = self.reader.rows(read, observation.called[1], observed.inputs, observed.size)
            observed = self._completed(observed, read, observation, place, rows)
            evidence = self.stage.scorer.evidence(self.model, observed)
            if observed.tokens is not None and self._texts is not None:
                observed = replace(observed, tokens=replace(observed.tokens, of_texts=self._texts.values(observed)))
        index = self._index(place, rows, indices)
        self.stage.add(place, observed, evidence, index, self._ids(read, rows))
        self._warn_of_repeats(place)

    def _index(self, place: int, rows: SampleRows, indices: Indices | None) -> Tensor:
        """Return the index of each sample of the next batch ``(N,)``, and warn if it is unknown."""
        moved, of_dataset = self.transfers.moved(rows.size), self.stage.rows[place]
        index = rows.of(of_dataset.index.take(rows.size, indices, moved))
        if len(index) and int(index.min()) <= UNKNOWN:
            why = OF_LOADER if moved is None else OF_HOOK
            name = of_dataset.dataset
            text = f"the index of the rows of {name!r} is unknown and stays null: {why}"
            self.reader.warn_once(f"index of {name}", text)
        self.skipped.select(of_dataset.dataset, rows.left_out)
        return index

    def _ids(self, read: ReadBatch, rows: SampleRows) -> list[str]:
        """Return the id of each sample; an empty list if the run stores none."""
        if self.sample_id is None:
            return []
        if len(read.ids) != rows.size:
            raise ValueError(
                f"sample_id= returned {len(read.ids)} ids for a batch of {rows.size} samples; expected one id per sample"
            )
        return rows.of_list(read.ids)

    def _leave_out(self, place: int, number: int, size: int | None, indices: Indices | None) -> None:
        """Count a batch whose step did not call the model, and go on with the index of the next one."""
        rows = self.stage.rows[place]
        self.transfers.moved(size or 0)
        taken = rows.index.take(size or 0, indices)  # without those that a distributed sampler repeats
        self.skipped.add(rows.dataset, number, int((taken != REPEATED).sum()))

    def _placed(self, stack: ExitStack, batch: ObservedBatch) -> ObservedBatch:
        """Return the batch with the samples on the first axis of its inputs, where they stay until the stack is left."""
        if self.sample_axis == 0 or batch.inputs is None:
            return batch
        model = batch.called or self.model
        inputs, stated = stack.enter_context(samples_first(model, batch.inputs, self.sample_axis))
        return replace(batch, inputs=inputs, sample_axis=stated)

    def _completed(
        self, batch: ObservedBatch, read: ReadBatch, seen: Observation, place: int, rows: SampleRows
    ) -> ObservedBatch:
        """Return the batch with its labels and its dataset."""
        dataset = self.stage.rows[place].dataset
        received: list[Tensor] = []
        inputs: list[Tensor] = []
        for call in () if seen.called is None else seen.called[1]:
            received += call.received
            inputs += call.received_inputs()
        if token_ids(batch) is not None:
            labels = None if read.copied is None else labels_of_call(batch)
            if labels is None:
                labels = self.reader.token_labels(read, rows.size, received, dataset)
                labels = None if labels is None else rows.of(labels)
            batch = replace(batch, ood=self.stage.ood(place, batch.size), dataset=dataset)
            return self._observer.tokens(batch, labels, read.inputs)
        if batch.logits.ndim > 2 and batch.logits.ndim != 4:
            raise ValueError(_other_positions(batch))
        labels = None
        if batch.logits.ndim == 4:
            labels = self.reader.label_maps(read, rows.size, batch.logits.shape[1], inputs, dataset)
            batch = batch if labels is None else at_size(batch, tuple(labels.shape[1:]))
        if batch.logits.ndim == 2 and batch.logits.shape[1] > 1:
            labels = self.reader.labels(read, rows.size, batch.logits.shape[1], inputs, dataset)
        labels = None if labels is None else rows.of(labels)
        if batch.logits.ndim == 2:
            labels = self._checked(labels, batch.logits.shape[1], place)
        return replace(batch, labels=labels, ood=self.stage.ood(place, batch.size), dataset=dataset)

    def _checked(self, labels: Tensor | None, classes: int, place: int) -> Tensor | None:
        """Return the labels; ``None`` for in-distribution data with a label outside the classes."""
        rows = self.stage.rows[place]
        if labels is not None and classes == 2:
            self.reader.note_numbers(labels, rows.dataset)
        if labels is None or not len(labels) or self.roles.get(rows.dataset, ID) != ID or int(labels.max()) < classes:
            return labels
        rows.forget_labels = True
        self.reader.warn_once(
            rows.dataset,
            f"no labels are used for the dataset {rows.dataset!r}: they go up to {int(labels.max())}, but the model has "
            f"{classes} classes, 0 to {classes - 1}. Pass split_batch=, a callable from the batch to (inputs, labels), with -1 "
            "for an unknown label; or datasets= with a role other than 'id'",
        )
        return labels

    def _warn_of_repeats(self, place: int) -> None:
        if self.drawn.repeats(place):
            dataset = self.stage.rows[place].dataset
            self.reader.warn_once(
                f"repeats in {dataset}",
                f"the dataloader {dataset!r} draws some samples more than once: the results keep the first row of each, so that "
                "no sample counts twice. Use a sampler without replacement to score every sample",
            )

    def stop(self) -> None:
        """Stop observing. Does nothing if no step is observed."""
        if self._remove is not None:
            self._remove()
            self._remove = None

    def finish(self) -> None:
        """Stop observing, and compute all scores.

        Raises:
            ValueError: If no step called the model.
        """
        self.stop()
        self.stage.settle()
        self.skipped.finish()
        self.reader.warn_of_signs()

    def close(self) -> None:
        """Stop observing, and end the stage."""
        self.stop()
        self.stage.close()


def _other_positions(batch: ObservedBatch) -> str:
    """Return why positions that are neither pixels nor tokens are not scored in a Trainer."""
    message = (
        f"the logits have shape {tuple(batch.logits.shape)}: in a Trainer, scores per position are those of the pixels of images, "
        "(N, C, H, W), and those of tokens (N, T, V)"
    )
    if batch.logits.ndim == 3:
        message += (
            " of a language model that the step calls with token ids input_ids (N, T). Without them, as with inputs_embeds, it is "
            "unknown which token each position predicts"
        )
    return f"{message}. lightning_gradmetrics.score(model, inputs, scores, targets=labels) returns scores of other positions"
