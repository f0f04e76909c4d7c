"""Saves and loads the states of fitted scores, and checks that they belong to the model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.scoring.fitted import FittedScore, averaged, fitted_scores, not_fitted
from lightning_gradmetrics.scoring.recipes import Score
from lightning_gradmetrics.scoring.registry import ScoreLike, resolve

__all__ = [
    "check_fitted",
    "check_head",
    "fingerprint",
    "fitted_states",
    "load_fitted",
    "save_fitted",
    "with_fitted_states",
]

CHUNK = 2**22


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the shapes and values of a model's parameters and buffers.

    It does not depend on the device, on a module that wraps the network, or on the precision, because values are
    rounded to bfloat16.
    """
    digest = hashlib.sha256()
    for tensor in [*model.parameters(), *model.buffers()]:
        digest.update(repr((tuple(tensor.shape), _hash(tensor.detach()) if tensor.is_floating_point() else 0)).encode())
    return digest.hexdigest()[:16]


def _hash(tensor: Tensor) -> int:
    """Return an integer hash of the values that does not depend on the device or the order of summation."""
    bits = tensor.reshape(-1).to(torch.bfloat16).view(torch.int16)
    total = 0
    for start in range(0, len(bits), CHUNK):
        numbers = bits[start : start + CHUNK].long() + 2**15
        position = torch.arange(start + 1, start + 1 + len(numbers), device=numbers.device)
        total += int((numbers * (position * 0x9E3779B1 + position * position)).sum())
    return total % 2**64


def check_fitted(scores: Iterable[Score], model: nn.Module) -> None:
    """Check that all fitted scores have a state that was fitted for a model.

    Args:
        scores: Scores; those that need no fit are skipped.
        model: The model to be scored.

    Returns:
        None.

    Raises:
        ValueError: If a fitted score has no state, or its state was fitted for another model.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import resolve
        >>> check_fitted(resolve(["energy", "gradorth"]), nn.Linear(4, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: the score 'gradorth' is not fitted: ...
    """
    fitted = fitted_scores(averaged(score) for score in scores)
    present = fingerprint(model) if fitted else ""
    for score in fitted:
        if score.state is None:
            raise ValueError(not_fitted(score.name))
        if score.model != present:
            raise ValueError(
                f"the score {score.name!r} was fitted for another model ({score.model}; this "
                f"{type(model).__name__} is {present}): its weights or its shape changed; fit the score again for this one"
            )


def check_head(scores: Iterable[Score], head: str | None) -> None:
    """Check that the states of all fitted scores were fitted for a head.

    Args:
        scores: Scores; those that need no fit are skipped.
        head: The name of the head; ``None`` checks nothing.

    Raises:
        ValueError: If a state was fitted for another head.
    """
    for candidate in scores:
        score = averaged(candidate)
        if isinstance(score, FittedScore) and score.head and head and not _same_module(score.head, head):
            raise ValueError(
                f"the score {score.name!r} was fitted for the head {score.head!r}, but this is {head!r}: fit it again, "
                f"or pass head={score.head!r}"
            )


def _same_module(first: str, second: str) -> bool:
    """Return whether two names mean the same module; one of them may include a wrapper's prefix."""
    return first == second or first.endswith(f".{second}") or second.endswith(f".{first}")


def save_fitted(scores: Iterable[Score], directory: str | Path) -> list[Path]:
    """Write the state of each fitted score to ``directory/<name>.safetensors``.

    The files contain only tensors and strings, no code.

    Args:
        scores: Scores; those that need no fit are skipped.
        directory: The folder; it is created if it does not exist.

    Returns:
        The files written.

    Raises:
        ValueError: If a fitted score has no state.

    Example:
        >>> import tempfile, lightning_gradmetrics as lgm
        >>> model, images = nn.Linear(4, 3), torch.randn(20, 4)
        >>> fitted = lgm.fit(model, [images], "gradorth")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [path.name for path in save_fitted(fitted, folder)]
        >>> names
        ['gradorth.safetensors']
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
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(
            score.state, temporary, metadata={**_about(score), "model": score.model or "", "head": score.head or ""}
        )
        temporary.replace(path)
        written.append(path)
    return written


def _file_name(score: FittedScore) -> str:
    """Return the score's name, with underscores for characters that file systems refuse."""
    return re.sub(r"[^\w.=,()+-]", "_", score.name) + ".safetensors"


