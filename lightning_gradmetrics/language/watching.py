"""Scores tokens while ``generate`` draws them, without a second pass and without storing logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.logit_map import recognised_map
from lightning_gradmetrics.language.generation import joined, padding_of, token_scores
from lightning_gradmetrics.language.model import LanguageModel, LanguageModelError
from lightning_gradmetrics.language.plan import GenerationScores, planned
from lightning_gradmetrics.language.scored import ScoredGeneration
from lightning_gradmetrics.language.sequences import PromptAndAnswer
from lightning_gradmetrics.language.token_rows import TokenRows
from lightning_gradmetrics.scoring.registry import ScoreLike
from lightning_gradmetrics.scoring.states import check_fitted

__all__ = ["WatchedGeneration", "watching_generation"]

SEVERAL_TOKENS = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""Arguments of ``generate`` with which one call of the model draws more or less than one token."""

WITHOUT_PROMPT = ("inputs_embeds", "past_key_values", "cache")
"""Arguments of ``generate`` with which the model does not receive the token ids of the whole prompt."""

POSITIONAL = ("inputs", "generation_config")
"""The names of the positional arguments of ``generate``."""


@contextmanager
def watching_generation(
    model: nn.Module,
    scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
    *,
    head: str | None = None,
) -> Iterator[WatchedGeneration]:
    r"""Score the tokens that ``model.generate`` draws inside the block, from the logits before any sampling rule.

    Hooks read the input and the output of the head at the last position of each call, and compute the scores
    immediately. There is no second pass, and only the logits of one step are stored. Greedy search and all kinds of
    sampling work, including several answers per prompt. Beam search needs ``return_dict_in_generate=True``, and before
    transformers 4.50 also ``output_scores=True``.

    Args:
        model: A causal language model with ``generate``: of transformers, or a peft model around one.
        scores: Scores of tokens, as in :func:`score_generation`. Scores that need a backward pass are refused.
        head: The name of the head; found automatically.

    Returns:
        A context whose value is a :class:`WatchedGeneration`; after the block ``watch.result(ids)`` returns the scores.

    Raises:
        ValueError: If a score is not defined for tokens, or ``generate`` draws several tokens in one call of the model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=0, pad_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> with watching_generation(model, ["entropy", "nll"]) as watch:
        ...     ids = model.generate(torch.tensor([[1, 5]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        >>> watch.result(ids).tokens["entropy"][0].shape
        torch.Size([3])
    """
    plan = planned(scores)
    if plan.sequences:
        names = ", ".join(score.name for score in plan.sequences)
        raise ValueError(f"the scores {names} need a backward pass: pass the answers to score_generation afterwards")
    check_fitted(plan.tokens, model)
    watch = WatchedGeneration(LanguageModel(model, head), plan)
    with watch.attached():
        yield watch


