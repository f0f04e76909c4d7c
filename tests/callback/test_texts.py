"""Batches of texts in a Trainer: the scores of their tokens, the rows of texts, and metrics."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from lightning_gradmetrics.report import write_report
from lightning_gradmetrics.scoring.text_step import TextReader
from tests.callback.runs import Stepped, column, test_run
from tests.language.language_models import language_model

PROMPTS = [[1, 5, 7], [2, 3], [1, 9, 9, 4], [6], [3, 3, 8]]
ANSWERS = [[4, 6, 25], [8, 8, 8, 1, 3], [7], [11, 12, 13, 14], [9, 28]]
SCORES = ["nll", "entropy", "max_softmax", "gradnorm", "pseudo_label", "exgrad", "fisher_trace", "grand(target=head)"]


class LanguageStep(Stepped):
    """Calls the model as examples of transformers do."""

    def step(self, batch: Any) -> Any:
        return self.net(**batch)


def texts(left: bool = False, with_positions: bool = False) -> list[dict[str, Tensor]]:
    """Prompts and answers, padded, with labels of -100 at prompts and padding."""
    width, rows = 9, []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids = prompt + answer
        fill = width - len(ids)
        before, after = (fill, 0) if left else (0, fill)
        row = {
            "input_ids": torch.tensor([0] * before + ids + [0] * after),
            "attention_mask": torch.tensor([0] * before + [1] * len(ids) + [0] * after),
            "labels": torch.tensor([-100] * (before + len(prompt)) + answer + [-100] * after),
        }
        if with_positions:
            row["position_ids"] = (row["attention_mask"].cumsum(0) - 1).clamp(min=0)
        rows.append(row)
    return rows


def run(module: Stepped, data: Any, scores: Any = SCORES, batch_size: int = 2, **options: Any) -> lgm.GradientMetrics:
    """The callback after a test over the data."""
    callback = lgm.GradientMetrics(scores, print_summary=False, **options)
    loaders = (
        [DataLoader(rows, batch_size) for rows in data] if isinstance(data[0], list) else DataLoader(data, batch_size)
    )
    test_run(callback, module, loaders)
    return callback


def assert_tokens(callback: lgm.GradientMetrics, model: nn.Module) -> None:
    """Assert that the results equal a second pass over prompts and answers; norms and rotary embeddings are in float32."""
    expected = lgm.score_generation(model, PROMPTS, ANSWERS, callback.score_names)
    assert callback.results["token_ids"].to_pylist() == ANSWERS
    for name, answers in expected.tokens.items():
        found = callback.results[f"tokens/{name}"].to_pylist()
        for row, answer in zip(found, answers, strict=True):
            torch.testing.assert_close(torch.tensor(row).double(), answer.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["untied", "tied", "bias", "learned positions", "scale", "division"])
def test_tokens_have_the_scores_of_a_second_pass(kind: str) -> None:
    model = language_model(kind)
    assert_tokens(run(LanguageStep(model), texts()), model)


@pytest.mark.filterwarnings("ignore:left out of the results")
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("chosen", [[3, 1, 4, 0, 2], [4, 1]])
def test_texts_that_a_step_reorders_or_selects_keep_their_tokens_and_index(
    chosen: list[int], with_labels: bool
) -> None:
    class Choosing(Stepped):
        def step(self, batch: Any) -> Any:
            keys = batch if with_labels else ("input_ids", "attention_mask")
            return self.net(**{key: batch[key][chosen] for key in keys})

    model = language_model("untied")
    callback, kept = run(Choosing(model), texts(), ["nll", "entropy"], batch_size=5), sorted(chosen)
    expected = lgm.score_generation(model, PROMPTS, ANSWERS, ["nll"]).tokens["nll"]
    assert callback.results["index"].to_pylist() == kept
    assert callback.results["token_ids"].to_pylist() == [ANSWERS[row] for row in kept]
    found = torch.tensor(callback.results["tokens/nll"].combine_chunks().flatten().to_pylist()).double()
    torch.testing.assert_close(found, torch.cat([expected[row] for row in kept]).double(), rtol=1e-5, atol=1e-9)


OF_TEXTS = ["grand", "semgrad", "hybridgrad"]
OF_TIED = [*OF_TEXTS, "gradnorm(target=all)", "pseudo_label(target='*layers.1*',statistic=l2)", "gradnorm(target=tied)"]


def assert_texts(callback: lgm.GradientMetrics, model: nn.Module, rtol: float = 1e-9) -> None:
    """Assert that the scores of whole texts are those of the same prompts and answers."""
    expected = lgm.score_generation(model, PROMPTS, ANSWERS, callback.score_names)
    for name, values in expected.values.items():
        torch.testing.assert_close(column(callback, name).double(), values.double(), rtol=rtol, atol=1e-12)
        assert f"tokens/{name}" not in callback.results.column_names


@pytest.mark.parametrize(
    ("kind", "scores"),
    [("untied", OF_TEXTS), ("tied", [*OF_TIED, "hybridgrad(target=tied)"])],
)
@pytest.mark.slow
def test_scores_of_whole_texts_are_those_of_a_prompt_and_an_answer(kind: str, scores: list[str]) -> None:
    model = language_model(kind)
    callback = run(LanguageStep(model), texts(), ["nll", *scores])
    assert_texts(callback, model)
    assert_tokens(callback, model)
    assert callback.tokens.column_names[-2:] == ["nll", "finite"]


def test_whole_texts_have_the_gradient_of_their_mean_loss() -> None:
    model = language_model("plain")
    ids = torch.randint(29, (4, 7))
    callback = run(Unlabelled(model), [{"ids": row} for row in ids], ["grand", "grand(target='net.mixing.*',p=1)"])
    for number, row in enumerate(ids):
        loss = nn.functional.cross_entropy(model(row[None])[0, :-1], row[1:])
        gradients = dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True)
        )
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        inner = torch.cat([value.flatten() for name, value in gradients.items() if name.startswith("mixing.")])
        assert column(callback, "grand")[number] == pytest.approx(norm.item(), rel=1e-9)
        assert column(callback, callback.score_names[1])[number] == pytest.approx(inner.abs().sum().item(), rel=1e-9)


@pytest.mark.slow
def test_whole_texts_of_any_padding_and_of_a_module_around_the_model() -> None:
    model, scores = language_model("learned positions"), ["entropy", "gradnorm(target=all)", "semgrad"]
    assert_texts(run(LanguageStep(model), texts(left=True, with_positions=True), scores, 3), model, 1e-6)
    callback = run(Around(model), texts(), [*scores, "grand(target='net.*')"])
    assert_texts(run(Around(model), texts(), scores, datasets={"a": "id"}), model, 1e-6)
    everything = lgm.score_generation(model, PROMPTS, ANSWERS, "grand").values["grand"]
    torch.testing.assert_close(column(callback, "grand(target='net.*')").double(), everything, rtol=1e-6, atol=1e-12)


class Around(Stepped):
    """A module that calls itself with the whole batch."""

    def forward(self, batch: Any) -> Any:
        return self.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def step(self, batch: Any) -> Any:
        return self(batch)


class Masking(nn.Module):
    """Keeps the attention mask for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = language_model("plain")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        embedded = self.inner.embedding(input_ids) * attention_mask[..., None]
        logits: Tensor = self.inner.head(self.inner.mixing(embedded)[0])
        return logits


