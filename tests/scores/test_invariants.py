"""Every row of the test table through every invariant."""

from __future__ import annotations

import pytest
import torch

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import FittedScore
from lightning_gradmetrics.scoring.registry import make
from tests.models import MODELS, assert_same_state, cnn, fast_rows, images, state_of
from tests.scores.fits import labels_of, ready
from tests.scores.test_reference import CASES, FAST, tolerances

pytestmark = pytest.mark.filterwarnings("ignore:.*has no dropout module")  # mc_dropout on models without dropout


def values(model, inputs, score):
    (found,) = lgm.score(model, inputs, score, labels_of(inputs)).values()
    return found


@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_shape_finite_and_dtype(case: str) -> None:
    for make_model, make_inputs in MODELS.values():
        model = make_model()
        found = values(model, make_inputs(3), ready(case, model, make_inputs))
        assert (
            found.shape == (3,) and found.dtype == torch.float32 and found.isfinite().all() and not found.requires_grad
        )


@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_batch_splitting_and_order(case: str) -> None:
    model, inputs = cnn().double(), images(7).double()
    score = ready(case, model, images)
    whole = values(model, inputs, score)
    parts = torch.cat([values(model, part, score) for part in inputs.split([1, 4, 2])])
    torch.testing.assert_close(parts, whole, **tolerances(case))
    order = torch.randperm(7)
    torch.testing.assert_close(values(model, inputs[order], score), whole[order], **tolerances(case))


@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_no_samples(case: str) -> None:
    model = cnn()
    assert values(model, images(0), ready(case, model, images)).shape == (0,)


@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_half_precision(case: str) -> None:
    """A bfloat16 model's scores are finite, equal to plain autograd's in bfloat16, and near those in float32.

    One sample of the six may be off: a ReLU that is at its edge opens in one precision and not in the other. A fitted classifier
    stretches small differences, so its outputs are held to a mean difference.
    """
    model, inputs = cnn().bfloat16(), images(6).bfloat16()
    score = ready(case, cnn_like(model), images)
    rough, exact = values(model, inputs, score), values(cnn_like(model), inputs.float(), score)
    assert rough.isfinite().all()
    largest = exact.abs().max().item()
    if isinstance(score, FittedScore):
        assert (rough - exact).abs().mean() <= 0.15 * max(1, largest), (rough, exact)
    else:
        assert torch.isclose(rough, exact, rtol=0.1, atol=0.05 * largest + 1e-12).sum() >= 5, (rough, exact)
    if score.needs.gradients:
        (slow,) = lgm.score(model, inputs, score, labels_of(inputs), engine="reference").values()
        torch.testing.assert_close(rough, slow, rtol=0.05, atol=0.02 * largest + 1e-12)


def cnn_like(model):
    copy = cnn()
    copy.load_state_dict(model.state_dict())
    return copy.float()


@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_the_model_is_unchanged(case: str) -> None:
    model = cnn()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    inputs = images(3)
    before = state_of(model)
    score = ready(case, model, images)
    with torch.inference_mode():
        inside = values(model, inputs, score)
    assert_same_state(before, model)
    torch.testing.assert_close(values(model, inputs, score), inside)


@pytest.mark.parametrize("case", fast_rows(CASES, FAST))
def test_a_bad_row_does_not_affect_others(case: str) -> None:
    model, inputs = cnn(), images(4)
    score = ready(case, model, images)
    clean = values(model, inputs, score)
    inputs[1, 0, 0, 0] = float("nan")
    found = values(model, inputs, score)
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found[keep], clean[keep], rtol=1e-4, atol=1e-6)
    assert not found[1].isfinite()


@pytest.mark.parametrize(
    "case",
    fast_rows([c for c in CASES if all(word not in c for word in ("energy", "logit", "NACUE", "average"))], FAST),
)
def test_confident_samples_keep_different_scores(case: str) -> None:
    """Logit gaps of 20 to 60 in float32: nothing overflows, nothing becomes NaN. NAC-UE and GAIA-A need a layer before the head."""
    head = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    model = torch.nn.Sequential(torch.nn.Flatten(), head).eval()
    inputs = torch.zeros(3, 4)
    inputs[:, 0] = torch.tensor([20.0, 40.0, 60.0])
    found = values(model, inputs, ready(case, model, lambda n: torch.randn(n, 4)))
    assert found.isfinite().all()


OF_PASSES = [
    "odin(epsilon=0.1)",
    "mc_dropout",
    "regrad(target='0.weight',perturbations=2)",
    "gga(summary=std_cosine)",
    "gga_detector(neighbours=5)",
    "gaia(form=average)",
    "nac_ue(fill=40)",
    "nac_ue(fill=40,layers='2',steepness=1)",
    "views(n=3,score=entropy)",
    "views(n=3,score=knn)",
    "trust",
    "trust(views=3)",
    "channel_distance",
]


@pytest.mark.parametrize("case", OF_PASSES)
def test_one_logit_scores_as_the_logits_zero_and_z(case: str) -> None:
    """Scores that run the model again read one logit z as ``(0, z)``, like all others."""
    head, pair = torch.nn.Linear(36, 1), torch.nn.Linear(36, 2)
    with torch.no_grad():
        pair.weight.copy_(torch.cat([torch.zeros_like(head.weight), head.weight]))
        pair.bias.copy_(torch.cat([torch.zeros_like(head.bias), head.bias]))
    body = [torch.nn.Conv2d(1, 4, 4), torch.nn.Dropout(), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten()]
    inputs = torch.randn(40, 1, 9, 9).double()
    found = []
    for last in (head, pair):
        model = torch.nn.Sequential(*body, last).double().eval()
        score = make(case)
        if isinstance(score, FittedScore):
            (score,) = lgm.fit(model, [(inputs, torch.arange(40) % 2)], score)
        found.append(values(model, inputs[:6] + 0.1, score))
    torch.testing.assert_close(found[0], found[1])
    assert len(found[0].unique()) > 1 or case.startswith("gga")  # two classes' maps are always opposite


@pytest.mark.parametrize(
    "case", fast_rows([c for c in CASES if "mc_dropout" not in c and "regrad" not in c and "GradNorm" not in c], FAST)
)
def test_the_stated_number_of_forward_passes_is_run(case: str) -> None:
    """The count includes the pass of the prediction; planning and checking take a few extra passes on some samples, once."""
    model, inputs, rows = cnn(), images(16), []
    hook = model.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))  # planned with its call
    score = ready(case, model, images)
    values(model, inputs, score)
    rows.clear()
    values(model, inputs, score)
    hook.remove()
    assert rows.count(16) == score.needs.forwards
