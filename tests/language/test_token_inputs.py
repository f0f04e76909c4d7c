"""Prompts and answers in every form, padding, result tables, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

import lightning_gradmetrics as lgm
from lightning_gradmetrics.classifier.logit_map import recognised_map
from lightning_gradmetrics.language.coloured_text import tokens_html
from lightning_gradmetrics.language.sequence_gradients import EmbeddingUse, SequenceFactors, sequence_moments
from lightning_gradmetrics.scoring.registry import make
from tests.language.language_models import ANSWERS, PROMPTS, SIZES, Plain, language_model

SCORES = ["nll", "entropy", "pseudo_label"]


def padded(rows: list[list[int]], left: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length, and their mask."""
    width = max(map(len, rows))
    ids, masks = [], []
    for row in rows:
        fill = [pad] * (width - len(row))
        kept = [1] * len(row)
        ids.append(fill + row if left else row + fill)
        masks.append([0] * len(fill) + kept if left else kept + [0] * len(fill))
    return torch.tensor(ids), torch.tensor(masks)


@pytest.mark.parametrize("left", [True, False])
def test_every_form_of_token_ids_gives_the_same_scores(left: bool) -> None:
    model = language_model()
    expected = lgm.score_generation(model, PROMPTS, ANSWERS, SCORES, batch_size=1)
    ids, mask = padded(PROMPTS, left, 0)
    answer_ids, answer_mask = padded(ANSWERS, left, 0)
    forms = [
        ([torch.tensor(row) for row in PROMPTS], [torch.tensor(row) for row in ANSWERS]),
        ({"input_ids": ids, "attention_mask": mask}, {"input_ids": answer_ids, "attention_mask": answer_mask}),
        ({"input_ids": ids, "attention_mask": mask}, padded(ANSWERS, False, 0)[0]),
        (PROMPTS, padded(ANSWERS, False, -100)[0]),
    ]
    for prompts, answers in forms:
        scored = lgm.score_generation(model, prompts, answers, SCORES)
        for name in SCORES:
            for found, wanted in zip(scored.tokens[name], expected.tokens[name], strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_end_tokens_that_are_the_padding_are_kept_once() -> None:
    model = language_model()
    model.generation_config.pad_token_id = 2  # type: ignore[union-attr]
    answers = torch.tensor([[4, 6, 2, 2], [4, 6, 8, 9], [4, 2, 2, 2]])
    scored = lgm.score_generation(model, PROMPTS, answers, ["nll"])
    assert scored.table.column("token_ids").to_pylist() == [[4, 6, 2], [4, 6, 8, 9], [4, 2]]


def test_the_table_and_spans() -> None:
    model = language_model()
    scored = lgm.score_generation(
        model, PROMPTS, ANSWERS, ["nll", "gradnorm(target=all)"], aggregates=("mean", "sum", "max")
    )
    table = scored.table
    assert table.column_names == [
        "index", "prompt_tokens", "tokens", "nll/mean", "nll/sum", "nll/max", "gradnorm(target=all)", "token_ids", "tokens/nll",
    ]  # fmt: skip
    assert table.column("tokens").to_pylist() == [3, 5, 1] and table.column("prompt_tokens").to_pylist() == [3, 2, 4]
    tokens = table.column("tokens/nll").to_pylist()
    assert tokens[0] == pytest.approx(scored.tokens["nll"][0].tolist())
    assert table.column("nll/sum").to_pylist() == pytest.approx([sum(row) for row in tokens])
    spans = scored.spans([[(0, 2), (2, 3)], [(1, 5)], []])
    assert spans.column("index").to_pylist() == [0, 0, 1] and spans.column("end").to_pylist() == [2, 3, 5]
    assert spans.column("nll/mean").to_pylist() == pytest.approx(
        [sum(tokens[0][:2]) / 2, tokens[0][2], sum(tokens[1][1:]) / 4]
    )
    with pytest.raises(ValueError, match="outside its 1 tokens"):
        scored.spans([[], [], [(0, 2)]])


REFUSED = {
    "a text": (lambda m: lgm.score_generation(m, ["a"], [[1]], "nll"), "tokenize texts first"),
    "an empty prompt": (lambda m: lgm.score_generation(m, [[]], [[1]], "nll"), "prompt 0 has no tokens"),
    "an empty answer": (lambda m: lgm.score_generation(m, [[1]], [[]], "nll"), "answer 0 has no tokens"),
    "a token that the model does not have": (
        lambda m: lgm.score_generation(m, [[1]], [[1, 29]], "nll"),
        "answer 0 has the token id 29, and the model's input embedding has the ids 0 to 28",
    ),
    "a negative token": (
        lambda m: lgm.score_generation(m, [[1], [-1]], [[1], [2]], "nll"),
        "prompt 1 has the token id -1",
    ),
    "a mask with a gap": (
        lambda m: lgm.score_generation(m, {"input_ids": [[1, 5, 7]], "attention_mask": [[1, 0, 1]]}, [[4]], "nll"),
        "padding between two tokens",
    ),
    "a mask that is added to attention": (
        lambda m: lgm.score_generation(m, {"input_ids": [[1, 5]], "attention_mask": [[-1e9, 0.0]]}, [[4]], "nll"),
        "the value 1 at each",
    ),
    "a mask of another length": (
        lambda m: lgm.score_generation(m, {"input_ids": [[1, 5]], "attention_mask": [[1]]}, [[4]], "nll"),
        "each of the 2 token ids",
    ),
    "an answer with a gap": (
        lambda m: lgm.score_generation(m, [[1]], torch.tensor([[4, -100, 6]]), "nll"),
        "padding between two tokens",
    ),
    "other numbers": (lambda m: lgm.score_generation(m, [[1]], [[1], [2]], "nll"), "1 prompts and 2 answers"),
    "padding without a mask": (
        lambda m: lgm.score_generation(m, torch.tensor([[0, 1], [1, 3]]), [[1], [2]], "nll"),
        "padding is indistinguishable",
    ),
    "a prompt token that is not there": (
        lambda m: lgm.score_generation(m, [[1]], [[1]], "semgrad(semantic_token=-2)"),
        "outside prompt 0",
    ),
    "untied weights": (lambda m: lgm.score_generation(m, [[1]], [[1]], "gradnorm(target=tied)"), "share one weight"),
    "an expectation over the vocabulary": (
        lambda m: lgm.score_generation(m, [[1]], [[1]], "exgrad(target=all)"),
        "not defined for a sequence",
    ),
    "another pass": (lambda m: lgm.score_generation(m, [[1]], [[1]], "mc_dropout"), "not defined for generated text"),
    "no parameter": (lambda m: lgm.score_generation(m, [[1]], [[1]], "gradnorm(target='x*')"), "chooses no parameter"),
    "an unknown aggregate": (lambda m: lgm.score_generation(m, [[1]], [[1]], "nll", aggregates=("median",)), "median"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call(language_model())


def test_active_dropout_and_models_that_are_not_causal_are_refused() -> None:
    gpt2 = language_model("learned positions").train()
    with pytest.raises(ValueError, match=r"call model\.eval"):
        lgm.score_generation(gpt2, PROMPTS, ANSWERS, "nll")
    plain = language_model("plain")
    plain.mixing = torch.nn.GRU(8, 4, batch_first=True, bidirectional=True).double()
    for prompts, answers in ((PROMPTS, ANSWERS), ([[1, 5]], [[4, 6]])):
        with pytest.raises(ValueError, match="not a causal language model"):
            lgm.score_generation(plain, prompts, answers, "nll")


def test_models_with_an_attention_mask_that_are_not_causal_are_refused() -> None:
    """Their logits do not depend on masked padding, but on later tokens."""
    config = transformers.BertConfig(**SIZES)
    with pytest.raises(ValueError, match="not a causal language model"):
        lgm.score_generation(transformers.BertForMaskedLM(config).eval(), PROMPTS, ANSWERS, "nll")


class Changed(Plain):
    """A model whose output is another form of the head's output."""

    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, ids: torch.Tensor) -> Any:
        return self.change(super().forward(ids))


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "scaled": lambda z: z / 2,
    "capped": lambda z: 0.5 * torch.tanh(z / 0.5),
    "mapping": lambda z: {"logits": z},
}


@pytest.mark.parametrize("change", CHANGES)
def test_heads_of_models_outside_of_transformers_are_found(change: str) -> None:
    torch.manual_seed(0)
    model = Changed(CHANGES[change]).double().eval()
    wanted = {"token": "grand(target=head)", "whole": "grand(target=all)"}
    scored = lgm.score_generation(model, PROMPTS, ANSWERS, wanted)
    for number, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        output = model(torch.tensor([prompt + answer]))
        logits = (output["logits"] if change == "mapping" else output)[0, len(prompt) - 1 : -1]
        losses = F.cross_entropy(logits, torch.tensor(answer), reduction="none")
        norms = [torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0].norm() for loss in losses]
        torch.testing.assert_close(scored.tokens["token"][number], torch.stack(norms))
        gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
        whole = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(scored.values["whole"][number], whole)