class WatchedGeneration:
    """The recorded scores of one call of ``generate``.

    Args:
        model: The model.
        plan: The scores.
    """

    def __init__(self, model: LanguageModel, plan: GenerationScores) -> None:
        if model.head_name is None or not hasattr(model.module, "generate"):
            raise LanguageModelError(
                f"{type(model.module).__name__} has no generate and no output embeddings of transformers; score its text "
                "with score_generation"
            )
        self.model, self.plan = model, plan
        self._arguments: Mapping[str, Any] | None = None
        self._beams = 1
        self._inputs: list[Tensor] = []
        self._mask: Tensor | None = None
        self._head_call: tuple[Tensor, Tensor] | None = None
        self._pending: TokenRows | None = None
        self._steps: list[dict[str, Tensor]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the model inside the block; hooks and the replaced ``generate`` are removed after it."""
        module, owner = self.model.module, self._owner()
        with ExitStack() as stack:
            stack.callback(self.model.embedding.register_forward_pre_hook(self._embedding_called).remove)
            stack.callback(self.model.head.register_forward_hook(self._head_returned).remove)
            stack.callback(owner.register_forward_pre_hook(self._model_called, with_kwargs=True).remove)
            stack.callback(owner.register_forward_hook(self._model_returned).remove)
            stack.callback(_replace_generate(module, self._generating))
            yield

    def _owner(self) -> nn.Module:
        """Return the module that contains the head and turns its output into the logits."""
        assert self.model.head_name is not None
        return self.model.module.get_submodule(self.model.head_name.rpartition(".")[0])

    def _generating(self, arguments: Mapping[str, Any]) -> None:
        """Read the arguments of a call of ``generate``, and refuse those that cannot be watched."""
        if self._arguments is not None:
            raise ValueError("generate was called twice inside watching_generation; use one block per call")
        self._arguments = arguments
        config = arguments.get("generation_config") or getattr(self.model.module, "generation_config", None)
        for name in SEVERAL_TOKENS:
            if arguments.get(name, getattr(config, name, None)) is not None:
                raise ValueError(
                    f"generate({name}=...) draws several tokens in one call of the model: use score_generation"
                )
        for name in WITHOUT_PROMPT:
            if arguments.get(name) is not None and not _is_empty_cache(arguments[name]):
                raise ValueError(
                    f"generate({name}=...) does not show the model the ids of the prompt: use score_generation"
                )
        _check_left_padded(arguments.get("attention_mask"))
        self._beams = arguments.get("num_beams") or getattr(config, "num_beams", None) or 1
        returns_dict = arguments.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False))
        if self._beams > 1 and not returns_dict:
            raise ValueError(
                "beam search reorders its rows: pass return_dict_in_generate=True to generate, and its output to "
                "watch.result"
            )
        needing = [score.name for score in self.plan.tokens if score.needs.labels]
        if self._beams > 1 and needing:
            raise ValueError(
                f"the scores {', '.join(needing)} need the token that follows each beam, which beam search decides later: use "
                "score_generation"
            )

    # Hooks

    def _model_called(self, module: nn.Module, arguments: Any, named: Mapping[str, Any]) -> None:
        """Keep the mask of the prompts, which ``generate`` makes from the padding id if the user gives none."""
        mask = named.get("attention_mask")
        if not self._inputs and isinstance(mask, Tensor) and mask.ndim == 2:
            _check_left_padded(mask)
            self._mask = mask

    def _embedding_called(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        ids = arguments[0]
        self._score_pending(ids[:, -1])
        self._inputs.append(ids.detach().clone() if not self._inputs else ids[:, -1].detach().clone())

    def _head_returned(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._head_call = (arguments[0][:, -1].detach(), output[:, -1].detach())

    def _model_returned(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._head_call is None:
            return
        features, head_output = self._head_call
        logits = output.logits[:, -1].detach().clone()
        logit_map = recognised_map(head_output, logits)
        if logit_map is None:
            raise LanguageModelError(
                "the model's logits are neither its head's output nor a scaled or capped function of it, so the gradient of "
                "the head is unknown"
            )
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        lengths = (1,) * len(logits)
        self._pending = TokenRows(logits, features.clone(), head_output.clone(), labels, lengths, logit_map)
        self._head_call = None

    def _score_pending(self, tokens: Tensor) -> None:
        """Score the previous step, whose tokens are now known."""
        rows = self._pending
        if rows is None:
            return
        self._pending = None
        labelled = TokenRows(
            rows.logits, rows.features, rows.output, tokens.to(rows.logits.device), rows.lengths, rows.logit_map
        )
        step = {}
        with torch.no_grad():
            for name, values in token_scores(self.model, self.plan, labelled).items():
                step[name] = torch.cat(values)
        self._steps.append(step)

    # The result

    def result(self, output: Any) -> ScoredGeneration:
        """Return the scores of the answers, each up to and including its first end token.

        Args:
            output: The result of ``generate``: the ids ``(N, P + T)``, or an output with ``sequences``.

        Raises:
            ValueError: If the output does not come from the watched call.
        """
        sequences = output if isinstance(output, Tensor) else output.sequences
        if self._arguments is None or not self._inputs:
            raise ValueError("no call of model.generate was seen inside watching_generation")
        width = self._inputs[0].shape[1]
        answers = sequences[:, width:].cpu()
        self._score_pending(sequences[:, -1])
        has_all_steps = len(self._steps) == answers.shape[1]
        if self._beams > 1:  # a beam that ended early may win
            has_all_steps = len(self._steps) >= answers.shape[1]
        if not has_all_steps:
            raise ValueError(
                f"generate called the model {len(self._steps)} times for {answers.shape[1]} tokens; expected one call per "
                "token: use score_generation"
            )
        if self._beams > 1:
            return self._collected(sequences.cpu(), width, _order_of_beams(output))
        self._check_tokens(answers)
        return self._collected(sequences.cpu(), width, None)

    def _check_tokens(self, answers: Tensor) -> None:
        """Compare the tokens that the model received with those of the result."""
        for step, received in enumerate(self._inputs[1:]):
            if not torch.equal(received.cpu(), answers[:, step]):
                raise ValueError(
                    "these ids are not those that the watched call of generate returned, or not in its order"
                )

    def _collected(self, ids: Tensor, width: int, beams: Tensor | None) -> ScoredGeneration:
        names = [score.name for score in self.plan.tokens]
        columns = {}
        for name in names:
            columns[name] = torch.stack([step[name] for step in self._steps], 1)
        tokens: dict[str, list[Tensor]] = {name: [] for name in names}
        sequences: list[PromptAndAnswer] = []
        for number, row in enumerate(ids):
            length = self._length(row[width:]) if beams is None else int((beams[number] >= 0).sum())
            prompt = row[:width][self._is_prompt(number, len(ids), width)]
            sequences.append(PromptAndAnswer(torch.cat([prompt, row[width : width + length]]), len(prompt)))
            rows = torch.full((length,), number) if beams is None else beams[number, :length]
            for name in names:
                tokens[name].append(columns[name][rows, torch.arange(length)])
        return joined(sequences, self.plan, [(tokens, {})])

    def _length(self, answer: Tensor) -> int:
        """Return the number of tokens up to and including the first end token."""
        assert self._arguments is not None
        config = self._arguments.get("generation_config") or self.model.module
        ends = set(padding_of(config, None).ends)
        end_ids = self._arguments.get("eos_token_id")
        if end_ids is not None:
            ends = set(torch.as_tensor(end_ids).flatten().tolist())
        is_end = torch.zeros_like(answer, dtype=torch.bool)
        for end in ends:
            is_end |= answer == end
        return int(is_end.nonzero()[0]) + 1 if is_end.any() else len(answer)

    def _is_prompt(self, number: int, rows: int, width: int) -> Tensor:
        """Return which ids of a row's prompt are tokens instead of padding."""
        assert self._arguments is not None
        mask_of_call = self._arguments.get("attention_mask")
        mask = self._mask if mask_of_call is None else mask_of_call
        if mask is None:
            return torch.ones(width, dtype=torch.bool)
        is_prompt: Tensor = mask[number * len(mask) // rows].bool().cpu()
        return is_prompt


def _order_of_beams(output: Any) -> Tensor:
    """Return the number of the row that each token was drawn in, ``(N, T)``; -1 after the end."""
    beams: Tensor | None = output.beam_indices
    if beams is None:  # before transformers 4.50
        raise ValueError("generate did not return the order of the beams: pass output_scores=True to it")
    return beams.cpu()


def _is_empty_cache(value: Any) -> bool:
    """Return whether a value is a cache of keys without tokens, as a user passes to choose its kind."""
    length = getattr(value, "get_seq_length", None)
    return length is not None and int(length()) == 0


def _check_left_padded(mask: Any) -> None:
    """Refuse prompts with padding at their end, where ``generate`` would continue the padding."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, -1] == 0).any()):
        raise ValueError(
            "a prompt is padded on the right, so generate continues its padding and not its text: set "
            "tokenizer.padding_side = 'left'"
        )


def _replace_generate(module: nn.Module, before: Callable[[Mapping[str, Any]], None]) -> Callable[[], None]:
    """Make ``generate`` call a function with its arguments first; return a function that undoes this."""
    own = module.__dict__.get("generate")
    generate: Callable[..., Any] = module.generate  # type: ignore[assignment]

    def watched(*arguments: Any, **named: Any) -> Any:
        before({**dict(zip(POSITIONAL, arguments, strict=False)), **named})
        return generate(*arguments, **named)

    def undo() -> None:
        del module.__dict__["generate"]
        if own is not None:
            module.__dict__["generate"] = own

    module.__dict__["generate"] = watched
    return undo
