"""One run: prepare, fit, score, draw, evaluate, write, show."""

from __future__ import annotations

import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_gradmetrics.cli.second_process import SecondProcess, second_process

if TYPE_CHECKING:
    from lightning_gradmetrics.cli.steps.prepare import Experiment

__all__ = ["run"]

TASKS = ("evaluate", "gradtrust_demo", "segmentation", "stories")
HINTS = (
    r".*does not have many workers.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*GPU available but not used.*",
)
"""Warnings that the command does not show."""


def run(config: DictConfig) -> None:
    """Run the task of the configuration: score evaluation, GradTrust's demo, segmentation, or language model text.

    Args:
        config: The composed configuration.

    Raises:
        ValueError: If the task is unknown.
    """
    with _no_collection():
        _quiet_lightning()
        import lightning_gradmetrics.cli.steps.prepare  # noqa: F401  # imports nearly all that a task needs
    _check_nothing_is_missing(config)
    with second_process(wanted=config.task == "evaluate" and config.report is True) as process:
        _run_task(config, process)


def _run_task(config: DictConfig, process: SecondProcess) -> None:
    if config.task not in TASKS:
        raise ValueError(f"unknown task {config.task!r}; allowed: {', '.join(TASKS)}")
    if config.task == "evaluate":
        _evaluate_scores(config, process)
    elif config.task == "stories":
        _stories(config)
    elif config.task == "segmentation":
        _segmentation(config)
    else:
        _gradtrust_demo(config)


def _check_nothing_is_missing(config: DictConfig) -> None:
    """Check that every mandatory key has a value.

    Raises:
        ValueError: If some have none.
    """
    missing = list(_missing_keys("", OmegaConf.to_container(config, resolve=False)))
    if missing:
        raise ValueError(f"{', '.join(missing)} is missing: give it a value, as in {missing[0]}=VALUE")


def _missing_keys(prefix: str, node: Any) -> Iterator[str]:
    """Yield the keys below a node whose value is ``???``."""
    if isinstance(node, dict):
        for key, value in node.items():
            if value == "???":
                yield f"{prefix}{key}"
            yield from _missing_keys(f"{prefix}{key}.", value)


def _evaluate_scores(config: DictConfig, process: SecondProcess) -> None:
    from lightning_gradmetrics.cli.files import reserved, shown_path
    from lightning_gradmetrics.cli.interrupted import is_complete
    from lightning_gradmetrics.cli.progress import notice
    from lightning_gradmetrics.cli.steps.prepare import prepare

    directory = Path(HydraConfig.get().runtime.output_dir)
    with reserved(directory):
        if config.resume is True and is_complete(directory):
            notice(f"The run in {shown_path(directory)} is complete: there is nothing to resume")
            return
        clock = _Clock()
        experiment = prepare(config)
        clock.note("prepare_seconds")
        _run_steps(experiment, clock, process)


def _run_steps(experiment: Experiment, clock: _Clock, process: SecondProcess) -> None:
    from lightning_gradmetrics.cli.interrupted import delete_parts
    from lightning_gradmetrics.cli.steps.draw import drawn
    from lightning_gradmetrics.cli.steps.evaluate import evaluate
    from lightning_gradmetrics.cli.steps.fit import fit
    from lightning_gradmetrics.cli.steps.score import score
    from lightning_gradmetrics.cli.steps.show import show
    from lightning_gradmetrics.cli.steps.write import write

    fit(experiment)
    clock.note("fit_seconds")
    scored = score(experiment)
    clock.note("score_seconds")
    if not experiment.trainer.is_global_zero:  # rank 0 continues with the rows of all processes
        return
    with drawn(experiment, scored, process) as figures:
        evaluated = evaluate(experiment, scored)
        clock.note("evaluate_seconds")
        tables = write(experiment, scored, evaluated, figures(), clock.seconds)
    delete_parts(experiment.directory)
    show(experiment, evaluated, tables)


class _Clock:
    """Measures how long each step takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, name: str) -> None:
        """Store the seconds since the last call."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _gradtrust_demo(config: DictConfig) -> None:
    from lightning.pytorch import seed_everything

    from lightning_gradmetrics.cli.gradtrust_demo import demo_block, read_image

    image = read_image(config.image, config.size)
    seed_everything(config.seed, verbose=False)
    notes = []
    if config.model.get("weights") is None and config.model.get("checkpoint") is None:
        notes.append("The weights are random: model.weights=DEFAULT downloads the published ones.")
    print(demo_block(instantiate(config.model), image, notes))


def _stories(config: DictConfig) -> None:
    from transformers import AutoModelForCausalLM

    from lightning_gradmetrics.cli.leaderboard_record import write_record
    from lightning_gradmetrics.cli.leaderboard_units import stories_record
    from lightning_gradmetrics.cli.stories import (
        Stories,
        read_sequences,
        sequence_rows,
        sequence_table,
        show_stories,
        token_rows,
        token_table,
    )

    chosen = config.stories
    sequences = read_sequences(config.root, config.rows)
    model = AutoModelForCausalLM.from_pretrained(chosen.checkpoint).eval()
    stories = Stories(model, sequences, config.batch_size, chosen.prefix, chosen.prompt)
    tokens = token_table(stories, list(chosen.token_scores))
    texts = sequence_table(stories, list(chosen.sequence_scores), list(chosen.semantic_scores))
    show_stories(token_rows(tokens), sequence_rows(texts))
    if config.leaderboard is not None:
        write_record(stories_record(config.leaderboard, tokens, texts), Path())


def _segmentation(config: DictConfig) -> None:
    from lightning_gradmetrics.cli.data.label_folders import LabelledImages
    from lightning_gradmetrics.cli.data.sets import EvaluationData
    from lightning_gradmetrics.cli.factories import build_model
    from lightning_gradmetrics.cli.leaderboard_record import write_record
    from lightning_gradmetrics.cli.leaderboard_units import segmentation_record
    from lightning_gradmetrics.cli.segmentation import find_code, score_segmentation, show_segmentation

    data = LabelledImages(**config.images, rows=config.rows)
    find_code(config.code)
    model = build_model(config.model, EvaluationData({"images": data}, {"images": "id"}))
    pixels = OmegaConf.to_container(config.pixels, resolve=True)
    callback = score_segmentation(model, data, list(config.segmentation_scores), pixels, config.batch_size)  # type: ignore[arg-type]
    show_segmentation(callback.results, callback.pixel_metrics, callback.segments.num_rows)
    for path in callback.write_maps("maps"):
        print(path)
    if config.leaderboard is not None:
        name = str(config.model._target_)
        write_record(segmentation_record(config.leaderboard, callback, name, config.pixels.resamples), Path())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Import Lightning without the garbage collector, which takes a quarter of the time and finds nothing.

    Afterwards, the collector ignores what was imported.
    """
    is_first = gc.isenabled() and "lightning" not in sys.modules
    if is_first:
        gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
            gc.enable()


def _quiet_lightning() -> None:
    """Silence Lightning's start-up messages and hints, but not warnings about the user's data."""
    import lightning.pytorch  # noqa: F401  # its import sets the levels of its loggers

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in HINTS:
        warnings.filterwarnings("ignore", message=message)
