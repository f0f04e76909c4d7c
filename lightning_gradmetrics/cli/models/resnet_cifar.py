"""The residual network for CIFAR images of He et al. 2016, section 4.2, with parameter-free shortcuts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.cli.models.classifier import Classifier, load_weights

__all__ = ["ResNetCifar", "resnet20_cifar"]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, or every second pixel with zeros for the new channels (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block, ``(N, channels_in, H, W) -> (N, channels, H / stride, W / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        before = self.new_channels // 2
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before)))


class ResNetCifar(nn.Module):
    """A residual network of depth ``6 n + 2`` for images ``(N, 3, 32, 32)``.

    Args:
        blocks: ``n``, the number of blocks in each of the three stages; 3 for ResNet-20.
        classes: Number of classes.
        width: The number of channels of the first stage.

    Reference:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2016, section 4.2.
    """

    def __init__(self, blocks: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        stage = nn.Sequential(Block(channels_in, channels, stride))
        for _ in range(blocks - 1):
            stage.append(Block(channels, channels, 1))
        return stage

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, classes)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))  # type: ignore[no-any-return]


def resnet20_cifar(checkpoint: str | None = None, classes: int = 10) -> Classifier:
    """Return the CIFAR ResNet-20 as a classifier, with the weights of a checkpoint or random ones.

    Args:
        checkpoint: A state dict on disk; ``None`` leaves the weights random.
        classes: The number of classes.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If its keys do not fit.
    """
    network = ResNetCifar(3, classes)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    return Classifier(network).eval()
