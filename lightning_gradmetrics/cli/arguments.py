"""Checks the command line before Hydra reads it, and adds options for the user's factories."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from lightning_gradmetrics.cli.configuration import option_names
from lightning_gradmetrics.cli.errors import UsageError, unknown_name

__all__ = ["check_arguments", "own_factories"]

FLAGS_WITH_VALUE = {
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--experimental-rerun",
}
OWN_CONFIGURATION = ("--config-dir", "-cd", "--config-path", "-cp", "hydra.searchpath")
"""Arguments that add a directory of configuration groups."""

FACTORY_GROUPS = ("data", "model")


def check_arguments(arguments: Sequence[str], commands: Iterable[str]) -> None:
    """Check the words of a command line, and the names of its scores.

    Args:
        arguments: The command line.
        commands: The names of the subcommands.

    Raises:
        UsageError: If a word is not an override, or a score is unknown.
    """
    for argument in _words(arguments):
        if "=" not in argument and not argument.startswith("~"):
            raise UsageError(unknown_name("command", argument, commands) + "; settings are written key=value")
    if not any(argument.startswith(OWN_CONFIGURATION) for argument in arguments):
        _check_scores(arguments)


def _words(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments that are neither flags nor values of flags."""
    previous = ""
    for argument in arguments:
        if not argument.startswith("-") and previous not in FLAGS_WITH_VALUE:
            yield argument
        previous = argument


def _check_scores(arguments: Sequence[str]) -> None:
    known = option_names("score")
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "score":
            continue
        _refuse_calls(value, known)
        if any(letter in value for letter in "${(:"):
            continue
        names = value.strip("[] ").split(",")
        if names == [""]:
            raise UsageError(f"score is empty: choose at least one of {', '.join(known)}")
        for name in names:
            if name.strip(" '\"") not in known:
                raise UsageError(unknown_name("score", name.strip(), known))


def _refuse_calls(value: str, known: Iterable[str]) -> None:
    """Refuse ``name(argument=value)``, which is a score in Python and not one in a configuration."""
    for name in re.findall(r"(\w+)\(", value):
        if name in known:
            raise UsageError(
                f"score {value!r}: arguments are separate settings of the command, as in score={name} "
                f"score.{name}.ARGUMENT=VALUE; a second variant of the score is "
                f"'+score.NAME={{_target_:lightning_gradmetrics.scores.{name},ARGUMENT:VALUE}}'"
            )


def own_factories(arguments: Sequence[str]) -> list[str]:
    """Return the command line with ``data=custom`` or ``model=custom`` added if their ``_target_`` is given.

    The option ``custom`` is empty, so the user's factory does not receive the arguments of the default factory.

    Args:
        arguments: The command line.

    Example:
        >>> own_factories(["model._target_=mine.net", "model.width=3"])
        ['model=custom', '++model._target_=mine.net', '++model.width=3']
    """
    rewritten = list(arguments)
    for group in FACTORY_GROUPS:
        if _has_own_target(group, rewritten) and not _chooses_option(group, rewritten):
            rewritten = _with_custom_option(group, rewritten)
    return rewritten


def _with_custom_option(group: str, arguments: Sequence[str]) -> list[str]:
    """Insert the option next to the group's first key, because flags such as ``-m`` must not separate the overrides."""
    rewritten, chosen = [], [f"{group}=custom"]
    for argument in arguments:
        forced = _forced(group, argument)
        if forced.startswith(f"++{group}"):
            rewritten += chosen
            chosen = []
        rewritten.append(forced)
    return rewritten


def _has_own_target(group: str, arguments: Sequence[str]) -> bool:
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == f"{group}._target_" or (key == group and value.startswith("{") and "_target_" in value):
            return True
    return False


def _chooses_option(group: str, arguments: Sequence[str]) -> bool:
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == group and not value.startswith("{"):
            return True
    return False


def _forced(group: str, argument: str) -> str:
    """Return an override of one of the group's keys in the form ``++key=value``, which also adds missing keys."""
    key = argument.partition("=")[0].lstrip("+")
    if key == group or key.startswith(f"{group}."):
        return f"++{argument.lstrip('+')}"
    return argument
