"""Converts prompts and answers to token ids in right-padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NO_PADDING", "Padded", "Padding", "PromptAndAnswer", "check_vocabulary", "paired", "right_padded"]

IGNORED = -100
"""The id of padding in label tensors."""


@dataclass(frozen=True)
class Padding:
    """The padding of tensors of token ids.

    Args:
        pad: The id of the padding, or ``None`` if there is none.
        ends: The ids that end an answer.
    """

    pad: int | None = None
    ends: frozenset[int] = frozenset()

    def cut(self, answer: Tensor) -> Tensor:
        """Return an answer without the padding at its end; if padding and end token have the same id, one is kept."""
        if self.pad is None:
            return answer
        is_token = answer != self.pad
        length = int(is_token.nonzero().max()) + 1 if is_token.any() else 0
        return answer[: length + 1] if self.pad in self.ends else answer[:length]

    def check_prompt(self, prompt: Tensor, number: int) -> None:
        """Refuse a row of a tensor that begins or ends with the padding id, because it may be padding or a token."""
        if self.pad is not None and len(prompt) and self.pad in (int(prompt[0]), int(prompt[-1])):
            raise ValueError(
                f"prompt {number} begins or ends with {self.pad}, the padding id, and in a tensor padding is indistinguishable "
                "from tokens: pass the mapping with input_ids and attention_mask that the tokenizer returned, or lists"
            )


NO_PADDING = Padding()


@dataclass(frozen=True)
class PromptAndAnswer:
    """One sequence.

    Args:
        ids: All token ids ``(P + A,)``.
        prompt: The number of prompt tokens ``P``, at least 1.
    """

    ids: Tensor
    prompt: int

    @property
    def answer(self) -> Tensor:
        """The token ids of the answer ``(A,)``."""
        return self.ids[self.prompt :]

    @property
    def positions(self) -> Tensor:
        """The positions whose logits predict the answer's tokens, ``(A,)``: one before each token."""
        return torch.arange(self.prompt - 1, len(self.ids) - 1)


@dataclass(frozen=True)
class Padded:
    """A batch of sequences, padded on the right.

    Args:
        sequences: The sequences.
        ids: ``(N, T)``.
        mask: 1 for tokens, 0 for padding, ``(N, T)``.
    """

    sequences: tuple[PromptAndAnswer, ...]
    ids: Tensor
    mask: Tensor

    @property
    def needed(self) -> int:
        """The number of final positions that include every position that predicts an answer token."""
        first = min(sequence.prompt for sequence in self.sequences) - 1
        return self.ids.shape[1] - first


def right_padded(sequences: Sequence[PromptAndAnswer], device: torch.device) -> Padded:
    """Return a batch, padded on the right with the id 0.

    Args:
        sequences: The sequences.
        device: The device of the batch.

    Example:
        >>> short, long = paired([[1], [1, 5]], [[2], [3, 4]])
        >>> right_padded([short, long], torch.device("cpu")).ids
        tensor([[1, 2, 0, 0],
                [1, 5, 3, 4]])
    """
    ids = torch.nn.utils.rnn.pad_sequence([sequence.ids for sequence in sequences], batch_first=True)
    lengths = torch.tensor([len(sequence.ids) for sequence in sequences])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return Padded(tuple(sequences), ids.to(device), mask.long().to(device))


def paired(prompts: Any, answers: Any, padding: Padding = NO_PADDING) -> list[PromptAndAnswer]:
    """Return the sequences of prompts and their answers.

    Args:
        prompts: Token ids: a list of lists or of tensors ``(P,)``, a tensor ``(N, P)``, or a mapping with ``input_ids``
            ``(N, P)`` and ``attention_mask``, as returned by a tokenizer.
        answers: Token ids, in the same forms. In a tensor ``(N, A)``, the id -100 is padding.
        padding: The padding of tensors ``(N, A)`` of answers. Lists and mappings have none.

    Raises:
        ValueError: If the numbers of prompts and answers differ, or a prompt or an answer is empty.
        TypeError: If the values are not token ids.

    Example:
        >>> [(sequence.ids.tolist(), sequence.prompt) for sequence in paired([[1, 2]], [[3, 4]])]
        [([1, 2, 3, 4], 2)]
    """
    prompt_rows = list(_rows(prompts, "prompts"))
    answer_rows = list(_rows(answers, "answers"))
    if isinstance(prompts, Tensor):
        for number, prompt in enumerate(prompt_rows):
            padding.check_prompt(prompt, number)
    if isinstance(answers, Tensor):
        for number, answer in enumerate(answer_rows):
            answer_rows[number] = padding.cut(_without(answer == IGNORED, answer, f"answers[{number}]"))
    if len(prompt_rows) != len(answer_rows):
        raise ValueError(
            f"there are {len(prompt_rows)} prompts and {len(answer_rows)} answers; give one answer per prompt"
        )
    if not prompt_rows:
        raise ValueError("there are no prompts; give at least one prompt and one answer")
    sequences = []
    for number, (prompt, answer) in enumerate(zip(prompt_rows, answer_rows, strict=True)):
        if not len(prompt):
            raise ValueError(
                f"prompt {number} has no tokens, so nothing predicts the first token of its answer: give it at least one, "
                "such as the tokenizer's bos_token_id"
            )
        if not len(answer):
            raise ValueError(f"answer {number} has no tokens: remove it and its prompt")
        sequences.append(PromptAndAnswer(torch.cat([prompt, answer]), len(prompt)))
    return sequences


