"""Compare the engine and other software with a training step, on models whose step takes 20 ms and more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from benchmarks.models import resnet18, resnet20
from benchmarks.steps import Case, compare

__all__ = ["CASES", "main"]


def _vision(name: str) -> Callable[[], nn.Module]:
    """Return a function that builds a model of torchvision."""

    def make() -> nn.Module:
        import torchvision

        model: nn.Module = getattr(torchvision.models, name)()
        return model

    return make


def _group_norm() -> nn.Module:
    """Return ResNet-20 with group norms in the place of batch norms."""
    model = resnet20()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, nn.GroupNorm(4, module.num_features))
    return model


def _vit_tiny() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    nn.init.normal_(model.heads.head.weight, std=0.02)  # zeros would pass no gradient to the layers below
    return model


class _OverFrames(nn.Module):
    """A classifier of videos that averages the results of an image network over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.head = resnet18(), nn.Linear(1000, 4)

    def forward(self, videos: Tensor) -> Tensor:
        results = self.frames(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
        logits: Tensor = self.head(results.mean(1))
        return logits


class _Bert(nn.Module):
    """The classifier of transformers with random weights; it returns the logits."""

    def __init__(self, layers: int, width: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        heads, vocabulary = width // 64, TOKENS
        self.model = BertForSequenceClassification(
            BertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                vocab_size=vocabulary,
                num_labels=4,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


TOKENS = 5000

CASES: dict[str, Case] = {
    "ResNet-20, 64": (resnet20, (64, 3, 32, 32), 0),
    "ResNet-20, 256": (resnet20, (256, 3, 32, 32), 0),
    "ResNet-20 with group norm, 64": (_group_norm, (64, 3, 32, 32), 0),
    "ResNet-18 112 px, 16": (resnet18, (16, 3, 112, 112), 0),
    "ResNet-18 56 px, 16 x 4 frames": (_OverFrames, (16, 4, 3, 56, 56), 0),
    "ResNet-50 96 px, 16": (_vision("resnet50"), (16, 3, 96, 96), 0),
    "MobileNetV3-small 128 px, 16": (_vision("mobilenet_v3_small"), (16, 3, 128, 128), 0),
    "ShuffleNetV2-x1 96 px, 16": (_vision("shufflenet_v2_x1_0"), (16, 3, 96, 96), 0),
    "RegNet-Y-400MF 96 px, 16": (_vision("regnet_y_400mf"), (16, 3, 96, 96), 0),
    "EfficientNet-B0 128 px, 16": (_vision("efficientnet_b0"), (16, 3, 128, 128), 0),
    "DenseNet-121 64 px, 16": (_vision("densenet121"), (16, 3, 64, 64), 0),
    "ConvNeXt-T 64 px, 16": (_vision("convnext_tiny"), (16, 3, 64, 64), 0),
    "Swin-T 64 px, 16": (_vision("swin_t"), (16, 3, 64, 64), 0),
    "ViT-tiny 224 px, 16": (_vit_tiny, (16, 3, 224, 224), 0),
    "BERT 4 x 256, 16 x 64": (lambda: _Bert(4, 256), (16, 64), TOKENS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write a JSON file."""
    compare("large", __doc__, CASES, arguments)