def test_a_model_may_keep_the_mask_for_the_backward_pass() -> None:
    model = Masking().eval()
    callback = run(LanguageStep(model), texts()[:2], ["grand"])
    for number in range(2):
        ids = torch.tensor([PROMPTS[number] + ANSWERS[number]])
        logits = model(ids, torch.ones_like(ids))[0, len(PROMPTS[number]) - 1 : -1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(ANSWERS[number]))
        gradients = [gradient.flatten() for gradient in torch.autograd.grad(loss, [*model.parameters()])]
        assert column(callback, "grand")[number] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-9)


def test_a_run_with_scores_of_whole_texts_alone() -> None:
    rows, model = texts()[:2], language_model("tied")
    rows[0]["labels"] = torch.full((9,), -100)
    callback = run(LanguageStep(model), rows, ["semgrad", "hybridgrad(target=tied)", "gradnorm(target=tied)"])
    expected = lgm.score_generation(model, PROMPTS[1:2], ANSWERS[1:2], callback.score_names)
    for name, values in expected.values.items():
        assert column(callback, name)[1] == pytest.approx(values.item(), rel=1e-9)
    assert callback.results["finite"].to_pylist() == [False, True] and column(callback, "semgrad").isnan().tolist() == [
        True,
        False,
    ]
    assert callback.evaluation is not None and "semgrad" in callback.evaluation.settings["scores"]


