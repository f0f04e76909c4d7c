"""Operations that keep samples apart are proven; the same operations along the sample axis are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_gradmetrics.engine.planning.separability import proof_of
from lightning_gradmetrics.engine.tracing.dependence import DependenceTrace

ORDER = torch.tensor([0, 2, 3, 1])
SQUARE = torch.rand(6, 6)


def _is_proven(function: Callable[[Tensor], Tensor]) -> bool:
    """Return whether the rows of a function's result are proven to depend on the same rows of its argument only."""
    traces, results = [], []
    for samples in (2, 3):
        x = torch.rand(samples, 4, 6, 6, requires_grad=True)
        with DependenceTrace([x], []) as trace:
            results.append(function(torch.tanh(x)).flatten(1))
        traces.append(trace)
    two, three = traces
    return proof_of(two.operations, three.operations, three.samples, three.serial(results[1])).layouts is not None


def _filled_with(h: Tensor, index: int) -> Tensor:
    mask = torch.ones(len(h), 4, 6, 6)
    mask.select(index, 0).fill_(0)
    return h * mask


def _in_two_orders(h: Tensor) -> Tensor:
    rows = h.detach().flatten(1)
    memory = torch.zeros(rows.numel())
    first, second = memory.view(-1, len(h)), memory.view(len(h), -1)
    first.copy_(rows.t())
    second.copy_(rows)
    return h.flatten(1) * first.t()


def _scattered_in_two_orders(h: Tensor) -> Tensor:
    rows = h.detach().flatten(1)
    memory = torch.zeros(rows.numel())
    memory.view(-1, len(h)).scatter_(0, rows.t().argsort(0), rows.t())
    return h.flatten(1) * memory.view(len(h), -1)


