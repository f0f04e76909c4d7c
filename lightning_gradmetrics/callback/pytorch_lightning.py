"""The package ``pytorch_lightning``: the same Lightning under an older name, with a ``Callback`` class of that name."""

from __future__ import annotations

import sys

__all__ = ["also_callback_of_pytorch_lightning", "is_of_lightning"]


def also_callback_of_pytorch_lightning(kind: type) -> None:
    """Make a callback class a subclass of ``pytorch_lightning.Callback`` too, if that package was imported.

    The package is not imported here, because a program that uses it has already imported it.

    Args:
        kind: A subclass of ``lightning.pytorch.Callback``.
    """
    other = getattr(sys.modules.get("pytorch_lightning"), "Callback", None)
    if isinstance(other, type) and not issubclass(kind, other):
        kind.__bases__ = (*kind.__bases__, other)


def is_of_lightning(module: object, method: str) -> bool:
    """Return whether a module has Lightning's own version of a method, from either package.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> is_of_lightning(LightningModule(), "predict_step")
        True
    """
    if method in vars(module):
        return False
    owner = getattr(getattr(type(module), method, None), "__module__", "")
    return owner.startswith(("lightning.pytorch.", "pytorch_lightning.", "torch.nn.modules.module"))
