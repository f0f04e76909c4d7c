"""Compare head gradients of pixels with autograd on segmentation models: ``python -m benchmarks zoo_segmentation``.

Each model has random weights in float64 and two small images. The head is detected. At six pixels, the L1 norms of the
pseudo-label and uniform gradients of its weight are compared with autograd. ``--table`` prints the table of the page.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from benchmarks.zoo import pseudo_label_loss
from benchmarks.zoo_models import UnsuitableError, randomised
from lightning_gradmetrics.classifier.forward import logits_in
from lightning_gradmetrics.scoring.registry import resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import observed

BOUND = 1e-9
PIXELS = ((0, 0.0, 0.0), (1, 1.0, 1.0), (0, 0.3, 0.2), (1, 0.1, 0.8), (0, 0.7, 0.4), (1, 0.5, 0.9))
"""Image index, and row and column as fractions of height and width."""

Make = Callable[[], nn.Module]


def torchvision_models() -> Iterator[tuple[str, Make]]:
    """Yield every semantic segmentation model of torchvision."""
    from torchvision import models

    for name in models.list_models(module=models.segmentation):
        yield name, lambda name=name: models.get_model(name, weights=None, weights_backbone=None, num_classes=5)


def smp_models() -> Iterator[tuple[str, Make]]:
    """Yield a model with each decoder of segmentation_models_pytorch, and three variants."""
    import segmentation_models_pytorch as smp

    for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "UPerNet", "Segformer"):
        yield name, lambda name=name: getattr(smp, name)("resnet18", encoder_weights=None, classes=5)
    for name in ("DeepLabV3", "DeepLabV3Plus"):
        yield name, lambda name=name: getattr(smp, name)("resnet18", encoder_weights=None, classes=5)
    encoder = "tu-vit_tiny_patch16_224"
    yield "DPT", lambda: smp.DPT(encoder, encoder_weights=None, classes=5, dynamic_img_size=True)
    yield "Unet, softmax2d", lambda: smp.Unet("resnet18", encoder_weights=None, classes=5, activation="softmax2d")
    yield "Unet, one class", lambda: smp.Unet("resnet18", encoder_weights=None, classes=1)
    yield "Unet, aux_params", lambda: smp.Unet("resnet18", encoder_weights=None, classes=5, aux_params={"classes": 3})


SMALL_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 64,
}
HUGGINGFACE: dict[str, tuple[str, dict[str, Any]]] = {
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16},
    ),
    "UperNetForSemanticSegmentation": ("UperNetConfig", {"hidden_size": 32, "use_auxiliary_head": False}),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2Config", {}),
    "MobileViTForSemanticSegmentation": ("MobileViTConfig", {"image_size": 64}),
    "MobileViTV2ForSemanticSegmentation": ("MobileViTV2Config", {"image_size": 64}),
    "DPTForSemanticSegmentation": (
        "DPTConfig",
        {
            **SMALL_VIT,
            "patch_size": 8,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 16,
        },
    ),
    "BeitForSemanticSegmentation": ("BeitConfig", {**SMALL_VIT, "patch_size": 8, "out_indices": [1, 2, 3, 4]}),
    "Data2VecVisionForSemanticSegmentation": (
        "Data2VecVisionConfig",
        {**SMALL_VIT, "patch_size": 8, "out_indices": [1, 2, 3, 4]},
    ),
    "MaskFormerForInstanceSegmentation": ("MaskFormerConfig", {}),
    "Mask2FormerForUniversalSegmentation": ("Mask2FormerConfig", {}),
    "EomtForUniversalSegmentation": ("EomtConfig", {**SMALL_VIT, "patch_size": 8, "num_blocks": 2}),
}


def huggingface_models() -> Iterator[tuple[str, Make]]:
    """Yield small transformers models for semantic, instance and universal segmentation."""
    for name, (config, settings) in HUGGINGFACE.items():
        yield name, lambda name=name, config=config, settings=settings: _huggingface(name, config, settings)


def _huggingface(name: str, config: str, settings: Mapping[str, Any]) -> nn.Module:
    import transformers

    chosen = dict(settings)
    if config == "UperNetConfig":
        backbone = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
        chosen["backbone_config"] = transformers.SwinConfig(
            **backbone, out_features=["stage1", "stage2", "stage3", "stage4"]
        )
    configuration = getattr(transformers, config)(**chosen)
    configuration.num_labels = 5
    return getattr(transformers, name)(configuration)


FAMILIES = {
    "torchvision": torchvision_models,
    "segmentation_models_pytorch": smp_models,
    "transformers": huggingface_models,
}


def pixels_of(logits: Tensor) -> list[tuple[int, int, int]]:
    """Return the image, row and column of each pixel."""
    height, width = logits.shape[2:]
    return [(image, round(row * (height - 1)), round(column * (width - 1))) for image, row, column in PIXELS]


def gradient_norms(model: nn.Module, head: str, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the L1 norms of the pseudo-label and uniform gradients of the head's weights, by autograd."""
    weights = [model.get_submodule(name).weight.requires_grad_() for name in head.split("+")]
    norms = []
    for image, row, column in pixels_of(logits):
        z = logits[image, :, row, column]
        z = torch.cat([torch.zeros_like(z), z]) if len(z) == 1 else z
        for loss in (pseudo_label_loss(z[None])[0], -z.log_softmax(0).mean()):
            gradients = torch.autograd.grad(loss, weights, retain_graph=True)
            norms.append(sum(gradient.abs().sum() for gradient in gradients))
    values = torch.stack(norms).view(-1, 2)
    return values[:, 0], values[:, 1]


