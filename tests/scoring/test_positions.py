"""Scores of pixels and tokens: closed forms against autograd for every kind of head, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.classifier.head import HeadNotFoundError
from lightning_gradmetrics.scores import Evidence, FittedScore
from lightning_gradmetrics.scoring import positions
from lightning_gradmetrics.scoring.positions import by_rows, made_up_maps
from lightning_gradmetrics.scoring.registry import RECIPES
from tests.models import assert_same_state, fast_rows, state_of
from tests.scoring.segmenters import HEADS, Segmenter, gradient_of, logits_of

PIXELS = [(0, 0, 0), (1, 3, 4), (1, -1, -1), (0, 2, -2)]
"""Image, row and column."""


def close_to(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-13)


def pseudo_label(row: Tensor) -> Tensor:
    return -row.log_softmax(0)[row.argmax()]


def by_class(model: nn.Module, row: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The expectation of a function of the gradients of all classes."""
    total = torch.zeros((), dtype=row.dtype)
    for c, p in enumerate(row.softmax(0)):
        total = total + p.detach() * norm(gradient_of(model, -row.log_softmax(0)[c]))
    return total


def norms(p: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: torch.linalg.vector_norm(gradient, p)


REFERENCES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "gradnorm": lambda m, z: -norms(1)(gradient_of(m, -z.log_softmax(0).mean())),
    "gradnorm(p=0.5,temperature=2.0)": lambda m, z: -norms(0.5)(gradient_of(m, -(z / 2).log_softmax(0).mean())),
    "uniform(statistic=max)": lambda m, z: -gradient_of(m, -z.log_softmax(0).mean()).max(),
    "pseudo_label": lambda m, z: norms(1)(gradient_of(m, pseudo_label(z))),
    "pseudo_label(statistic=l2)": lambda m, z: norms(2)(gradient_of(m, pseudo_label(z))),
    "pseudo_label(statistic=linf)": lambda m, z: norms(float("inf"))(gradient_of(m, pseudo_label(z))),
    "pseudo_label(statistic=std)": lambda m, z: gradient_of(m, pseudo_label(z)).std(),
    "pseudo_label(statistic=mean)": lambda m, z: gradient_of(m, pseudo_label(z)).mean(),
    "confounding(target=head)": lambda m, z: norms(2)(gradient_of(m, -z.log_softmax(0).sum())).square(),
    "exgrad": lambda m, z: by_class(m, z, norms(1)),
    "exgrad(p=3.0)": lambda m, z: by_class(m, z, norms(3)),
    "fisher_trace": lambda m, z: by_class(m, z, lambda gradient: gradient.square().sum()),
    "grand(target=head)": lambda m, z: norms(2)(gradient_of(m, -z.log_softmax(0)[0])),
    "entropy": lambda m, z: -(z.softmax(0) * z.log_softmax(0)).sum(),
    "max_softmax": lambda m, z: 1 - z.softmax(0).max(),
    "energy": lambda m, z: -z.logsumexp(0),
}
"""The score of one position from its logits ``(C,)``, by autograd; labels are all 0."""


@pytest.mark.parametrize("kind", HEADS)
def test_every_pixel_has_the_gradient_of_its_loss(kind: str) -> None:
    torch.manual_seed(0)
    model, images = HEADS[kind]().double().eval(), torch.randn(2, 3, 8, 9).double()
    before = state_of(model)
    logits = logits_of(model(images))
    found = lgm.score(model, images, list(REFERENCES), torch.zeros(len(logits), *logits.shape[2:]).long())
    assert_same_state(before, model)
    for name, reference in REFERENCES.items():
        assert found[name].shape == (2, *logits.shape[2:])
        for image, y, x in PIXELS:
            close_to(found[name][image, y, x], reference(model, logits[image, :, y, x]))


