"""Models of libraries with random weights: the head is found, and its gradients equal autograd's at some pixels.

``python -m benchmarks zoo_segmentation`` runs all of them.
"""

from __future__ import annotations

import pytest

from benchmarks.zoo_segmentation import FAMILIES, examined

MODELS = [
    ("torchvision", "lraspp_mobilenet_v3_large"),
    ("torchvision", "deeplabv3_mobilenet_v3_large"),
    ("transformers", "SegformerForSemanticSegmentation"),
    ("transformers", "MobileNetV2ForSemanticSegmentation"),
    ("segmentation_models_pytorch", "Unet"),
    ("segmentation_models_pytorch", "PAN"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), MODELS)
def test_heads_of_libraries_are_exact(family: str, name: str) -> None:
    pytest.importorskip(family)
    result = examined(dict(FAMILIES[family]())[name])
    assert result["verdict"] == "exact", result


@pytest.mark.slow
def test_a_softmax_behind_the_head_is_refused() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    result = examined(dict(FAMILIES["segmentation_models_pytorch"]())["Unet, softmax2d"])
    assert result["verdict"] == "refused" and "softmax" in result["reason"]
