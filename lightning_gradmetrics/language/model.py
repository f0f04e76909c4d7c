"""Calls a causal language model and finds its input embedding and its head."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.head import linear_layers
from lightning_gradmetrics.classifier.logit_map import recognised_map
from lightning_gradmetrics.classifier.model_layout import HookState

__all__ = ["HeadCall", "LanguageModel", "LanguageModelError", "logits_of"]

TOKENS_FIRST = "the logits must be (N, T, V): one row per sequence, one column per token, V tokens in the vocabulary"


class LanguageModelError(ValueError):
    """The model is not a causal language model with a known head."""


@dataclass
class HeadCall:
    """The input and output of the head in one forward pass, and the logits of the model.

    Args:
        features: ``(N, K, D)`` for the last K of T positions.
        output: ``(N, K, V)``.
        logits: ``(N, K, V)``.
        hidden_states: The hidden states ``(N, T, D)``, if they were requested.
    """

    features: Tensor
    output: Tensor
    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


@dataclass
class LanguageModel:
    """A causal language model from token ids ``(N, T)`` to logits ``(N, T, V)``.

    Args:
        module: The model: of transformers, a peft model around one, or any module with such a forward.
        head_name: The name of its head, or ``None`` to find it.
        prefix: The start of the names of its parameters, if it is part of a larger model whose names targets use.
    """

    module: nn.Module
    head_name: str | None = None
    prefix: str = ""
    _candidates: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    losses: dict[Hashable, nn.Module] = field(default_factory=dict, repr=False)
    """Modules around the model by their losses, kept because the engine plans once for each module."""

    def __post_init__(self) -> None:
        config = getattr(self.module, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise LanguageModelError(
                f"{type(self.module).__name__} is an encoder-decoder model; allowed: causal language models, whose answer "
                "continues the prompt. Score its decoder's batches with lgm.score"
            )
        if self.head_name is not None:
            self._candidates = {self.head_name: self.module.get_submodule(self.head_name)}
            return
        named = {module: name for name, module in self.module.named_modules()}
        declared = _declared(self.module, "get_output_embeddings")
        if declared is not None and declared in named:
            self.head_name = named[declared]
            self._candidates = {self.head_name: declared}
        else:
            self._candidates = dict(linear_layers(self.module))

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.module.parameters()).device

    @property
    def head(self) -> nn.Module:
        """The head; available after the first call."""
        assert self.head_name is not None
        return self._candidates[self.head_name]

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding.

        Raises:
            LanguageModelError: If it is unknown.
        """
        layer = _declared(self.module, "get_input_embeddings")
        if not isinstance(layer, nn.Embedding):
            layer = _only_embedding(self.module)
        return layer

    @property
    def vocabulary(self) -> int | None:
        """The number of token ids of the input embedding; ``None`` if it is not known which layer that is."""
        try:
            return self.embedding.num_embeddings
        except LanguageModelError:
            return None

    def __call__(self, ids: Tensor, mask: Tensor, last: int | None = None, hidden_states: bool = False) -> HeadCall:
        """Run the model on a right-padded batch.

        Args:
            ids: Token ids ``(N, T)``.
            mask: 1 for tokens, 0 for padding, ``(N, T)``.
            last: The number of positions to return, counted from the end; ``None`` returns all.
            hidden_states: Whether to return the hidden states.

        Raises:
            LanguageModelError: If the model returns no logits ``(N, T, V)``, or its head cannot be found.
        """
        options = self._options(mask, last, hidden_states)
        hooks = HookState(self.module)
        try:
            with self._watching() as calls:
                output = self.module(ids, **options)
        finally:
            hooks.restore()  # transformers adds hooks to return hidden states
        logits = logits_of(output, self.module)
        if logits.ndim != 3 or len(logits) != len(ids):
            raise LanguageModelError(
                f"the logits of {type(self.module).__name__} have shape {tuple(logits.shape)}; {TOKENS_FIRST}"
            )
        features, head_output = self._head_call(calls, logits)
        length = logits.shape[1] if last is None else last
        states = tuple(output.hidden_states) if hidden_states else ()
        return HeadCall(features[:, -length:], head_output[:, -length:], logits[:, -length:], states)

    def _options(self, mask: Tensor, last: int | None, hidden_states: bool) -> dict[str, Any]:
        """Return the keyword arguments that the model's forward takes."""
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if last is not None:
            options["logits_to_keep"] = last
        if hidden_states:
            options["output_hidden_states"] = True
        allowed = self.parameters
        if hidden_states and "output_hidden_states" not in allowed and "kwargs" not in allowed:
            raise LanguageModelError(
                f"the forward of {type(self.module).__name__} has no argument output_hidden_states; scores of hidden states "
                "need a model of transformers"
            )
        always = {"output_hidden_states"}
        return {key: value for key, value in options.items() if key in allowed or key in always}

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the arguments of the model's forward; for a peft model, those of the model inside it."""
        inner = getattr(self.module, "get_base_model", None)
        module = inner() if callable(inner) else self.module
        return frozenset(inspect.signature(module.forward).parameters)

    @contextmanager
    def _watching(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Record the input and the output of each candidate for the head inside the block."""
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for name, candidate in self._candidates.items():
                stack.callback(candidate.register_forward_hook(_keeping(calls, name)).remove)
            yield calls

    def _head_call(self, seen: dict[str, tuple[Tensor, Tensor]], logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.head_name is None:
            self.head_name = self._found(seen, logits)
        if self.head_name not in seen:
            raise LanguageModelError(
                f"the head {self.head_name!r} of {type(self.module).__name__} was not called in its forward pass. Pass "
                "head=, the name of the linear layer whose output becomes the logits"
            )
        features, output = seen[self.head_name]
        if output.shape != logits.shape:
            raise LanguageModelError(
                f"the head {self.head_name!r} returned {tuple(output.shape)}, but the model's logits are "
                f"{tuple(logits.shape)}: the operations between them are not elementwise. Pass head=, another linear layer"
            )
        return features, output

    def _found(self, seen: dict[str, tuple[Tensor, Tensor]], logits: Tensor) -> str:
        """Return the only linear layer whose output is the logits, or becomes them by a scaling or a cap."""
        equal, mapped = [], []
        for name, (_, output) in seen.items():
            if output.shape == logits.shape and recognised_map(output, logits) is not None:
                mapped.append(name)
                equal += [name] if torch.equal(output, logits) else []
        candidates = equal or mapped
        kind = type(self.module).__name__
        if not candidates:
            raise LanguageModelError(
                f"the logits of {kind} are not the output of one of its linear layers, nor that output scaled or capped, so the "
                "gradient of its head is unknown: return the head's output as the logits"
            )
        if len(candidates) > 1:
            raise LanguageModelError(
                f"several linear layers of {kind} return its logits: {', '.join(candidates)}. Pass head=, the name of one"
            )
        return candidates[0]


def _declared(module: nn.Module, method: str) -> nn.Module | None:
    """Return the submodule that a transformers model returns from a method such as ``get_output_embeddings``."""
    function = getattr(module, method, None)
    if not callable(function):
        return None
    try:
        submodule = function()
    except (NotImplementedError, AttributeError):
        return None
    return submodule if isinstance(submodule, nn.Module) else None


def _only_embedding(module: nn.Module) -> nn.Embedding:
    embeddings = []
    for submodule in module.modules():
        if isinstance(submodule, nn.Embedding):
            embeddings.append(submodule)
    if len(embeddings) != 1:
        raise LanguageModelError(
            f"{type(module).__name__} has {len(embeddings)} embeddings, but no get_input_embeddings() that returns the one for "
            "the token ids"
        )
    return embeddings[0]


def _keeping(seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        given = arguments[0] if arguments else None
        if isinstance(given, Tensor) and isinstance(output, Tensor) and output.ndim == 3:
            seen[name] = (given, output)

    return keep


def logits_of(output: Any, module: nn.Module) -> Tensor:
    """Return the logits in the output of a language model: the tensor itself, an attribute or an entry ``logits``.

    Raises:
        LanguageModelError: If the output contains no logits.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise LanguageModelError(
            f"{type(module).__name__} returned a {type(output).__name__} without logits; {TOKENS_FIRST}. Allowed: a tensor, a "
            "mapping with 'logits', or an object with .logits, as models of transformers return without return_dict=False"
        )
    return logits
