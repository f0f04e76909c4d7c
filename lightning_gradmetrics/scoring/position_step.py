"""Reads batches of models with one prediction per position, and finds their heads by comparing outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.class_axis import class_axis, classes_second
from lightning_gradmetrics.classifier.composition import Composition, Part, compose, recompose, reproduces
from lightning_gradmetrics.classifier.forward import Inputs, call, logits_in, map_tensors, preserved
from lightning_gradmetrics.classifier.head import Head, HeadNotFoundError, LayerCall
from lightning_gradmetrics.classifier.logit_map import IDENTITY, LogitMap, recognised_map
from lightning_gradmetrics.classifier.observation import redirected
from lightning_gradmetrics.classifier.patches import patches_of
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.head_features import Block, HeadFeatures, Term
from lightning_gradmetrics.gradients.precision import at_least_float32
from lightning_gradmetrics.scoring.agreement import OTHER_LOGITS, check_same_logits
from lightning_gradmetrics.scoring.batch import ObservedBatch

__all__ = ["PositionReader"]


class PositionReader:
    """Reads the batches of a model with one prediction per position, and finds its heads in the first batch.

    Args:
        model: The model that is scored.
        head: The name of the layer whose output is scored, or ``None`` to find the heads of the model's logits.
        logits_fn: Returns the logits from the model's output.
    """

    def __init__(self, model: nn.Module, head: str | None, logits_fn: Callable[[Any], Tensor]) -> None:
        self.model = model
        self.head = head
        self.logits_fn = logits_fn
        self.axis: int | None = None
        self.composition: Composition | None = None
        self._scores_output = False
        self._map = IDENTITY

    def logits(self, logits: Tensor, calls: Sequence[LayerCall], inputs: Inputs | None) -> Tensor:
        """Return the logits with the classes on axis 1."""
        if self.axis is None:
            self.axis = class_axis(logits, self.model, calls, inputs, self.logits_fn is logits_in)
        return classes_second(logits, self.axis)

    def observing(self) -> AbstractContextManager[list[LayerCall]]:
        """Copy inputs and outputs of the heads inside the block, once they are known."""
        return nullcontext([]) if self.composition is None else capturing(self._candidates(0))

    def batch(
        self, logits: Tensor, inputs: Inputs | None, called: nn.Module, calls: Sequence[LayerCall] = ()
    ) -> ObservedBatch:
        """Return a batch with the input of its heads.

        Args:
            logits: The logits of the step's call, with the classes on axis 1.
            inputs: The arguments of that call.
            called: The module that was called.
            calls: The calls of the heads in the step; without them an additional forward pass runs.

        Raises:
            HeadNotFoundError: If the heads cannot be determined.
        """
        if self.composition is None:
            self._find(logits, self._known(inputs), called)
        assert self.composition is not None
        own = logits
        if not calls:
            calls, own = self._forward(self._known(inputs), called, self._candidates(0), logits.ndim)
            check_same_logits(own, logits, f"{type(self.model).__name__} {OTHER_LOGITS}")
        if self._scores_output:
            own = logits = calls[-1].output  # type: ignore[assignment]
        slope = self._slope(calls, own)
        if slope is not None and not self._map.is_identity:
            own = calls[-1].output  # type: ignore[assignment]
        made = None if slope is None else recompose(self.composition, calls, own)
        if made is None or slope is None:
            raise HeadNotFoundError(
                f"the output of {' + '.join(self.composition.names)} produced the model's logits in an earlier batch, but not in this "
                "batch. Pass head=, the layer whose output is the logits, or submodule=, the part to score"
            )
        features, head = self._features(made, calls)
        return ObservedBatch(inputs, logits, features, head, called=called, slope=slope)

    def _slope(self, calls: Sequence[LayerCall], logits: Tensor) -> Tensor | float | None:
        """Return the derivative of the logits with respect to the head's output; ``None`` if the known map does not fit them."""
        if self._map.is_identity:
            return 1.0
        output = calls[-1].output
        if output is None or output.shape != logits.shape or not self._map.holds(output, logits):
            return None
        return self._map.slope(at_least_float32(output))

    def _known(self, inputs: Inputs | None) -> Inputs:
        if inputs is None:
            raise HeadNotFoundError(
                f"the inputs of {type(self.model).__name__} are unknown, and head scores of positions need its head's input: "
                "pass submodule=, the part of the model that the step calls"
            )
        return inputs

    def _find(self, logits: Tensor, inputs: Inputs, called: nn.Module) -> None:
        """Find the heads in a forward pass of the first sample."""
        size = len(logits)

        def first(tensor: Tensor) -> Tensor:
            return tensor[:1] if tensor.ndim and len(tensor) == size else tensor

        candidates = self._candidates(logits.shape[1])
        calls, own = self._forward(map_tensors(inputs, first), called, candidates, logits.ndim)
        self._scores_output = False
        compositions = compose([_first_sample(layer_call) for layer_call in calls], own[:1])
        if not compositions and self.head is not None and calls:
            compositions, self._scores_output = [Composition((Part(self.head),))], True
        if not compositions:
            compositions = self._mapped(calls, own)
        self.composition = self._certain(compositions, calls, own)

    def _mapped(self, calls: Sequence[LayerCall], logits: Tensor) -> list[Composition]:
        """Return the head whose output the model scales or caps, and keep the map; empty if it is not certain."""
        maps: dict[str, LogitMap] = {}
        for layer_call in calls:
            same_shape = layer_call.output is not None and layer_call.output.shape == logits.shape
            recognised = recognised_map(layer_call.output, logits) if same_shape else None  # type: ignore[arg-type]
            if recognised is not None:
                maps[layer_call.name] = recognised
        if len(maps) != 1:
            return []
        ((name, self._map),) = maps.items()
        return [Composition((Part(name),))]

    def _candidates(self, classes: int) -> dict[str, nn.Module]:
        """Return the layers that may be heads: those with one output channel per class."""
        layers = dict(self.model.named_modules())
        if self.head is not None:
            if self.head not in layers or patches_of(layers[self.head]) is None:
                raise HeadNotFoundError(f"head={self.head!r} is neither a convolution nor a linear layer of the model")
            return {self.head: layers[self.head]}
        if self.composition is not None:
            return {name: layers[name] for name in self.composition.names}
        chosen = {}
        for name, layer in layers.items():
            outputs = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
            if outputs == classes and patches_of(layer) is not None:
                chosen[name] = layer
        return chosen

    def _forward(
        self, inputs: Inputs, called: nn.Module, layers: Mapping[str, nn.Module], axes: int
    ) -> tuple[list[LayerCall], Tensor]:
        """Run a forward pass on the inputs, and return the calls of the layers and the logits; one sample may lack its axis."""
        copies = map_tensors(inputs, lambda tensor: tensor.detach().clone())
        with (
            preserved(self.model),
            torch.no_grad(),
            eager(),
            redirected(self.model, called),
            capturing(layers) as calls,
        ):
            output = self.logits_fn(call(self.model, copies))
        assert self.axis is not None
        output = output.unsqueeze(0) if output.ndim == axes - 1 else output
        return calls, classes_second(output.detach(), self.axis)

    def _certain(self, found: Sequence[Composition], calls: Sequence[LayerCall], logits: Tensor) -> Composition:
        """Return the only composition whose layers are linear functions given by their weights."""
        if len(found) > 1:
            names = ", ".join(" + ".join(composition.names) for composition in found)
            raise HeadNotFoundError(
                f"several layers of {type(self.model).__name__} return its logits: {names}. Say which is its head: "
                f"head={found[0].names[0]!r}, for example"
            )
        if not found:
            raise HeadNotFoundError(self._not_found(logits, calls))
        for name in found[0].names:
            self._check_layer(name, next(layer_call for layer_call in calls if layer_call.name == name))
        return found[0]

    def _check_layer(self, name: str, one: LayerCall) -> None:
        layer = self.model.get_submodule(name)
        patches = patches_of(layer)
        assert patches is not None
        if not reproduces(layer, patches, one):
            raise HeadNotFoundError(
                f"the layer {name!r} does not compute the linear function given by its weight and bias, so it cannot be "
                "the head of the closed forms"
            )

    def _not_found(self, logits: Tensor, calls: Sequence[LayerCall]) -> str:
        kind, names = (
            type(self.model).__name__,
            ", ".join(dict.fromkeys(layer_call.name for layer_call in calls)) or "none",
        )
        return (
            f"the head of {kind} could not be found: its logits {tuple(logits.shape)} are not the output of a convolution, a "
            "transposed convolution or a linear layer, resized, cropped, averaged over flips or added "
            f"(layers with {logits.shape[1]} outputs: {names}). A softmax, a CRF, masks multiplied by class scores, or a learned "
            "layer of another kind behind the head have no closed form. Logit scores, as max_softmax and entropy, need no "
            "head; pass logits_fn= or submodule= if the logits are another tensor"
        )

    def _features(self, made: Composition, calls: Sequence[LayerCall]) -> tuple[HeadFeatures, Head]:
        """Return the head's input, and its weight and bias as those of one linear layer."""
        blocks: list[Block] = []
        weights: list[Tensor] = []
        bias: Tensor | None = None
        for name in made.names:
            layer = self.model.get_submodule(name)
            patches = patches_of(layer)
            assert patches is not None
            calls_of_layer = [layer_call for layer_call in calls if layer_call.name == name]
            terms = []
            for summand in made.parts:
                if summand.name == name:
                    features = calls_of_layer[summand.call].features
                    assert features is not None
                    terms.append(Term(features, patches, (summand.carry, made.carry), summand.share))
            blocks += _blocks(terms)
            matrix = patches.weight_matrix(layer.weight)  # type: ignore[arg-type]
            weights.append(torch.block_diag(*matrix.chunk(patches.groups)))  # type: ignore[no-untyped-call]
            if layer.bias is not None:
                share = sum(summand.share for summand in made.parts if summand.name == name)
                added = share * layer.bias  # type: ignore[operator]
                bias = added if bias is None else bias + added  # type: ignore[assignment]
        return HeadFeatures(tuple(blocks)), Head("+".join(made.names), torch.cat(weights, 1), bias)


