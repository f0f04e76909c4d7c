"""Names the members of groups in data configurations, which are a single member or a mapping from name to member."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Groups", "check_names", "named", "open_groups", "role_groups"]

Groups = Mapping[str, Mapping[str, Any]]
"""A mapping from role to the members of the role, by name."""


def named(members: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return members by name; the name of a single path or word is its last part, without ``.npz``.

    Example:
        >>> named("data/svhn.npz"), named({"mine": "x"}), named(None)
        ({'svhn': 'data/svhn.npz'}, {'mine': 'x'}, {})
    """
    if members is None:
        return {}
    return dict(members) if isinstance(members, Mapping) else {Path(members).name.removesuffix(".npz"): str(members)}


def role_groups(id: Any, near: Any, far: Any, other: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return the members of every role."""
    groups = {"id": named(id), "near": named(near), "far": named(far)}
    for role, members in (other or {}).items():
        groups[role] = named(members)
    return groups


def check_names(groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that no name appears twice.

    Raises:
        ValueError: If a name appears twice.
    """
    known: set[str] = set()
    for group in groups:
        if double := sorted(known & group.keys()):
            raise ValueError(f"two datasets are called {double[0]!r}: name them yourself, as in near={{name: path}}")
        known |= group.keys()


def open_groups(groups: Groups, open_member: Callable[[Any, bool], Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the datasets and their roles, by name.

    Args:
        groups: The members of every role.
        open_member: Makes a dataset of a member; the second argument is whether it is in-distribution.
    """
    sets, roles = {}, {}
    for role, members in groups.items():
        for name, member in members.items():
            sets[name] = open_member(member, role == "id")
            roles[name] = role
    return sets, roles
