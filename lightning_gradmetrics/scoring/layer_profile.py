"""The gradient norm of every layer, which shows the layers that react to a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import Inputs
from lightning_gradmetrics.engine import gradient_statistics
from lightning_gradmetrics.gradients.objectives import Loss, Objective
from lightning_gradmetrics.scoring.evidence import Evidence

__all__ = ["LayerNorms", "Profile", "gradient_profile"]


class LayerNorms(NamedTuple):
    """The gradient norm of every layer.

    Args:
        names: The layers, in the model's order.
        norms: ``(N, L)``.
    """

    names: tuple[str, ...]
    norms: Tensor


def gradient_profile(
    model: nn.Module,
    inputs: Inputs,
    objective: str | Loss | Objective = "pseudo_label",
    norm: float = 2.0,
    parameters: Callable[[str], bool] | None = None,
    **options: Any,
) -> LayerNorms:
    r"""Return the gradient norm of every layer, for each sample: ``|d L_n / d theta_l|_p``.

    A layer is a module that has parameters directly; its weight and its bias are combined. With entries of equal size,
    a layer with more parameters has a larger norm.

    Args:
        model: A classifier; batch norms must be in eval mode. The model is left unchanged.
        inputs: A tensor ``(N, ...)``, a mapping (keyword arguments) or a sequence (positional arguments) of them.
        objective: As in :func:`lightning_gradmetrics.gradient_statistics`.
        norm: The norm's ``p``, in ``(0, inf]``.
        parameters: ``None`` for all parameters, or a predicate on the parameter's name.
        **options: ``targets``, ``logits``, ``engine`` and ``memory``, as in
            :func:`lightning_gradmetrics.gradient_statistics`.

    Returns:
        The layers' ``names`` in the model's order, and the ``norms``, ``(N, L)``.

    Raises:
        ValueError: If a name is unknown, or a batch norm is in train mode.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
        >>> names, norms = gradient_profile(model, torch.randn(5, 8))
        >>> names, norms.shape
        (('0', '2'), torch.Size([5, 2]))
    """
    statistics_of_layers = gradient_statistics(
        model, inputs, Objective.of(objective), parameters, True, statistics=[f"l{norm:g}"], **options
    ).by_layer()
    return LayerNorms(statistics_of_layers.names, statistics_of_layers.norm(norm))


@dataclass(frozen=True)
class Profile:
    """The objective and the norm of a run's layer profile; callable with evidence, like a score.

    Args:
        objective: The objective.
        norm: The norm's ``p``.

    Example:
        >>> Profile.of(True), Profile.of("uniform").objective, Profile.of(False)
        (Profile(objective='pseudo_label', norm=2.0), 'uniform', None)
    """

    objective: str | Loss | Objective = "pseudo_label"
    norm: float = 2.0

    @classmethod
    def of(cls, asked: bool | str | Mapping[str, Any] | Profile | None) -> Profile | None:
        """Return the profile for a boolean, the name of an objective, or a mapping of arguments.

        Raises:
            ValueError: If an objective or an argument is unknown, or the norm is not a positive number.
        """
        if asked is None or asked is False:
            return None
        if not isinstance(asked, (bool, str, Mapping, Profile)):
            raise ValueError(
                f"profile={asked!r}; expected True, the name of an objective, such as 'uniform', or a mapping, as in "
                "profile={'objective': 'uniform', 'norm': 1.0}"
            )
        if isinstance(asked, Mapping) and (unknown := set(asked) - {"objective", "norm"}):
            raise ValueError(f"a profile has no argument {min(unknown)!r}; its arguments are: objective, norm")
        if isinstance(asked, Profile):
            made = asked
        elif isinstance(asked, str):
            made = cls(asked)
        else:
            made = cls(**asked) if isinstance(asked, Mapping) else cls()
        if not made.norm > 0:
            raise ValueError(f"norm={made.norm!r}; the p of a p-norm must be above 0, as in profile={{'norm': 1.0}}")
        Objective.of(made.objective)
        return made

    def __call__(self, evidence: Evidence) -> LayerNorms:
        """Return the norms of a batch."""
        layers = evidence.gradient_per_parameter(self.objective, "all").by_layer()
        return LayerNorms(layers.names, layers.norm(self.norm))
