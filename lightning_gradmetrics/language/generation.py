"""Scores answers to prompts by a separate, teacher-forced pass of the model over the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import check_model, preserved
from lightning_gradmetrics.classifier.head import LayerCall, head_of
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.gradients.statistics import result_dtype
from lightning_gradmetrics.language.model import HeadCall, LanguageModel, LanguageModelError
from lightning_gradmetrics.language.plan import GenerationScores, planned
from lightning_gradmetrics.language.scored import AGGREGATES, ScoredGeneration
from lightning_gradmetrics.language.sequence_evidence import sequence_evidence
from lightning_gradmetrics.language.sequences import (
    Padded,
    Padding,
    PromptAndAnswer,
    check_vocabulary,
    paired,
    right_padded,
)
from lightning_gradmetrics.language.token_rows import TokenRows, answer_rows
from lightning_gradmetrics.scoring.agreement import are_close
from lightning_gradmetrics.scoring.registry import ScoreLike
from lightning_gradmetrics.scoring.states import check_fitted, check_head

__all__ = ["score_generation"]

HEAD_GRADIENT = "gradient"
"""The name of the aggregate that is computed from the head's gradient of the sequence's mean loss."""


def score_generation(
    model: nn.Module,
    prompts: Any,
    answers: Any,
    scores: ScoreLike | Iterable[ScoreLike] | Mapping[str, ScoreLike],
    *,
    batch_size: int = 8,
    aggregates: Sequence[str] = ("mean", "max"),
    head: str | None = None,
    pad_token_id: int | None = None,
    engine: str = "auto",
) -> ScoredGeneration:
    r"""Score answers of a causal language model, token by token and as sequences; higher = more uncertain.

    The text may have any source; it is passed through the model once, padded on the right. The score of a token is
    computed from the logits that predict it; for example, ``max_softmax`` is ``1 - max_v p(v)`` of that prediction.

    - Scores of the logits, the labels (the tokens themselves) and the head: one value per token. The gradient of the
      head's weight covers its use as the head only, even if the weight is tied to the input embedding.
    - Scores with ``target="tied"`` (both uses of a tied weight), ``"all"`` or a pattern: one value per sequence, of the
      gradient of the mean loss over the answer's tokens.
    - ``"semgrad"`` and ``"hybridgrad"``: one value per sequence, from one more forward and backward pass.

    Args:
        model: A causal language model: of transformers, a peft model around one, or any module from token ids ``(N, T)``
            to logits ``(N, T, V)``. It is left unchanged.
        prompts: Token ids: lists of lists, lists of tensors, a tensor ``(N, P)``, or the output of a tokenizer
            (``input_ids`` and ``attention_mask``, padded on either side). Each needs at least one token.
        answers: Token ids in the same forms, one answer per prompt. In a tensor, -100 is padding.
        scores: Names, objects or a mapping, as in :func:`lightning_gradmetrics.score`.
        batch_size: The number of sequences in one forward pass.
        aggregates: The summaries of an answer's tokens in the table: ``mean``, ``sum``, ``max``, ``min``. ``gradient``
            adds scores of the head's gradient of the sequence's mean loss.
        head: The name of the head; found automatically if the model names it or its output is the logits.
        pad_token_id: The padding of a tensor of answers; by default that of the model's ``generate``.
        engine: The engine of scores with other targets than the head.

    Returns:
        The scores: ``.table`` has one row per sequence, ``.tokens[name]`` has one tensor ``(T_i,)`` per answer, and
        ``.spans(...)`` returns one row per span of tokens.

    Raises:
        ValueError: If a score is not defined for text, a prompt or an answer is empty, a token id is outside the vocabulary,
            the model is in train mode, or its logits depend on later tokens.
        TypeError: If the prompts or answers are not token ids.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11)).eval()
        >>> scored = score_generation(model, [[1], [1, 2]], [[3, 4], [5]], ["nll", "entropy"])
        >>> [tuple(answer.shape) for answer in scored.tokens["entropy"]], scored.table.num_rows
        ([(2,), (1,)], 2)
    """
    _check_arguments(model, batch_size, aggregates)
    plan = planned(scores, head_gradient=HEAD_GRADIENT in aggregates)
    check_fitted([*plan.tokens, *plan.sequences], model)
    language_model = LanguageModel(model, head)
    sequences = paired(prompts, answers, padding_of(model, pad_token_id))
    if language_model.vocabulary is not None:
        check_vocabulary(sequences, language_model.vocabulary)
    parts = []
    for start in range(0, len(sequences), batch_size):
        batch = right_padded(sequences[start : start + batch_size], language_model.device)
        parts.append(_scored_batch(language_model, batch, plan, engine, is_first=start == 0))
    summaries = tuple(aggregate for aggregate in aggregates if aggregate != HEAD_GRADIENT)
    return joined(sequences, plan, parts, summaries)


def _check_arguments(model: nn.Module, batch_size: int, aggregates: Sequence[str]) -> None:
    check_model(model)
    allowed = [*AGGREGATES, HEAD_GRADIENT]
    for aggregate in (aggregates,) if isinstance(aggregates, str) else aggregates:
        if aggregate not in allowed:
            raise ValueError(f"unknown aggregate {aggregate!r}; available: {', '.join(allowed)}")
    if isinstance(aggregates, str) or batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size}, aggregates={aggregates!r}; expected at least 1, and a sequence of names"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(
                f"the dropout {name!r} is in train mode, so scores would be random: call model.eval() first"
            )


def padding_of(model: Any, pad_token_id: int | None) -> Padding:
    """Return the padding of generated answers, from the model's configuration for ``generate``.

    Args:
        model: The model, or a configuration for ``generate``.
        pad_token_id: The id of the padding, if the user gave one.
    """
    config = getattr(model, "generation_config", None) or getattr(model, "config", None) or model
    ends = getattr(config, "eos_token_id", None)
    end_ids = [] if ends is None else list(torch.tensor([ends]).flatten().tolist())
    pad = getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id
    if pad is None and end_ids:
        pad = end_ids[0]  # generate pads with it
    return Padding(pad, frozenset(end_ids))


def _scored_batch(
    model: LanguageModel, batch: Padded, plan: GenerationScores, engine: str, is_first: bool
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Return the scores of one batch: of tokens, one tensor per answer; and of sequences ``(N,)``."""
    rows: TokenRows | None = None
    tokens: dict[str, list[Tensor]] = {}
    values: dict[str, Tensor] = {}
    if plan.tokens or plan.needs.gradients or is_first:
        with preserved(model.module), torch.no_grad(), eager():
            call = model(batch.ids, batch.mask, batch.needed)
            if is_first:
                _check_causal(model, batch, call)
            rows = answer_rows(call, batch)
            tokens = token_scores(model, plan, rows)
    if plan.sequences or plan.of_head:
        evidence = sequence_evidence(model, batch, rows, plan.needs, engine)
        for score in plan.sequences:
            values[score.name] = score(evidence).cpu()
        for name, score in plan.of_head.items():
            values[name] = score(evidence).cpu()
    return tokens, values


