"""Scores of whole texts that a step passed to a causal language model, by a separate pass over the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_gradmetrics.classifier.forward import preserved
from lightning_gradmetrics.classifier.observation import whole_modules
from lightning_gradmetrics.engine.api import eager
from lightning_gradmetrics.language.model import LanguageModel
from lightning_gradmetrics.language.plan import planned
from lightning_gradmetrics.language.sequence_evidence import sequence_evidence
from lightning_gradmetrics.language.sequences import Padded, PromptAndAnswer, right_padded
from lightning_gradmetrics.language.token_rows import TokenRows, answer_rows
from lightning_gradmetrics.scoring.agreement import check_same_logits
from lightning_gradmetrics.scoring.batch import ObservedBatch, ScoredTokens
from lightning_gradmetrics.scoring.recipes import Score

__all__ = ["ObservedTexts"]

OTHER_LOGITS = (
    "returns different logits for the texts alone, padded on the right, than the step did, so the scores of whole texts would be "
    "those of another computation. Pass submodule=, the language model that the step calls with input_ids and attention_mask; or "
    "call lightning_gradmetrics.score_generation(model, prompts, answers, scores)"
)


@dataclass
class ObservedTexts:
    """Scores of whole texts in the batches of a run.

    A text's prompt is everything before its first scored token, and its answer the scored tokens. The values are those
    of :func:`~lightning_gradmetrics.language.score_generation` for this prompt and this answer.

    Args:
        model: The model of the run.
        scores: Scores of whole texts.
        head: The name of the model's head, or ``None`` to find it.
        engine: The engine of the scores.
    """

    model: nn.Module
    scores: Sequence[Score]
    head: str | None = None
    engine: str = "auto"
    _models: dict[nn.Module, LanguageModel] = field(default_factory=dict, repr=False)

    def values(self, batch: ObservedBatch) -> dict[str, Tensor]:
        """Return the scores of the texts of a batch, ``(N,)`` each; NaN for a text without scored tokens.

        Args:
            batch: An observed batch with one row per scored token.

        Raises:
            ValueError: If the scored tokens of a text do not follow each other, the model returns other logits than in
                the step, or a score is not defined for texts.
        """
        assert batch.tokens is not None
        has_tokens = batch.tokens.lengths > 0
        columns = {}
        for score in self.scores:
            columns[score.name] = torch.full((len(has_tokens),), torch.nan, dtype=torch.float64)
        with torch.inference_mode(False):  # a model may keep its inputs for the backward pass
            texts = _prompts_and_answers(batch.tokens)
            if not texts:
                return columns
            padded = right_padded(texts, batch.logits.device)
        called = batch.called or self.model
        model = self._models[called] = self._models.get(called) or self._language_model(called)
        rows = self._rows(model, padded, batch.logits)
        plan = planned(self.scores)
        evidence = sequence_evidence(model, padded, rows, plan.needs, self.engine)
        for score in plan.sequences:
            columns[score.name][has_tokens.cpu()] = score(evidence).cpu().double()
        return columns

    def _language_model(self, called: nn.Module) -> LanguageModel:
        """Return the model of transformers inside the called module, or the called module if there is none."""
        chosen = called
        for module in whole_modules(called):
            if hasattr(module, "get_output_embeddings"):
                chosen = module
                break
        path = next(name for name, module in self.model.named_modules() if module is chosen)
        prefix = f"{path}." if path else ""
        head = None if self.head is None else self.head.removeprefix(prefix)
        return LanguageModel(chosen, head, prefix)

    def _rows(self, model: LanguageModel, padded: Padded, logits: Tensor) -> TokenRows:
        """Return the tokens of the texts, after comparing their logits with those of the step."""
        with preserved(model.module), torch.no_grad(), eager():
            rows = answer_rows(model(padded.ids, padded.mask, padded.needed), padded)
        check_same_logits(rows.logits, logits, f"{type(model.module).__name__} {OTHER_LOGITS}")
        return rows


def _prompts_and_answers(tokens: ScoredTokens) -> list[PromptAndAnswer]:
    """Return the texts with scored tokens.

    Raises:
        ValueError: If a token inside a text is not scored.
    """
    texts, lengths = [], tokens.lengths.tolist()
    answers = tokens.ids.cpu().split(lengths)  # type: ignore[no-untyped-call]
    positions = tokens.positions.cpu().split(lengths)  # type: ignore[no-untyped-call]
    for number, (answer, places) in enumerate(zip(answers, positions, strict=True)):
        if not len(answer):
            continue
        before = tokens.context[number, : int(places[0])].cpu()
        prompt = before[before >= 0]
        has_gap = int(places[-1]) - int(places[0]) + 1 != len(answer) or bool((before[-len(prompt) :] < 0).any())
        if has_gap:
            raise ValueError(
                f"text {number} of a batch has tokens inside it without a score (labels of -100 or attention_mask 0 between scored "
                "tokens), so its scores of the whole text are not those of one answer to one prompt: score one answer per text, or "
                "remove the scores of whole texts"
            )
        texts.append(PromptAndAnswer(torch.cat([prompt, answer]).long(), len(prompt)))
    return texts
