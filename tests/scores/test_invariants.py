"""Every row of the test table through every invariant."""

from __future__ import annotations

import pytest
import torch

import lightning_gradmetrics as lgm
from tests.models import MODELS, assert_same_state, cnn, images, state_of
from tests.scores.test_reference import CASES


def values(model, inputs, case):
    (found,) = lgm.score(model, inputs, case).values()
    return found


@pytest.mark.parametrize("case", CASES)
def test_shape_finite_and_dtype(case: str) -> None:
    for make_model, make_inputs in MODELS.values():
        found = values(make_model(), make_inputs(3), case)
        assert found.shape == (3,) and found.dtype == torch.float32 and found.isfinite().all() and not found.requires_grad


@pytest.mark.parametrize("case", CASES)
def test_batch_splitting_and_order(case: str) -> None:
    model, inputs = cnn().double(), images(7).double()
    whole = values(model, inputs, case)
    parts = torch.cat([values(model, part, case) for part in inputs.split([1, 4, 2])])
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    order = torch.randperm(7)
    torch.testing.assert_close(values(model, inputs[order], case), whole[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_no_samples(case: str) -> None:
    assert values(cnn(), images(0), case).shape == (0,)


@pytest.mark.parametrize("case", CASES)
def test_half_precision(case: str) -> None:
    """A bfloat16 model's scores are finite, and near those of the float32 model of the same weights."""
    model, inputs = cnn().bfloat16(), images(6).bfloat16()
    rough, exact = values(model, inputs, case), values(cnn_like(model), inputs.float(), case)
    assert rough.isfinite().all()
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05 * exact.abs().max().item() + 1e-12)


def cnn_like(model):
    copy = cnn()
    copy.load_state_dict(model.state_dict())
    return copy.float()


@pytest.mark.parametrize("case", CASES)
def test_model_comes_back_untouched(case: str) -> None:
    model = cnn()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    inputs = images(3)
    before = state_of(model)
    with torch.inference_mode():
        inside = values(model, inputs, case)
    assert_same_state(before, model)
    torch.testing.assert_close(values(model, inputs, case), inside)


@pytest.mark.parametrize("case", CASES)
def test_a_bad_row_stays_in_its_row(case: str) -> None:
    model, inputs = cnn(), images(4)
    clean = values(model, inputs, case)
    inputs[1, 0, 0, 0] = float("nan")
    found = values(model, inputs, case)
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found[keep], clean[keep], rtol=1e-4, atol=1e-6)
    assert not found[1].isfinite()


@pytest.mark.parametrize("case", [c for c in CASES if "energy" not in c and "logit" not in c])
def test_confident_samples_stay_apart(case: str) -> None:
    """Logit gaps of 20 to 60 in float32: nothing overflows, nothing becomes NaN."""
    head = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
    model = torch.nn.Sequential(torch.nn.Flatten(), head).eval()
    inputs = torch.zeros(3, 4)
    inputs[:, 0] = torch.tensor([20.0, 40.0, 60.0])
    found = values(model, inputs, case)
    assert found.isfinite().all()
