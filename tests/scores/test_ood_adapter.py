"""pytorch-ood's detectors as scores: everything that is not in the test table."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from pytorch_ood import detector as library
from pytorch_ood.api import Detector, GradientDetector
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import FittedScore, load_fitted, save_fitted
from lightning_gradmetrics.scores.pytorch_ood_adapter.detectors import stages
from lightning_gradmetrics.scores.pytorch_ood_adapter.specs import REFUSED
from lightning_gradmetrics.scoring import totals
from lightning_gradmetrics.scoring.fitting import Fitting
from lightning_gradmetrics.scoring.registry import make
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import observed
from tests.models import Module, assert_same_state, cnn, images, state_of
from tests.scores.fits import fit_batches
from tests.scores.ood_cases import FITTED_MAKERS, PLAIN, name

ROOT = Path(__file__).parents[2]
DETECTORS = {
    n: c for n, c in vars(library).items() if inspect.isclass(c) and issubclass(c, Detector) and c is not Detector
}
EIGHT = ("KNN,k=3", "ViM,d=2", "Mahalanobis", "ReAct", "ASH", "GEN", "NNGuide", "NACUE")
MAKERS = {**PLAIN, **FITTED_MAKERS}
NEEDED = {
    "DICE": {"p": 0.5},
    "WeightedEBO": {"weights": [1.0, 2, 1, 1, 1]},
    "MCM": {"text_embeddings": [[1.0] * 6] * 2},
}


def ready_to_fit() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = cnn()
    ((x, y),), _ = fit_batches(model, images)
    return model, x, y


def quiet(*callbacks) -> Trainer:
    options = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **dict.fromkeys(options, False))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")  # torch 2.8
@pytest.mark.parametrize("detector", sorted(set(DETECTORS) - set(REFUSED) - {"SHE"}))
def test_every_detector_runs(detector: str) -> None:
    """Every other detector is refused with the reason; SHE needs a correct prediction of every class, which a random network lacks."""
    model, x, _ = ready_to_fit()
    score = make("pytorch_ood", detector=detector, **NEEDED.get(detector, {}))
    y = model(x).argmax(1)
    y[: 2 * 5] = torch.arange(5).repeat(2)
    before = state_of(model)
    if DETECTORS[detector].requires_fit:
        many = [(x.repeat(4, 1, 1, 1) + 0.1 * torch.randn(160, 3, 8, 8), y.repeat(4))]
        before["random"] = torch.get_rng_state()
        score = lgm.fit(model, many, score)[0]
    with torch.inference_mode():
        (found,) = lgm.score(model, x[:6], score).values()
    assert found.shape == (6,) and found.isfinite().all()
    assert_same_state(before, model)
    assert score.recipe.family == ("gradient" if issubclass(DETECTORS[detector], GradientDetector) else "baseline")


@pytest.mark.parametrize("detector", sorted(REFUSED))
def test_refused_detectors_name_the_reason_and_the_alternatives(detector: str) -> None:
    assert detector in DETECTORS
    with pytest.raises(ValueError, match=f"{detector} cannot be run as a score: it .*; those that can: ASH, .*ViM"):
        make(f"pytorch_ood(detector={detector})")


def test_a_round_trip_with_the_callback(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fitted by a Trainer, saved, loaded: each column equals pytorch-ood's values; only NAC-UE runs the model."""
    caplog.set_level(logging.WARNING)
    network, x, y = ready_to_fit()
    model = Module(network).eval()
    names = [name(detector) for detector in EIGHT]
    callback = lgm.GradientMetrics(["max_softmax", *names])
    trainer = quiet(callback)
    loader = DataLoader(TensorDataset(x, y), 7)
    before = state_of(model)
    callback.fit(trainer, model, loader)
    save_fitted(callback.scorer.scores, tmp_path)
    assert_same_state({**before, "random": torch.get_rng_state()}, model)
    again = lgm.GradientMetrics(load_fitted(callback.scorer.scores, tmp_path, model))
    fresh = images(23)
    before_test = model.forwards
    quiet(again).test(model, DataLoader(TensorDataset(fresh, torch.zeros(23).long()), 8), verbose=False)
    # One pass per step; NAC-UE takes two to fit and one per batch; one on two samples checks that the pass repeats.
    assert model.forwards - before_test == 3 + 2 + 3 + 1
    assert not caplog.records
    baselines = [score.name for score in again.scorer.scores if score.recipe.family == "baseline"]
    assert baselines == ["max_softmax", *names[:-1]]
    for detector, column in zip(EIGHT, names, strict=True):
        direct = MAKERS[detector](network).to("cpu").fit([(x, y)])
        found = torch.tensor(again.results.column(column).to_pylist())
        torch.testing.assert_close(found, direct.predict(fresh).detach().float(), rtol=1e-4, atol=1e-5)


