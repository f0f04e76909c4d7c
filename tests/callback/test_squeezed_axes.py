"""Networks that call ``squeeze()`` without an axis: the results of a last batch of one sample are those of ``flatten(1)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from tests.callback.runs import Stepped, batches, column, numbers, trainer

NAMES = ["max_softmax", "gradnorm", "feature_norm", "gaia", "odin", "mc_dropout"]
SCORES = {"full": "pseudo_label(target='all')", **{name: name for name in NAMES}}
"""Scores of the logits, of the head, of gradients, of layers inside the model, and of further passes."""


class Network(nn.Module):
    """A convolution of images, which may have lost the axis of their sample, a pooling and two layers."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], classes: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.conv, self.pool, self.dropout = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)
        self.hidden, self.head = nn.Linear(4, 5), nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.second(self.pool(self.conv(self.first(x)).relu()))
        return self.head(self.dropout(self.hidden(pooled).tanh()))


def run(stage: str, network: Network, x: Tensor) -> dict[str, Tensor]:
    callback = lgm.GradientMetrics(SCORES, print_summary=False)
    quiet = {} if stage == "predict" else {"verbose": False}
    getattr(trainer(callback), stage)(Stepped(network.double().eval()), batches(x, torch.arange(len(x)) % 2), **quiet)
    return {name: column(callback, name) for name in (*SCORES, "prediction", "label")}


@pytest.mark.parametrize(
    ("stage", "size", "classes", "is_early"),
    [("validate", 5, 3, False), ("test", 9, 3, True), ("predict", 5, 1, False), ("test", 1, 3, False)],
)
def test_last_batch_of_one_sample(stage: str, size: int, classes: int, is_early: bool) -> None:
    torch.manual_seed(0)
    network = Network(torch.squeeze if is_early else lambda x: x, torch.squeeze, classes)
    kept = Network(lambda x: x, lambda x: x.flatten(1), classes)
    kept.load_state_dict(network.state_dict())
    x = numbers(size, 3, 6, 6)
    expected = run(stage, kept, x)
    for name, values in run(stage, network, x).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-12)


class Pixels(nn.Module):
    """A segmentation network that returns ``(C, H, W)`` for one image if it drops axes."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.drop = nn.Conv2d(3, 4, 1), drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.head(x))


@pytest.mark.parametrize("size", [1, 3])
def test_pixels_of_one_image(size: int) -> None:
    torch.manual_seed(0)
    network, kept, x = Pixels(torch.squeeze).double(), Pixels(lambda x: x).double(), numbers(size, 3, 4, 4)
    kept.load_state_dict(network.state_dict())
    expected = lgm.score(kept, x, ["entropy", "gradnorm"])
    for name, values in lgm.score(network, x, ["entropy", "gradnorm"]).items():
        assert values.shape == (size, 4, 4)
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-12)


def test_tokens_of_one_text_are_not_samples() -> None:
    """A wrong answer would be one row for each of its seven tokens."""
    torch.manual_seed(0)
    layers = [nn.Embedding(11, 6), nn.Linear(6, 11)]
    squeezing, ids = nn.Sequential(*layers, Dropping()), torch.randint(0, 11, (5, 7))
    found, expected = (lgm.GradientMetrics("entropy", print_summary=False) for _ in range(2))
    for callback, network in ((found, squeezing), (expected, nn.Sequential(*layers))):
        trainer(callback).test(Texts(network), batches(ids), verbose=False)
    assert found.results.num_rows == 5
    torch.testing.assert_close(column(found, "entropy"), column(expected, "entropy"))


class Dropping(nn.Module):
    """Drops all axes of length one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze()


class Texts(Stepped):
    """Passes token ids by their name."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids)

    def step(self, batch: Any) -> Tensor:
        return self(input_ids=batch[0])


class Flat(nn.Module):
    """Returns the logits of all samples in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten()


@pytest.mark.parametrize("size", [1, 3])
def test_a_single_row_of_logits_that_two_samples_share_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=r"\(N, C\).*squeeze\(\)"):
        lgm.score(Flat().eval(), torch.randn(size, 4), "max_softmax")
