"""Errors for models and inputs whose per-sample gradients are not defined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

__all__ = [
    "CoupledSamplesError",
    "REFUSALS",
    "NotReproducibleError",
    "SampleAxisError",
    "ambiguous_inputs",
    "checkpoint_differs",
    "coupled_model",
    "coupled_objective",
    "list_as_long_as_the_batch",
    "list_of_samples",
    "no_gradient",
    "no_gradient_of_loss",
    "no_real_logits",
    "not_reproducible",
    "not_without_others",
    "other_precisions",
    "raise_if_out_of_memory",
    "rows_not_samples",
    "wrong_length",
]


class CoupledSamplesError(ValueError):
    """The samples of a batch depend on each other, so per-sample gradients are undefined."""


class SampleAxisError(ValueError):
    """The sample axis of the inputs or of the logits is not the first one, or is ambiguous."""


class NotReproducibleError(ValueError):
    """The model returns different logits for the same inputs."""


REFUSALS = (CoupledSamplesError, SampleAxisError, NotReproducibleError)
"""The errors that no other way of computing the gradients avoids."""


def coupled_model(where: str) -> CoupledSamplesError:
    """Return the error for a model that couples the samples.

    Args:
        where: The part that couples them, as a noun phrase.
    """
    return CoupledSamplesError(
        f"the samples of a batch depend on each other: {where} couples them, so per-sample gradients are not defined. "
        "Make the model treat each sample separately, pass one sample at a time, or pass sample_axis= if an input has the samples on "
        "another axis or all samples share it"
    )


def coupled_objective(name: str) -> CoupledSamplesError:
    """Return the error for an objective whose loss of a sample depends on the other samples of the batch."""
    return CoupledSamplesError(
        f"the losses of the objective {name!r} depend on each other: a sample's loss or its gradient changes with the other "
        "samples of the batch, so per-sample gradients are not defined. The loss of a sample must depend on its logits only"
    )


def not_reproducible(model: object) -> NotReproducibleError:
    """Return the error for a model that returns other logits for the same inputs, state and random numbers of torch."""
    return NotReproducibleError(
        f"{type(model).__name__} returns different logits for the same inputs, with torch's random number generators in the same "
        "state, so its gradients are not defined. Draw random numbers from torch's default generators and not from numpy, random "
        "or a separate generator; keep no other state between calls; or make the forward pass deterministic"
    )


def checkpoint_differs(model: object, error: Exception) -> NotReproducibleError:
    """Return the error for a model whose activation checkpoint repeats its forward pass with other tensors."""
    reason = " ".join(str(error).split())
    return NotReproducibleError(
        f"an activation checkpoint of {type(model).__name__} repeats its part of the forward pass with other tensors in the backward "
        "pass, so the gradients are not defined. The part must depend on its inputs and parameters only, and not on counters, "
        f"caches or requires_grad; or turn checkpoints off ({reason[:200]})"
    )


def not_without_others(model: object, count: int, samples: int, error: Exception) -> SampleAxisError:
    """Return the error for a model that runs on a batch but not on some of its samples.

    Args:
        model: The model.
        count: The number of samples that it does not run on.
        samples: The number of samples in the batch.
        error: The error that it raised.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return SampleAxisError(
        f"{type(model).__name__} runs on the batch of {samples} samples but not on {count} of them ({reason[:200]}). Every "
        "tensor of the inputs must have the samples on its first axis or be shared by all samples. For another layout, such as a "
        "hidden state (L, N, H), pass sample_axis= to score, gradient_statistics or GradientMetrics, an axis or a mapping from "
        "arguments to axes, as {1: 1}; or wrap the model in a module whose forward transposes its inputs"
    )


