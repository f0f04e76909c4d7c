"""Errors for models and inputs whose per-sample gradients are not defined."""

from __future__ import annotations

__all__ = ["CoupledSamplesError", "SampleAxisError", "coupled_model", "coupled_objective", "rows_not_samples"]


class CoupledSamplesError(ValueError):
    """The samples of a batch depend on each other, so per-sample gradients are undefined."""


class SampleAxisError(ValueError):
    """The sample axis of the inputs or of the logits is not the first one, or is ambiguous."""


def coupled_model(where: str) -> CoupledSamplesError:
    """Return the error for a model that couples the samples.

    Args:
        where: The part that couples them, as a noun phrase.
    """
    return CoupledSamplesError(
        f"the samples of a batch depend on each other: {where} couples them, so per-sample gradients are not defined. "
        "Make the model treat each sample separately, or pass one sample at a time"
    )


def coupled_objective(name: str) -> CoupledSamplesError:
    """Return the error for an objective whose loss of a sample depends on the other samples of the batch."""
    return CoupledSamplesError(
        f"the losses of the objective {name!r} depend on each other: a sample's loss or its gradient changes with the other "
        "samples of the batch, so per-sample gradients are not defined. The loss of a sample must depend on its logits only"
    )


def rows_not_samples(shape: tuple[int, ...], samples: int) -> SampleAxisError:
    """Return the error for logits whose rows are not the samples of the inputs."""
    return SampleAxisError(
        f"the model returned logits of shape {shape} for {samples} samples; expected one row per sample, in their order. "
        "The first axis of the inputs must be the sample axis: wrap a model that takes time first (T, N, ...) in a module "
        "whose forward transposes its input, and pass logits= to reduce several rows per sample to one"
    )