def _written(h: Tensor, memory: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return the entries of a constant that values were written into, or into a view of this shape."""
    if shape is None:
        memory[:, 1:] = h[:, 1:]
    else:
        memory.view(shape).copy_(h)
    return memory.view(-1, 144)


APART: dict[str, Callable[[Tensor], Tensor]] = {
    "fold": lambda h: F.fold(F.unfold(h, 3, padding=1), (6, 6), 3, padding=1),
    "grid_sample": lambda h: F.grid_sample(h, h[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "affine_grid": lambda h: F.affine_grid(h[:, :2, 0, :3], [len(h), 1, 2, 2], align_corners=False),
    "linear interpolation": lambda h: F.interpolate(h.flatten(2), scale_factor=2, mode="linear"),
    "exact nearest neighbours": lambda h: F.interpolate(h, size=(9, 9), mode="nearest-exact"),
    "volumes": lambda h: F.interpolate(F.avg_pool3d(h[:, :, None], (1, 2, 2)), scale_factor=2, mode="trilinear"),
    "channel_shuffle": lambda h: F.channel_shuffle(h, 2),
    "max_unpool2d": lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2),
    "padding of samples as channels": lambda h: F.pad(h.flatten(1)[None], (2, 2), mode="reflect")[0],
    "padding of volumes": lambda h: F.pad(h[:, None], (1, 1, 1, 1, 1, 1), mode="replicate"),
    "index_select": lambda h: h.index_select(1, ORDER),
    "two indices": lambda h: h[:, ORDER[:, None], ORDER[None]],
    "positions of each sample": lambda h: h[torch.arange(len(h)), :, h[:, 0, 0].argmax(1)],
    "scatter": lambda h: torch.zeros_like(h).scatter(-1, h.argsort(-1), h),
    "scatter in place": lambda h: torch.zeros_like(h).scatter_(-1, h.argsort(-1), 2) * h,
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(-1, h.argsort(-1), h),
    "index_add": lambda h: torch.zeros(len(h), 5, 6, 6).index_add(1, ORDER, h),
    "index_copy": lambda h: torch.zeros(len(h), 5, 6, 6).index_copy(1, ORDER, h),
    "tril": lambda h: h.tril() + h.triu(1),
    "diagonal": lambda h: h.diagonal(dim1=-2, dim2=-1),
    "diag_embed": lambda h: torch.diag_embed(h),
    "inverse": lambda h: torch.linalg.inv(h + 10 * torch.eye(6)),
    "singular values": lambda h: torch.linalg.svdvals(h),
    "cdist": lambda h: torch.cdist(h, h + 1) + torch.cdist(h, SQUARE),
    "cross": lambda h: torch.linalg.cross(h[:, :3], h[:, 1:], dim=1),
    "cummax": lambda h: h.cummax(-1)[0] + h.logcumsumexp(-1),
    "median": lambda h: h.median(-1)[0] + h.kthvalue(2, -1)[0],
    "rot90": lambda h: h.rot90(1, (2, 3)),
    "Fourier transform": lambda h: torch.fft.irfft2(torch.fft.rfft2(h), s=(6, 6)),
    "polar": lambda h: torch.polar(h, h).real,
    "bucketize": lambda h: torch.bucketize(h, torch.linspace(0, 1, 4)),
    "instance_norm": lambda h: F.instance_norm(h),
    "causal attention": lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    "baddbmm": lambda h: torch.baddbmm(h.flatten(0, 1), h.flatten(0, 1), h.flatten(0, 1)).view(len(h), -1),
    "repeat": lambda h: (
        h.repeat(1, 2, 1, 1) * SQUARE[:2, :1].repeat(len(h), 1).view(len(h), 2, 1, 1).repeat(1, 4, 1, 1)
    ),
    "expanded table": lambda h: (h.view(-1, 36) * SQUARE[:4].expand(len(h), 4, 6).reshape(-1, 6).repeat(1, 6)).view(
        len(h), -1
    ),
    "mask of channels": lambda h: _filled_with(h, 1),
    "pooling with channels last": lambda h: F.adaptive_avg_pool2d(h.to(memory_format=torch.channels_last), 1),
    "gather from ones": lambda h: torch.ones(len(h), 36).gather(1, h.flatten(2)[:, 0].argsort(1)),
    "constants where a mask is true": lambda h: h.index_put((h > 0.5,), torch.tensor(0.5)),
    "equal numbers of rows": lambda h: h[h[:, :, 0].argsort(-1) > 2].view(len(h), -1),
    "written into a constant": lambda h: _written(h, h.new_zeros(len(h), 4, 6, 6)),
    "written into flat memory": lambda h: _written(h, h.new_zeros(len(h) * 4, 6, 6).view(-1, 4, 6, 6)),
}

MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "index_select": lambda h: h.index_select(0, torch.arange(len(h)).flip(0)),
    "scatter": lambda h: torch.zeros_like(h).scatter(0, h.argsort(0), h),
    "tril": lambda h: h.movedim(0, -1).tril().movedim(-1, 0),
    "diagonal": lambda h: h.diagonal(dim1=0, dim2=1)[..., None].transpose(0, 2),
    "matrices of samples": lambda h: torch.linalg.qr(h.flatten(2).transpose(0, 1))[0].transpose(0, 1),
    "cdist": lambda h: torch.cdist(h.flatten(1), h.flatten(1)),
    "cummax": lambda h: h.cummax(0)[0],
    "median": lambda h: h - h.median(0, keepdim=True)[0],
    "rot90": lambda h: h.rot90(2, (0, 1)),
    "Fourier transform": lambda h: torch.fft.fft(h, dim=0).real,
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "other samples' grid": lambda h: F.grid_sample(h, h.flip(0)[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "baddbmm": lambda h: torch.baddbmm(
        h.flatten(0, 1), h.transpose(0, 1).flatten(0, 1), h.transpose(0, 1).flatten(0, 1)
    ).view(len(h), -1),
    "heads in another order": lambda h: (
        (h.transpose(0, 1).reshape(-1, 36) * SQUARE[:4].repeat(len(h), 6)).view(4, len(h), 36).transpose(0, 1)
    ),
    "expanded heads in another order": lambda h: (
        (h.transpose(0, 1).reshape(-1, 6, 6) * SQUARE[:4].expand(len(h), 4, 6).reshape(-1, 1, 6))
        .view(4, len(h), 36)
        .transpose(0, 1)
    ),
    "repeated samples": lambda h: h.flatten(1).repeat(2, 1).view(len(h), -1),
    "the first sample": lambda h: _filled_with(h, 0),
    "strides of a copy": lambda h: h.flatten(1)[:, :36].as_strided((len(h), 36), (36, 1)),
    "gather from a table": lambda h: SQUARE.gather(1, h[:, 0, 0].argsort(1)),
    "scatter in place": lambda h: torch.zeros_like(h).scatter_(0, h.argsort(0), h),
    "scatter into memory of all samples": lambda h: h * torch.zeros(4, 6, 6).scatter_(2, h[0].argsort(2), 1),
    "scatter in two orders": _scattered_in_two_orders,
    "scatter of a table": lambda h: torch.zeros(len(h), 6).scatter(1, h[:, 0, 0].argsort(1), SQUARE),
    "memory in two orders": _in_two_orders,
    "memory that samples share": lambda h: h * SQUARE.expand_as(h).masked_fill_(h > 0.5, 2.0),
    "as many borders as samples": lambda h: h * torch.bucketize(h, torch.zeros(len(h))),
    "as many pieces as samples": lambda h: torch.cat(h.flatten(1).split(144 // len(h), 1)[::-1], 1),
    "numbers of rows that differ": lambda h: h[h[:, :, 0, 0] > 0.5].sum(0, keepdim=True).expand(len(h), 6, 6),
    "a mask of other samples": lambda h: h.index_put((h.flip(0) > 0.5,), torch.tensor(0.5)),
    "written in another order": lambda h: _written(h.transpose(0, 1), h.new_zeros(len(h) * 4, 6, 6), (4, -1, 6, 6)),
}


@pytest.mark.parametrize("name", APART)
def test_operations_that_keep_samples_apart_are_proven(name: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 4, 6, 6).tanh()
    alone = torch.cat([APART[name](row[None]).flatten(1) for row in x])
    torch.testing.assert_close(APART[name](x).flatten(1), alone, rtol=1e-4, atol=1e-4)
    assert _is_proven(APART[name])


@pytest.mark.filterwarnings("ignore:Use of masked_fill_ on expanded tensors")
@pytest.mark.parametrize("name", MIXED)
def test_operations_along_the_sample_axis_are_not(name: str) -> None:
    torch.manual_seed(0)
    assert not _is_proven(MIXED[name])