def _about(score: FittedScore) -> dict[str, str]:
    return {
        "score": score.recipe.name,
        "arguments": json.dumps({**score.recipe.defaults, **score.arguments}, sort_keys=True, default=_described),
    }


def _described(value: object) -> str:
    """Return the name of an argument that JSON cannot represent: an address would differ between processes."""
    return getattr(value, "__qualname__", type(value).__qualname__)


def load_fitted(
    scores: ScoreLike | Iterable[ScoreLike], directory: str | Path, model: nn.Module, head: str | None = None
) -> tuple[Score, ...]:
    """Return the scores with the states that :func:`save_fitted` wrote.

    Args:
        scores: Scores, or their names; those that need no fit are returned unchanged.
        directory: The folder of the states.
        model: The model to be scored.
        head: The name of its head, if it is known; otherwise it is checked when the head is found.

    Returns:
        The scores, in the same order.

    Raises:
        FileNotFoundError: If there is no state for a fitted score.
        ValueError: If a state was made for another model, another head, another score or other arguments.

    Example:
        >>> import tempfile, lightning_gradmetrics as lgm
        >>> model, images = nn.Linear(4, 3), torch.randn(20, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_fitted(lgm.fit(model, [images], "gradorth"), folder)
        ...     loaded = load_fitted(["energy", "gradorth"], folder, model)
        >>> list(lgm.score(model, images, loaded))
        ['energy', 'gradorth']
    """
    loaded: list[Score] = []
    for score in resolve(scores):
        loaded.append(_load(score, Path(directory)) if isinstance(score, FittedScore) else score)
    check_fitted(loaded, model)
    check_head(loaded, head)
    return tuple(loaded)


def _load(score: FittedScore, folder: Path) -> FittedScore:
    from safetensors import safe_open

    path = folder / _file_name(score)
    if not path.is_file():
        raise FileNotFoundError(
            f"no state of the score {score.name!r} in {str(folder)!r}: fit it first, and save it with save_fitted"
        )
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        about: dict[str, str] = file.metadata() or {}
        state = {}
        for key in file.keys():  # noqa: SIM118
            state[key] = file.get_tensor(key)
    _check_about(score, about, repr(str(path)))
    return score.with_state(state, about.get("model"), about.get("head") or None)


def _check_about(score: FittedScore, about: Mapping[str, str], place: str) -> None:
    """Refuse a state that was made for another score or other arguments."""
    for key, value in _about(score).items():
        if about.get(key) != value:
            raise ValueError(
                f"the state in {place} was made for another {key} ({about.get(key)} instead of {value}):  "
                "fit the score again for this one"
            )


def fitted_states(scores: Iterable[Score]) -> dict[str, dict[str, Any]]:
    """Return the states of the fitted scores by name, as tensors and strings, which checkpoints store without pickled code.

    Args:
        scores: Scores; those that need no fit, or are not fitted, are skipped.
    """
    states = {}
    for score in scores:
        if isinstance(score, FittedScore) and score.state is not None:
            about = {**_about(score), "model": score.model or "", "head": score.head or ""}
            states[score.name] = {"tensors": dict(score.state), "about": about}
    return states


def with_fitted_states(scores: Iterable[Score], states: Mapping[str, Mapping[str, Any]]) -> tuple[Score, ...]:
    """Return the scores with the states that :func:`fitted_states` returned; a score without one is returned unchanged.

    Args:
        scores: The scores.
        states: The states by the names of the scores.

    Raises:
        ValueError: If a state was made for another score or other arguments.
    """
    restored: list[Score] = []
    for score in scores:
        saved = states.get(score.name)
        if saved is None or not isinstance(score, FittedScore):
            restored.append(score)
            continue
        about = saved["about"]
        _check_about(score, about, "the checkpoint")
        restored.append(score.with_state(dict(saved["tensors"]), about["model"], about["head"] or None))
    return tuple(restored)