def other_precisions(model: object, samples: int, precisions: Iterable[torch.dtype]) -> CoupledSamplesError:
    """Return the error for a model that computes in another precision in a batch than with one sample alone.

    Args:
        model: The model.
        samples: The number of samples in the batch.
        precisions: The floating types that only one of the two uses.
    """
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in precisions)) or "another order of types"
    return CoupledSamplesError(
        f"the precision of {type(model).__name__} depends on the size of the batch: the forward pass of one sample alone and that of "
        f"{samples} samples do not use the same floating types ({names}). Use autocast and casts at every batch size or at none"
    )


def rows_not_samples(shape: tuple[int, ...], samples: int) -> SampleAxisError:
    """Return the error for logits whose rows are not the samples of the inputs."""
    return SampleAxisError(
        f"the model returned logits of shape {shape} for {samples} samples; expected one row per sample, in their order. "
        "The first axis of the inputs must be the sample axis; for a model that takes time first (T, N, ...) pass "
        "sample_axis=1 to score, gradient_statistics or GradientMetrics, or wrap it in a module whose forward transposes its input. "
        "Pass logits= to reduce several rows per sample to one"
    )


def ambiguous_inputs(names: Sequence[object], samples: int) -> SampleAxisError:
    """Return the error for inputs as long as the batch that may have one row per sample or be shared by all samples.

    Args:
        names: The names or positions of the arguments.
        samples: The number of samples in the batch.
    """
    listed, shared = ", ".join(map(repr, names)), dict.fromkeys(names)
    return SampleAxisError(
        f"it is ambiguous whether all samples share the input {listed}: it is as long as the batch of {samples}, and samples "
        "without the others have the same logits only if it is not split. If all samples share it, pass "
        f"sample_axis={shared!r} to score, gradient_statistics or GradientMetrics. If it has one row per sample, the samples of "
        "a batch depend on each other through it, so per-sample gradients are not defined"
    )


def wrong_length(name: object, shape: tuple[int, ...], samples: int) -> SampleAxisError:
    """Return the error for an input that ``sample_axis=`` states to have samples, with another length than the batch."""
    return SampleAxisError(
        f"sample_axis= states that the input {name!r} has samples, but on that axis it is not as long as the batch of {samples}: its "
        f"shape is {shape}, with that axis first. Pass None for an input that all samples share"
    )


def list_as_long_as_the_batch(kind: str, samples: int) -> SampleAxisError:
    """Return the error for an input without a sample axis that has one entry per sample."""
    return SampleAxisError(
        f"an input is a {kind} of {samples} entries, as long as the batch, and the model returns different logits in parts of "
        "the batch: only tensors are split into samples. Pass it as a tensor with the samples on its first axis"
    )


def list_of_samples(samples: int) -> SampleAxisError:
    """Return the error for an input that is a list with the tensor of each sample."""
    return SampleAxisError(
        f"an input is a list of {samples} tensors, one for each row of the logits, but the samples must be along the first axis of each "
        "tensor. Stack them, as in torch.stack(images), or pad tensors of different shapes to one shape; if the model needs a list, wrap "
        "it in a module whose forward takes the stacked tensor and unbinds it"
    )


def no_gradient(model: object) -> ValueError:
    """Return the error for a model whose logits have no gradient."""
    return ValueError(
        f"the logits of {type(model).__name__} have no gradient: its forward runs under torch.no_grad or torch.inference_mode, or "
        "detaches its output"
    )


def no_gradient_of_loss(name: str) -> ValueError:
    """Return the error for an objective whose losses have no gradient."""
    return ValueError(
        f"the losses of the objective {name!r} have no gradient: it detaches the logits, returns whole numbers or constants, or "
        "computes them outside of torch"
    )


def no_real_logits(dtype: torch.dtype) -> ValueError:
    """Return the error for logits of whole or complex numbers."""
    return ValueError(
        f"the logits are {dtype}; expected floating-point numbers (N, C), before any argmax. Pass logits=, a callable from the model's "
        "output to them"
    )


def raise_if_out_of_memory(error: Exception) -> None:
    """Raise an error again if memory ran out, because a slower plan for all later batches would hide it.

    Args:
        error: An error raised during a probe.
    """
    is_of_cpu = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    if is_of_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error
