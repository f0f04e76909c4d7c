"""Rows that a mask selects, such as the last token of each text: planned if each sample has the same number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.engine.auto import _STRATEGIES
from lightning_gradmetrics.engine.refusals import CoupledSamplesError

END = 2
"""The token that a mask marks."""


class Texts(nn.Module):
    """A classifier of texts whose first two layers share their weights; ``pool`` turns hidden activations and tokens into rows."""

    def __init__(self, pool: Callable[[Texts, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.body
        self.pool = pool

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.again(torch.tanh(self.body(self.table(tokens)))).cumsum(1)
        return self.head(self.pool(self, h, tokens))


def last_end(net: Texts, h: Tensor, tokens: Tensor) -> Tensor:
    """As BART and T5 do."""
    ends = tokens == END
    if len(torch.unique_consecutive(ends.sum(1))) > 1:
        raise ValueError("the texts must have the same number of ends")
    return h[ends, :].view(len(h), -1, h.shape[-1])[:, -1]


def all_ends(net: Texts, h: Tensor, tokens: Tensor) -> Tensor:
    rows = net.body(h.flatten(0, 1)[(tokens == END).flatten()])
    return torch.tanh(rows).view(len(h), -1, h.shape[-1]).sum(1)


def of_shifted_tokens(net: Texts, h: Tensor, tokens: Tensor) -> Tensor:
    """The input of a decoder: the tokens one place later."""
    shifted = tokens.new_zeros(tokens.shape)
    shifted[:, 1:] = tokens[:, :-1].clone()
    shifted[:, 0] = 1
    h = h * torch.tanh(net.body(net.table(shifted)))
    h[tokens == 5] = 0.5
    return h[tokens == END].view(len(h), -1, h.shape[-1]).mean(1)


def in_order_of_time(net: Texts, h: Tensor, tokens: Tensor) -> Tensor:
    """Rows of the first end of all texts before those of the second, which may mix texts."""
    return h.transpose(0, 1)[(tokens == END).t()].view(len(h), -1, h.shape[-1]).sum(1)


def texts(counts: list[int], length: int, seed: int) -> Tensor:
    """Return tokens ``(N, length)`` with a number of ends in each text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 20, (len(counts), length), generator=generator)
    for row, count in zip(tokens, counts, strict=True):
        row[torch.randperm(length, generator=generator)[:count]] = END
    return tokens


def norms(model: nn.Module, tokens: Tensor, engine: str = "auto") -> Tensor:
    labels = torch.arange(len(tokens)) % 3
    return lgm.gradient_statistics(model, tokens, "label", targets=labels, engine=engine).norm(2)


def strategies(model: nn.Module) -> list[Any]:
    return [strategy for known in _STRATEGIES[model].values() for strategy in known]


@pytest.mark.parametrize("pool", [last_end, all_ends, of_shifted_tokens])
def test_rows_of_a_mask_are_planned(pool: Any) -> None:
    """In later batches, other texts, other lengths and another number of ends are exact, too."""
    torch.manual_seed(0)
    model = Texts(pool).double().eval()
    for seed, (count, length) in enumerate([(2, 7)] * 4 + [(2, 9)] * 3 + [(3, 8)] * 2 + [(2, 7)]):
        tokens = texts([count] * 5, length, seed)
        torch.testing.assert_close(norms(model, tokens), norms(model, tokens, "reference"))
    two, three = strategies(model)
    assert (two.plan.masks, three.plan.masks) == ((2,), (3,))
    assert len(two.paths) == 2 and all(strategy.sizes is not None for strategy in (two, three))


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
def test_texts_with_different_numbers(batches: int) -> None:
    """The number of rows is the same in total, so that no shape shows that rows belong to other texts."""
    torch.manual_seed(0)
    model = Texts(all_ends).eval()
    for seed in range(batches):
        norms(model, texts([2] * 5, 7, seed))
    with pytest.raises(CoupledSamplesError):
        norms(model, texts([1, 2, 2, 2, 3], 7, 9))
    tokens = texts([2] * 5, 7, 10)
    torch.testing.assert_close(norms(model, tokens), norms(model, tokens, "reference"))


def test_texts_that_the_model_refuses() -> None:
    model = Texts(last_end).eval()
    for seed in range(4):
        norms(model, texts([2] * 5, 7, seed))
    with pytest.raises(ValueError, match="the same number of ends"):
        norms(model, texts([2, 2, 3, 2, 2], 7, 9))


@pytest.mark.filterwarnings("ignore:no fast rule")
def test_no_rows_of_a_mask_in_a_model_with_a_module_that_has_two_names() -> None:
    """The engine tries ``torch.func``, which cannot run the model, and must leave the module's own weights in place."""
    torch.manual_seed(0)
    model = Texts(lambda net, h, tokens: h.sum(1) + h[tokens == END].sum()).double().eval()
    tokens = texts([0] * 3, 7, 0)
    for _ in range(2):
        torch.testing.assert_close(norms(model, tokens), norms(model, tokens, "reference"))


def test_rows_in_another_order() -> None:
    with pytest.raises(CoupledSamplesError):
        norms(Texts(in_order_of_time).eval(), texts([2] * 5, 7, 0))
