"""Counts the batches for which a step does not call the model: their samples have no scores."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_gradmetrics.callback.processes import Processes

__all__ = ["SkippedBatches"]


@dataclass
class SkippedBatches:
    """The batches of a run for which the step returned without a call of the model, as for a batch without valid samples.

    Args:
        model: The name of the model's class.
        processes: The processes of the run.
        of_datasets: The number of batches and of samples by dataset.
        others: The number of batches for which the step called the model, or whose rows are stored already.
        selected: The number of samples by dataset that the step did not pass to the model in other batches.
    """

    model: str
    processes: Processes
    of_datasets: dict[str, tuple[int, int]] = field(default_factory=dict)
    others: int = 0
    selected: dict[str, int] = field(default_factory=dict)

    def add(self, dataset: str, number: int, size: int) -> None:
        """Count a batch, and warn if it is the first one.

        Args:
            dataset: The name of its dataset.
            number: Its number in the dataloader.
            size: The number of its samples; 0 if that is unknown.
        """
        if not self.of_datasets:
            self.processes.warn(
                f"the step did not call {self.model}, nor a layer of it, for batch {number} of the dataset {dataset!r}: its samples "
                "have no scores and are left out of the results, as in all such batches; their number is shown after the run. "
                "If the step does compute predictions for them, let it call the model, or pass submodule=, the part that it calls"
            )
        batches, samples = self.of_datasets.get(dataset, (0, 0))
        self.of_datasets[dataset] = (batches + 1, samples + size)

    def select(self, dataset: str, left_out: int) -> None:
        """Count the samples of a batch that the step did not pass to the model."""
        if not left_out:
            return
        self.selected[dataset] = self.selected.get(dataset, 0) + left_out

    def finish(self) -> None:
        """Warn about the batches and samples that all processes left out, and add the numbers of the other processes.

        Raises:
            ValueError: If the step never called the model.
        """
        counts = self.processes.all_gather((self.others, self.of_datasets, self.selected))
        self.others, self.of_datasets, self.selected = 0, {}, {}
        for others, of_datasets, selected in counts:
            self.others += others
            for dataset, (batches, samples) in of_datasets.items():
                before = self.of_datasets.get(dataset, (0, 0))
                self.of_datasets[dataset] = (before[0] + batches, before[1] + samples)
            for dataset, samples in selected.items():
                self.select(dataset, samples)
        if self.of_datasets and not self.others:
            raise ValueError(
                f"the step does not call {self.model}, nor any of its layers, for any batch, so its scores are unknown. Let the step "
                "call the model, or pass submodule=, the part of the model that the step calls"
            )
        for dataset, (batches, samples) in self.of_datasets.items():
            known = f" ({samples} samples)" if samples else ""
            self.processes.warn(
                f"left out of the results: {batches} {'batch' if batches == 1 else 'batches'} of the dataset {dataset!r}{known}, for "
                f"which the step did not call {self.model}"
            )
        for dataset, samples in self.selected.items():
            self.processes.warn(
                f"left out of the results: {samples} samples of the dataset {dataset!r}, which the step did not pass to {self.model}"
            )
