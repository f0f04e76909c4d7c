"""The program of each process of the distributed test."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from tests.meters.meter_cases import CASES, MODES, SIZE, assert_same, data, expected, made

FEW = [(name, bins) for name, bins in MODES if name in ("AUROC", "OSCR", "SpearmanCorrelation")]
"""The meters that are also tried where only the last rank has samples: one for each kind of state."""


def _shares(ranks: int, uneven: bool) -> list[int]:
    if uneven:
        return [0] * (ranks - 1) + [SIZE]
    return [SIZE // ranks + (rank < SIZE % ranks) for rank in range(ranks)]


def _check_all(rank: int, ranks: int, group: Any, uneven: bool) -> None:
    for name, bins in MODES if not uneven else FEW:
        case = CASES[name]
        rows = data(case.inputs)
        meter: Any = made(case, bins)
        meter.process_group = group
        mine = [torch.split(row, _shares(ranks, uneven))[rank] for row in rows]
        for parts in zip(*(row.split(10) for row in mine), strict=True):
            if len(parts[0]):
                meter.update(*parts)
        meter._update_count = max(meter._update_count, 1)
        assert_same(meter.compute(), expected(case, rows))
        # Gathering is undone after compute: the rank has its own rows again and can go on.
        assert_same(meter.compute(), expected(case, rows))
        if bins is None:
            assert sum(map(len, meter.scores)) <= len(mine[0])


def _check_gathered_once(ranks: int) -> None:
    meter: Any = CASES["AUROC"].make()  # its states are attributes that torchmetrics adds
    for _ in range(3):
        meter.update(torch.randn(5), torch.randint(2, (5,)))
    meter.sync()
    assert [len(piece) for piece in meter.scores] == [15 * ranks]
    assert meter.scores[0].untyped_storage().nbytes() == 15 * ranks * 4
    meter.unsync()
    assert len(meter.scores) == 3
    own = CASES["AUROC"].make(dist_sync_fn=gather_all_tensors)
    own.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    assert own.compute() == 1


def check(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    try:
        groups = [distributed.new_group(list(range(ranks))) for ranks in (1, 2)]
        for ranks, group in ((1, groups[0]), (2, groups[1]), (3, None)):
            if rank < ranks:
                _check_all(rank, ranks, group, uneven=False)
            distributed.barrier()
        _check_all(rank, 3, None, uneven=True)
        _check_gathered_once(3)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
