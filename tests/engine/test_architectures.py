"""Real architectures with random weights: no parameter falls back, and every statistic is that of the reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_gradmetrics.engine import gradient_statistics
from tests.engine.cases import worst_difference

models = pytest.importorskip("torchvision.models")


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5
    )
    return transformers.BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        num_labels=5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2ForSequenceClassification(config)


def _swin(**options: object) -> nn.Module:
    return models.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=10, **options
    )


def _swin_v2() -> nn.Module:
    swin = models.swin_transformer
    return _swin(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)


def _convnext() -> nn.Module:
    setting = models.convnext.CNBlockConfig
    return models.ConvNeXt([setting(16, 32, 2), setting(32, None, 2)], num_classes=10)


def _mobilenet() -> nn.Module:
    block = models.mobilenetv3.InvertedResidualConfig
    setting = [block(16, 3, 16, 16, True, "RE", 2, 1, 1), block(16, 5, 40, 24, True, "HS", 2, 1, 1)]
    return models.MobileNetV3(setting, 32, num_classes=10)


def _efficientnet() -> nn.Module:
    block = models.efficientnet.MBConvConfig
    return models.EfficientNet([block(1, 3, 1, 32, 16, 1), block(6, 5, 2, 16, 24, 2)], 0.2, num_classes=10)


def _images(side: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


def _tokens() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, 50, (3, 7)), "attention_mask": mask}


ARCHITECTURES = {
    "resnet18": (lambda: models.resnet18(num_classes=10), _images),
    "mobilenet_v3": (_mobilenet, _images),
    "efficientnet": (_efficientnet, _images),
    "convnext": (_convnext, _images),
    "vit_small": (lambda: models.VisionTransformer(48, 16, 2, 4, 32, 64, num_classes=10), _images),
    "vit_b_16": (lambda: models.vit_b_16(num_classes=10, image_size=32), lambda: _images(32)),
    "swin": (_swin, _images),
    "swin_v2": (_swin_v2, _images),
    "maxvit": (lambda: models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10), lambda: _images(64)),
    "squeezenet": (lambda: models.squeezenet1_1(num_classes=10), _images),
    "bert": (_bert, _tokens),
    "gpt2": (_gpt2, _tokens),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    make, batch = ARCHITECTURES[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model, inputs = make().eval(), batch()
        warnings.filterwarnings("error", "no fast rule")
        found = gradient_statistics(model, inputs, "pseudo_label", per_parameter=True)
    expected = gradient_statistics(model, inputs, "pseudo_label", per_parameter=True, engine="reference")
    assert worst_difference(found, expected, floor=1e-2) < 1e-4