def test_a_second_fit_replaces_the_first() -> None:
    """The probe of a detector that runs the model belongs to the state that it was made of."""
    network, x, y = ready_to_fit()
    model, score = Module(network).eval(), name("NACUE,layers='network.0',m_bins=10,o_star=5")
    callback = lgm.GradientMetrics(score)
    trainer, columns = quiet(callback), []
    for rows in (slice(0, 20), slice(20, 40)):
        callback.fit(trainer, model, DataLoader(TensorDataset(x[rows], y[rows]), 20))
        trainer.test(model, DataLoader(TensorDataset(x, y), 40), verbose=False)
        columns.append(torch.tensor(callback.results.column(score).to_pylist()))
        direct = library.NACUE(network, [network[0]], m_bins=10, o_star=5).fit([x[rows]])
        torch.testing.assert_close(columns[-1], direct.predict(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(*columns)


def test_processes_join_and_a_fitted_score_is_copied() -> None:
    """The totals of two processes add up to those of one; a copy of a score rebuilds its detector."""
    model, x, y = ready_to_fit()
    scores = [make(name(detector)) for detector in ("KNN,k=3", "ViM,d=2", "NACUE")]

    def seen(rows: slice) -> tuple:
        part = Fitting(scores, Scorer(tuple(scores)))
        batch = observed(part.scorer, model, x[rows], y[rows])
        part.add(batch, part.scorer.evidence(model, batch))
        parts.append(part)
        return part.seen

    parts: list[Fitting] = []
    joined = [seen(slice(25, 40)), seen(slice(0, 25))]
    together = parts[0].finish(model, joined)
    for score in lgm.fit(model, [(x, y)], scores):
        other = together[score.name]
        assert score.state.keys() == other.state.keys()
        for key, value in score.state.items():
            torch.testing.assert_close(value, other.state[key])
        wanted = lgm.score(model, x, score)[score.name]
        twin = deepcopy(score)
        assert score.built and not twin.built
        assert torch.equal(lgm.score(model, x, twin)[score.name], wanted)


def test_the_sample_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(totals, "MAX_ROWS", 12)
    model, x, y = ready_to_fit()
    for detector in ("KNN,k=3", "NACUE"):
        score = lgm.fit(model, list(zip(x.split(9), y.split(9), strict=True)), name(detector))[0]
        assert len(score.state["rows"]) == len(score.state["labels"]) == 12


def test_detectors_of_classes_require_labels() -> None:
    model, x, _ = ready_to_fit()
    for detector in ("KNN,k=3", "ViM,d=2", "ReAct", "NNGuide", "NACUE"):
        assert lgm.fit(model, [x], name(detector))[0].state is not None
    with pytest.raises(ValueError, match="needs true labels"):
        lgm.fit(model, [x], name("Mahalanobis"))


@pytest.mark.parametrize(
    ("detector", "message"),
    [
        ("KNN,k=41", r"pytorch-ood's KNN could not be fitted on these 40 samples of shape \(6,\): k=41 exceeds"),
        (
            "Mahalanobis",
            r"Mahalanobis could not be .* classes \[1, 2, 3, 4, 5\]: it takes samples of all classes, from 0 up",
        ),
        ("ViM,d=6", "ViM with d=6 returns no finite score for samples that it was fitted on, of 6 numbers each"),
    ],
)
def test_a_failed_fit_names_the_reason(detector: str, message: str) -> None:
    """The error is raised during the fit, not later."""
    model, x, _ = ready_to_fit()
    with pytest.raises(ValueError, match=message):
        lgm.fit(model, [(x, torch.arange(40) % 5 + 1)], name(detector))


@pytest.mark.parametrize(
    ("score", "kind", "message"),
    [
        ("pytorch_ood(detector=nac-ue)", ValueError, "cannot read the score"),
        (
            "pytorch_ood(detector='nac-ue')",
            ValueError,
            "has no detector 'nac-ue'; did you mean 'NACUE'.* available: ASH",
        ),
        ("pytorch_ood(detector=NNGuid)", ValueError, "did you mean 'NNGuide'"),
        (
            "pytorch_ood(detector=GEN,gama=1)",
            TypeError,
            r"no argument 'gama'; its arguments are: detector=\(required\), gamma=0.1",
        ),
        ("pytorch_ood(detector=KNN,encoder=1)", TypeError, "no argument 'encoder'"),
        ("pytorch_ood(detector=DICE)", TypeError, r"DICE needs p=, as in pytorch_ood\(detector=DICE, p=...\)"),
    ],
)
def test_wrong_arguments_are_refused(score: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        make(score)


def test_invalid_layers_and_inputs_are_refused() -> None:
    model, x, _ = ready_to_fit()
    score = lgm.fit(model, [x], "pytorch_ood(detector=NACUE,layers='0+layer9')")[0]
    with pytest.raises(ValueError, match="the model has no layer 'layer9'; its layers are: 0, 1, "):
        lgm.score(model, x, score)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.network(first + second)

    assert lgm.score(Two(), (x, x), "pytorch_ood(detector=GEN)")
    with pytest.raises(TypeError, match="take one tensor as its input, but this is a tuple"):
        lgm.score(Two(), (x, x), "pytorch_ood(detector=ODIN)")


def test_stages() -> None:
    """The stages are the blocks, if there are any, also inside a wrapper; norms and activations are not stages."""
    torchvision = pytest.importorskip("torchvision")
    resnet = torchvision.models.resnet18(weights=None)
    assert stages(resnet) == ["layer1", "layer2", "layer3", "layer4"]
    assert stages(Module(cnn())) == ["network.0", "network.3"]
    with pytest.raises(ValueError, match="name them in layers="):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_names_and_states_differ_between_detectors(tmp_path: Path) -> None:
    """A name can be parsed again; an explicit default is not shown; a different k makes a different score."""
    score = make("pytorch_ood(detector=NNGuide, k=3)")
    assert score.name == "pytorch_ood(detector=NNGuide,k=3)" and make(score.name).arguments == score.arguments
    assert make("pytorch_ood", detector="NNGuide", k=10).name == "pytorch_ood(detector=NNGuide)"
    assert score.recipe.summary == "NNGuide of pytorch-ood." and "ICCV 2023" in score.recipe.paper
    layers = OmegaConf.create(["0", "3"])
    assert make("pytorch_ood", detector="NACUE", layers=layers).arguments["layers"] == ["0", "3"]
    model, x, _ = ready_to_fit()
    save_fitted([lgm.fit(model, [x], score)[0].named("mine")], tmp_path)
    with pytest.raises(ValueError, match="made for another arguments"):
        load_fitted([make("pytorch_ood(detector=NNGuide)", name="mine")], tmp_path, model)
    with pytest.raises(ValueError, match="is not fitted"):
        lgm.score(model, x, score)


def test_react_with_a_threshold_needs_no_fit() -> None:
    assert not isinstance(make("pytorch_ood(detector=ReAct,threshold=0.5)"), FittedScore)
    assert isinstance(make("pytorch_ood(detector=ReAct)"), FittedScore)


SCRIPT = """
import sys
import lightning_gradmetrics as lgm
assert "pytorch_ood" not in sys.modules
sys.modules["pytorch_ood"] = None
from lightning_gradmetrics.cli.score_catalogue import markdown
from pathlib import Path
assert markdown() == Path("docs/scores.md").read_text(encoding="utf-8")
try:
    lgm.GradientMetrics("pytorch_ood(detector=GEN)")
except ImportError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_pytorch_ood() -> None:
    """Nothing imports pytorch-ood beforehand, the tables work without it, and the error names what to install."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'pip install "lightning-gradmetrics[pytorch-ood]"' in done.stdout
