"""Calls any model: checks its inputs, finds its logits, and leaves it unchanged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_gradmetrics.classifier.input_errors import problem_of
from lightning_gradmetrics.classifier.labels import MULTI_LABEL
from lightning_gradmetrics.classifier.model_layout import modules_of
from lightning_gradmetrics.classifier.preservation import preserved
from lightning_gradmetrics.classifier.tensor_records import first_pass_watched

__all__ = [
    "Inputs",
    "as_rows",
    "batch_size",
    "call",
    "check_inputs",
    "check_model",
    "gradients_enabled",
    "has_compiled_parts",
    "logits_in",
    "logits_of",
    "map_tensors",
    "preserved",
    "tensors_in",
    "with_two_classes",
]

Inputs = Tensor | Mapping[str, Any] | Sequence[Any]
"""A model's inputs: a tensor ``(N, ...)``, keyword arguments, or positional arguments; the first axis of every tensor is the
sample. A mapping may contain both: integer keys are positional arguments, other keys are keyword arguments."""

LOGIT_KEYS = ("logits", "out")
"""The entries of a mapping that hold logits."""

FABRIC_MODULES = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
"""The modules with the flag that Fabric sets during ``fabric.backward``."""

NO_GRADIENT = "does not require grad"
"""A part of torch's error if a forward pass computes gradients while they are disabled."""

MASK_CLASSES = "class_queries_logits"
"""The entry of models that classify masks: MaskFormer, Mask2Former, OneFormer and EoMT in transformers."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call ``model`` with a tensor, with a mapping as keyword arguments, or with a sequence as positional arguments.

    The model receives copies of the tensors, so in-place operations do not change the caller's tensors.

    Raises:
        TypeError: If a list of tensors has more entries than the model has arguments.
        ValueError: If the model fails because of the type of the inputs, or of ids outside an embedding.
    """
    try:
        with first_pass_watched(model):
            return _called(model, inputs)
    except TypeError as error:
        if isinstance(inputs, (Tensor, Mapping)) or len(inputs) < 2 or "positional argument" not in str(error):
            raise
        raise TypeError(
            f"{type(model).__name__} cannot be called with a list of {len(inputs)} inputs: the entries of a list are the arguments of "
            "its forward, and samples are along the first axis of each tensor. If the entries are samples, stack them, as in "
            f"torch.stack(images) ({error})"
        ) from error
    except (IndexError, RuntimeError) as error:
        if (
            NO_GRADIENT in str(error) and not torch.is_grad_enabled()
        ):  # the forward itself differentiates, as for forces
            with gradients_enabled(model), first_pass_watched(model):
                output = _called(model, inputs)
            return output.detach() if isinstance(output, Tensor) else output
        is_about_values = isinstance(error, IndexError) or "type" in str(error)
        words = " ".join(str(error).split())
        problem = problem_of(model, list(tensors_in(inputs)), words) if is_about_values else ""
        if not problem:
            raise
        raise ValueError(f"{type(model).__name__} cannot be called with these inputs: {problem} ({words})") from None


def _called(model: nn.Module, inputs: Inputs) -> Any:
    copies = map_tensors(inputs, Tensor.clone)
    if isinstance(inputs, Tensor):
        return model(copies)
    if isinstance(inputs, Mapping):
        positional, named = [], {}
        for key, value in copies.items():
            if isinstance(key, int):
                positional.append(value)
            else:
                named[key] = value
        return model(*positional, **named)
    return model(*copies)


def logits_of(output: Any) -> Tensor:
    """Return the logits ``(N, C)`` in a model's output: the tensor itself, its ``logits`` entry, or its ``.logits``.

    Raises:
        TypeError: If the output contains no logits.
        ValueError: If they are not ``(N, C)``, nor ``(C,)`` of one sample.
    """
    logits = as_rows(logits_in(output))
    if logits.ndim != 2:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}; expected (N, C), one row per sample and one column per class; "
            "pass logits_fn=, a callable from the model's output to them"
        )
    return logits


