"""The places of parameters and buffers in a model, for functions that run it with other tensors.

``torch.func.functional_call`` and the like put other tensors in these places and then put the model's own back. Where two attributes hold
the same module, each place has two names. With both of them, as with ``tie_weights=True``, they would put back their own tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from torch import Tensor, nn

__all__ = ["tensors_by_place"]


def tensors_by_place(model: nn.Module, chosen: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return a tensor for each place of a parameter or buffer in a model, by one name of this place.

    Args:
        model: The model.
        chosen: Other tensors, by the identity of the parameter or buffer whose places they take.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> list(tensors_by_place(nn.Sequential(layer, layer), {}))
        ['0.weight', '0.bias']
    """
    places: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                places[f"{prefix}.{name}" if prefix else name] = chosen.get(id(tensor), tensor)
    return places
