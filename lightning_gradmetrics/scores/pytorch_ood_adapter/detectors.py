"""Builds, fits and runs detectors of pytorch-ood according to their specification."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import gradients_enabled
from lightning_gradmetrics.scores.pytorch_ood_adapter.specs import Spec, detector_class

__all__ = ["build", "fit", "predict", "stages"]

BATCH = 128
"""Batch size for fitting a detector that runs the model."""


def build(
    spec: Spec,
    arguments: Mapping[str, Any],
    head: tuple[Tensor, Tensor] | None = None,
    model: nn.Module | None = None,
) -> Any:
    """Return a new detector that is not fitted yet.

    Args:
        spec: Its specification.
        arguments: Its own arguments.
        head: The head's weight ``(C, D)`` and bias ``(C,)``, for a detector of the head's input.
        model: The model, for a detector that runs it.
    """
    kind = detector_class(spec.name)
    taken = inspect.signature(kind.__init__).parameters
    device = torch.device("cpu") if head is None else head[0].device
    keywords = {key: _tensor(value, taken.get(key)) for key, value in arguments.items() if value is not None}
    parts: dict[str, Any] = {"model": model, "encoder": None, "backbone": nn.Identity()}
    if head is not None:
        with _steady(device):
            parts |= _head_parts(*head, flat=spec.takes == "maps")
    if model is not None and "layers" in taken:
        keywords["layers"] = _layers(model, keywords.get("layers"))
    with _steady(device):
        return kind(**{**{key: value for key, value in parts.items() if key in taken}, **keywords})


def _head_parts(weight: Tensor, bias: Tensor, flat: bool) -> dict[str, Any]:
    """Return the head in the form that detectors require: a new module, or its weight and bias, in float32."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=torch.float32).requires_grad_(False)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    module = nn.Sequential(nn.Flatten(), head) if flat else head
    return {"head": module, "w": head.weight, "b": head.bias, "d": weight.shape[1] // 2}


def _tensor(value: Any, parameter: inspect.Parameter | None) -> Any:
    """Return numbers as a tensor if the detector expects one."""
    return torch.tensor(value) if parameter is not None and parameter.annotation in (Tensor, "Tensor") else value


def _layers(model: nn.Module, names: Any) -> list[nn.Module]:
    """Return the named submodules, or the model's stages.

    Raises:
        ValueError: If there is no submodule of that name.
    """
    if names is None:
        names = stages(model)
    elif isinstance(names, str):
        names = names.split("+")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"the model has no layer {unknown[0]!r}; its layers are: {', '.join(list(known)[1:40])}. Name them as in "
            "layers='layer3+layer4'"
        )
    return [known[name] for name in names]


def stages(model: nn.Module) -> list[str]:
    """Return names of the model's stages without the head: its blocks, or if it has none its layers with a weight matrix.

    Example:
        >>> stages(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)))
        ['0']
    """
    prefix, children = "", _weighted(model)
    while len(children) == 1:
        prefix, model = f"{prefix}{next(iter(children))}.", next(iter(children.values()))
        children = _weighted(model)
    candidates = dict(list(children.items())[:-1])
    if not candidates:
        raise ValueError("the layers before the model's head could not be identified: name them in layers=")
    blocks = [name for name, child in candidates.items() if _weighted(child)]
    return [prefix + name for name in blocks or candidates]


def _weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the children that have a weight of two or more axes, by name."""
    children = {}
    for name, child in model.named_children():
        if any(parameter.ndim > 1 for parameter in child.parameters()):
            children[name] = child
    return children


# Fitting and running


@contextmanager
def _steady(device: torch.device) -> Iterator[None]:
    """Enable gradients and use a fixed seed inside the block; the global random state is restored."""
    number = (device.index or 0) if device.type == "cuda" else None
    with torch.random.fork_rng([] if number is None else [number]), gradients_enabled():
        torch.default_generator.manual_seed(0)
        if number is not None:
            torch.cuda.default_generators[number].manual_seed(0)
        yield


def fit(spec: Spec, detector: Any, rows: Tensor, labels: Tensor) -> Any:
    """Fit the detector and return it.

    Args:
        spec: Its specification.
        detector: The detector that :func:`build` returned.
        rows: Logits, features or inputs ``(N, ...)``.
        labels: True labels ``(N,)``; zeros if the detector needs none.

    Raises:
        ValueError: If it cannot be fitted on them.
    """
    try:
        with _steady(rows.device):
            if spec.takes == "model":
                return detector.fit(list(zip(torch.split(rows, BATCH), torch.split(labels, BATCH), strict=True)))
            if spec.takes == "maps":
                return detector.fit_feature_maps(rows[:, :, None, None], labels)
            return detector.fit_logits(rows, labels) if spec.takes == "logits" else detector.fit_features(rows, labels)
    except (AssertionError, ValueError, RuntimeError) as error:
        labels_of_fit = f", classes {sorted(set(labels.tolist()))}" if spec.classes else ""
        raise ValueError(
            f"pytorch-ood's {spec.name} could not be fitted on these {len(rows)} samples of shape "
            f"{tuple(rows.shape[1:])}{labels_of_fit}: {str(error) or 'it takes samples of all classes, from 0 up without a gap'}"
        ) from error


def predict(spec: Spec, detector: Any, rows: Tensor) -> Tensor:
    """Return the scores ``(N,)`` of rows ``(N, ...)``, higher = more of an outlier; NaN where a row is not finite."""
    finite = rows.flatten(1).isfinite().all(1)
    scores = torch.full(
        (len(rows),),
        torch.nan,
        dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32,
        device=rows.device,
    )
    if finite.any():
        scores[finite] = _predict(spec, detector, rows[finite]).detach().to(scores)
    return scores


def _predict(spec: Spec, detector: Any, rows: Tensor) -> Tensor:
    with _steady(rows.device):
        rows = rows.clone() if rows.is_inference() else rows
        if spec.takes == "model":
            return detector.predict(rows)  # type: ignore[no-any-return]
        if spec.takes == "maps":
            return detector.predict_feature_maps(rows[:, :, None, None])  # type: ignore[no-any-return]
        call = detector.predict_logits if spec.takes == "logits" else detector.predict_features
        return call(rows)  # type: ignore[no-any-return]
