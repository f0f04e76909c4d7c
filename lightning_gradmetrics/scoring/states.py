"""The states of fitted scores: which model they belong to, and their files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scoring.fitted import FittedScore, _not_fitted
from lightning_gradmetrics.scoring.registry import Score

__all__ = ["check_fitted", "check_head", "fingerprint", "load_fitted", "save_fitted"]

CHUNK = 2**22


def fingerprint(model: nn.Module) -> str:
    """Of the model that a state is fitted for: the shapes and values of its parameters and buffers.

    It is the same on every device, for a network and for a module that wraps it, and after a change of precision: values
    count to the precision of bfloat16.
    """
    digest = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:
        digest.update(repr((tuple(tensor.shape), _hash(tensor.detach()) if tensor.is_floating_point() else 0)).encode())
    return digest.hexdigest()[:16]


def _hash(tensor: Tensor) -> int:
    """Of the values, in whole numbers: exact on any device, in any order of summation."""
    bits = tensor.reshape(-1).to(torch.bfloat16).view(torch.int16)
    total = 0
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long() + 2**15
        position = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        total += int((part * (position * 0x9E3779B1 + position * position)).sum())
    return total % 2**64


def check_fitted(scores: Iterable[Score], model: nn.Module) -> None:
    """Refuse fitted scores without a state, or with one made for another model.

    Raises:
        ValueError: If there is one.
    """
    fitted = [score for score in scores if isinstance(score, FittedScore)]
    found = fingerprint(model) if fitted else ""
    for score in fitted:
        if score.state is None:
            raise ValueError(_not_fitted(score.name))
        if score.model != found:
            raise ValueError(
                f"the score {score.name!r} was fitted for another model ({score.model}, and this "
                f"{type(model).__name__} is {found}): its weights or its shape changed; fit the score again for this one"
            )


def check_head(scores: Iterable[Score], head: str | None) -> None:
    """Refuse fitted scores whose state was made for another head.

    Raises:
        ValueError: If there is one.
    """
    for score in scores:
        if isinstance(score, FittedScore) and score.head and head and not _same_module(score.head, head):
            raise ValueError(
                f"the score {score.name!r} was fitted for the head {score.head!r}, and this is {head!r}: fit it again, "
                f"or pass head={score.head!r}"
            )


def _same_module(first: str, second: str) -> bool:
    """Whether two names mean the same module, one of them perhaps inside a wrapper."""
    return first == second or first.endswith(f".{second}") or second.endswith(f".{first}")


def save_fitted(scores: Iterable[Score], directory: str | Path) -> list[Path]:
    """Write the state of each fitted score to ``directory/<name>.safetensors``.

    A file holds tensors and text, nothing that could run.

    Args:
        scores: Scores; those that need no fit are passed over.
        directory: The folder; made if it is not there.

    Returns:
        The files written.

    Raises:
        ValueError: If a fitted score has no state.
    """
    from safetensors.torch import save_file

    folder, written = Path(directory), []
    folder.mkdir(parents=True, exist_ok=True)
    for score in scores:
        if not isinstance(score, FittedScore):
            continue
        if score.state is None:
            raise ValueError(f"the score {score.name!r} is not fitted, so there is nothing to save")
        path = folder / _file_name(score)
        save_file(score.state, path, metadata={**_about(score), "model": score.model or "", "head": score.head or ""})
        written.append(path)
    return written


def _file_name(score: FittedScore) -> str:
    """The score's name, with a low line for what file systems refuse."""
    return re.sub(r"[^\w.=,()+-]", "_", score.name) + ".safetensors"


def _about(score: FittedScore) -> dict[str, str]:
    return {
        "score": score.recipe.name,
        "arguments": json.dumps({**score.recipe.defaults, **score.arguments}, sort_keys=True, default=_described),
    }


def _described(value: object) -> str:
    """An argument that JSON has no form for, by its name: an address would be another in every process."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def load_fitted(
    scores: Iterable[Score], directory: str | Path, model: nn.Module, head: str | None = None
) -> tuple[Score, ...]:
    """The scores with the states that :func:`save_fitted` wrote.

    Args:
        scores: Scores; those that need no fit come back as they are.
        directory: The folder of the states.
        model: The model that they will score.
        head: The name of its head, where it is known; otherwise it is checked when the head is found.

    Raises:
        FileNotFoundError: If there is no state for a fitted score.
        ValueError: If a state was made for another model, another head, another score or other arguments.
    """
    loaded = tuple(_load(score, Path(directory)) if isinstance(score, FittedScore) else score for score in scores)
    check_fitted(loaded, model)
    check_head(loaded, head)
    return loaded


def _load(score: FittedScore, folder: Path) -> FittedScore:
    from safetensors import safe_open

    path = folder / _file_name(score)
    if not path.is_file():
        raise FileNotFoundError(
            f"no state of the score {score.name!r} in {str(folder)!r}: fit it first, and save it with save_fitted"
        )
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        about: dict[str, str] = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value in _about(score).items():
        if about.get(key) != value:
            raise ValueError(
                f"the state in {str(path)!r} was made for another {key} ({about.get(key)}, and this is {value}): "
                "fit the score again for this one"
            )
    return replace(score, state=state, model=about.get("model"), head=about.get("head") or None)
