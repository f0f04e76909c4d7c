"""GradTrust, its comparison scores and the detectors of geometric gradient analysis, beyond the test table."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor, nn

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import detectors
from lightning_gradmetrics.scoring.evidence import Evidence
from lightning_gradmetrics.scoring.registry import make
from tests.models import assert_same_state, cnn, images, state_of
from tests.scores import trust_cases


def only(model: nn.Module, inputs: Tensor, score: str) -> Tensor:
    (found,) = lgm.score(model, inputs, score).values()
    return found


@pytest.mark.parametrize(("temperature", "epsilon"), [(100.0, 0.0014), (1.0, 0.1), (1000.0, 0.02)])
def test_odin_equals_pytorch_ood(temperature: float, epsilon: float) -> None:
    from pytorch_ood.detector import ODIN

    model, inputs = cnn().double(), images(6).double()
    theirs = ODIN(model, eps=epsilon, temperature=temperature).predict(inputs)
    ours = only(model, inputs, f"odin(temperature={temperature},epsilon={epsilon})")
    torch.testing.assert_close(ours, 1 + theirs.detach(), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(ours, only(model, inputs, f"odin(temperature={temperature},epsilon=0)"), rtol=1e-9)


def test_input_gradients_require_one_tensor_of_floats() -> None:
    class TwoInputs(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.stack([a, b], 1)

    for score in ("odin", "gga"):
        with pytest.raises(TypeError, match="one float tensor"):
            lgm.score(TwoInputs(), (torch.randn(2), torch.randn(2)), score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradtrust_in_half_precision_is_exact(dtype: torch.dtype) -> None:
    """Large logits: fourth powers overflow float16, and the score is that of plain autograd in float64."""
    head = nn.Linear(6, 6, bias=False)
    nn.init.eye_(head.weight)
    model = nn.Sequential(nn.Flatten(), head).eval().to(dtype)
    inputs = (torch.randn(5, 6) * torch.tensor([[1.0], [20], [200], [2000], [20000]])).to(dtype)
    exact = torch.stack([trust_cases.trust(model.double(), x[None]) for x in inputs.double()])
    found = only(model.to(dtype), inputs, "gradtrust")
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["gradtrust", "gradtrust(k=5)", "max_logit_pnorm", "max_logit_pnorm(p=inf)"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
def test_scores_of_float32_logits_are_those_in_float64(scale: float, name: str) -> None:
    """No power of a float32 number overflows or vanishes."""
    logits = scale * (2 * torch.rand(20, 50) - 1)
    logits[0], logits[1], logits[2] = 0, 1 / 50, 7
    found, expected = (make(name)(Evidence(given)) for given in (logits, logits.double()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_gradtrust_is_from_one_to_the_number_of_classes() -> None:
    head = nn.Linear(4, 4, bias=False)
    nn.init.eye_(head.weight)
    model = nn.Sequential(nn.Flatten(), head).eval()
    equal, single = torch.full((4,), 3.0), torch.tensor([1e4, 0.25, 0.25, 0.25])
    found = -only(model, torch.stack([equal, single, torch.full((4,), 0.25)]), "gradtrust")
    torch.testing.assert_close(found, torch.tensor([1.0, 4.0, 1.0]))
    top = -only(model, torch.stack([equal, single]), "gradtrust(k=2)")
    torch.testing.assert_close(top, torch.tensor([1.0, 2.0]))
    assert not torch.equal(found[:2], -only(model, torch.stack([equal, single]) + torch.randn(4), "gradtrust"))
    with pytest.raises(ValueError, match="at least 2"):
        only(model, single[None], "gradtrust(k=1)")


class Dropping(nn.Module):
    """Dropout of every kind, between layers with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout2d(0.3), nn.SELU(inplace=True))
        self.drops = nn.Sequential(nn.Dropout(0.4, inplace=True), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.head(self.drops(self.body(x)).mean((2, 3)))


def test_mc_dropout_depends_only_on_the_sample_and_changes_nothing() -> None:
    model, inputs = Dropping().eval(), images(5)
    model.drops[0].train()
    before = state_of(model)
    whole = only(model, inputs, "mc_dropout")
    assert_same_state(before, model)
    parts = torch.cat([only(model, part, "mc_dropout") for part in inputs.flip(0).split([2, 3])]).flip(0)
    torch.testing.assert_close(parts, whole)
    assert not torch.allclose(whole, only(model, inputs, "mc_dropout(seed=1)"), rtol=1e-3)
    model.drops[0].eval()
    assert (whole > only(model, inputs, "entropy")).float().mean() > 0.5


@pytest.mark.slow
def test_mc_dropout_converges_to_the_mean_of_torchs_dropout() -> None:
    model, inputs = Dropping().eval(), images(4)
    found = only(model, inputs, "mc_dropout(passes=3000)")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train()
    with torch.no_grad():
        p = torch.stack([model(inputs).softmax(1) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(found, torch.special.entr(p).sum(1), rtol=0.03, atol=0.01)


def test_mc_dropout_drops_the_same_units_of_a_sample_in_any_batch() -> None:
    """Windows of a sample are rows of the first axis inside the model."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.drop(x.reshape(-1, 4)).reshape(len(x), -1, 4).mean(1))

    model, inputs = Windows().eval(), torch.randn(6, 5, 4)
    parts = torch.cat([only(model, part, "mc_dropout") for part in inputs.split([1, 3, 2])])
    torch.testing.assert_close(parts, only(model, inputs, "mc_dropout"))


def test_mc_dropout_warns_once_without_dropout() -> None:
    model = cnn()
    with pytest.warns(UserWarning, match="no dropout module"):
        found = only(model, images(2), "mc_dropout")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(only(model, images(2), "mc_dropout").shape, found.shape)


def test_using_all_classes_of_a_large_model_causes_a_warning() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 100)).eval(), torch.randn(2, 3)
    with pytest.warns(UserWarning, match="99 backward passes.*classes=10"):
        only(model, inputs, "gga")
    assert only(model, inputs, "gga(classes=10)").shape == (2,)
    with pytest.raises(ValueError, match="summary='median'; allowed: 'mean_cosine'"):
        only(model, inputs, "gga(summary=median)")
    with pytest.raises(ValueError, match="from 1 to 100"):
        only(model, inputs, "gga(classes=101)")


def test_two_gga_scores_share_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gradmetrics.scores import geometry

    calls, original = [], geometry.cosine_similarity_maps
    monkeypatch.setattr(geometry, "cosine_similarity_maps", lambda *a, **k: calls.append(1) or original(*a, **k))
    lgm.score(cnn(), images(3), ["gga", "gga(summary=max_cosine)"])
    assert len(calls) == 1


@pytest.mark.parametrize("rows", [5, 40, 400])
def test_mahalanobis_equals_ledoit_wolf(rows: int) -> None:
    x = torch.randn(rows, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 3
    parts = [detectors.moment_sums(part) for part in x.split(3)]
    state = detectors.mahalanobis_state({key: torch.stack([p[key] for p in parts]).sum(0) for key in parts[0]})
    other = LedoitWolf().fit(x.numpy())
    new = torch.randn(7, 12, dtype=torch.float64)
    theirs = torch.from_numpy(other.mahalanobis(new.numpy()))
    torch.testing.assert_close(detectors.mahalanobis(new, state), theirs, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("rows", "neighbours"), [(8, 20), (300, 20), (300, 1)])
def test_local_outlier_factor_equals_scikit_learn(rows: int, neighbours: int) -> None:
    x, new = torch.randn(rows, 5, dtype=torch.float64), 2 * torch.randn(9, 5, dtype=torch.float64)
    found = detectors.local_outlier_factor(new, detectors.lof_state(x, neighbours), neighbours)
    other = LocalOutlierFactor(n_neighbors=min(neighbours, rows - 1), novelty=True).fit(x.numpy())
    torch.testing.assert_close(found, torch.from_numpy(-other.score_samples(new.numpy())), rtol=1e-9, atol=0)


def test_detectors_refuse_data_that_they_cannot_be_fitted_on() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        detectors.lof_state(torch.randn(1, 3), 5)
    with pytest.raises(ValueError, match="2 or more"):
        detectors.mahalanobis_state(detectors.moment_sums(torch.randn(1, 3)))
    with pytest.raises(ValueError, match="same features"):
        detectors.mahalanobis_state(detectors.moment_sums(torch.ones(5, 3, dtype=torch.float64)))
    twins = detectors.lof_state(torch.ones(30, 3, dtype=torch.float64), 5)
    assert detectors.local_outlier_factor(torch.ones(2, 3, dtype=torch.float64), twins, 5).isfinite().all()


@pytest.mark.parametrize(
    "score", ["odin(epsilon=0.1)", "gga(sign=False)", "mc_dropout", "gradnorm(target=all)", "purview"]
)
def test_scores_use_the_logits_of_models_that_return_probabilities(score: str) -> None:
    """The head is named, or ``logits_fn`` converts the output to logits."""

    class Softmax(nn.Module):
        def __init__(self, log: bool) -> None:
            super().__init__()
            self.body, self.head, self.log = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2)), nn.Linear(6, 3), log

        def forward(self, x: Tensor) -> object:
            z = self.head(self.body(x).tanh())
            return {"odds": (5 * x[:, :3] + z).exp()} if self.log else z.softmax(1)

    class Plain(Softmax):
        def forward(self, x: Tensor) -> Tensor:
            return (5 * x[:, :3] if self.log else 0) + self.head(self.body(x).tanh())

    inputs = torch.randn(5, 4)
    for log, options in ((False, {"head": "head"}), (True, {"logits_fn": lambda output: output["odds"].log()})):
        hidden, plain = Softmax(log).eval(), Plain(log).eval()
        plain.load_state_dict(hidden.state_dict())
        before = state_of(hidden)
        (found,) = lgm.score(hidden, inputs, score, **options).values()
        assert_same_state(before, hidden)
        torch.testing.assert_close(found, only(plain, inputs, score), rtol=1e-4, atol=1e-5)
