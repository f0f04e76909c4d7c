"""Models of the engine benchmark, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CASES", "Case", "resnet18", "resnet20", "vit_small"]


class _Block(nn.Module):
    """A residual block with the parameter-free shortcut of He et al. 2016, section 4.2."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, width - channels
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return F.relu(out + x)


class _ResNet20(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.Sequential(*(_Block(a, b, b // a) for a, b in pairwise(widths)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def resnet20() -> nn.Module:
    """Return ResNet-20 for 32x32 images."""
    return _ResNet20()


def resnet18() -> nn.Module:
    """Return ResNet-18 of torchvision."""
    from torchvision.models import resnet18

    return resnet18()


def vit_small() -> nn.Module:
    """Return ViT-S/16: 12 layers of width 384 with 6 heads."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)


@dataclass(frozen=True)
class Case:
    """A model and the shape of its batch."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, device: str = "cpu", batch: int | None = None) -> tuple[nn.Module, Tensor]:
        """Return the model in eval mode and a batch, the same in every call."""
        torch.manual_seed(0)
        model = self.model().eval().to(device)
        shape = (batch or self.shape[0], *self.shape[1:])
        return model, torch.randn(shape, device=device)


CASES = {
    "resnet20": Case(resnet20, (256, 3, 32, 32)),
    "resnet18": Case(resnet18, (16, 3, 112, 112)),
    "vit": Case(vit_small, (8, 3, 224, 224)),
}
"""The benchmark cases by name."""