@pytest.mark.parametrize(
    ("change", "message"), [("log_softmax", "nor that output scaled"), ("tuple", "without logits")]
)
def test_other_outputs_are_refused(change: str, message: str) -> None:
    changes = {"log_softmax": lambda z: z.log_softmax(-1), "tuple": lambda z: (z,)}
    with pytest.raises(ValueError, match=message):
        lgm.score_generation(Changed(changes[change]).eval(), PROMPTS, ANSWERS, "nll")


def test_closed_forms_for_plain_logits_are_not_used_for_capped_ones() -> None:
    with pytest.raises(ValueError, match="caps its logits"):
        lgm.score_generation(language_model("soft cap"), PROMPTS, ANSWERS, "gradnorm_kl")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_maps_from_the_head_to_the_logits(dtype: torch.dtype) -> None:
    output = (10 * torch.randn(5, 50, dtype=torch.float64)).to(dtype)
    for cap in (3.0, 30.0):
        found = recognised_map(output, cap * torch.tanh(output / cap))
        assert found is not None and found.cap == pytest.approx(cap, rel=16 * torch.finfo(dtype).eps)
    found = recognised_map(output, output / 8)
    assert found is not None and found.scale == pytest.approx(1 / 8, rel=torch.finfo(dtype).eps)
    assert recognised_map(output, output.masked_fill(torch.arange(50) == 7, -torch.inf)) is None
    assert recognised_map(output, output.log_softmax(1)) is None and recognised_map(output, output.clamp(-1, 1)) is None


