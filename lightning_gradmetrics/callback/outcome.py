"""Outputs of a run: the summary, the report, the pictures and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import is_lazy

from lightning_gradmetrics.callback.evaluating import judged_scores
from lightning_gradmetrics.callback.logged import plain_names
from lightning_gradmetrics.classifier.hints import did_you_mean
from lightning_gradmetrics.evaluation import Evaluation, Thresholds
from lightning_gradmetrics.pictures import (
    Picture,
    PictureSource,
    curve_pictures,
    log_pictures,
    log_samples,
    write_pictures,
    write_thumbnails,
)
from lightning_gradmetrics.results.output import Output
from lightning_gradmetrics.results.reading import is_complete, read_results
from lightning_gradmetrics.results.stores import Results
from lightning_gradmetrics.results.table import largest_of_each
from lightning_gradmetrics.results.tokens import has_tokens
from lightning_gradmetrics.scoring.scorer import Scorer

__all__ = ["Outcome", "model_facts"]


class Outcome:
    """The part of the callback that presents the results of a run."""

    scorer: Scorer
    thresholds: Thresholds | None
    _results: Results
    _is_set_up = False
    """Whether this process took part in a run."""
    _drawn: tuple[Any, Any, list[Picture]] = (None, None, [])
    """The picture sources of a run, its evaluation, and the pictures."""
    logs_pictures = True
    """Whether a run passes its pictures to the loggers; the command does that after the run."""
    output: Output | None
    evaluation: Evaluation | None
    token_evaluation: Evaluation | None
    sources: list[PictureSource]
    top_k: dict[str, int]
    split_batch: Callable[[Any], tuple[Any, Any]]
    prefix: str
    print_summary: bool
    _fitting: Any
    _model: dict[str, Any]

    @property
    def score_names(self) -> list[str]:
        """The names of the scores, which are columns of the results."""
        return [score.name for score in self.scorer.scores]

    @property
    def results(self) -> pa.Table:
        """The per-sample results of the last run. With ``output=`` they are read from the directory on first use."""
        if self.output is not None and not self._is_set_up and is_complete(self.output.directory):
            return read_results(self.output.directory)  # another process or callback ran
        if callable(self._results):
            self._results = self._results()
        return self._results

    def __repr__(self) -> str:
        """Return one line with the scores and the number of samples scored so far."""
        scored = "results on disk" if callable(self._results) else f"{self._results.num_rows} samples scored"
        return f"{type(self).__name__}({', '.join(self.score_names)}; {scored})"

    def _repr_html_(self) -> str:
        """Return the main table for a notebook, or the short text before a run."""
        return f"<code>{escape(repr(self))}</code>" if self.evaluation is None else self.evaluation._repr_html_()

    def summary(self, width: int | None = None) -> str:
        """Return the main table of the last run as text; after a run over texts, also the table of wrong tokens.

        Args:
            width: The number of characters in a line; by default that of the terminal.

        Raises:
            RuntimeError: If no run has finished yet.
        """
        from rich.console import Console

        evaluation = self._evaluated_run()
        width = Console().width if width is None else width
        text = self._table_text(evaluation, width)
        if self.token_evaluation is not None:
            text += f"\nWrong tokens\n{self._table_text(self.token_evaluation, width)}"
        return text

    def _table_text(self, evaluation: Evaluation, width: int) -> str:
        from lightning_gradmetrics.report.tables import grids_text, summary_grids

        return grids_text(summary_grids(evaluation, judged_scores(evaluation, self.scorer.scores), width), width)

    def report(
        self,
        path: Path | str = "report.html",
        data: Mapping[str, Any] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> Path:
        """Write the HTML report of the last run: a single file that works offline.

        Args:
            path: The file to write.
            data: Datasets or dataloaders by name; the listed samples are shown as thumbnails of their images.
            decode: After a run over texts, from token ids to their text, such as ``tokenizer.decode``; otherwise the
                report shows the ids.

        Returns:
            The path of the file.

        Raises:
            RuntimeError: If no run has finished yet.
            ValueError: If ``data`` names a dataset that is not in the run.
        """
        from lightning_gradmetrics.report import listed_samples, write_report

        self._evaluated_run()
        _check_datasets(data or {}, self.results["dataset"].unique().to_pylist())
        with TemporaryDirectory() as folder:
            self.save(folder, decode)
            if data:
                write_thumbnails(Path(folder), data, listed_samples(folder), self.split_batch)
            return write_report(folder, path)

    def save(self, directory: Path | str, decode: Callable[[list[int]], str] | None = None) -> Path:
        """Write the results of the last run to a directory, as the command does.

        It contains ``results.parquet``, ``metrics.json``, ``metrics.csv``, ``table.md``, ``table.tex`` and ``figures``;
        after a run over texts, also ``texts.html``, the texts with their tokens coloured by rank.
        ``gradmetrics compare`` and ``gradmetrics report`` read it.

        Args:
            directory: The directory; files of an earlier run are replaced.
            decode: After a run over texts, from token ids to their text, such as ``tokenizer.decode``.

        Returns:
            The path of the directory.

        Raises:
            RuntimeError: If no run has finished yet.
        """
        from lightning_gradmetrics.report import write_metrics_tables, write_run, write_texts

        evaluation, directory = self._evaluated_run(), Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        figures = write_pictures(self.pictures(), directory)
        write_run(
            directory,
            self.results,
            evaluation,
            self.scorer.scores,
            model=self._model,
            figures=figures,
            thresholds=self.thresholds,
        )
        write_metrics_tables(evaluation, judged_scores(evaluation, self.scorer.scores), directory)
        write_pictures(curve_pictures(self.results, evaluation), directory, pdf=True)
        if has_tokens(self.results):
            write_texts(directory, self.results, decode)
        return directory

    def pictures(self) -> list[Picture]:
        """Return the pictures of the last run, which are drawn once."""
        sources, evaluation, pictures = self._drawn
        if sources is not self.sources or evaluation is not self.evaluation:
            pictures = []
            for source in self.sources:
                pictures += source.pictures()
            self._drawn = self.sources, self.evaluation, pictures
        return list(pictures)

    def tables(self) -> dict[str, pa.Table]:
        """Return the tables behind the pictures: ``profile``, one row per dataset and layer, and ``largest``, one row per sample."""
        tables = {}
        for source in self.sources:
            tables.update(source.tables())
        if self.top_k:
            tables["largest"] = largest_of_each(self.results, self.top_k)
        return tables

    def _log(self, trainer: Trainer) -> None:
        """Pass the pictures to the loggers; outside a fit, also the curves and per-sample scores if they are in memory."""
        if not trainer.loggers or self.evaluation is None:
            return
        pictures, step = self.pictures() if self.logs_pictures else [], trainer.global_step
        if trainer.state.fn != "fit" and self.output is None:
            pictures += curve_pictures(self.results, self.evaluation, ("misclassification", "ood"))
            names = plain_names(self.score_names)
            log_samples(trainer.loggers, self.results, names, self.sources, self.prefix, step)
        log_pictures(trainer.loggers, pictures, self.prefix, step)

    def _evaluated_run(self) -> Evaluation:
        if self.evaluation is None:
            raise RuntimeError("there is no finished run yet: call trainer.test, validate or predict first, on rank 0")
        return self.evaluation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary, except inside a fit."""
        is_wanted = self.print_summary and self._fitting is None and trainer.is_global_zero
        if is_wanted and trainer.state.fn != "fit" and self.evaluation is not None and self.evaluation.metrics:
            print(self.summary())

    on_test_end = on_predict_end = on_validation_end


def model_facts(module: LightningModule) -> dict[str, Any]:
    """Return the name of a module's class and the number of its parameters."""
    parameters = 0
    for parameter in module.parameters():
        parameters += 0 if is_lazy(parameter) else parameter.numel()
    return {"name": type(module).__name__, "parameters": parameters}


def _check_datasets(data: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse datasets that are not in the run."""
    for name in data:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(
                f"data names a dataset {name!r} that is not in the run;{hint} available: {', '.join(known)}"
            )
