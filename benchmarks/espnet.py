"""ESPNet (Mehta et al. 2018, arXiv:1803.06815) with random weights, for timings: 354,517 parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["espnet"]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Return a convolution without bias; at stride 1 the output has the size of the input."""
    return nn.Conv2d(inputs, outputs, size, stride, dilation * (size // 2), dilation, bias=False)


def activation(channels: int) -> nn.Sequential:
    """Return a batch norm and a PReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels))


class SpatialPyramid(nn.Module):
    """A reduction and five dilated convolutions, whose cumulative sums are concatenated."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        narrow = outputs // 5
        widths = [outputs - 4 * narrow, narrow, narrow, narrow, narrow]
        self.reduce = convolution(inputs, narrow, 3 if stride == 2 else 1, stride)
        self.dilated = nn.ModuleList([convolution(narrow, width, 3, 1, 2**k) for k, width in enumerate(widths)])
        self.activation, self.residual = activation(outputs), residual

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        outputs = [layer(reduced) for layer in self.dilated]
        for k in range(2, 5):
            outputs[k] = outputs[k] + outputs[k - 1]
        y = torch.cat(outputs, 1)
        return self.activation(x + y if self.residual else y)


class ESPNet(nn.Module):
    """A three-level encoder and a light decoder; the head is a 2x2 transposed convolution of stride 2."""

    def __init__(self, classes: int, depths: tuple[int, int] = (2, 8)) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.stem, self.first = nn.Sequential(convolution(3, 16, 3, 2), activation(16)), activation(19)
        self.down2, self.level2 = SpatialPyramid(19, 64, 2), self.level(64, depths[0])
        self.second = activation(131)
        self.down3, self.level3 = SpatialPyramid(131, 128, 2), self.level(128, depths[1])
        self.third = activation(256)
        self.project3 = nn.Sequential(convolution(256, classes, 1), nn.BatchNorm2d(classes, eps=1e-3))
        self.project2, self.up3, self.up2, self.head = (
            convolution(131, classes, 1),
            *(self.up(classes) for _ in range(3)),
        )
        self.merge = nn.Sequential(activation(2 * classes), SpatialPyramid(2 * classes, classes))
        self.between = activation(classes)
        self.last = nn.Sequential(convolution(19 + classes, classes, 3), activation(classes))

    @staticmethod
    def level(channels: int, depth: int) -> nn.Sequential:
        return nn.Sequential(*[SpatialPyramid(channels, channels, residual=True) for _ in range(depth)])

    @staticmethod
    def up(classes: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half = self.pool(x)
        quarter = self.pool(half)
        features1 = self.first(torch.cat([self.stem(x), half], 1))
        features2 = self.down2(features1)
        features2 = self.second(torch.cat([self.level2(features2), features2, quarter], 1))
        features3 = self.down3(features2)
        features3 = self.third(torch.cat([features3, self.level3(features3)], 1))
        deep = self.up3(self.project3(features3))
        merged = self.between(self.up2(self.merge(torch.cat([self.project2(features2), deep], 1))))
        return self.head(self.last(torch.cat([merged, features1], 1)))


def espnet(classes: int = 12) -> nn.Module:
    """Return the network in eval mode; it maps images ``(N, 3, H, W)`` to logits ``(N, C, H, W)``."""
    torch.manual_seed(0)
    return ESPNet(classes).eval()