class LanguageModel(nn.Module):
    """Embeddings and a linear layer over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(input_ids).tanh())}


def test_every_token_has_the_gradient_of_its_loss() -> None:
    torch.manual_seed(0)
    model, ids = LanguageModel().double().eval(), torch.randint(11, (2, 7))
    logits = model(ids)["logits"]
    found = lgm.score(model, {"input_ids": ids}, list(REFERENCES), torch.zeros(2, 7).long())
    for name, reference in REFERENCES.items():
        assert found[name].shape == (2, 7)
        close_to(found[name][1, 3], reference(model, logits[1, 3]))


@pytest.mark.parametrize(("name", "tail"), [("scale", lambda z: z / 3), ("cap", lambda z: 2 * torch.tanh(z / 2))])
def test_scaled_and_capped_logits_have_the_gradient_of_their_loss(name: str, tail: Callable[[Tensor], Tensor]) -> None:
    """Closed forms of plain logits are refused for capped ones."""
    torch.manual_seed(0)
    model, images = Segmenter(nn.Conv2d(4, 5, 3, padding=1), tail).double().eval(), 3 * torch.randn(2, 3, 8, 9).double()
    logits, labels = model(images), torch.zeros(2, 8, 9).long()
    refused = ("exgrad", "exgrad(p=3.0)", "fisher_trace") if name == "cap" else ()
    found = lgm.score(model, images, [score for score in REFERENCES if score not in refused], labels)
    for score, values in found.items():
        for image, y, x in PIXELS:
            close_to(values[image, y, x], REFERENCES[score](model, logits[image, :, y, x]))
    for score in refused:
        with pytest.raises(ValueError, match="caps its logits"):
            lgm.score(model, images, score)
    norms_of_input = model.body(images).abs().sum(1)
    linear = Segmenter(nn.Conv2d(4, 5, 1), tail).double().eval()
    linear.body = model.body
    close_to(lgm.score(linear, images, "feature_norm")["feature_norm"], -norms_of_input)


def test_a_custom_loss_of_rows_is_differentiated_at_every_pixel() -> None:
    """The loss reduces over the last axis, which is not the class axis in a map."""
    torch.manual_seed(0)
    model, images = HEADS["bilinear"]().double().eval(), torch.randn(1, 3, 8, 9).double()

    def squared(rows: Tensor) -> Tensor:
        return rows.square().sum(-1)

    found = lgm.score(model, images, {"mine": lambda evidence: evidence.gradient(squared).norm(1)})["mine"]
    logits = model(images)
    close_to(found[0, 5, 7], norms(1)(gradient_of(model, logits[0, :, 5, 7].square().sum())))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_score_of_logits_and_head_works_on_maps(name: str) -> None:
    """The same function scores samples and maps; a wrong axis would change the values, as all sizes are equal."""
    score = RECIPES[name].described()
    if isinstance(score, FittedScore) or score.needs.gradients or score.needs.probes:
        pytest.skip("has no value per position, or is fitted")
    assert score.works_on_maps


def test_a_score_of_rows_receives_rows() -> None:
    def last_axis(evidence: Evidence) -> Tensor:
        return evidence.logits.softmax(-1).amax(-1) * evidence.features.sum(-1)

    model, images = Segmenter(nn.Conv2d(4, 3, 1)).double().eval(), torch.randn(2, 3, 3, 3).double()
    found = lgm.score(model, images, last_axis)["last_axis"]
    expected = model(images).softmax(1).amax(1) * model.body(images).sum(1)
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("name", ["knn(k=2)", "vim", "kfac_influence", "gradorth", "sirc"])
def test_fitted_scores_of_pixels_are_those_of_their_patches(name: str) -> None:
    """A convolution of patches is a linear layer on rows: both fits and both scores agree."""
    torch.manual_seed(0)
    model, images = Segmenter(nn.Conv2d(4, 5, 3, padding=1)).double().eval(), torch.randn(3, 3, 6, 7).double()
    head = nn.Linear(36, 5).double()
    with torch.no_grad():
        head.weight.copy_(model.head.weight.flatten(1))
        head.bias.copy_(model.head.bias)
    rows = nn.functional.unfold(model.body(images), 3, padding=1).movedim(1, -1).reshape(-1, 36).detach()
    labels = torch.randint(5, (3, 6, 7))
    fitted = lgm.fit(model, [(images, labels)], name)
    expected = lgm.score(head, rows, lgm.fit(head, [(rows, labels.flatten())], name))
    found = lgm.score(model, images, fitted)
    torch.testing.assert_close(found[name].flatten(), expected[name], rtol=1e-6, atol=1e-9)


def test_a_logit_score_needs_no_head() -> None:
    model = Segmenter(nn.Conv2d(4, 5, 1), lambda z: z + z.mean(1, keepdim=True)).eval()
    assert lgm.score(model, torch.randn(2, 3, 4, 4), "entropy")["entropy"].shape == (2, 4, 4)


class MaskClassifier(nn.Module):
    """Queries with class probabilities, multiplied by their masks, as in MaskFormer's semantic inference."""

    def __init__(self) -> None:
        super().__init__()
        self.masks, self.classes = nn.Conv2d(3, 6, 1), nn.Linear(3, 6 * 5)

    def forward(self, x: Tensor) -> Tensor:
        classes = self.classes(x.mean((2, 3))).unflatten(1, (6, 5)).softmax(2)
        return torch.einsum("nqc,nqhw->nchw", classes, self.masks(x).sigmoid())