def test_rows_are_aggregates_of_tokens() -> None:
    model = language_model()
    callback = run(LanguageStep(model), texts(), ["nll", "entropy"])
    tokens = [torch.tensor(row, dtype=torch.float64) for row in callback.results["tokens/nll"].to_pylist()]
    for name, aggregate in (("nll", torch.mean), ("nll/sum", torch.sum), ("nll/max", torch.amax)):
        torch.testing.assert_close(column(callback, name), torch.stack([aggregate(row) for row in tokens]))  # type: ignore[operator]
    assert callback.results["tokens"].to_pylist() == [len(answer) for answer in ANSWERS]
    logits = model(torch.tensor([PROMPTS[1] + ANSWERS[1]])).logits[0, 1:-1]
    assert callback.results["predicted_ids"].to_pylist()[1] == logits.argmax(1).tolist()
    assert column(callback, "error")[1] == (logits.argmax(1) != torch.tensor(ANSWERS[1])).double().mean()
    table = callback.tokens
    assert table.num_rows == sum(map(len, ANSWERS)) and table["label"].to_pylist() == [*itertools.chain(*ANSWERS)]
    assert table["position"].to_pylist()[:3] == [3, 4, 5] and table["index"].to_pylist()[:4] == [0, 0, 0, 1]


class Shifted(Stepped):
    """A step on (ids, next ids), as used to train models outside of transformers."""

    def step(self, batch: Any) -> Any:
        return self(batch[0])


class Unlabelled(Stepped):
    def step(self, batch: Any) -> Any:
        return self(batch["ids"])


def test_shifted_labels_and_no_labels_are_the_same_tokens() -> None:
    model, ids = language_model("plain"), torch.randint(29, (5, 8))
    expected = lgm.score_generation(model, ids[:, :1], ids[:, 1:], SCORES)
    shifted = run(Shifted(model), list(zip(ids[:, :-1], ids[:, 1:], strict=True)))
    unlabelled = run(Unlabelled(model), [{"ids": row} for row in ids])
    for callback in (shifted, unlabelled):
        assert callback.results["token_ids"].to_pylist() == ids[:, 1:].tolist()
        for name, answers in expected.tokens.items():
            found = torch.tensor(callback.results[f"tokens/{name}"].to_pylist(), dtype=torch.float64)
            torch.testing.assert_close(found, torch.stack(list(answers)), rtol=1e-9, atol=1e-12)


def test_labels_that_the_step_passes_to_the_model_by_name_are_used() -> None:
    class Passing(Stepped):
        def step(self, batch: Any) -> Any:
            return self.net(batch[0], attention_mask=batch[1], labels=batch[2])

    model, names = language_model(), ("input_ids", "attention_mask", "labels")
    assert_tokens(run(Passing(model), [tuple(row[name] for name in names) for row in texts()], ["nll"]), model)


def test_padding_after_a_text_is_not_scored_with_shifted_labels() -> None:
    ids, labels = torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[6, 7, 0, 0, 0]])
    padding = torch.tensor([[False, False, False, True, True]])
    reader = TextReader(nn.Identity(), lambda output: output)
    assert reader._next_tokens(ids, padding, labels).tolist() == [[6, 7, -100, -100, -100]]


