"""The architecture of ESPNet (Mehta et al. 2018, arXiv:1803.06815) with random weights, for timings: 354,517 parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["espnet"]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size of its input."""
    return nn.Conv2d(inputs, outputs, size, stride, dilation * (size // 2), dilation, bias=False)


def activation(channels: int) -> nn.Sequential:
    """Batch norm and PReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels))


class SpatialPyramid(nn.Module):
    """One reduction, five dilated convolutions, and their running sums side by side."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        narrow = outputs // 5
        widths = [outputs - 4 * narrow, narrow, narrow, narrow, narrow]
        self.reduce = convolution(inputs, narrow, 3 if stride == 2 else 1, stride)
        self.dilated = nn.ModuleList([convolution(narrow, width, 3, 1, 2**k) for k, width in enumerate(widths)])
        self.activation, self.residual = activation(outputs), residual

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        parts = [layer(reduced) for layer in self.dilated]
        for k in range(2, 5):
            parts[k] = parts[k] + parts[k - 1]
        y = torch.cat(parts, 1)
        return self.activation(x + y if self.residual else y)


class ESPNet(nn.Module):
    """Encoder of three levels and a light decoder; its head is a transposed convolution of kernel and stride 2."""

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
        one = self.first(torch.cat([self.stem(x), half], 1))
        two = self.down2(one)
        two = self.second(torch.cat([self.level2(two), two, quarter], 1))
        three = self.down3(two)
        three = self.third(torch.cat([three, self.level3(three)], 1))
        deep = self.up3(self.project3(three))
        merged = self.between(self.up2(self.merge(torch.cat([self.project2(two), deep], 1))))
        return self.head(self.last(torch.cat([merged, one], 1)))


def espnet(classes: int = 12) -> nn.Module:
    """Return the network in eval mode, from images ``(N, 3, H, W)`` to logits ``(N, C, H, W)``."""
    torch.manual_seed(0)
    return ESPNet(classes).eval()