def as_rows(logits: Tensor) -> Tensor:
    """Return logits ``(C,)`` of one sample as ``(1, C)``, and other logits unchanged.

    ``squeeze()`` without an axis removes the sample axis of a batch of one sample. The caller compares the number of rows with
    the number of samples: logits ``(N,)`` of several samples become one row too.

    Example:
        >>> as_rows(torch.zeros(3)).shape, as_rows(torch.zeros(5, 3)).shape
        (torch.Size([1, 3]), torch.Size([5, 3]))
    """
    return torch.atleast_2d(logits) if logits.ndim == 1 else logits  # type: ignore[no-untyped-call]


def with_two_classes(logits: Tensor) -> Tensor:
    """Return logits ``(N, C)``, where one logit z per sample becomes ``(0, z)``.

    Example:
        >>> with_two_classes(torch.tensor([[3.0]]))
        tensor([[0., 3.]])
    """
    return logits if logits.shape[1] != 1 else torch.cat([torch.zeros_like(logits), logits], 1)


def logits_in(output: Any) -> Tensor:
    """Return the logits in a model's output, of samples or of positions: the tensor itself, an entry, or an attribute.

    The entries are ``logits``, and ``out`` as in torchvision's segmentation models.

    Raises:
        TypeError: If the output contains no logits.

    Example:
        >>> logits_in({"out": torch.zeros(1, 3, 4, 4), "aux": torch.zeros(1, 3, 4, 4)}).shape
        torch.Size([1, 3, 4, 4])
    """
    logits = output
    if isinstance(output, Mapping):
        logits = next((output[key] for key in LOGIT_KEYS if key in output), None)
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if (isinstance(output, Mapping) and MASK_CLASSES in output) or hasattr(output, MASK_CLASSES):
        raise TypeError(
            f"{type(output).__name__} has masks and a class for each mask ({MASK_CLASSES}): pixels have no softmax of logits, so "
            "no score is defined. Pass logits_fn= if your own post-processing returns logits (N, C, H, W)"
        )
    raise TypeError(
        f"no logits in the model's output of type {type(output).__name__}; allowed: a tensor, a mapping with 'logits' or "
        "'out', or an object with .logits; for anything else, as a tuple (mask, label), pass logits_fn=, a callable from the "
        "output to the logits (N, C)"
    )


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Yield every tensor in the inputs."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors_in(value)
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            yield from tensors_in(value)


def map_tensors(inputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``inputs`` with ``function`` applied to every tensor; containers become plain dicts, lists, tuples, named tuples."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        values = [map_tensors(value, function) for value in inputs]
        if isinstance(inputs, list):
            return values
        return type(inputs)(*values) if hasattr(inputs, "_fields") else tuple(values)
    return inputs


def batch_size(inputs: Inputs) -> int:
    """Return the number of samples: the first axis of the first tensor.

    Raises:
        ValueError: If the inputs contain no tensor, or a tensor without axes.
    """
    for tensor in tensors_in(inputs):
        if tensor.ndim == 0:
            break
        return tensor.shape[0]
    raise ValueError(
        "the inputs contain no tensor with a sample axis; expected a tensor (N, ...), or a mapping or sequence of them"
    )


def check_inputs(model: nn.Module, inputs: Inputs) -> None:
    """Refuse inputs that have no sample axis.

    Raises:
        TypeError: If an input is packed, nested or sparse, or consists of flat indices with offsets.
    """
    _check_layouts(inputs)
    _check_bags(model, inputs)


def _check_layouts(inputs: Any) -> None:
    """Refuse inputs whose samples are not along the first axis of a dense tensor."""
    if isinstance(inputs, PackedSequence):
        raise TypeError(
            "a PackedSequence has no sample axis; pass the padded tensor (N, T, ...) and the lengths (N,), and call "
            "pack_padded_sequence(..., enforce_sorted=False) in the model's forward"
        )
    if isinstance(inputs, Tensor):
        if inputs.is_nested or inputs.layout != torch.strided:
            kind = "nested" if inputs.is_nested else str(inputs.layout)
            raise TypeError(
                f"an input is a {kind} tensor; allowed: dense tensors with the samples along the first axis. "
                "Convert it first, as in x.to_dense() or torch.nested.to_padded_tensor(x, 0.0)"
            )
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            _check_layouts(value)
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            _check_layouts(value)


def _check_bags(model: nn.Module, inputs: Any) -> None:
    """Refuse inputs of an EmbeddingBag that are flat indices with offsets."""
    shapes = []
    for tensor in tensors_in(inputs):
        if not tensor.is_floating_point():
            shapes.append(tuple(tensor.shape))
    if len(shapes) < 2 or any(len(shape) != 1 for shape in shapes):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.EmbeddingBag):
            raise TypeError(
                f"the inputs {shapes} of the EmbeddingBag {name!r} are flat indices with "
                "offsets, which have no sample axis; pass bags padded to one length, (N, T), and give the EmbeddingBag "
                "the padding_idx"
            )