def test_padding_on_the_left_needs_positions() -> None:
    model = language_model("learned positions")
    with pytest.raises(ValueError, match="pass position_ids"):
        run(LanguageStep(model), texts(left=True))
    assert_tokens(run(LanguageStep(model), texts(left=True, with_positions=True)), model)


@pytest.mark.parametrize(("left", "has_labels"), [(True, True), (False, False)])
def test_padding_without_a_mask_is_refused(left: bool, has_labels: bool) -> None:
    rows = texts(left)
    for row in rows:
        del row["attention_mask"]
        if not has_labels:
            del row["labels"]
    with pytest.raises(ValueError, match="the padding id of the model, and the batch has no attention_mask"):
        run(LanguageStep(language_model()), rows, ["entropy"])


def test_padding_without_a_mask_has_no_score_where_labels_mark_it() -> None:
    rows, model = texts(), language_model()
    for row in rows:
        del row["attention_mask"]
    assert_tokens(run(LanguageStep(model), rows), model)


@pytest.mark.slow
def test_a_text_without_scored_tokens_has_no_value() -> None:
    rows = texts()[:2]
    rows[0]["labels"] = torch.full((9,), -100)
    callback = run(LanguageStep(language_model()), rows, ["entropy"])
    assert callback.results["tokens"].to_pylist() == [0, 5] and callback.results["finite"].to_pylist() == [False, True]
    assert callback.results["tokens/entropy"].to_pylist()[0] == []


def both_ways() -> nn.Module:
    model = language_model("plain")
    model.mixing = nn.GRU(8, 4, batch_first=True, bidirectional=True).double()
    return model


class Embedded(Stepped):
    """A step that passes embeddings to the model."""

    def step(self, batch: Any) -> Any:
        return self.net(inputs_embeds=self.net.get_input_embeddings()(batch["input_ids"]))


def two_answers() -> list[dict[str, Tensor]]:
    """A text whose second scored token does not follow the first."""
    ids = torch.arange(1, 7)
    return [{"input_ids": ids, "labels": torch.tensor([-100, 2, -100, -100, 5, -100])}]


