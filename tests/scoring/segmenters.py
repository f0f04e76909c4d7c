"""Small models with one prediction per position, and the scores of single positions by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tail = Callable[[Tensor], Tensor]


class Segmenter(nn.Module):
    """A body, a head, and what follows the head."""

    def __init__(self, head: nn.Module, tail: Tail | None = None, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())
        self.head, self.tail = head, tail

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.body(x))
        return z if self.tail is None else self.tail(z)


def resized(size: tuple[int, int], **options: object) -> Tail:
    return lambda z: F.interpolate(z, size, **options)  # type: ignore[arg-type]


class FlipAverage(nn.Module):
    """The mean of the logits of an image and of its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Segmenter(nn.Conv2d(4, 5, 3, padding=1))

    @property
    def head(self) -> nn.Module:
        return self.net.head

    def forward(self, x: Tensor) -> Tensor:
        both = (self.net(x) + self.net(x.flip(3)).flip(3)) / 2
        return F.interpolate(both, (12, 14), mode="bilinear")


class Added(nn.Module):
    """Two heads on two grids, the smaller one resized, as in LR-ASPP and in skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.low, self.high = nn.Conv2d(4, 5, 1), nn.Conv2d(6, 5, 1)

    @property
    def head(self) -> nn.Module:
        return nn.ModuleList([self.low, self.high])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x).relu()
        high = self.high(F.interpolate(self.coarse(fine), fine.shape[2:], mode="bilinear", align_corners=False))
        return {"out": F.interpolate(self.low(fine) + high, (13, 15), mode="bilinear", align_corners=False)}


def transposed(*args: int, **options: int) -> nn.Module:
    return nn.ConvTranspose2d(4, 5, *args, **options)  # type: ignore[arg-type]


HEADS: dict[str, Callable[[], nn.Module]] = {
    "1x1": lambda: Segmenter(nn.Conv2d(4, 5, 1)),
    "3x3": lambda: Segmenter(nn.Conv2d(4, 5, 3, padding=1)),
    "no bias, stride": lambda: Segmenter(nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False)),
    "dilation, reflect": lambda: Segmenter(nn.Conv2d(4, 5, 3, padding=2, dilation=2, padding_mode="reflect")),
    "uneven, same": lambda: Segmenter(nn.Conv2d(4, 5, (2, 5), padding="same", padding_mode="circular")),
    "groups": lambda: Segmenter(nn.Conv2d(4, 6, 3, groups=2, padding=1)),
    "transposed 2/2": lambda: Segmenter(transposed(2, stride=2)),
    "transposed 4/2/1": lambda: Segmenter(transposed(4, stride=2, padding=1)),
    "transposed 3/2/1+1": lambda: Segmenter(transposed(3, stride=2, padding=1, output_padding=1)),
    "transposed dilated": lambda: Segmenter(transposed(3, dilation=2, padding=1)),
    "transposed, cropped": lambda: Segmenter(transposed(4, stride=2), lambda z: z[:, :, 1:-1, 1:-1]),
    "bilinear": lambda: Segmenter(nn.Conv2d(4, 5, 1), resized((16, 19), mode="bilinear")),
    "bilinear of 3x3": lambda: Segmenter(nn.Conv2d(4, 5, 3), resized((9, 11), mode="bilinear", align_corners=True)),
    "bicubic": lambda: Segmenter(nn.Conv2d(4, 5, 1), resized((11, 12), mode="bicubic")),
    "nearest": lambda: Segmenter(nn.Conv2d(4, 5, 3, padding=1), resized((16, 18), mode="nearest")),
    "antialiased": lambda: Segmenter(nn.Conv2d(4, 5, 1), resized((5, 6), mode="bilinear", antialias=True)),
    "enlarged, cropped": lambda: Segmenter(
        nn.Conv2d(4, 5, 1), lambda z: F.interpolate(z, scale_factor=2, mode="bilinear")[:, :, :13, 1:16]
    ),
    "one logit": lambda: Segmenter(nn.Conv2d(4, 1, 3, padding=1), resized((16, 18), mode="bilinear")),
    "flip average": FlipAverage,
    "two heads": Added,
}
"""A model for each kind of head."""


def logits_of(output: Tensor | dict[str, Tensor]) -> Tensor:
    """The logits ``(N, C, H, W)``, with two columns for one logit."""
    logits = output["out"] if isinstance(output, dict) else output
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def gradient_of(model: nn.Module, loss: Tensor) -> Tensor:
    """The entries of a loss's gradient with respect to the weights of the head."""
    weights = [parameter for name, parameter in model.head.named_parameters() if name.endswith("weight")]  # type: ignore[union-attr]
    parts = torch.autograd.grad(loss, weights, retain_graph=True)
    return torch.cat([part.flatten() for part in parts])
