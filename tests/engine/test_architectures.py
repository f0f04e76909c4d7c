"""Real architectures with random weights: no parameter falls back, and every statistic equals the reference's."""

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


def _swin_v2() -> nn.Module:
    """A small one: the full one has the layers of swin_t."""
    swin = models.swin_transformer
    kinds = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, **kinds)


def _maxvit() -> nn.Module:
    """MaxViT-T, with windows that suit small images."""
    return models.MaxVit((128, 128), 64, 4, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2, num_classes=10)


def _images(side: int = 48) -> torch.Tensor:
    return torch.randn(2, 3, side, side)


def _tokens() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, 50, (3, 7)), "attention_mask": mask}


ARCHITECTURES = {
    "resnet18": (lambda: models.resnet18(num_classes=10), _images),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=10), _images),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=10), _images),
    "convnext_tiny": (lambda: models.convnext_tiny(num_classes=10), _images),
    "vit_small": (lambda: models.VisionTransformer(48, 16, 2, 4, 32, 64, num_classes=10), _images),
    "vit_b_16": (lambda: models.vit_b_16(num_classes=10, image_size=32), lambda: _images(32)),
    "swin_t": (lambda: models.swin_t(num_classes=10), _images),
    "swin_v2": (_swin_v2, _images),
    "maxvit_t": (_maxvit, lambda: _images(128)),
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
        torch.manual_seed(0)
        model, inputs = make().eval(), batch()
        warnings.filterwarnings("error", "no fast rule")
        found = gradient_statistics(model, inputs, "pseudo_label", per_parameter=True)
    expected = gradient_statistics(model, inputs, "pseudo_label", per_parameter=True, engine="reference")
    assert worst_difference(found, expected, floor=1e-2) < 1e-4
