"""A value that Python reads from a tensor makes a GPU wait. Later batches read none beyond a few checks of whole batches."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from benchmarks.callback import HEAD_SCORES
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import make

CHECKS = {"_check_head", "_checked", "equals"}
"""The checks of a batch: the head's output is the logits, labels are classes, and the step changed no input in place."""

ON_CPU = {"_index"}
"""Functions that read only tensors that are on the CPU already: the index of the samples."""

BUFFERS = {"_restore_small"}
"""The function that compares small buffers of a model that is on the CPU."""

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
}


class HostReads(TorchDispatchMode):
    """Collects the functions of the package that read a value or a shape which depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS or _is_indexed_by_mask(func, args):
            for frame in reversed(traceback.extract_stack()):
                if "/lightning_gradmetrics/" in frame.filename:
                    self.functions.append(frame.name)
                    break
        return func(*args, **(kwargs or {}))


def _is_indexed_by_mask(func: Any, args: Any) -> bool:
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Watch(Callback):
    """Collects the reads from the start of the third batch to the end of the last."""

    def __init__(self, reads: HostReads) -> None:
        self.reads = reads

    def on_test_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, number: int = 0) -> None:
        if batch_idx == 2:
            self.reads.functions.clear()


def test_the_mode_finds_reads():
    values = torch.arange(4.0)
    with HostReads() as reads:
        lgm.meters.functional.auroc(values, torch.tensor([0, 1, 0, 1]))
    assert reads.functions


@pytest.mark.parametrize("name", HEAD_SCORES)
def test_a_head_score_reads_no_value(name):
    torch.manual_seed(0)
    evidence = Evidence(torch.randn(32, 10), torch.randn(32, 16).relu())
    score = make(name)
    with HostReads() as reads:
        score(evidence)
    assert reads.functions == []


def test_gradient_statistics_read_no_value_after_the_first_batches():
    torch.manual_seed(0)
    model = Classifier().network.eval()
    for _ in range(2):
        gradient_statistics(model, torch.randn(16, 16), "pseudo_label")
    with HostReads() as reads:
        gradient_statistics(model, torch.randn(16, 16), "pseudo_label")
    assert set(reads.functions) <= BUFFERS | {
        "check_gradients"
    }  # which reads nothing of a known model on other devices


def test_later_batches_of_the_callback_only_run_the_checks_of_a_batch():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(5 * 16, 16), torch.randint(10, (5 * 16,)))
    reads = HostReads()

    class Last(Callback):
        def on_test_batch_end(self, *arguments: Any) -> None:
            self.functions = list(reads.functions)

    last = Last()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Watch(reads), lgm.GradientMetrics(HEAD_SCORES, print_summary=False), last],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with reads:
        trainer.test(Classifier(), DataLoader(data, 16), verbose=False)
    assert set(last.functions) == CHECKS | ON_CPU
    for name in CHECKS:
        assert last.functions.count(name) == 3, name  # once in each of three batches
