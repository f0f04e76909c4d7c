"""The callback under real Trainers."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradmetrics as lgm
from tests.callback.image_runs import STAGES, Answer, loader, run, scores_of
from tests.callback.runs import trainer
from tests.models import Module, assert_same_state, cnn, images, state_of

HEAD_SCORES = ["max_softmax", "energy", "gradnorm", "gradtrust"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_scores_of_every_sample(stage: str) -> None:
    """Equal to `lgm.score` on the whole data at once, for head scores and full-network scores."""
    wanted = [*HEAD_SCORES, "pseudo_label(target=all)"]
    callback, model, data = lgm.GradientMetrics(wanted), Module(), loader(10, 4)
    used = run(stage, callback, model, data)
    x, y = data.dataset.tensors
    expected = lgm.score(model.network, x, wanted)
    for name, values in expected.items():
        torch.testing.assert_close(scores_of(callback, name), values, rtol=1e-4, atol=1e-5)
    table = callback.results
    assert table.column_names == ["dataset", "index", "prediction", "label", *expected, "finite"]
    assert table["index"].to_pylist() == list(range(10)) and table["label"].to_pylist() == y.tolist()
    assert table["prediction"].to_pylist() == model.network(x).argmax(1).tolist()
    assert set(table["dataset"].to_pylist()) == {"dataloader_0"} and all(table["finite"].to_pylist())
    logged = used.callback_metrics["gradmetrics/dataloader_0/energy/misclassification_auroc"]
    wrong = model.network(x).argmax(1) != y
    assert float(logged) == pytest.approx(float(lgm.meters.functional.auroc(expected["energy"], wrong)), abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_head_scores_run_no_extra_forward(stage: str) -> None:
    plain, watched = Module(), Module()
    data = loader(10, 4)
    run(stage, lgm.GradientMetrics(HEAD_SCORES), watched, data)
    getattr(trainer(), stage)(plain, data)
    assert watched.forwards == plain.forwards == 3


def test_full_network_scores_share_one_forward() -> None:
    """Several scores take as many forward passes as one."""
    counts = []
    for wanted in (
        ["gradnorm(target=all)"],
        ["gradnorm(target=all)", "pseudo_label(target=all)", "pseudo_label(target='network.7.*')"],
    ):
        model, data = Module(), loader(8, 4)
        run("test", lgm.GradientMetrics(wanted), model, data)
        before = model.forwards
        run("test", lgm.GradientMetrics(wanted), model, data)
        counts.append(model.forwards - before)
    assert counts[0] == counts[1] <= 2 + 2 * 2 + 1  # the steps'; the scores', perhaps with a sample alone; one check


@pytest.mark.slow
def test_model_untouched_and_metrics_reach_the_loggers(tmp_path) -> None:
    model = Module()
    before = state_of(model)
    for stage in STAGES:
        logger = CSVLogger(tmp_path, name=stage, version=0)
        run(stage, lgm.GradientMetrics(["energy", "gradnorm(target=all)"]), model, loader(8, 4), logger=logger)
        logger.save()
        assert (
            "gradmetrics/dataloader_0/energy/misclassification_auroc"
            in (tmp_path / stage / "version_0" / "metrics.csv").read_text()
        )
    model.eval()
    assert_same_state({**before, "training": state_of(model)["training"], "random": torch.get_rng_state()}, model)


def test_training_ends_with_the_same_weights() -> None:
    """A fit with validation ends with bit-identical weights with and without the callback."""
    ends = []
    for callbacks in ([], [lgm.GradientMetrics(["energy", "gradnorm", "pseudo_label(target=all)"])]):
        torch.manual_seed(3)
        model = Module(cnn().train())
        data = TensorDataset(images(16), torch.randint(0, 5, (16,)))
        fit = trainer(*callbacks, max_epochs=2, log_every_n_steps=1)
        fit.fit(model, DataLoader(data, 4, shuffle=True), DataLoader(data, 8))
        ends.append(model.state_dict())
        if callbacks:
            assert callbacks[0].results.num_rows == 16
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_named_dataloaders_with_roles() -> None:
    callback = lgm.GradientMetrics(["energy", "gradnorm"], datasets={"inside": "id", "close": "near", "away": "far"})
    model = Answer(lambda b: b[0], lambda z: z)
    used = run("predict", callback, model, [loader(9), loader(5, labels=False), loader(6, labels=False)])
    assert callback.results["dataset"].to_pylist() == ["inside"] * 9 + ["close"] * 5 + ["away"] * 6
    assert "gradmetrics/away/gradnorm/ood_auroc" in used.callback_metrics
    assert "gradmetrics/close/energy/ood_fpr95" in used.callback_metrics
    assert not any("inside" in key and "ood" in key for key in used.callback_metrics)


def test_names_from_a_mapping_of_dataloaders() -> None:
    callback = lgm.GradientMetrics("energy")
    with pytest.warns(UserWarning, match="2 dataloaders and no roles.*{'a': 'id', 'b': 'far'}"):
        run("predict", callback, Module(), {"a": loader(3), "b": loader(2)})
    assert callback.results["dataset"].to_pylist() == ["a"] * 3 + ["b"] * 2


def test_wrong_number_of_names() -> None:
    with pytest.raises(ValueError, match=r"names 1 datasets \(one\), but test has 2 dataloaders"):
        run("test", lgm.GradientMetrics("energy", datasets=["one"]), Module(), [loader(3), loader(2)])


def test_log_probabilities_cause_a_warning() -> None:
    model = Module(nn.Sequential(*cnn(), nn.LogSoftmax(1)).eval())
    with pytest.warns(UserWarning, match="log-probabilities"):
        run("test", lgm.GradientMetrics("energy"), model, loader(4))


def test_unknown_score() -> None:
    with pytest.raises(ValueError, match=r"unknown score 'gradnrom'; did you mean 'gradnorm'"):
        lgm.GradientMetrics("gradnrom")


def test_an_empty_dataloader() -> None:
    empty = DataLoader(TensorDataset(images(0), torch.zeros(0, dtype=torch.long)), 4)
    callback = lgm.GradientMetrics("energy", datasets=["some", "none"])
    with pytest.warns(UserWarning, match="'none' returned no samples"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ength.*zero.*|.*returned 0.*")
        run("test", callback, Module(), [loader(4), empty])
    assert callback.results["dataset"].to_pylist() == ["some"] * 4
    callback = lgm.GradientMetrics("energy")
    with pytest.warns(UserWarning, match="no samples"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ength.*zero.*")
        run("test", callback, Module(), empty)
    assert callback.results.num_rows == 0 and callback.results.column_names[-2:] == ["energy", "finite"]


@pytest.mark.parametrize("stage", STAGES)
def test_batch_size_one(stage: str) -> None:
    callback, data, model = lgm.GradientMetrics(["gradnorm", "pseudo_label(target=all)"]), loader(3, 1), Module()
    run(stage, callback, model, data)
    expected = lgm.score(model.network, data.dataset.tensors[0], ["gradnorm"])["gradnorm"]
    torch.testing.assert_close(scores_of(callback, "gradnorm"), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite(bad: float) -> None:
    data = loader(12)
    clean = lgm.GradientMetrics(["energy", "gradnorm(target=all)"], datasets={"x": "id"})
    model = Module()
    run("test", clean, model, DataLoader(TensorDataset(*(t[torch.arange(12) != 5] for t in data.dataset.tensors)), 4))
    data.dataset.tensors[0][5, 1, 2, 3] = bad
    callback = lgm.GradientMetrics(["energy", "gradnorm(target=all)"], datasets={"x": "id"})
    run("test", callback, model, data)
    assert callback.results["finite"].to_pylist() == [i != 5 for i in range(12)]
    assert callback.evaluation.datasets[0]["not_finite"] == 1 and any(
        "finite" in note for note in callback.evaluation.notes
    )
    for record, wanted in zip(callback.evaluation.metrics, clean.evaluation.metrics, strict=True):
        assert record["value"] == pytest.approx(wanted["value"], abs=1e-5)


class Breaks(Module):
    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("the user's own")


def test_a_user_exception_leaves_no_hook() -> None:
    model = Breaks()
    model.eval()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="the user's own"):
        run("test", lgm.GradientMetrics(["gradnorm", "gradnorm(target=all)"]), model, loader(8))
    assert_same_state({**before, "random": torch.get_rng_state()}, model)


def test_a_second_run_replaces_the_first() -> None:
    callback = lgm.GradientMetrics("energy")
    used = trainer(callback)
    for n in (5, 3):
        used.test(Module(), loader(n), verbose=False)
        assert callback.results.num_rows == n


def test_docstring_lists_every_argument() -> None:
    arguments = re.findall(r"^ {4,8}(\w+):", lgm.GradientMetrics.__doc__.split("Attributes:")[0], re.M)
    assert set(arguments) >= {"scores", "datasets", "head", "submodule", "split_batch", "logits_fn", "engine", "prefix"}


def test_intervals_on_request() -> None:
    callback = lgm.GradientMetrics(["energy", "gradnorm"], datasets={"a": "id", "b": "far"}, resamples=50)
    run("predict", callback, Answer(lambda b: b[0], lambda z: z), [loader(40), loader(30, labels=False)])
    (record,) = callback.evaluation.find(score="gradnorm", task="ood", dataset="b", metric="auroc")
    assert record["low"] <= record["value"] <= record["high"] and callback.evaluation.statements
