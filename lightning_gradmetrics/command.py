"""The ``gradmetrics`` command: one Hydra run from data and model to table, files and report."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

__all__ = ["configuration_directory", "main"]


def configuration_directory() -> Path:
    """``conf/``: inside the installed package, or beside it in a source checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"the configuration folder conf/ lies neither in {here} nor beside it: install the package again"
    )


TASKS = ("evaluate", "demo")


def run(config: DictConfig) -> None:
    """Evaluate a model's scores, or show GradTrust's demo.

    Raises:
        ValueError: If the task is unknown.
    """
    if config.task not in TASKS:
        raise ValueError(f"unknown task {config.task!r}; allowed: {', '.join(TASKS)}")
    evaluate(config) if config.task == "evaluate" else demo(config)


def demo(config: DictConfig) -> None:
    """GradTrust's demo for one image."""
    from lightning.pytorch import seed_everything

    from lightning_gradmetrics.demo import demo_block, read_image

    image = read_image(config.image, config.size)
    seed_everything(config.seed, verbose=False)
    random = config.model.get("weights") is None and config.model.get("checkpoint") is None
    note = "The weights are random: model.weights=DEFAULT downloads the published ones."
    print(demo_block(instantiate(config.model), image, [note] if random else []))


def evaluate(config: DictConfig) -> None:
    """Train or load the model, score the data, write the files, show the table."""
    from lightning.pytorch import seed_everything

    from lightning_gradmetrics.demo import trust_areas, trust_table, write_trust_table
    from lightning_gradmetrics.gallery import write_pictures
    from lightning_gradmetrics.report import write_report
    from lightning_gradmetrics.runs import write_run
    from lightning_gradmetrics.scores import resolve
    from lightning_gradmetrics.tables import metrics_table

    console = Console()
    directory = Path(HydraConfig.get().runtime.output_dir)
    seed_everything(config.seed, verbose=False)
    scores = resolve({str(name): instantiate(node) for name, node in config.score.items()})
    clock = time.perf_counter()
    data = instantiate(config.data, _convert_="all")
    model = instantiate(config.model, _partial_=True)(data=data)
    prepared = time.perf_counter()
    callback = instantiate(config.callback, _partial_=True)(scores=scores, datasets=dict(data.roles))
    logger = instantiate(config.logger) or False
    trainer = instantiate(config.trainer, _partial_=True)(callbacks=[callback], logger=logger)
    fit_scores(callback, trainer, model, data, config, directory / "fitted")
    trainer.test(model, data.loaders(config.batch_size, config.num_workers), verbose=False)
    scored = time.perf_counter()
    evaluation = judge(callback, data, config, console)
    write_run(
        directory,
        callback.results,
        evaluation,
        scores,
        model=_describe(config, model, data),
        descriptions=data.descriptions,
        figures=write_pictures(callback.gallery.pictures(), directory) if callback.gallery else (),
        command=shlex.join(["gradmetrics", *sys.argv[1:]]),
        timing={
            "prepare_seconds": prepared - clock,
            "score_seconds": scored - prepared,
            "judge_seconds": time.perf_counter() - scored,
        },
    )
    console.print(metrics_table(evaluation, scores))
    if config.trust_table:
        records = trust_areas(callback.results, [score.name for score in scores])
        write_trust_table(records, directory / "trust_table.csv")
        console.print(trust_table(records))
    console.print(f"Results: {_shown(directory)}", soft_wrap=True)
    if config.report:
        console.print(f"Report:  {_shown(write_report(directory))}", soft_wrap=True)


def judge(callback: Any, data: Any, config: DictConfig, console: Console) -> Any:
    """The evaluation of the run's results, with intervals and a progress bar."""
    from rich.progress import Progress

    from lightning_gradmetrics.evaluation import evaluate as evaluate_results

    present = set(callback.results["dataset"].to_pylist())
    roles = {name: role for name, role in data.roles.items() if name in present}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Intervals", total=1.0, visible=config.resamples > 0)
        return evaluate_results(
            callback.results,
            callback.score_names,
            roles,
            callback.baseline_names,
            resamples=config.resamples,
            seed=config.seed,
            progress=lambda share: progress.update(task, completed=share),
        )


def fit_scores(callback: Any, trainer: Any, model: Any, data: Any, config: DictConfig, directory: Path) -> None:
    """Fit the scores that need it, or take the states that an earlier run kept in ``config.fitted``; keep the states."""
    from lightning_gradmetrics.scores import FittedScore, load_fitted, save_fitted

    scores = callback.scorer.scores
    if not any(isinstance(score, FittedScore) for score in scores):
        return
    if config.fitted is not None:
        callback.scorer.scores = load_fitted(scores, Path(config.fitted).expanduser(), callback.scored_model(model))
    else:
        loaders, roles = data.fit_loaders(config.batch_size, config.num_workers)
        callback.fit(trainer, model, loaders, roles)
    if trainer.is_global_zero:
        save_fitted(callback.scorer.scores, directory)


def _describe(config: DictConfig, model: Any, data: Any) -> dict[str, Any]:
    return {
        "name": str(config.model._target_).rpartition(".")[2]
        + (f" {config.model.name}" if "name" in config.model else ""),
        "checkpoint": None if config.model.get("checkpoint") is None else _shown(Path(config.model.checkpoint)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": len(data.classes),
    }


def _shown(path: Path) -> str:
    """The path from here where it lies below, else in full."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _quiet() -> None:
    """Leave out what Lightning says to every newcomer; warnings about the user's own data stay."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*GPU available but not used.*")


def main() -> None:
    """``gradmetrics scores`` lists the scores; anything else is a Hydra command line."""
    _quiet()
    if sys.argv[1:] == ["scores"]:
        from lightning_gradmetrics.tables import scores_table

        Console().print(scores_table())
        return
    hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name="config")(run)()


if __name__ == "__main__":
    main()
