"""Geometric gradient analysis against the gga-csm package, a slow reference in exact terms, and its properties."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import gga.CSM
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradmetrics.gradients import cosine_map_summaries as csm
from lightning_gradmetrics.gradients import cosine_maps as cosine_similarity
from lightning_gradmetrics.gradients.cosine_maps import class_covectors, cosine_similarity_maps


class Small(nn.Module):
    """Convolutions, batch norm, a residual, in-place ReLU: float64, random running statistics."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)
        self.relu = nn.ReLU(inplace=True)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        return 3 * self.head(self.relu(x + self.conv2(x)).mean((2, 3)))


@pytest.fixture
def small() -> tuple[Small, Tensor]:
    torch.manual_seed(0)
    return Small().double().eval(), torch.randn(6, 3, 7, 7, dtype=torch.float64)


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The function of the package gga-csm, run on the CPU although it requests CUDA in one place."""
    ones = torch.ones
    patched = ModuleType("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched.__dict__.update(torch.__dict__)
    patched.ones = lambda *size, device=None, **kwargs: ones(*size, **kwargs)
    monkeypatch.setattr(gga.CSM, "torch", patched)
    return gga.CSM.cosine_similarity_maps


def reference(model: nn.Module, inputs: Tensor, sign: bool, rescale: bool) -> Tensor:
    """One sample and one class at a time, each gradient by its own backward; zero maps have cosine 0."""
    result = []
    for sample in inputs:
        x = sample[None].clone().requires_grad_()
        logits = model(x)
        logits = 10 * logits / logits.abs().amax() if rescale else logits
        losses = [F.cross_entropy(logits, torch.tensor([c])) for c in range(logits.shape[1])]
        grads = [torch.autograd.grad(loss, x, retain_graph=True)[0][0] for loss in losses]
        maps = [g.sign() if sign else g for g in grads]
        maps = [(m.amax(0) if m.ndim >= 3 else m).flatten() for m in maps]
        result.append(
            torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0, eps=1e-300) for b in maps]) for a in maps])
        )
    return torch.stack(result)


MODES = pytest.mark.parametrize(("sign", "rescale"), [(True, True), (True, False), (False, True), (False, False)])


@MODES
def test_equals_the_gga_csm_package(small, original, sign, rescale):
    model, x = small
    theirs = original(model, x, sign=sign, rescale=rescale)
    ours = cosine_similarity_maps(model, x, sign=sign, rescale=rescale)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-11)


@MODES
def test_equals_the_gga_csm_package_in_float32_up_to_flipped_signs(small, original, sign, rescale):
    model, x = small
    model, x = model.float(), x.float()
    theirs = original(model, x, sign=sign, rescale=rescale)
    ours = cosine_similarity_maps(model, x, sign=sign, rescale=rescale)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=4 / 49 if sign else 1e-4)
    assert (ours - theirs).abs().median() < 1e-6


@MODES
def test_vector_inputs_have_no_channel_axis(sign, rescale):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    x = torch.randn(5, 9, dtype=torch.float64)
    ours = cosine_similarity_maps(model, x, sign=sign, rescale=rescale)
    torch.testing.assert_close(ours, reference(model, x, sign, rescale), rtol=0, atol=1e-11)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 14),
    classes=st.integers(2, 7),
    channels=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    sign=st.booleans(),
    rescale=st.booleans(),
)
def test_equals_the_slow_reference_for_any_shape(seed, size, classes, channels, scale, sign, rescale):
    torch.manual_seed(seed)
    model = Small(channels, classes).double().eval()
    x = scale * torch.randn(size, channels, 4, 5, dtype=torch.float64)
    ours = cosine_similarity_maps(model, x, sign=sign, rescale=rescale)
    torch.testing.assert_close(ours, reference(model, x, sign, rescale), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rescale", [True, False])
def test_class_covectors_are_the_losses_gradients_up_to_a_positive_factor(rescale):
    torch.manual_seed(2)
    logits = (3 * torch.randn(8, 6, dtype=torch.float64)).requires_grad_()
    scaled = 10 * logits / logits.abs().amax(1, keepdim=True) if rescale else logits
    ours = class_covectors(logits.detach(), torch.arange(6).expand(8, 6), rescale=rescale)
    for c in range(6):
        loss = F.cross_entropy(scaled, torch.full((8,), c), reduction="sum")
        (theirs,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(F.normalize(ours[:, c]), F.normalize(theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_class_gradients_span_all_but_one_dimension(rescale):
    """One backward pass can be saved, but not two: C gradients have rank C - 1, with and without rescaling."""
    torch.manual_seed(3)
    covectors = class_covectors(torch.randn(4, 6, dtype=torch.float64), torch.arange(6).expand(4, 6), rescale=rescale)
    assert torch.linalg.matrix_rank(covectors).tolist() == [5] * 4


@pytest.mark.parametrize("classes", [1, 2, 4, 5])
def test_top_classes_are_the_submap_of_the_largest_logits(small, classes):
    model, x = small
    full = cosine_similarity_maps(model, x)
    top = model(x).topk(classes).indices
    expected = torch.stack([m[t][:, t] for m, t in zip(full, top, strict=True)])
    torch.testing.assert_close(cosine_similarity_maps(model, x, classes=classes), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("classes", [0, -1, 6])
def test_classes_out_of_range(small, classes):
    with pytest.raises(ValueError, match="from 1 to 5"):
        cosine_similarity_maps(*small, classes=classes)


def test_a_confident_float32_sample_stays_accurate():
    """Where p rounds to 1, the original has a zero gradient and raises; this implementation keeps the direction."""
    torch.manual_seed(4)
    model = nn.Linear(6, 4).double()
    model.weight.data *= 60
    x = torch.randn(3, 6, dtype=torch.float64)
    exact = cosine_similarity_maps(model, x, sign=False, rescale=False)
    single = cosine_similarity_maps(model.float(), x.float(), sign=False, rescale=False)
    assert not csm.zero_saliency(single).any()
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_zero_saliency_maps_have_cosine_zero_and_are_reported(original, sign, rescale):
    """A dead ReLU for one sample, not for the other: the original raises for the whole batch."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    x = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    x[1] = -1
    nn.init.ones_(model[0].weight)
    nn.init.constant_(model[0].bias, 0.5)
    with pytest.raises(Exception, match="NaN"):
        original(model, x, sign=sign, rescale=rescale)
    maps = cosine_similarity_maps(model, x, sign=sign, rescale=rescale)
    assert csm.zero_saliency(maps).tolist() == [[False] * 3, [True] * 3]
    assert torch.equal(maps[1], torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(
        maps[:1], original(model, x[:1], sign=sign, rescale=rescale).detach(), rtol=0, atol=1e-12
    )


def test_logits_that_are_all_zero_cannot_be_rescaled_and_count_as_zero_maps():
    maps = cosine_similarity_maps(nn.Linear(3, 4, bias=False), torch.zeros(2, 3))
    assert csm.zero_saliency(maps).all()
    assert maps.isfinite().all()


def test_a_sample_with_nan_does_not_affect_others(small):
    model, x = small
    broken = x.clone()
    broken[2, 0, 0, 0] = torch.nan
    maps = cosine_similarity_maps(model, broken)
    assert maps[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(maps[keep], cosine_similarity_maps(model, x)[keep], rtol=0, atol=1e-11)
    for summary in (csm.mean_cosine, csm.std_cosine, csm.least_row_cosine, csm.effective_rank):
        assert summary(maps).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_under_modes_without_gradients(small, mode):
    model, x = small
    expected = cosine_similarity_maps(model, x)
    with mode():
        ours = cosine_similarity_maps(model, x.clone())
    assert torch.equal(ours, expected)
    assert not ours.requires_grad


def test_one_forward_and_no_parameter_gradient(small, monkeypatch):
    model, x = small
    calls = []
    model.register_forward_hook(lambda *_: calls.append([p.requires_grad for p in model.parameters()]))
    cosine_similarity_maps(model, x)
    assert calls == [[False] * len(list(model.parameters()))]


@pytest.mark.parametrize("broken", [False, True])
def test_model_and_inputs_are_unchanged(small, broken):
    model, x = small
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    model.head.bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad, p.grad.clone()) for p in model.parameters()]
    if broken:
        model.relu.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cosine_similarity_maps(model, x)
    else:
        cosine_similarity_maps(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p, (flag, grad, value) in zip(model.parameters(), flags, strict=True):
        assert p.requires_grad is flag
        assert p.grad is grad
        assert torch.equal(grad, value)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_in_place_first_layer_does_not_touch_the_inputs():
    torch.manual_seed(5)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    x = torch.randn(5, 4)
    kept = x.clone()
    cosine_similarity_maps(model, x)
    assert torch.equal(x, kept)


def test_empty_batches_and_batches_of_one_sample(small):
    model, x = small
    full = cosine_similarity_maps(model, x)
    torch.testing.assert_close(cosine_similarity_maps(model, x[:1]), full[:1], rtol=0, atol=1e-11)
    assert cosine_similarity_maps(model, x[:0]).shape == (0, 5, 5)
    assert cosine_similarity_maps(model, x[:0], classes=2).shape == (0, 2, 2)
    assert csm.mean_cosine(cosine_similarity_maps(model, x[:0])).shape == (0,)


def test_chunks_that_fit_in_memory(small, monkeypatch):
    model, x = small
    full = cosine_similarity_maps(model, x)
    monkeypatch.setattr(cosine_similarity, "BUDGET", 2 * 5 * 49 * 4)
    sizes = []
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    torch.testing.assert_close(cosine_similarity_maps(model, x), full, rtol=0, atol=1e-11)
    assert sizes == [6, 2, 2, 2]


@pytest.mark.parametrize("rows", [1, 10**6])
def test_classes_one_by_one_and_all_at_once(small, monkeypatch, rows):
    model, x = small
    monkeypatch.setitem(cosine_similarity.ROWS, "cpu", rows)
    torch.testing.assert_close(cosine_similarity_maps(model, x), reference(model, x, True, True), rtol=0, atol=1e-11)


class _Double(torch.autograd.Function):
    """Twice the input, without a rule for batched gradients."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return torch.tensor(2 * grad.detach().numpy())


def test_an_operation_without_batched_gradients_falls_back_to_a_loop(monkeypatch):
    torch.manual_seed(6)
    linear = nn.Linear(4, 3).double()
    model = nn.Sequential(linear)
    model.register_forward_hook(lambda _, __, out: _Double.apply(out))
    x = torch.randn(2, 4, dtype=torch.float64)
    monkeypatch.setitem(cosine_similarity.ROWS, "cpu", 100)
    torch.testing.assert_close(cosine_similarity_maps(model, x), cosine_similarity_maps(linear, x), rtol=0, atol=1e-11)


def test_channels_last_half_precision_and_mapping_outputs(small):
    model, x = small
    full = cosine_similarity_maps(model, x)
    last = cosine_similarity_maps(model, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, full, rtol=0, atol=1e-11)
    half = cosine_similarity_maps(model.bfloat16(), x.bfloat16(), sign=False)
    assert half.dtype == torch.float32
    model.double().register_forward_hook(lambda _, __, out: {"logits": out})
    assert cosine_similarity_maps(model, x).shape == full.shape


def test_clear_errors(small):
    model, x = small
    with pytest.raises(TypeError, match=r"torch.int64.*float\(\)"):
        cosine_similarity_maps(model, x.long())
    with pytest.raises(TypeError, match="not list"):
        cosine_similarity_maps(model, [x])
    with pytest.raises(ValueError, match="train mode"):
        cosine_similarity_maps(model.train(), x)
    model.eval().register_forward_hook(lambda _, __, out: out.detach())
    with pytest.raises(ValueError, match="do not depend on its inputs"):
        cosine_similarity_maps(model, x)


def test_summaries_equal_hand_computed_values():
    maps = torch.tensor([[[1.0, 0.5, -0.5], [0.5, 1.0, -1.0], [-0.5, -1.0, 1.0]]], dtype=torch.float64)
    assert csm.csm_features(maps).tolist() == [[0.5, -0.5, -1.0]]
    assert csm.mean_cosine(maps).item() == pytest.approx(-1 / 3)
    assert csm.std_cosine(maps).item() == pytest.approx((7 / 18) ** 0.5)
    assert (csm.min_cosine(maps).item(), csm.max_cosine(maps).item()) == (-1.0, 0.5)
    assert csm.least_row_cosine(maps).item() == pytest.approx(-0.75)
    with pytest.raises(ValueError, match="K >= 2"):
        csm.mean_cosine(torch.ones(2, 1, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 8), st.sampled_from([1e-200, 1.0, 1e200]))
def test_cosines_and_their_spectrum(seed, classes, width, scale):
    torch.manual_seed(seed)
    vectors = scale * torch.randn(3, classes, width, dtype=torch.float64)
    maps = csm.cosine_similarity(vectors)
    assert torch.equal(maps, maps.mT)
    assert maps.abs().max() <= 1
    torch.testing.assert_close(maps, torch.stack([F.normalize(v / scale) @ F.normalize(v / scale).T for v in vectors]))
    torch.testing.assert_close(csm.spectrum(maps).sum(1), torch.full((3,), float(classes), dtype=torch.float64))
    rank = csm.effective_rank(maps)
    assert (rank >= 1 - 1e-9).all()
    assert (rank <= min(classes, width) + 1e-6).all()