def compared(model: nn.Module) -> dict[str, Any]:
    """Score a model; return the detected head and the largest relative error."""
    side = 128 if type(model).__name__ == "PAN" else 64
    images = torch.randn(2, 3, side, side + 32, dtype=torch.float64)
    if hasattr(getattr(model, "config", None), "image_size"):
        images = images[:, :, :, :64]
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:
        raise UnsuitableError(f"its forward pass fails: {' '.join(str(error).split())}") from error
    try:
        scores = lgm.score(model, images, ["pseudo_label", "gradnorm"])
        scorer = Scorer(resolve(["gradnorm"]))
        head = observed(scorer, model, images).head.name
    except (ValueError, TypeError) as error:
        return {"verdict": "refused", "reason": " ".join(str(error).split())}
    logits = logits_in(model(images))
    pseudo, uniform = gradient_norms(model, head, logits)
    worst = 0.0
    for number, pixel in enumerate(pixels_of(logits)):
        for value, expected in (
            (scores["pseudo_label"][pixel], pseudo[number]),
            (-scores["gradnorm"][pixel], uniform[number]),
        ):
            worst = max(worst, float((value - expected).abs() / expected.abs().clamp(min=1e-300)))
    return {"verdict": "exact" if worst < BOUND else "WRONG", "error": worst, "head": head}


def examined(make: Make) -> dict[str, Any]:
    """Return the result for one model."""
    torch.manual_seed(0)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = randomised(make())
        except Exception as error:
            return {"verdict": "not run", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
        try:
            result = compared(model)
        except UnsuitableError as error:
            return {"verdict": "not run", "reason": str(error)[:200]}
        except Exception as error:
            result = {"verdict": "crash", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def run(families: Sequence[str], path: Path, only: str | None) -> None:
    """Run the models whose results are not in the file, and append each result."""
    done = {(row["family"], row["name"]) for row in read(path)}
    for family in families:
        for name, make in FAMILIES[family]():
            if (family, name) in done or (only and only not in name):
                continue
            row = {"family": family, "name": name, **examined(make)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                family,
                name,
                row["verdict"],
                row.get("error", ""),
                row.get("head", ""),
                row.get("reason", "")[:150],
                flush=True,
            )


def read(path: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the documentation page."""
    lines = [f"Measured on {date.today():%d %B %Y} with torch {torch.__version__.partition('+')[0]}.", ""]
    lines += ["| library | model | result | largest error | head |", "|---|---|---|---|---|"]
    for row in rows:
        error = f"{row['error']:.0e}" if "error" in row else ""
        head = (
            f"`{row['head'].replace('+', '` + `')}`" if "head" in row else row.get("reason", "").partition(":")[0][:90]
        )
        lines.append(f"| {row['family']} | `{row['name']}` | {row['verdict']} | {error} | {head} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run models, or print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks zoo_segmentation", description=__doc__)
    parser.add_argument("--family", choices=[*FAMILIES, "all"], default="all")
    parser.add_argument("--only", help="run only models whose name contains this text")
    parser.add_argument("--out", type=Path, default=Path("zoo_segmentation.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table; run no model")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read(options.out)), end="")
    else:
        run(list(FAMILIES) if options.family == "all" else [options.family], options.out, options.only)
