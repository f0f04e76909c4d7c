"""Reads the state of a trainer and a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from lightning_gradmetrics.callback.alarm import alarm_of
from lightning_gradmetrics.callback.processes import Processes
from lightning_gradmetrics.callback.pytorch_lightning import is_of_lightning
from lightning_gradmetrics.callback.signals import stop_after_sigterm
from lightning_gradmetrics.results.sample_index import sampler_of
from lightning_gradmetrics.scores import Score

__all__ = [
    "check_sharding",
    "check_spawned",
    "check_split",
    "evaluation_loop",
    "is_side_by_side",
    "processes_of",
    "processes_of_run",
    "scored_model",
]


RUNS = count()
"""Numbers the runs of a process. All processes of a trainer start the same runs."""


def processes_of(trainer: Trainer) -> Processes:
    """Return the trainer's processes."""
    return Processes(trainer.world_size, trainer.global_rank)


def processes_of_run(trainer: Trainer) -> Processes:
    """Return the trainer's processes for a new run: a failure in one ends all of them."""
    size, rank = trainer.world_size, trainer.global_rank
    return Processes(size, rank, alarm_of(next(RUNS), size, rank, partial(stop_after_sigterm, trainer)))


def evaluation_loop(trainer: Trainer) -> Any:
    """Return the loop that validates, tests or predicts; during a fit, the validation loop."""
    loop: Any = trainer._active_loop
    return loop.epoch_loop.val_loop if hasattr(loop, "epoch_loop") else loop


def is_side_by_side(trainer: Trainer) -> bool:
    """Return whether the running loop draws one batch from all its dataloaders at once (``CombinedLoader``)."""
    combined = getattr(evaluation_loop(trainer), "_combined_loader", None)
    return combined is not None and combined._mode != "sequential"


def scored_model(module: LightningModule, name: str | None = None, head: str | None = None) -> nn.Module:
    """Return the named submodule, or the module itself, or its only child if the module has no forward.

    Args:
        module: The user's module.
        name: The name of the submodule to score, or ``None``.
        head: The name of the head in the module, or ``None``.

    Raises:
        ValueError: If there is no such submodule, or the choice is ambiguous.
    """
    children = []
    for key, child in module.named_children():
        if next(child.parameters(), None) is not None:
            children.append(key)
    kind = type(module).__name__
    if name is not None:
        if name not in dict(module.named_modules()):
            raise ValueError(f"{kind} has no submodule {name!r}; its children are: {', '.join(children) or 'none'}")
        return module.get_submodule(name)
    if not is_of_lightning(module, "forward") or (head is not None and head in dict(module.named_modules())):
        return module
    if not children:
        raise ValueError(
            f"{kind} has no forward and no submodule with parameters. Register its network, as in self.net = net or "
            "self.nets = nn.ModuleList(nets); networks in a list or a dictionary are not found"
        )
    if len(children) != 1:
        raise ValueError(
            f"{kind} has no forward, and {len(children)} children with parameters ({', '.join(children)}): name the one to "
            f"score, as in GradientMetrics(submodule={(children or ['net'])[0]!r})"
        )
    return module.get_submodule(children[0])


def check_sharding(strategy: Strategy, scores: Sequence[Score], model: nn.Module) -> None:
    """Refuse scores over more than the head if parameters are sharded, because their gradients would be incomplete.

    Args:
        strategy: The trainer's strategy.
        scores: The scores.
        model: The scored model, whose parameters the user may have sharded under any strategy.

    Raises:
        ValueError: If parameters are sharded and a score takes gradients of the network.
    """
    who = _sharding_of(strategy, model)
    refused = []
    for score in scores:
        if score.needs.gradients or score.needs.probes:
            refused.append(score.name)
    if who is not None and refused:
        raise ValueError(
            f"{who} shards the parameters, and the scores {', '.join(map(repr, refused))} need gradients of the "
            "whole network, which no process has. Remove them (scores of the logits and of the head work), or use "
            "strategy='ddp' or one device"
        )


def _sharding_of(strategy: Strategy, model: nn.Module) -> str | None:
    """Return the name of what shards the parameters, or ``None``."""
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        return type(strategy).__name__
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            return "FullyShardedDataParallel"
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            return "fully_shard or another use of DTensor"
    return None


def check_spawned(trainer: Trainer, stage: str, has_output: bool, is_fit: bool) -> None:
    """Refuse a run in processes that end with the trainer's call, if their results would be lost.

    Args:
        trainer: The trainer.
        stage: The stage. Validation during a fit is never refused, because its metrics are logged.
        has_output: Whether the results are written to a directory, where the calling process can read them.
        is_fit: Whether scores are fitted; their states would be lost.

    Raises:
        RuntimeError: If the results or the states would be lost.
    """
    strategy = trainer.strategy
    is_kept = stage == "fit" or (has_output and not is_fit)
    if is_kept or not isinstance(strategy.launcher, _MultiProcessingLauncher):
        return
    name = getattr(strategy, "_start_method", None)
    started = f"processes by {name!r}" if name else "processes"
    lost = "the fitted states" if is_fit else "the results"
    remedy = "" if is_fit else "pass output='DIR' to write them to a directory, which callback.results reads; or "
    raise RuntimeError(
        f"{type(strategy).__name__} starts {started} for one call of the trainer, and {lost} would be lost with them: {remedy}use "
        "strategy='ddp' in a script"
    )


def check_split(loaders: Mapping[str, Any], processes: Processes) -> None:
    """Refuse dataloaders that several processes read without a distributed sampler: rows would share an index.

    Args:
        loaders: The dataloaders by the names of their datasets.
        processes: The processes of the run.

    Raises:
        ValueError: If a dataloader reads a whole dataset on each process.
    """
    if processes.count == 1:
        return
    for name, loader in loaders.items():
        if isinstance(loader, DataLoader) and isinstance(sampler_of(loader), (SequentialSampler, RandomSampler)):
            raise ValueError(
                f"each of the {processes.count} processes reads the dataset {name!r} from its first row to its last, so "
                "the processes give the same index to different rows. Pass the whole dataset with "
                "Trainer(use_distributed_sampler=True), or a dataloader whose sampler is a DistributedSampler of the whole dataset"
            )