def token_scores(model: LanguageModel, plan: GenerationScores, rows: TokenRows) -> dict[str, list[Tensor]]:
    """Return the scores of the tokens of a batch, one tensor per sequence.

    Args:
        model: The model.
        plan: The scores.
        rows: The tokens.
    """
    if not plan.tokens:
        return {}
    head = _head(model, plan, rows)
    blocks: dict[str, list[Tensor]] = {score.name: [] for score in plan.tokens}
    for block in rows.blocks():
        for score in plan.tokens:
            blocks[score.name].append(block.values(score, head).to(result_dtype(rows.logits.dtype)).cpu())
    scores = {}
    for name, values in blocks.items():
        scores[name] = list(torch.cat(values).split(rows.lengths))  # type: ignore[no-untyped-call]
    return scores


def _head(model: LanguageModel, plan: GenerationScores, rows: TokenRows) -> tuple[Tensor, Tensor | None] | None:
    """Return the head's effective weight and bias, if a score reads the head or its input."""
    if not any(score.needs.features for score in plan.tokens):
        return None
    assert model.head_name is not None
    check_head(plan.tokens, model.head_name)
    if type(model.head) is nn.Linear:
        return model.head.weight, model.head.bias
    features, output = rows.features, rows.output
    head = head_of(
        model.module, LayerCall(model.head_name, features, output, tuple(features.shape), tuple(output.shape))
    )
    return head.weight, head.bias


def _check_causal(model: LanguageModel, batch: Padded, call: HeadCall) -> None:
    """Refuse a model whose logits depend on later tokens or on the padding; tested without the last token of the shortest text.

    Raises:
        LanguageModelError: If the logits of the earlier tokens differ.
    """
    lengths = batch.mask.sum(1)
    row = int(lengths.argmin())
    length = int(lengths[row]) - 1
    shorter = model(batch.ids[row : row + 1, :length], batch.mask[row : row + 1, :length])
    offset = batch.ids.shape[1] - call.logits.shape[1]
    if not are_close(call.logits[row, : length - offset], shorter.logits[0, offset:]):
        raise LanguageModelError(
            f"the logits of {type(model.module).__name__} depend on later tokens or on the padding behind a text, so it is not a "
            "causal language model, and no position predicts its next token. Scores of tokens of other models come from "
            "lightning_gradmetrics.score"
        )


def joined(
    sequences: Sequence[PromptAndAnswer],
    plan: GenerationScores,
    parts: Sequence[tuple[dict[str, list[Tensor]], dict[str, Tensor]]],
    aggregates: tuple[str, ...] = ("mean", "max"),
) -> ScoredGeneration:
    """Join the scores of all batches.

    Args:
        sequences: The sequences of all batches.
        plan: The scores.
        parts: The scores of each batch.
        aggregates: The summaries of the tokens in the table.
    """
    tokens: dict[str, list[Tensor]] = {}
    values: dict[str, list[Tensor]] = {}
    for of_tokens, of_sequences in parts:
        for name, answers in of_tokens.items():
            tokens.setdefault(name, []).extend(answers)
        for name, scores_of_batch in of_sequences.items():
            values.setdefault(name, []).append(scores_of_batch)
    whole = {}
    for name, columns in values.items():
        whole[name] = torch.cat(columns)
    return ScoredGeneration(tuple(sequences), tokens, whole, aggregates)
