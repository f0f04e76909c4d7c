"""The ``gradmetrics`` command: one Hydra run from data and model to table, files and report."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
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
    here = Path(__file__).resolve().parents[1]
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

    from lightning_gradmetrics.cli.gradtrust_demo import demo_block, read_image

    image = read_image(config.image, config.size)
    seed_everything(config.seed, verbose=False)
    random = config.model.get("weights") is None and config.model.get("checkpoint") is None
    note = "The weights are random: model.weights=DEFAULT downloads the published ones."
    print(demo_block(instantiate(config.model), image, [note] if random else []))


def evaluate(config: DictConfig) -> None:
    """Train or load the model, score the data, write the files, show the table."""
    from lightning.pytorch import seed_everything

    from lightning_gradmetrics.cli.gradtrust_demo import trust_areas, trust_table, write_trust_table
    from lightning_gradmetrics.cli.run_files import write_run
    from lightning_gradmetrics.cli.standings import standings_table, write_standings
    from lightning_gradmetrics.cli.tables import largest_table, metrics_table
    from lightning_gradmetrics.pictures import write_pictures, write_tables
    from lightning_gradmetrics.report import write_report
    from lightning_gradmetrics.scores import FittedScore, resolve

    console = Console()
    directory = Path(HydraConfig.get().runtime.output_dir)
    seed_everything(config.seed, verbose=False)
    scores: Sequence[Any] = resolve({str(name): instantiate(node) for name, node in config.score.items()})
    clock = time.perf_counter()
    data = instantiate(config.data, _convert_="all")
    model = instantiate(config.model, _partial_=True)(data=data)
    prepared = time.perf_counter()
    compared, scores = scores, [score for score in scores if not (config.costs and score.needs.labels)]
    scored_as_is = [score for score in scores if not (config.folds and isinstance(score, FittedScore))]
    if not scored_as_is:
        raise ValueError(
            "folds cross-validates the fitted scores: give one or more scores that need no fit beside them"
        )
    callback = instantiate(config.callback, _partial_=True)(scores=scored_as_is, datasets=dict(data.roles))
    logger = instantiate(config.logger) or False
    trainer = instantiate(config.trainer, _partial_=True)(callbacks=[callback], logger=logger)
    fit_scores(callback, trainer, model, data, config, directory / "fitted")
    trainer.test(model, data.loaders(config.batch_size, config.num_workers), verbose=False)
    results, standing = callback.results, list[Any]()
    if config.folds:
        results, scores, standing = cross_validate(callback, trainer, model, data, scores, config, console)
    scored = time.perf_counter()
    evaluation = judge(results, scores, data, config, console)
    write_run(
        directory,
        results,
        evaluation,
        scores,
        model=_describe(config, model, data),
        descriptions=data.descriptions,
        figures=write_pictures(callback.pictures(), directory),
        command=shlex.join(["gradmetrics", *sys.argv[1:]]),
        timing={
            "prepare_seconds": prepared - clock,
            "score_seconds": scored - prepared,
            "judge_seconds": time.perf_counter() - scored,
        },
    )
    tables = callback.tables()
    write_tables(tables, directory)
    if config.costs:
        compare_costs(callback, model, data, compared, evaluation, config, console, directory)
    else:
        console.print(metrics_table(evaluation, scores))
    if "largest" in tables:
        console.print(largest_table(tables["largest"]))
    if config.trust_table:
        areas = trust_areas(results, [score.name for score in scores])
        write_trust_table(areas, directory / "trust_table.csv")
        console.print(trust_table(areas))
    if standing:
        write_standings(standing, directory)
        console.print(standings_table(standing))
    console.print(f"Results: {_shown(directory)}", soft_wrap=True)
    if config.report:
        console.print(f"Report:  {_shown(write_report(directory))}", soft_wrap=True)


def compare_costs(
    callback: Any,
    model: Any,
    data: Any,
    scores: Any,
    evaluation: Any,
    config: DictConfig,
    console: Console,
    directory: Path,
) -> None:
    """Measure what every score costs on ``config.costs`` in-distribution samples, and show and write all in one table."""
    from lightning_gradmetrics.classifier.forward import map_tensors
    from lightning_gradmetrics.cli.costs import benchmark_records, benchmark_table, score_costs, write_benchmark

    inside = next(name for name, role in data.roles.items() if role == "id")
    inputs, labels = callback.split_batch(next(iter(data.loaders(config.costs, config.num_workers)[inside])))
    scored = callback.scored_model(model)
    device = next(scored.parameters()).device
    inputs, labels = map_tensors(inputs, lambda t: t.to(device)), None if labels is None else labels.to(device)
    ready = {score.name: score for score in callback.scorer.scores}
    with console.status("Costs") as status:
        costs = score_costs(
            scored,
            inputs,
            labels,
            [ready.get(score.name, score) for score in scores],
            progress=lambda name: status.update(f"Costs: {name}"),
        )
    records = benchmark_records(evaluation, scores, costs)
    write_benchmark(records, directory)
    console.print(benchmark_table(records))


def cross_validate(
    callback: Any, trainer: Any, model: Any, data: Any, scores: Any, config: DictConfig, console: Console
) -> tuple[Any, list[Any], list[Any]]:
    """The run's results with the held-out scores of ``config.folds`` folds, its scores, and where the fitted ones stand.

    Raises:
        ValueError: If there are several processes, or no score but fitted ones.
    """
    from rich.progress import Progress

    from lightning_gradmetrics.cli.standings import standings
    from lightning_gradmetrics.results.table import join_scores
    from lightning_gradmetrics.scores import FittedScore
    from lightning_gradmetrics.scoring.cross_fitting import cross_fit, held_out_columns

    if trainer.world_size > 1:
        raise ValueError(
            f"folds is {config.folds}: cross-validation runs in one process; set trainer.devices=1, or folds=0"
        )
    fitted = [score for score in scores if isinstance(score, FittedScore)]
    if not fitted:
        return callback.results, list(scores), []
    scorer = callback.scorer
    options = {"head": config.callback.head, "logits_fn": scorer.logits_fn, "engine": scorer.engine}
    network = callback.scored_model(model).to(trainer.strategy.root_device).eval()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Cross-validation", total=1.0)
        options |= {"progress": lambda share: progress.update(task, completed=share)}
        loaders = data.loaders(config.batch_size, config.num_workers)
        held_out = cross_fit(network, loaders, fitted, data.roles, folds=config.folds, seed=config.seed, **options)
    plans = held_out_columns(fitted, data.roles)
    everything = [*(s for s in scores if not isinstance(s, FittedScore)), *(plan.named for plan in plans)]
    results, without = join_scores(callback.results, held_out), {plan.named.name: plan.without for plan in plans}
    options = {"resamples": config.resamples, "seed": config.seed}
    return results, everything, standings(results, everything, data.roles, without, **options)


def judge(results: Any, scores: Any, data: Any, config: DictConfig, console: Console) -> Any:
    """The evaluation of the run's results, with intervals and a progress bar."""
    from rich.progress import Progress

    from lightning_gradmetrics.evaluation import evaluate as evaluate_results

    present = set(results["dataset"].to_pylist())
    roles = {name: role for name, role in data.roles.items() if name in present}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Intervals", total=1.0, visible=config.resamples > 0)
        return evaluate_results(
            results,
            [score.name for score in scores],
            roles,
            [score.name for score in scores if score.recipe.family == "baseline"],
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
        from lightning_gradmetrics.cli.tables import scores_table

        Console().print(scores_table())
        return
    hydra.main(version_base="1.3", config_path=str(configuration_directory()), config_name="config")(run)()


if __name__ == "__main__":
    main()
