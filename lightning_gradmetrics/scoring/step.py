"""Observes a step and returns its batch: the model's inputs, its logits and its head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import (
    Inputs,
    as_rows,
    call,
    has_compiled_parts,
    map_tensors,
    preserved,
)
from lightning_gradmetrics.classifier.head import (
    Head,
    HeadNotFoundError,
    LayerCall,
    find_head,
    head_of,
    linear_layers,
    named_layer,
)
from lightning_gradmetrics.classifier.observation import ModelCall, Observation, joined_inputs, observing, whole_modules
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.scoring.agreement import OTHER_LOGITS, check_same_logits
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.evidence import ObservableProbe, Probe
from lightning_gradmetrics.scoring.fitted import fitted_scores
from lightning_gradmetrics.scoring.logit_checks import SingleLogits, check_logits, with_two_columns
from lightning_gradmetrics.scoring.position_step import PositionReader
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.single_row import SingleRowReader, is_one_sample
from lightning_gradmetrics.scoring.text_step import TextReader, not_in_batches_of_texts, token_ids

__all__ = ["StepObserver", "observed"]


def observed(scorer: Scorer, model: nn.Module, inputs: Inputs, labels: Tensor | None = None) -> ObservedBatch:
    """Run a forward pass and return the observed batch.

    Args:
        scorer: The scorer that needs the batch.
        model: A classifier.
        inputs: Its inputs.
        labels: True labels ``(N,)``, or ``None``.

    Example:
        >>> from lightning_gradmetrics.scoring.registry import resolve
        >>> model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4)
        >>> scorer = Scorer(resolve("gradnorm"))
        >>> scorer(scorer.evidence(model, observed(scorer, model, x)))["gradnorm"].shape
        torch.Size([5])
    """
    return replace(StepObserver(scorer, model).own(inputs), labels=labels)


class StepObserver:
    """Observes the steps of one run of one model, and finds the model's head in the first step.

    Args:
        scorer: The scorer that needs the batches.
        model: The model that is scored.
    """

    def __init__(self, scorer: Scorer, model: nn.Module) -> None:
        self.scorer = scorer
        self.model = model
        self._needs_head = scorer.needs(3).features or scorer.head is not None
        self._name = scorer.head
        self._head: Head | None = None
        self._head_weight: Tensor | None = None
        self._whole = whole_modules(model)
        self._layers = dict(model.named_modules()) if scorer.head is None else {}
        if scorer.head is not None:
            self._layers[scorer.head] = named_layer(model, scorer.head)
        self._positions = PositionReader(model, scorer.head, scorer.logits_fn)
        self._head_calls: Sequence[LayerCall] = ()
        self._rows = SingleRowReader(model, scorer.logits_fn)
        self._probes = [] if has_compiled_parts(model) else scorer.needs(3).observable
        self._readers: dict[ObservableProbe, Callable[[int], Tensor | None]] = {}
        self._texts = TextReader(model, self._logits_of_texts)
        self._single = SingleLogits()

    def _logits_of_texts(self, output: Any) -> Tensor:
        """Return the logits ``(N, V, T)`` in the model's output for texts; one text may lack its axis."""
        logits = self.scorer.logits_fn(output)
        return self._positions.logits(logits.unsqueeze(0) if logits.ndim == 2 else logits, (), None)

    @contextmanager
    def observing(self) -> Iterator[Observation]:
        """Observe the model's calls inside the block."""
        with ExitStack() as stack:
            self._head_calls = stack.enter_context(self._positions.observing())
            if self._name is not None and len(self._layers) == 1:  # the step may have replaced the layer
                self._layers = {self._name: named_layer(self.model, self._name)}
            yield self._entered(stack, self._layers)

    def _entered(self, stack: ExitStack, layers: dict[str, nn.Module]) -> Observation:
        """Start to observe the calls of the model and of its layers, and start the observable probes."""
        observation = stack.enter_context(observing(self.model, layers, self.scorer.logits_fn, self._whole))
        self._readers = {}
        for probe in self._probes:
            self._readers[probe] = stack.enter_context(probe.observing(self.model))
        return observation

    def own(self, inputs: Inputs) -> ObservedBatch:
        """Run a forward pass on the inputs and return the observed batch."""
        return self.batch(self._run(inputs), inputs)

    def is_unseen(self, seen: Observation, given: Inputs | None, stepped: nn.Module | None) -> bool:
        """Return whether the step did not call the model, nor a layer of it; compiled models may hide their calls.

        Args:
            seen: The observed calls.
            given: The inputs in the batch.
            stepped: The module whose step was observed; ``None`` for the model.
        """
        if seen.layers or seen.called is not None:
            return False
        return given is None or not (has_compiled_parts(stepped or self.model) or has_compiled_parts(self.model))

    def batch(self, seen: Observation, given: Inputs | None, size: int | None = None) -> ObservedBatch:
        """Return the batch of an observed step that called the model, if its calls can be observed.

        Args:
            seen: The observed calls.
            given: The inputs in the batch; used if the step does not call the model as a whole.
            size: The number of samples in the batch; used if the step calls the model several times.

        Raises:
            HeadNotFoundError: If the head is needed and cannot be determined.
            ValueError: If it is ambiguous which calls of the step belong to the samples.
        """
        if not seen.layers and seen.called is None:
            seen = self._unseen(given)
        if seen.called is None:
            batch = self._from_parts(seen, given, size)
        else:
            batch = self._from_calls(seen, size)
        if (not self._needs_head and batch.features is None) or batch.logits.ndim > 2:
            self._layers = {}
        elif self._name is not None and len(self._layers) > 1:
            self._layers = {self._name: named_layer(self.model, self._name)}
        batch = with_two_columns(batch)
        if batch.one_logit and batch.logits.ndim == 2:
            self._single.add(batch.logits)
        return batch

    def tokens(self, batch: ObservedBatch, labels: Tensor | None, others: Inputs | None = None) -> ObservedBatch:
        """Return a batch of texts with one row per scored token.

        Args:
            batch: An observed batch for which :func:`~lightning_gradmetrics.scoring.text_step.token_ids` finds token ids.
            labels: The labels ``(N, T)``, or ``None``.
            others: The inputs in the dataloader's batch, which may contain the ``attention_mask`` if the call does not.

        Raises:
            ValueError: If it is ambiguous which logits predict which tokens, or a score is not defined per token.
        """
        needs = self.scorer.of_tokens().needs(batch.logits.shape[1])
        of_fitted_gradients = any(score.needs.of_texts for score in fitted_scores(self.scorer.scores))
        if needs.gradients or needs.probes or of_fitted_gradients:
            raise ValueError(not_in_batches_of_texts(self.scorer.scores))
        ids = token_ids(batch)
        assert ids is not None
        return self._texts.batch(batch, ids, labels, others)

    # A step that calls the model as a whole

    def _from_calls(self, seen: Observation, size: int | None, may_run: bool = True) -> ObservedBatch:
        assert seen.called is not None
        module, calls = seen.called
        inputs, logits = self._joined(calls, size)
        if logits is not None:
            logits = self._rows.with_row(logits, module, inputs, size)
        if logits is not None and logits.ndim < 2:
            check_logits(logits)
        if logits is not None and logits.ndim > 2:
            return self._of_positions(seen, inputs, logits)
        if not self._needs_head:
            logits = _existing(logits, calls)
            return ObservedBatch(inputs, logits, called=module, observed=self._observed(calls, len(logits)))
        if may_run and self._is_unobserved(seen):
            return self._from_own_forward(inputs, logits)
        if self.scorer.head is None:
            logits = _existing(logits, calls)
            self._name = self._name or find_head(self.model, seen.layers, as_rows(_existing(calls[0].logits, calls)))
        features, output = self._through_head(seen, inputs, size)
        if self.scorer.head is None:
            self._check_head(output, logits)
        observed = self._observed(calls, len(output))
        return ObservedBatch(inputs, output, features, self._head, called=module, observed=observed)

    def _of_positions(self, seen: Observation, inputs: Inputs | None, logits: Tensor) -> ObservedBatch:
        """Return the batch of a model with one prediction per position."""
        assert seen.called is not None
        module, calls = seen.called
        logits = self._positions.logits(logits, seen.layers, inputs)
        self._layers = {}
        if not self._needs_head:
            return ObservedBatch(inputs, logits, called=module)
        head_calls, self._head_calls = self._head_calls, ()
        return self._positions.batch(logits, inputs, module, head_calls if len(calls) == 1 else ())

    def _from_own_forward(self, inputs: Inputs | None, logits: Tensor | None) -> ObservedBatch:
        """Return the batch of a step with a compiled model, whose layers run no hooks."""
        batch = self._from_calls(self._run(inputs), None, may_run=False)
        if logits is not None and self.scorer.head is None:
            check_same_logits(batch.logits, logits, f"{type(self.model).__name__} {OTHER_LOGITS}")
        return batch

    def _is_unobserved(self, seen: Observation) -> bool:
        """Return whether the hooks of the layers did not run."""
        if self._name is not None:
            return not seen.of_layer(self._name)
        heads = set(linear_layers(self.model))
        return not any(call.name in heads for call in seen.layers)

    def _joined(self, calls: Sequence[ModelCall], size: int | None) -> tuple[Inputs | None, Tensor | None]:
        """Return inputs and logits of the samples, from calls with consecutive parts of the batch or from equal calls."""
        _refuse_transformed(calls)
        if len(calls) == 1:
            return calls[0].inputs, calls[0].logits
        logits = [_existing(call.logits, [call]) for call in calls]
        if _are_equal(logits):
            return calls[0].inputs, logits[0]
        rows = [len(logits_of_call) for logits_of_call in logits]
        joined = _rows_of_all(logits, size, type(self.model).__name__)
        return joined_inputs([call.inputs for call in calls], rows), joined

    def _check_head(self, output: Tensor, logits: Tensor | None) -> None:
        assert logits is not None
        if output.shape == logits.shape:
            same = output.to(logits.dtype)
            if torch.equal(same, logits) or torch.equal(same.nan_to_num(), logits.nan_to_num()):
                return
        raise HeadNotFoundError(
            f"the layer {self._name!r} returned the model's logits in an earlier batch, but not in this one. Pass "
            "head=, the layer whose output is the logits, or submodule=, the part of the model to score"
        )

    # A step that calls parts of the model

    def _from_parts(self, seen: Observation, given: Inputs | None, size: int | None) -> ObservedBatch:
        if self._name is None:
            self._name = self._name_of_parts(seen, given)
        self._needs_head = True
        features, output = self._through_head(seen, given, size)
        return ObservedBatch(given, output, features, self._head)

    def _name_of_parts(self, seen: Observation, given: Inputs | None) -> str:
        """Return the head if only parts of the model were called: the layer whose output ``forward`` returns, or the only one."""
        name = None if given is None else self._name_by_forward(given)
        if name is not None and seen.of_layer(name):
            return name
        called: dict[str, None] = {}
        for layer_call in seen.layers:
            if layer_call.output is not None and layer_call.name in linear_layers(self.model):
                called[layer_call.name] = None
        if name is None and len(called) == 1:
            return next(iter(called))
        kind = type(self.model).__name__
        why = (
            f"its forward ends in {name!r}, which the step does not call" if name else "several layers may be its head"
        )
        if not called:
            why = "no linear layer was called"
        raise HeadNotFoundError(
            f"the step does not call {kind} as a whole, and {why} (called: {', '.join(called) or 'none'}). Pass head=, the "
            "layer whose output is the logits, or submodule=, the part of the model that the step calls"
        )

    def _name_by_forward(self, given: Inputs) -> str | None:
        """Return the layer whose output ``forward`` returns for the batch, or ``None`` if that does not identify one."""
        try:
            observation = self._run(given)
            assert observation.called is not None
            (only,) = observation.called[1]
            return find_head(self.model, observation.layers, _existing(only.logits, [only]))
        except Exception:  # the user's forward may not accept the batch
            return None

    def _unseen(self, given: Inputs | None) -> Observation:
        """Run a forward pass because no call was observed in the step, as happens for compiled models."""
        kind = type(self.model).__name__
        warnings.warn(
            f"no call of {kind} was observed in the step, perhaps because it is compiled: the scores come from its "
            "forward with the inputs in the batch",
            stacklevel=2,
        )
        return self._run(given)

    # Helpers of both kinds of step

    def _run(self, inputs: Inputs | None) -> Observation:
        """Run a forward pass on these inputs and return the observed calls."""
        assert inputs is not None
        layers = self._layers or dict(self.model.named_modules())
        with preserved(self.model), torch.no_grad(), eager():
            copies = map_tensors(inputs, lambda tensor: tensor.detach().clone())
            with ExitStack() as stack:
                observation = self._entered(stack, layers)
                call(self.model, copies)
        return observation

    def _observed(self, calls: Sequence[ModelCall], size: int) -> dict[Probe, Tensor]:
        """Return the results of the observable probes if the model was called once."""
        results: dict[Probe, Tensor] = {}
        if len(calls) != 1:
            return results
        for probe, reader in self._readers.items():
            value = reader(size)
            if value is not None:
                results[probe] = value
        return results

    def _through_head(self, seen: Observation, given: Inputs | None, size: int | None) -> tuple[Tensor, Tensor]:
        """Return the head's input ``(N, D)`` and output ``(N, C)``."""
        assert self._name is not None
        calls = seen.of_layer(self._name)
        if not calls:
            raise HeadNotFoundError(
                f"the head {self._name!r} was not called in this step; pass head=, the layer whose output is the logits, or "
                "submodule=, the part of the model that the step calls"
            )
        weight = named_layer(self.model, self._name)._parameters.get("weight")
        if self._head is None or weight is not self._head_weight:
            self._head, self._head_weight = head_of(self.model, calls[-1]), weight
        is_row = any(one.input_shape is not None and len(one.input_shape) == 1 for one in calls)
        if is_row and not is_one_sample(given, size):
            raise HeadNotFoundError(f"the head {self._name!r} has an input of shape {calls[0].input_shape}")
        return _joined_layer(calls, size)


