"""The models of the zoo: small configurations with random weights, and a batch for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Made", "UnsuitableError"]

SAMPLES = 4

LARGEST = 5_000_000
"""Largest number of parameters of a Hugging Face model. A larger one ignored its small configuration and is not run."""

Made = tuple[nn.Module, dict[str, Tensor] | Tensor]
Entry = tuple[str, Callable[[], Made]]


class UnsuitableError(Exception):
    """The model has no small configuration, or its own forward pass fails, so it cannot test the engine."""


def randomised(model: nn.Module) -> nn.Module:
    """Return the model in float64 and eval mode; constant parameters and running statistics become random."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model output."""
    return getattr(output, "logits", output)


def checked(model: nn.Module, inputs: dict[str, Tensor] | Tensor) -> Made:
    """Return the model and its inputs if the forward pass works for one and for all samples.

    Raises:
        UnsuitableError: If the forward pass fails, or its logits are not finite or not ``(N, C)``.
    """
    try:
        for count in (1, SAMPLES):
            batch = {k: v[:count] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[:count]
            logits = logits_of(model(**batch) if isinstance(batch, dict) else model(batch))
            if logits.ndim != 2 or len(logits) != count or not bool(logits.isfinite().all()):
                raise UnsuitableError(f"logits {tuple(logits.shape)} for {count} samples, or not finite")
    except UnsuitableError:
        raise
    except Exception as error:
        raise UnsuitableError(f"its own forward pass fails: {type(error).__name__}: {error}") from error
    return model, inputs


# -- torchvision ------------------------------------------------------------------------------------------------------

SIZES = {"inception_v3": 80, "maxvit_t": 128}
"""Image sizes of models that need more than 64 pixels."""


def torchvision_models() -> Iterator[Entry]:
    """Yield every classifier of torchvision."""
    from torchvision import models

    for name in models.list_models(module=models):
        yield name, lambda name=name: torchvision_model(name)


def torchvision_model(name: str) -> Made:
    """Return a torchvision classifier with 10 classes, and small images."""
    from torchvision import models

    size, options = SIZES.get(name, 64), {"num_classes": 10}
    if name.startswith("vit_"):
        size = 2 * int(name.rpartition("_")[2])
        options["image_size"] = size
    if name == "maxvit_t":
        network = models.MaxVit((size, size), 64, 4, [64, 128, 256, 512], [2, 2, 5, 2], 32, 0.2, num_classes=10)
    else:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        network = models.get_model(name, weights=None, **options, **extra)
    return checked(randomised(network), torch.randn(SAMPLES, 3, size, size, dtype=torch.float64))


# -- timm -------------------------------------------------------------------------------------------------------------

TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_nano_rw_224",
    "convnext_atto",
    "convnextv2_atto",
    "crossvit_tiny_240",
    "cs3darknet_s",
    "darknet17",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "dla34",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientnet_b0",
    "efficientvit_b0",
    "ese_vovnet19b_dw",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "ghostnet_050",
    "gmlp_ti16_224",
    "hardcorenas_a",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "lcnet_035",
    "levit_128s",
    "mambaout_femto",
    "mixer_s32_224",
    "mobilenetv4_conv_small_035",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mvitv2_tiny",
    "nfnet_f0",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repvgg_a0",
    "res2net50_14w_8s",
    "resmlp_12_224",
    "resnest14d",
    "resnetv2_50",
    "rexnet_100",
    "selecsls42",
    "sequencer2d_s",
    "skresnet18",
    "starnet_s1",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "tinynet_e",
    "twins_svt_small",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
]


def timm_models() -> Iterator[Entry]:
    """Yield one or two timm models of each kind."""
    for name in TIMM:
        yield name, lambda name=name: timm_model(name)


def timm_model(name: str) -> Made:
    """Return a timm model with 10 classes, and the smallest images that it accepts."""
    import timm

    reasons = []
    for size, sized in itertools.product((64, 96, 128, 224, 240), (True, False)):
        try:
            options = {"img_size": size} if sized else {}
            network = randomised(timm.create_model(name, pretrained=False, num_classes=10, **options))
            return checked(network, torch.randn(SAMPLES, 3, size, size, dtype=torch.float64))
        except Exception as error:  # try the next size
            reasons.append(str(error))
    raise UnsuitableError(reasons[-1])


# -- Hugging Face -----------------------------------------------------------------------------------------------------

SMALL = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(
        ("head_dim", "d_kv", "d_head", "kv_lora_rank", "q_lora_rank", "attention_head_size", "state_size"), 8
    ),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "patch_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"vocab_size": 60, "num_key_value_heads": 2, "type_vocab_size": 2, "embed_dim": 16, "image_size": 32},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_channels": 3},
}
"""Small values of settings; each configuration gets those whose names it has."""

EXPERTS = "eager"
"""Implementation of mixtures of experts; grouped matrix products do not support float64 on CPUs."""


def huggingface_models() -> Iterator[Entry]:
    """Yield the classifiers of sequences, images and audio in transformers."""
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    }
    for kind, table in tables.items():
        for family, classes in table.items():
            name = classes if isinstance(classes, str) else classes[0]
            yield name, lambda kind=kind, family=family, name=name: huggingface_model(kind, family, name)


def huggingface_model(kind: str, family: str, name: str) -> Made:
    """Return a small transformers classifier and a batch."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config_class = transformers.CONFIG_MAPPING[family]
        config = config_class(**_settings(config_class()), num_labels=5)
        with torch.device("meta"):
            entries = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
        if entries > LARGEST:
            raise UnsuitableError(f"{entries:,} parameters in the small configuration")
        network = randomised(getattr(transformers, name)(config))
    except UnsuitableError:
        raise
    except Exception as error:
        raise UnsuitableError(f"no small configuration: {type(error).__name__}: {error}") from error
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation(EXPERTS)
    return checked(network, _batch(kind))


def _settings(default: Any) -> dict[str, Any]:
    """Return the small values of settings that a configuration has and that are integers or token ids."""
    settings = {}
    for name, value in SMALL.items():
        if isinstance(getattr(default, name, None), int) or (hasattr(default, name) and name.endswith("token_id")):
            settings[name] = value
    return settings


def _batch(kind: str) -> dict[str, Tensor]:
    if kind == "image":
        return {"pixel_values": torch.randn(SAMPLES, 3, 32, 32, dtype=torch.float64)}
    if kind == "audio":
        return {"input_values": torch.randn(SAMPLES, 4000, dtype=torch.float64)}
    tokens = torch.randint(3, 60, (SAMPLES, 9))
    tokens[:, -1] = 2  # end-of-sequence token, at which some models classify
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


FAMILIES: dict[str, Callable[[], Iterable[Entry]]] = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "huggingface": huggingface_models,
}