class Doubled(nn.Module):
    """Doubles the logits of a language model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.inner(**inputs).logits
        return 2 * logits


REFUSED = {
    "a model that reads both ways": (
        lambda: run(Unlabelled(both_ways()), [{"ids": torch.arange(6)}] * 2),
        "not a causal",
    ),
    "labels of another kind": (
        lambda: run(Shifted(language_model("plain")), [(torch.arange(6), torch.zeros(6).long())] * 2),
        "not the tokens that follow",
    ),
    "embeddings instead of token ids": (
        lambda: run(Embedded(language_model()), texts(), ["nll"]),
        r"calls with token ids input_ids \(N, T\)\. Without them, as with inputs_embeds",
    ),
    "another pass": (
        lambda: run(LanguageStep(language_model()), texts(), ["mc_dropout", "gradnorm(target=all)"]),
        "mc_dropout: not defined for texts",
    ),
    "a tied weight that is not tied": (
        lambda: run(LanguageStep(language_model("untied")), texts(), ["gradnorm(target=tied)"]),
        "share one weight",
    ),
    "two answers in one text": (
        lambda: run(LanguageStep(language_model()), two_answers(), ["gradnorm(target=all)"]),
        "without a score",
    ),
    "a layer behind the language model": (
        lambda: run(LanguageStep(Doubled(language_model())), texts(), ["entropy", "gradnorm(target=all)"]),
        "those of another computation",
    ),
    "a closed form of plain logits for capped ones": (
        lambda: run(LanguageStep(language_model("soft cap")), texts(), ["exgrad"]),
        "caps its logits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", ["soft cap", "scale"])
def test_scaled_and_capped_logits_have_the_scores_of_a_second_pass(kind: str) -> None:
    model, scores = language_model(kind), ["nll", "entropy", "feature_norm", "gradnorm", "pseudo_label(statistic=l2)"]
    assert_tokens(run(LanguageStep(model), texts(), [*scores, "grand(target=head)", "feature_norm(p=2)"]), model)


@pytest.mark.slow
def test_results_on_disk_are_those_in_memory(tmp_path: Any) -> None:
    module = LanguageStep(language_model())
    callback = run(module, texts())
    stored = run(module, texts(), output=tmp_path / "run")
    assert stored.results.equals(callback.results) and lgm.read_results(tmp_path / "run").equals(callback.results)
    assert stored.tokens.equals(callback.tokens) and stored.token_evaluation is not None


def test_roles_and_wrong_tokens() -> None:
    torch.manual_seed(0)
    model = language_model("plain")
    ids = torch.randint(29, (24, 12))
    with torch.no_grad():  # the model predicts half of the tokens in the second half
        for place in range(1, 12, 2):
            ids[12:, place] = model(ids[12:, :place])[:, -1].argmax(1)
    rows = [{"ids": row} for row in ids]
    callback = run(
        Unlabelled(model), [rows[:12], rows[12:]], ["nll", "entropy"], datasets={"a": "id", "b": "far"}, resamples=20
    )
    assert callback.evaluation is not None and callback.token_evaluation is not None
    means = column(callback, "nll")
    (entry,) = callback.evaluation.find(score="nll", task="ood", metric="auroc")
    assert entry["value"] == pytest.approx(lgm.meters.functional.auroc(means, (torch.arange(24) >= 12).long()).item())
    tokens = callback.tokens.filter(callback.tokens["sequence"].to_numpy() >= 12)
    wrong = torch.tensor(tokens["label"].to_numpy() != tokens["prediction"].to_numpy())
    (entry,) = callback.token_evaluation.find(score="entropy", dataset="b", metric="auroc")
    scores = torch.tensor(tokens["entropy"].to_numpy())
    assert entry["value"] == pytest.approx(lgm.meters.functional.auroc(scores, wrong.long()).item())
    assert entry["low"] < entry["value"] < entry["high"] and callback.token_evaluation.settings["scores"] == ["entropy"]
    assert "Wrong tokens" in callback.summary(100)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [None, lambda ids: f"<{ids[0]}>"])
def test_the_report_has_texts_coloured_by_rank(tmp_path: Any, decode: Any) -> None:
    callback = run(LanguageStep(language_model()), texts(), ["nll", "entropy", "gradnorm"], resamples=0)
    callback.save(tmp_path / "run", decode)
    beside = (tmp_path / "run" / "texts.html").read_text()
    report = callback.report(tmp_path / "report.html", decode=decode).read_text()
    word = "&lt;{}&gt;" if decode else " {}"
    for page in (beside, report):
        for token in ANSWERS[int(column(callback, "entropy").argmax())]:
            assert f">{word.format(token)}</span>" in page
        assert "entropy" in page and "rgb(213,94,0)" in page and "predicted: " in page
    assert write_report(tmp_path / "run").read_text().count("rgb(213,94,0)") == report.count("rgb(213,94,0)")


def test_fitted_scores_take_tokens_as_rows() -> None:
    model, ids = language_model("plain"), torch.randint(29, (40, 12))
    with torch.no_grad():
        features = model.mixing(model.embedding(ids))[0][:, :-1].reshape(-1, 8)
    rows = nn.Sequential(nn.Identity(), model.head)
    wanted = ["knn(k=3)", "vim(dimensions=4)"]
    expected = lgm.score(rows, features, lgm.fit(rows, [features], wanted))
    fitted = lgm.fit(model, [{"ids": part} for part in ids.split(8)], wanted)
    callback = run(Unlabelled(model), [{"ids": row} for row in ids], fitted)
    for name, values in expected.items():
        found = torch.tensor(callback.results[f"tokens/{name}"].to_pylist(), dtype=torch.float64).flatten()
        torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-9)
