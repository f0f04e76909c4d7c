"""Formats errors as one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from lightning_gradmetrics.classifier.hints import did_you_mean

__all__ = ["UsageError", "one_line", "unknown_name"]

TRACEBACK = "HYDRA_FULL_ERROR=1 shows the traceback"
EXPLAINED = (ValueError, TypeError, OSError, ImportError, RuntimeError)
"""Errors whose message is sufficient; for others, the type is printed with a hint to the traceback."""


class UsageError(ValueError):
    """An invalid command line; the message states what to write instead."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a message about an unknown name, with similar names and all known names.

    Example:
        >>> unknown_name("score", "gradnrom", ["gradnorm", "energy"])
        "unknown score 'gradnrom'; did you mean 'gradnorm'? available: energy, gradnorm"
    """
    names = sorted(known)
    return f"unknown {kind} {name!r};{did_you_mean(name, names)} available: {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, without Hydra's additions."""
    error = _cause(error)
    name = type(error).__name__
    if name == "MissingConfigException":
        return _missing_option(error)
    if name in ("ConfigCompositionException", "ConfigAttributeError", "ConfigKeyError"):
        return _wrong_key(error)
    text = " ".join(str(error).split())
    if isinstance(error, EXPLAINED) or type(error).__module__.startswith(("hydra", "omegaconf", "lightning")):
        return text or name
    return f"{name}: {text} ({TRACEBACK})"


def _cause(error: BaseException) -> BaseException:
    """Return the original error of a factory that failed, which Hydra wraps."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _missing_option(error: BaseException) -> str:
    group, _, name = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
    options = getattr(error, "options", None) or []
    if not group or not options:
        return " ".join(str(error).split())
    return unknown_name(group, name, options)


def _wrong_key(error: BaseException) -> str:
    """Return a message about an unknown key, with similar known keys."""
    text = " ".join(str(error).split())
    match = re.search(r"Could not override '([^']+)'", text) or re.search(r"[Kk]ey '([^']+)' is not in struct", text)
    if match is None:
        return text
    key = match.group(1).removesuffix(".")
    if f"full_key: {key}." in str(error.__cause__):
        return f"{key} is a mapping with other keys; to replace all of it, write '~{key}' '+{key}={{...}}'"
    return f"unknown key {key!r};{did_you_mean(key, _known_keys(key))} gradmetrics --help lists the keys; +{key}=VALUE adds a new one"


def _known_keys(wrong: str) -> list[str]:
    """Return the dotted keys of the configuration, given the options of the command line without the wrong key."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from lightning_gradmetrics.cli.configuration import configuration_directory

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(configuration_directory()), version_base="1.3"):
        try:
            return list(_keys_below("", compose("config", _chosen_options(sys.argv[1:], wrong))))
        except HydraException:
            return list(_keys_below("", compose("config")))


def _chosen_options(arguments: Iterable[str], wrong: str) -> list[str]:
    """Return the arguments that choose options of groups or set keys without a dot, except the wrong key."""
    return [argument for argument in arguments if re.match(r"\w+=", argument) and not argument.startswith(f"{wrong}=")]


def _keys_below(prefix: str, node: Any) -> Iterable[str]:
    from omegaconf import DictConfig

    if not isinstance(node, DictConfig):
        return
    for name in node:
        key = str(name)
        yield prefix + key
        if not node._is_missing() and node._get_node(key) is not None:
            yield from _keys_below(f"{prefix}{key}.", node._get_node(key))