def _blocks(terms: Sequence[Term]) -> list[Block]:
    """Return one block, or one for each group of channels."""
    patches = terms[0].patches
    if patches.groups == 1:
        return [Block(tuple(terms))]
    blocks = []
    for group in range(patches.groups):
        parts = []
        for term in terms:
            inside = term.input.chunk(patches.groups, 1)[group]
            parts.append(replace(term, input=inside, patches=replace(patches, groups=1)))
        blocks.append(Block(tuple(parts), (group, patches.groups)))
    return blocks


@contextmanager
def capturing(layers: Mapping[str, nn.Module]) -> Iterator[list[LayerCall]]:
    """Copy inputs and outputs of layers inside the block, with the channels on axis 1.

    Args:
        layers: The layers by name.
    """
    calls: list[LayerCall] = []
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_copying(calls, name), with_kwargs=True).remove)
        yield calls


def _copying(calls: list[LayerCall], name: str) -> Callable[..., None]:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer_input = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(layer_input, Tensor) or not isinstance(output, Tensor) or layer_input.ndim < 3:
            return
        axis = -1 if isinstance(module, nn.Linear) else 1
        features, made = layer_input.detach().clone().movedim(axis, 1), output.detach().clone().movedim(axis, 1)
        calls.append(LayerCall(name, features, made, tuple(features.shape), tuple(made.shape)))

    return after


def _first_sample(one: LayerCall) -> LayerCall:
    assert one.features is not None and one.output is not None
    features, output = one.features[:1], one.output[:1]
    return LayerCall(one.name, features, output, tuple(features.shape), tuple(output.shape))