class Refined(Segmenter):
    """A learned layer that mixes classes behind the head, as a conditional random field does."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 5, 1))
        self.mixing = nn.Parameter(torch.eye(5) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z + torch.einsum("cd,ndhw->nchw", self.mixing, z.softmax(1))


@pytest.mark.parametrize(
    ("score", "model", "words"),
    [
        ("gradnorm(target=all)", Segmenter(nn.Conv2d(4, 5, 1)), "not defined per position.*separate backward pass"),
        ("mc_dropout", Segmenter(nn.Conv2d(4, 5, 1)), "not defined per position"),
        ("odin", Segmenter(nn.Conv2d(4, 5, 1)), "not defined per position"),
        ("views", Segmenter(nn.Conv2d(4, 5, 1)), "views is not defined per position: other passes(?!.*target=)"),
        ("purview", Segmenter(nn.Conv2d(4, 5, 1)), "separate backward pass(?!.*target=)"),
        ("gradnorm", Segmenter(nn.Conv2d(4, 5, 1), lambda z: z + z.mean(1, keepdim=True)), "could not be found"),
        ("gradnorm", Refined(), "could not be found.*a CRF.*no closed form.*Logit scores"),
        ("gradnorm", MaskClassifier(), "could not be found.*masks multiplied by class scores"),
        ("gradnorm", Segmenter(nn.Conv2d(4, 5, 1), lambda z: z.softmax(1)), "probabilities|softmax"),
        ("entropy", Segmenter(nn.Conv2d(4, 5, 1), lambda z: z.softmax(1)), "probabilities"),
        ("entropy", Segmenter(nn.Conv2d(4, 5, 1), lambda z: z.flatten(2)), "ambiguous which axis"),
    ],
)
def test_undefined_scores_are_refused_with_the_reason(score: str, model: nn.Module, words: str) -> None:
    with pytest.raises((ValueError, HeadNotFoundError), match=words):
        lgm.score(model.eval(), torch.randn(2, 3, 4, 4), score)


def test_a_fit_of_scores_of_inner_layers_is_refused_with_the_reason() -> None:
    data = [(torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4).long())]
    with pytest.raises(ValueError, match=r"trust is not defined per position: .*inner layers"):
        lgm.fit(Segmenter(nn.Conv2d(4, 5, 1)).eval(), data, "trust")


def test_an_unknown_label_has_no_score() -> None:
    model, images = Segmenter(nn.Conv2d(4, 5, 1)).eval(), torch.randn(1, 3, 2, 3)
    labels = torch.tensor([[[0, 255, 1], [-1, 4, 2]]])
    found = lgm.score(model, images, "grand(target=head)", labels)["grand(target=head)"]
    assert torch.equal(found.isnan(), (labels == 255) | (labels < 0))
    with pytest.raises(ValueError, match="label 11, and the model has 5 classes"):
        lgm.score(model, images, "el2n", labels.clamp(min=11))


def test_rows_and_maps_agree_in_blocks() -> None:
    evidence = made_up_maps()
    values = by_rows(lambda rows: rows.logits.amax(1), evidence, False)
    torch.testing.assert_close(values, evidence.logits.amax(1))


@pytest.mark.parametrize(
    "kind", fast_rows(["groups", "bilinear of 3x3", "two heads", "one logit"], ["groups", "one logit"])
)
def test_blocks_of_positions_have_the_values_of_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of an image do not depend on each other, so blocks of 7 give the same scores and head vectors."""
    torch.manual_seed(0)
    model, images = HEADS[kind]().double().eval(), torch.randn(2, 3, 8, 9).double()
    scores = {name: name for name in REFERENCES} | {"vectors": lambda evidence: evidence.features.square().sum(1)}
    logits = logits_of(model(images))
    labels = torch.randint(2, (2, *logits.shape[2:]))
    labels[0, 0] = 255
    expected = lgm.score(model, images, scores, labels)
    monkeypatch.setitem(positions.ENTRIES, "cpu", 7 * 2 * logits.shape[1])
    found = lgm.score(model, images, scores, labels)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=1e-14, equal_nan=True)


@pytest.mark.slow
def test_layers_on_smaller_grids_do_not_slow_the_search() -> None:
    """Layers with one output per class inside the network: an enlarged and cropped output is compared at few offsets."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 5, 3, stride=4, padding=1), nn.Conv2d(5, 5, 1), nn.ConvTranspose2d(5, 4, 4, 4))
    model = Segmenter(nn.Conv2d(4, 5, 1), lambda z: z + z.mean(1, keepdim=True), inner).eval()
    started = time.perf_counter()
    with pytest.raises(HeadNotFoundError):
        lgm.score(model, torch.randn(1, 3, 160, 160), "gradnorm")
    assert time.perf_counter() - started < 60