@pytest.mark.parametrize("is_tied", [False, True])
def test_moments_without_the_gradient(is_tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices and blocks of rows against the stored gradient."""
    monkeypatch.setattr("lightning_gradmetrics.language.sequence_gradients.BLOCK_ENTRIES", 40)
    output, features = torch.randn(4, 23, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    ids, delta = torch.tensor([3, 3, 0, 22, 7]), torch.randn(5, 9, dtype=torch.float64)
    gradient = output.T @ features
    if is_tied:
        gradient.index_add_(0, ids, delta)
    factors = SequenceFactors(output, features, EmbeddingUse(ids, delta) if is_tied else None)
    by_gram = sequence_moments(factors, ["sum", 2.0])
    by_blocks = sequence_moments(factors, ["sum", "max", "min", 0.5, 1.0, 2.0])
    expected = {"sum": gradient.sum(), 2.0: gradient.square().sum()}
    torch.testing.assert_close(by_gram, expected)
    expected |= {
        "max": gradient.max(),
        "min": gradient.min(),
        1.0: gradient.abs().sum(),
        0.5: gradient.abs().sqrt().sum(),
    }
    torch.testing.assert_close(by_blocks, expected)


def test_scores_of_answers_are_found_by_the_functions_of_samples() -> None:
    for name in ("semgrad", "hybridgrad", "semgrad(semantic_token=-2)"):
        with pytest.raises(ValueError, match=r"score_generation\(model, prompts, answers"):
            lgm.score(torch.nn.Linear(2, 2), torch.zeros(1, 2), name)
    with pytest.raises(ValueError, match="did you mean 'semgrad'"):
        make("semgard")
    with pytest.raises(AttributeError, match="score_generation"):
        lgm.scores.semgrad


def test_tokens_are_coloured_by_rank() -> None:
    texts, values = ["a <b>", "c\n", "d", "e"], [0.1, 1000.0, 0.2, 0.3]
    page = tokens_html(texts, values, ["", "x & y", "", ""])
    colours = re.findall(r"rgb\((\d+),(\d+),(\d+)\)", page)
    assert colours == [("255", "255", "255"), ("213", "94", "0"), ("241", "201", "170"), ("227", "148", "85")]
    assert re.sub(r"</?(span|p)[^>]*>", "", page) == "a &lt;b&gt;c<br>de"
    assert 'title="1000, x &amp; y"' in page and 'title="0.1"' in page
    for wrong in ([0.1], [0.1, 0.2, 0.3, float("nan")]):
        with pytest.raises(ValueError, match="one finite value per token"):
            tokens_html(texts, wrong)
    scored = lgm.score_generation(language_model(), PROMPTS, ANSWERS, "entropy")
    pages = scored.html("entropy", lambda ids: f"[{ids[0]}]").split("\n")
    assert [re.sub("<[^>]*>", "", page) for page in pages] == ["".join(f"[{i}]" for i in row) for row in ANSWERS]
    with pytest.raises(ValueError, match="no token scores 'nll'; available: entropy"):
        scored.html("nll", str)