def check_model(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
    """Refuse a model whose samples depend on each other, or whose classes do not exclude each other.

    Args:
        model: The model.
        modules: Its modules, if they are known.

    Raises:
        ValueError: If a batch norm is in train mode, or a model of transformers is declared multi-label.
    """
    for module in modules_of(model) if modules is None else modules:
        if getattr(vars(module).get("config"), "problem_type", None) == "multi_label_classification":
            raise ValueError(f"{type(module).__name__} is configured as a multi-label model: {MULTI_LABEL}")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, other in model.named_modules() if other is module)
            why = "is in train mode" if module.training else "keeps no running statistics"
            raise ValueError(
                f"the batch norm {name or type(module).__name__!r} {why}: each prediction would depend on the whole batch, so "
                "per-sample gradients are undefined. Call model.eval() first"
                + ("" if module.training else ", and give it track_running_stats=True")
            )


def has_compiled_parts(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to the module, to a submodule, or to a function stored in one of them."""
    for submodule in module.modules():
        if submodule._compiled_call_impl is not None:
            return True
        for value in vars(submodule).values():
            if hasattr(value, "_torchdynamo_orig_callable"):
                return True
    return False


def gradients_enabled(model: nn.Module | None = None) -> AbstractContextManager[Any]:
    """Enable gradients, also inside ``torch.inference_mode`` and ``torch.no_grad``.

    Args:
        model: The model that runs inside the block. cuDNN's recurrent layers have no backward pass in eval mode; if the
            model has some on a CUDA device, cuDNN is off inside the block.
    """
    has_fabric = any(map(sys.modules.__contains__, FABRIC_MODULES))
    has_cuda = model is not None and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if has_fabric or has_cuda or torch.is_inference_mode_enabled():
        return _gradients_enabled(model, has_fabric, has_cuda)
    return torch.enable_grad()


@contextmanager
def _gradients_enabled(model: nn.Module | None, has_fabric: bool, has_cuda: bool) -> Iterator[None]:
    inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with inference, torch.enable_grad(), _backward_of_fabric() if has_fabric else nullcontext():
        if model is None or not has_cuda or not _has_recurrent_layers(model):
            yield
            return
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = before


@contextmanager
def _backward_of_fabric() -> Iterator[None]:
    """Allow backward passes through modules that Fabric set up; it refuses them outside ``fabric.backward``.

    That method scales losses for an optimizer, and these gradients are not for an optimizer.
    """
    before: dict[str, bool] = {}
    for name in FABRIC_MODULES:
        if hasattr(sys.modules.get(name), "_in_fabric_backward"):
            before[name] = sys.modules[name]._in_fabric_backward
    try:
        for name in before:
            sys.modules[name]._in_fabric_backward = True  # type: ignore[attr-defined]
        yield
    finally:
        for name, value in before.items():
            sys.modules[name]._in_fabric_backward = value  # type: ignore[attr-defined]


def _has_recurrent_layers(model: nn.Module) -> bool:
    return any(isinstance(module, nn.RNNBase) and not module.training for module in model.modules())