def _refuse_transformed(calls: Sequence[ModelCall]) -> None:
    for call_of_model in calls:
        logits = call_of_model.logits
        if logits is not None and torch._C._functorch.is_functorch_wrapped_tensor(logits):
            raise ValueError(
                "the step calls the model inside a function of torch.func, such as vmap, so its logits have no values there. Call "
                "the model on the whole batch"
            )


def _joined_layer(calls: Sequence[LayerCall], size: int | None) -> tuple[Tensor, Tensor]:
    """Return features and outputs of the calls of one layer."""
    features, outputs = [], []
    for layer_call in calls:
        if layer_call.features is None or layer_call.output is None:
            raise HeadNotFoundError(f"the head {layer_call.name!r} has an input of shape {layer_call.input_shape}")
        features.append(layer_call.features)
        outputs.append(layer_call.output)
    if _are_equal(outputs):
        return features[0], outputs[0]
    return torch.cat(features), _rows_of_all(outputs, size, f"the head {calls[0].name!r}")


def _are_equal(parts: Sequence[Tensor]) -> bool:
    """Return whether all calls returned equal tensors."""
    first = parts[0]
    return all(later.shape == first.shape and torch.equal(later, first) for later in parts[1:])


def _rows_of_all(parts: Sequence[Tensor], size: int | None, who: str) -> Tensor:
    """Return the rows of consecutive parts of the batch."""
    rows = sum(len(tensor) for tensor in parts)
    if rows != size:
        samples = "an unknown number of samples" if size is None else f"{size} samples"
        raise ValueError(
            f"{who} returned {rows} rows in {len(parts)} calls during a step of {samples}, so it is unknown which rows belong to "
            "the samples. Call the model once for the batch, or for consecutive parts of it"
        )
    return torch.cat(list(parts))


def _existing(logits: Tensor | None, calls: Sequence[ModelCall]) -> Tensor:
    """Return the logits, or raise the error that explains why there are none."""
    if logits is not None:
        return logits
    problem = calls[0].problem
    assert problem is not None
    raise problem
