"""The gradient norm of every layer: against autograd, in a run, and in its files."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from lightning_gradmetrics.pictures import profiles, write_pictures
from lightning_gradmetrics.report import write_report, write_run
from lightning_gradmetrics.scoring.layer_profile import Profile
from tests.models import MODELS, Module, images


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
def test_every_layers_norm_is_that_of_autograd(name: str, norm: float) -> None:
    torch.manual_seed(0)
    model, make = MODELS[name]
    network, x = model().double(), make(3).double()
    names, norms = lgm.gradient_profile(network, x, "pseudo_label", norm)
    layers = [n for n, module in network.named_modules() if list(module.parameters(recurse=False))]
    assert list(names) == layers and norms.shape == (3, len(layers))
    for row in range(3):
        logits = network(x[row : row + 1])
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        gradients = dict(
            zip(dict(network.named_parameters()), torch.autograd.grad(loss, network.parameters()), strict=True)
        )
        for column, layer in enumerate(layers):
            flat = torch.cat([g.flatten() for n, g in gradients.items() if n.rpartition(".")[0] == layer])
            assert norms[row, column].item() == pytest.approx(torch.linalg.vector_norm(flat, norm).item(), rel=1e-8)


def test_the_norm_over_all_layers_is_that_of_the_gradient() -> None:
    network, x = MODELS["cnn"][0](), images(6)
    whole = lgm.gradient_statistics(network, x, "uniform", statistics=["l2"]).norm(2)
    torch.testing.assert_close(lgm.gradient_profile(network, x, "uniform").norms.norm(dim=1), whole)


def test_a_profile_is_given_by_a_flag_a_name_or_arguments() -> None:
    assert Profile.of(None) is Profile.of(False) is None and Profile.of(True) == Profile()
    assert Profile.of({"objective": "uniform", "norm": 1}) == Profile("uniform", 1) == Profile.of(Profile("uniform", 1))
    for wrong, words in (("unifrom", "uniform"), ({"p": 1}, "objective, norm"), ({"norm": 0}, "above 0")):
        with pytest.raises(ValueError, match=words):
            lgm.GradientMetrics("energy", profile=wrong)


def run(folder: Path, *scores: str, profile: object = True, sizes: tuple[int, ...] = (11, 5)):
    torch.manual_seed(1)
    sets = [TensorDataset(images(n), torch.zeros(n).long()) for n in sizes]
    callback = lgm.GradientMetrics(scores, datasets=["inside", "outside"][: len(sizes)], profile=profile)
    model = Module().eval()
    quiet = {"enable_progress_bar": False, "logger": False, "default_root_dir": folder}
    Trainer(accelerator="cpu", callbacks=[callback], **quiet).validate(
        model, [DataLoader(s, 4) for s in sets], verbose=False
    )
    return callback, model, [s.tensors[0] for s in sets]


@pytest.mark.slow
def test_a_run_returns_the_quartiles_of_every_layer(tmp_path: Path) -> None:
    """The quartiles are those of all samples, in the run's files and its report; a sample with NaN is left out."""
    callback, model, (inside, outside) = run(tmp_path, "energy", profile={"norm": 1.0})
    (table,) = callback.tables().values()
    for name, x in (("inside", inside), ("outside", outside)):
        names, norms = lgm.gradient_profile(model.network, x, norm=1.0)
        rows = table.filter(pyarrow.compute.equal(table["dataset"], name)).to_pydict()
        assert rows["layer"] == [f"network.{layer}" for layer in names] and set(rows["samples"]) == {len(x)}
        for key, share in (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75)):
            assert rows[key] == pytest.approx(norms.quantile(share, dim=0).tolist(), rel=1e-4)
    figures = write_pictures(callback.pictures(), tmp_path)
    write_run(tmp_path, callback.results, callback.evaluation, callback.scorer.scores, model={}, figures=figures)
    page = write_report(tmp_path).read_text()
    assert "Gradient norms by layer</h2>" in page and page.count("<img") == 1 and "Pictures</h2>" not in page


def test_a_profile_shares_the_forward_and_the_backward_of_a_score(tmp_path: Path) -> None:
    """The score's values and the number of forwards are the same with it and without."""
    score = "pseudo_label(target=all)"
    alone, first, _ = run(tmp_path, score, profile=False)
    both, second, _ = run(tmp_path, score, profile=True)
    assert first.forwards == second.forwards
    assert alone.results[score].to_pylist() == pytest.approx(both.results[score].to_pylist(), rel=1e-6)
    assert alone.tables() == {} and alone.pictures() == []


@pytest.mark.slow
def test_a_bounded_uniform_sample_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sample has the largest allowed size, spreads over the whole dataset, and does not depend on the processes."""
    monkeypatch.setattr(profiles, "MAX_SAMPLES", 40)
    callback, _, _ = run(tmp_path, "energy", sizes=(400,))
    source = callback.sources[0]
    sample = source.seen["inside"]
    assert sample.count == 400 and sample.norms.shape == (40, 4)
    kept = sorted(range(400), key=lambda i: profiles.row_keys(torch.tensor([[i]])).item())[:40]
    assert sample.keys.tolist() == [profiles.row_keys(torch.tensor([[i]])).item() for i in kept]
    assert 5 <= sum(i < 100 for i in kept) <= 17 and 5 <= sum(i >= 300 for i in kept) <= 17
    other = profiles.ProfileGallery(Profile())
    order = torch.randperm(40)
    halves = [profiles._Sample(200, sample.keys[part], sample.norms[part]) for part in order.split(20)]
    other.join([(source.layers, {"inside": halves[0]}), ((), {}), (source.layers, {"inside": halves[1]})])
    assert torch.equal(other.seen["inside"].norms, sample.norms) and other.layers == source.layers
    assert "40 random samples" in source.pictures()[0].caption


def test_samples_with_nan_are_left_out(tmp_path: Path) -> None:
    x = images(6)
    x[2, 0, 0, 0] = float("nan")
    callback = lgm.GradientMetrics("energy", profile="uniform")
    trainer = Trainer(accelerator="cpu", callbacks=[callback], enable_progress_bar=False, logger=False)
    trainer.predict(Module().eval(), DataLoader(TensorDataset(x), 6))
    table = callback.tables()["profile"].to_pydict()
    assert set(table["samples"]) == {5} and all(value > 0 for value in table["median"])
