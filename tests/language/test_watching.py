"""Scores taken while text is generated against those of a second pass over the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scoring.registry import make
from tests.language.language_models import language_model
from tests.models import assert_same_state, state_of

SCORES = ["nll", "entropy", "pseudo_label", "gradnorm", "grand(target=head)"]
PROMPTS = {
    "input_ids": torch.tensor([[0, 0, 1, 5], [1, 7, 9, 4]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without a cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 5, "num_return_sequences": 3},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.5, "return_dict_in_generate": True},
    "beams": {
        "num_beams": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "do_sample": False,
    },
}


@pytest.mark.parametrize("kind", ["untied", "soft cap", "scale"])
@pytest.mark.parametrize("way", WAYS)
def test_equals_a_second_pass(way: str, kind: str) -> None:
    model = language_model(kind).float()
    scores = [score for score in SCORES if way != "beams" or not make(score).needs.labels]
    torch.manual_seed(3)
    unwatched = model.generate(**PROMPTS, max_new_tokens=9, **WAYS[way])  # type: ignore[operator]
    torch.manual_seed(3)
    before = state_of(model)
    with lgm.watching_generation(model, scores) as watch:
        output = model.generate(**PROMPTS, max_new_tokens=9, **WAYS[way])  # type: ignore[operator]
    torch.set_rng_state(before["random"])  # type: ignore[arg-type]
    assert "generate" not in vars(model)
    assert_same_state(before, model)
    found = watch.result(output)
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    assert torch.equal(ids, unwatched if isinstance(unwatched, torch.Tensor) else unwatched.sequences)
    repeats = len(ids) // 2
    prompts = [row[mask.bool()] for row, mask in zip(PROMPTS["input_ids"], PROMPTS["attention_mask"], strict=True)]
    answers = [sequence.answer for sequence in found.sequences]
    assert [len(answer) for answer in answers] == [_length(row[4:]) for row in ids]
    given = [prompts[number // repeats] for number in range(len(ids))]
    expected = lgm.score_generation(model, given, answers, scores)
    assert found.table.column_names == expected.table.column_names
    for name in found.tokens:
        for one, other in zip(found.tokens[name], expected.tokens[name], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)


def _length(answer: torch.Tensor) -> int:
    ends = (answer == 2).nonzero()
    return int(ends[0]) + 1 if len(ends) else len(answer)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "beams without their order": ("entropy", {"num_beams": 2}, "return_dict_in_generate=True"),
    "labels of beams": ("nll", {"num_beams": 2, "return_dict_in_generate": True}, "which beam search decides later"),
    "several tokens at once": ("entropy", {"prompt_lookup_num_tokens": 2}, "draws several tokens"),
    "a backward pass": ("semgrad", {}, "need a backward pass"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    score, arguments, message = REFUSED[case]
    model = language_model()
    with pytest.raises(ValueError, match=message), lgm.watching_generation(model, score):
        model.generate(**PROMPTS, max_new_tokens=3, **arguments)  # type: ignore[operator]
    assert "generate" not in vars(model)


def test_ids_of_another_call_are_refused() -> None:
    model = language_model()
    with lgm.watching_generation(model, "entropy") as watch:
        ids = model.generate(**PROMPTS, max_new_tokens=5, min_new_tokens=5, do_sample=False)  # type: ignore[operator]
    with pytest.raises(ValueError, match="not those that the watched call"):
        watch.result(ids.flip(0))


@pytest.mark.parametrize("returns_scores", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_ends_early_may_win(seed: int, returns_scores: bool) -> None:
    model = language_model()
    options: dict[str, Any] = {
        "num_beams": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": returns_scores,
        "max_new_tokens": 12,
    }
    prompt = torch.tensor([[1, 5 + seed, 7]])
    with lgm.watching_generation(model, ["entropy"]) as watch:
        output = model.generate(prompt, length_penalty=-2.0, **options)  # type: ignore[operator]
    if output.beam_indices is None and not returns_scores:  # before transformers 4.50
        with pytest.raises(ValueError, match="output_scores=True"):
            watch.result(output)
        return
    found = watch.result(output)
    (sequence,) = found.sequences
    expected = lgm.score_generation(model, prompt, [sequence.answer], ["entropy"])
    torch.testing.assert_close(found.tokens["entropy"][0], expected.tokens["entropy"][0])


def test_a_configuration_as_positional_argument_is_read() -> None:
    """One answer ends at its first token and is padded to the length of the other."""
    model, ids = language_model(), torch.tensor([[1, 5, 7], [1, 9, 4]])
    first, other = model(ids).logits[:, -1].argmax(1).tolist()
    assert first != other
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=first, pad_token_id=0)
    with lgm.watching_generation(model, ["entropy"]) as watch:
        output = model.generate(ids, config)  # type: ignore[operator]
    assert len(watch.result(output).sequences[0].answer) == 1 < output.shape[1] - 3


def test_prompts_without_a_mask_lose_their_padding() -> None:
    model = language_model()
    with lgm.watching_generation(model, ["entropy"]) as watch:
        output = model.generate(PROMPTS["input_ids"], max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert [sequence.prompt for sequence in watch.result(output).sequences] == [2, 4]


@pytest.mark.parametrize("is_given", [True, False])
def test_prompts_with_padding_at_their_end_are_refused(is_given: bool) -> None:
    model, ids = language_model(), torch.tensor([[1, 5, 0], [1, 7, 9]])
    options = {"attention_mask": (ids != 0).long()} if is_given else {}
    with pytest.raises(ValueError, match="padded on the right"), lgm.watching_generation(model, ["entropy"]):
        model.generate(ids, max_new_tokens=3, do_sample=False, **options)  # type: ignore[operator]


def test_prompts_as_embeddings_are_refused() -> None:
    model = language_model()
    embedded = model.get_input_embeddings()(torch.tensor([[1, 5]]))  # type: ignore[operator]
    with (
        pytest.raises(ValueError, match="does not show the model the ids"),
        lgm.watching_generation(model, ["entropy"]),
    ):
        model.generate(inputs_embeds=embedded, max_new_tokens=3, do_sample=False)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_an_empty_cache_may_be_passed() -> None:
    from transformers import DynamicCache

    model, prompt = language_model(), torch.tensor([[1, 5, 7]])
    scores = []
    for cache in (None, DynamicCache()):
        with lgm.watching_generation(model, ["entropy"]) as watch:
            ids = model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        scores.append(watch.result(ids).tokens["entropy"][0])
    torch.testing.assert_close(*scores)
    with (
        pytest.raises(ValueError, match="does not show the model the ids"),
        lgm.watching_generation(model, ["entropy"]),
    ):
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