def check_vocabulary(sequences: Sequence[PromptAndAnswer], size: int) -> None:
    """Refuse token ids that the model's input embedding does not have.

    Args:
        sequences: The sequences.
        size: The number of tokens of the input embedding.

    Raises:
        ValueError: If an id is negative or not below ``size``.

    Example:
        >>> check_vocabulary(paired([[1]], [[2]]), 3)
    """
    for number, sequence in enumerate(sequences):
        outside = (sequence.ids < 0) | (sequence.ids >= size)
        if bool(outside.any()):
            position = int(outside.nonzero()[0])
            source = f"prompt {number}" if position < sequence.prompt else f"answer {number}"
            raise ValueError(
                f"{source} has the token id {int(sequence.ids[position])}, and the model's input embedding has the ids 0 to {size - 1}: "
                "use the tokenizer of this model, or resize the embedding after adding tokens to the tokenizer"
            )


def _rows(given: Any, what: str) -> Iterator[Tensor]:
    if isinstance(given, Mapping):
        yield from _masked_rows(given, what)
    elif isinstance(given, Tensor):
        if given.ndim != 2:
            raise TypeError(f"the {what} are a tensor {tuple(given.shape)}; expected token ids (N, T)")
        yield from _whole(given, what)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        for number, row in enumerate(given):
            yield _row(row, f"{what}[{number}]")
    else:
        raise TypeError(_wrong(given, what))


def _masked_rows(given: Mapping[str, Any], what: str) -> Iterator[Tensor]:
    if "input_ids" not in given or "attention_mask" not in given:
        raise TypeError(
            f"the {what} are a mapping with {', '.join(map(str, given))}; expected input_ids and attention_mask"
        )
    ids, masks = given["input_ids"], given["attention_mask"]
    if len(ids) != len(masks):
        raise ValueError(f"the {what} have {len(ids)} rows of input_ids and {len(masks)} of attention_mask")
    for number, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        row, name = _row(row, f"{what}['input_ids'][{number}]"), f"{what}['attention_mask'][{number}]"
        is_token = torch.as_tensor(mask, device=row.device)
        if is_token.shape != row.shape or bool(((is_token != 0) & (is_token != 1)).any()):
            raise ValueError(f"{name} must have the value 1 at each of the {len(row)} token ids, and 0 at padding")
        yield _without(is_token == 0, row, name)


def _without(padding: Tensor, row: Tensor, name: str) -> Tensor:
    """Return the ids of a row without the padding at its ends."""
    tokens = (~padding).nonzero().flatten()
    if len(tokens) and len(tokens) != int(tokens[-1]) - int(tokens[0]) + 1:
        raise ValueError(
            f"{name} has padding between two tokens, and without it the text would be different: pad at the ends only"
        )
    return row[tokens]


def _row(row: Any, name: str) -> Tensor:
    if isinstance(row, str) or not isinstance(row, (Tensor, Sequence)):
        raise TypeError(_wrong(row, name))
    ids = torch.as_tensor(row)
    if ids.ndim != 1:
        raise TypeError(f"{name} has shape {tuple(ids.shape)}; expected the token ids of one sequence (T,)")
    return _whole(ids, name) if len(ids) else ids.long()


def _whole(ids: Tensor, name: str) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} has the type {ids.dtype}; expected token ids, which are whole numbers")
    return ids.detach().cpu().long()


def _wrong(given: Any, what: str) -> str:
    hint = "; tokenize texts first, as in tokenizer(texts)['input_ids']" if isinstance(given, str) else ""
    return (
        f"{what} is of type {type(given).__name__}; expected token ids: lists of lists, lists of tensors (T,), a tensor "
        f"(N, T), or a mapping with input_ids and attention_mask{hint}"
    )
