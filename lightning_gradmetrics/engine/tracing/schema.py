"""What is known of a basic operation of torch without its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_gradmetrics.classifier.tensor_records import written_arguments

__all__ = ["Schema", "keeps_entries", "schema_of", "shows_memory"]


@dataclass(frozen=True)
class Schema:
    """What does not depend on the arguments of an operator.

    Args:
        name: Its name, with its namespace if torch does not define it.
        arguments: For each argument its name, whether it has a default value, and this value.
        written: The names of the arguments that it changes in place.
        pointwise: Whether it works element by element.
        is_tagged_pointwise: The same for an operator of any library, according to its tags.
        is_random: Whether it draws random numbers.
        reads_data: Whether Python reads values of its arguments.
        sizes_by_data: Whether the shapes of its results depend on values.
    """

    name: str
    arguments: tuple[tuple[str, bool, Any], ...]
    written: tuple[str, ...]
    pointwise: bool
    is_tagged_pointwise: bool
    is_random: bool
    reads_data: bool
    sizes_by_data: bool

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, defaults included."""
        bound = dict(zip(self._names, args, strict=False))
        for name, has_default, default in self.arguments[len(args) :]:
            if name in kwargs:
                bound[name] = kwargs[name]
            elif has_default:
                bound[name] = default
        return bound

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, _, _ in self.arguments]


@lru_cache(maxsize=4096)
def schema_of(operator: Any) -> Schema:
    """Return the schema of an operator; reading torch's own takes longer than a small operation."""
    arguments = []
    for argument in operator._schema.arguments:
        has_default = argument.has_default_value()
        arguments.append((argument.name, has_default, argument.default_value if has_default else None))
    written = [name for _, name in written_arguments(operator)]
    tags = frozenset(operator.tags)
    is_pointwise = torch.Tag.pointwise in tags
    return Schema(
        _name(operator),
        tuple(arguments),
        tuple(written),
        is_pointwise and operator.namespace == "aten",
        is_pointwise,
        torch.Tag.nondeterministic_seeded in tags,
        torch.Tag.data_dependent_output in tags,
        torch.Tag.dynamic_output_shape in tags,
    )


def _name(operator: Any) -> str:
    """Return the name of an operator, with its namespace if torch does not define it."""
    name: str = operator._overloadpacket.__name__
    return name if operator.namespace in ("aten", "prim", "prims") else f"{operator.namespace}::{name}"


_PLAIN_DISPATCH = Tensor.__torch_dispatch__


def shows_memory(tensor: Tensor) -> bool:
    """Return whether a tensor's storage is all of its memory: not for subclasses with parts, and zeros of forward-mode derivatives."""
    return type(tensor).__torch_dispatch__ is _PLAIN_DISPATCH and not tensor._is_zerotensor()


def keeps_entries(arguments: Mapping[str, Any]) -> bool:
    """Return whether the entries of a strided view are those of its argument, as where torch sets the strides of axes of length 1.

    Args:
        arguments: The arguments of ``as_strided``.
    """
    tensor, size, stride = arguments["self"], arguments["size"], arguments["stride"]
    if tuple(size) != tensor.shape or arguments["storage_offset"] not in (None, tensor.storage_offset()):
        return False
    return all(
        before == after or length == 1 for length, before, after in zip(size, tensor.stride(), stride, strict=True)
    )
