"""The callback under real Trainers."""

from __future__ import annotations

import html
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightning_gradmetrics as lgm
from tests.models import Module, assert_same_state, cnn, fast_rows, images, state_of

HEAD_SCORES = ["max_softmax", "energy", "gradnorm", "gradtrust"]
STAGES = ["validate", "test", "predict"]


def trainer(*callbacks, **options) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **options})


def loader(
    n: int = 10, batch_size: int = 4, labels: bool = True, inputs: torch.Tensor | None = None, **options
) -> DataLoader:
    x = images(n) if inputs is None else inputs
    y = torch.randint(0, 5, (len(x),))
    return DataLoader(TensorDataset(x, y) if labels else TensorDataset(x), batch_size, **options)


def run(stage: str, callback: lgm.GradientMetrics, model: LightningModule, loaders, **options) -> Trainer:
    used = trainer(callback, **options)
    getattr(used, stage)(model, loaders)
    return used


def scores_of(callback: lgm.GradientMetrics, name: str) -> torch.Tensor:
    return torch.tensor(callback.results.column(name).to_pylist())


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


class Samples(Dataset):
    """A dataset that applies a function to each image and label."""

    def __init__(self, make, n: int = 6) -> None:
        self.x, self.make = images(n), make

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.make(self.x[index], index % 5)


class Answer(LightningModule):
    """A user's module with its own format of batches and outputs."""

    def __init__(self, take, answer) -> None:
        super().__init__()
        self.network, self.take, self.answer = cnn(), take, answer

    def forward(self, *args, **kwargs):
        return self.answer(self.network(args[0] if args else kwargs["image"]))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self(self.take(batch))

    predict_step = test_step


@pytest.mark.parametrize(
    ("make", "take", "labelled"),
    [
        (lambda x, y: x, lambda b: b, False),
        (lambda x, y: (x, y), lambda b: b[0], True),
        (lambda x, y: [x], lambda b: b[0], False),
        (lambda x, y: {"image": x, "label": y}, lambda b: b["image"], True),
        (lambda x, y: {"image": x, "y": y}, lambda b: b["image"], True),
        (lambda x, y: {"image": x}, lambda b: b["image"], False),
    ],
    ids=["tensor", "pair", "list", "mapping", "mapping-y", "mapping-unlabelled"],
)
@pytest.mark.parametrize(
    "answer",
    [lambda z: z, lambda z: {"logits": z, "loss": 0}, lambda z: SimpleNamespace(logits=z)],
    ids=["tensor", "mapping", "object"],
)
def test_batches_and_outputs(make, take, labelled, answer) -> None:
    data = Samples(make)
    callback = lgm.GradientMetrics(["energy", "gradnorm", "gradnorm(target=all)"])
    model = Answer(take, answer)
    run("test", callback, model, DataLoader(data, 4))
    expected = lgm.score(model.network, data.x, ["energy", "gradnorm(target=all)"])
    torch.testing.assert_close(scores_of(callback, "energy"), expected["energy"])
    torch.testing.assert_close(
        scores_of(callback, "gradnorm(target=all)"), expected["gradnorm(target=all)"], rtol=1e-4, atol=1e-5
    )
    assert callback.results["label"].to_pylist() == ([i % 5 for i in range(6)] if labelled else [None] * 6)


def test_split_batch_and_logits_fn_handle_other_formats() -> None:
    data = Samples(lambda x, y: {"meta": {"pixels": x}, "class_of_it": y})
    model = Answer(lambda b: b["meta"]["pixels"], lambda z: ("extra", z))
    callback = lgm.GradientMetrics(
        ["energy", "gradnorm"],
        split_batch=lambda b: (b["meta"]["pixels"], b["class_of_it"]),
        logits_fn=lambda output: output[1],
    )
    run("test", callback, model, DataLoader(data, 4))
    torch.testing.assert_close(scores_of(callback, "energy"), lgm.score(model.network, data.x, "energy")["energy"])
    with pytest.raises(TypeError, match="pass logits_fn="):
        run("test", lgm.GradientMetrics("energy", split_batch=callback.split_batch), model, DataLoader(data, 4))


def test_labels_are_optional_with_a_note() -> None:
    callback = lgm.GradientMetrics(["energy"], datasets={"x": "id"})
    run("test", callback, Answer(lambda b: b[0], lambda z: z), loader(6, labels=False))
    assert not callback.evaluation.metrics
    assert any("label" in note for note in callback.evaluation.notes)


class Direct(LightningModule):
    """A module without a forward, whose step calls its network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def test_step(self, batch, batch_idx):
        self.net(batch[0])


class TwoNetworks(Direct):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = cnn()


def test_module_without_a_forward() -> None:
    model, data = Direct(), loader(6)
    callback = lgm.GradientMetrics(["gradnorm", "pseudo_label(target=all)"])
    run("test", callback, model, data)
    expected = lgm.score(model.net, data.dataset.tensors[0], ["gradnorm", "pseudo_label(target=all)"])
    for name, values in expected.items():
        torch.testing.assert_close(scores_of(callback, name), values, rtol=1e-4, atol=1e-5)


def test_module_without_a_forward_and_two_networks() -> None:
    with pytest.raises(ValueError, match=r"GradientMetrics\(submodule='net'\)"):
        run("test", lgm.GradientMetrics("energy"), TwoNetworks(), loader(4))
    callback = lgm.GradientMetrics(["energy", "gradnorm"], submodule="net")
    run("test", callback, TwoNetworks(), loader(4))
    assert callback.results.num_rows == 4
    with pytest.raises(ValueError, match="no submodule 'nett'"):
        run("test", lgm.GradientMetrics("energy", submodule="nett"), TwoNetworks(), loader(4))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def test_a_model_whose_head_cannot_be_found() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        run("test", lgm.GradientMetrics("gradnorm"), Module(Convolutional().eval()), loader(4))
    callback = lgm.GradientMetrics(["energy", "gradnorm(target=all)"])
    run("test", callback, Module(Convolutional().eval()), loader(4))
    assert callback.results.num_rows == 4
    softmax = nn.Sequential(*cnn(), nn.Softmax(1)).eval()
    with pytest.raises(ValueError, match=r"could not be found.*head='network.7'"):
        run("test", lgm.GradientMetrics("gradnorm"), Module(softmax), loader(4))
    with pytest.raises(ValueError, match="probabilities"):
        run("test", lgm.GradientMetrics("energy"), Module(softmax), loader(4))
    callback = lgm.GradientMetrics(["gradnorm", "energy"], head="network.7")
    data = loader(4)
    run("test", callback, Module(softmax), data)
    torch.testing.assert_close(
        scores_of(callback, "energy"), lgm.score(softmax[:-1], data.dataset.tensors[0], "energy")["energy"]
    )
    with pytest.raises(ValueError, match="no linear layer 'fc'"):
        run("test", lgm.GradientMetrics("gradnorm", head="fc"), Module(), loader(4))


def test_log_probabilities_cause_a_warning() -> None:
    model = Module(nn.Sequential(*cnn(), nn.LogSoftmax(1)).eval())
    with pytest.warns(UserWarning, match="log-probabilities"):
        run("test", lgm.GradientMetrics("energy"), model, loader(4))


def test_unknown_score() -> None:
    with pytest.raises(ValueError, match=r"unknown score 'gradnrom'; did you mean 'gradnorm'"):
        lgm.GradientMetrics("gradnrom")


class TrainModeNorm(Module):
    def on_test_start(self) -> None:
        self.network[1].train()


@pytest.mark.parametrize("score", ["energy", "gradnorm", "gradnorm(target=all)"])
def test_batch_norm_in_train_mode(score: str) -> None:
    with pytest.raises(ValueError, match=r"batch norm 'network.1' is in train mode.*model.eval\(\)"):
        run("test", lgm.GradientMetrics(score), TrainModeNorm(), loader(4))


class FromBytes(Module):
    def forward(self, x):
        return super().forward(x.float() / 255)


def test_a_model_of_integer_images_is_scored_without_input_gradients() -> None:
    x = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    data, model = loader(inputs=x), FromBytes()
    wanted = ["gradnorm", "pseudo_label(target=all)"]
    callback = lgm.GradientMetrics(wanted)
    run("test", callback, model, data)
    for name, values in lgm.score(model.network, x.float() / 255, wanted).items():
        torch.testing.assert_close(scores_of(callback, name), values, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=r"one float tensor .* as the input, not torch.uint8"):
        run("test", lgm.GradientMetrics("odin"), model, data)


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


def test_frozen_parameters_and_channels_last() -> None:
    model, data = Module(), loader(6)
    wanted = ["gradnorm", "pseudo_label(target=all)"]
    expected = lgm.score(model.network, data.dataset.tensors[0], wanted)
    for parameter in model.network[:4].parameters():
        parameter.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    x = data.dataset.tensors[0].to(memory_format=torch.channels_last)
    callback = lgm.GradientMetrics(wanted)
    run("test", callback, model, DataLoader(TensorDataset(x, data.dataset.tensors[1]), 4))
    for name, values in expected.items():
        torch.testing.assert_close(scores_of(callback, name), values, rtol=1e-4, atol=1e-5)


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


class Doubled(Module):
    def test_step(self, batch, batch_idx):
        self(batch[0])
        self(batch[0].flip(3))


class InParts(Module):
    def test_step(self, batch, batch_idx):
        for part in batch[0].split(3):
            self(part)


def test_a_step_that_calls_the_model_more_than_once() -> None:
    with pytest.raises(ValueError, match=r"8 rows in 2 calls during a step of 4 samples"):
        run("test", lgm.GradientMetrics("gradnorm"), Doubled(), loader(4))
    model, data = InParts(), loader(8)
    callback = lgm.GradientMetrics(["energy", "gradnorm"])
    run("test", callback, model, data)
    torch.testing.assert_close(
        scores_of(callback, "energy"), lgm.score(model.network, data.dataset.tensors[0], "energy")["energy"]
    )


class Stream(IterableDataset):
    def __iter__(self):
        torch.manual_seed(1)
        return iter([(images(1)[0], 0) for _ in range(7)])


def test_an_iterable_dataset_has_no_index() -> None:
    callback = lgm.GradientMetrics("energy")
    with pytest.warns(UserWarning, match="index of the rows of 'dataloader_0' is unknown"):
        run("predict", callback, Module(), DataLoader(Stream(), 3))
    assert callback.results["index"].to_pylist() == [None] * 7
    assert callback.evaluation is not None


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_precision(precision: str) -> None:
    model, data = Module(), loader(6)
    x = data.dataset.tensors[0]
    expected = lgm.score(model.network, x, ["gradnorm", "pseudo_label(target=all)"])
    callback = lgm.GradientMetrics(list(expected))
    run("test", callback, model, data, precision=precision)
    for name, values in expected.items():
        found = scores_of(callback, name).float()
        assert found.isfinite().all()
        torch.testing.assert_close(
            found, values, rtol=1e-4 if precision == "64-true" else 0.1, atol=1e-4 if precision == "64-true" else 0.1
        )


@pytest.mark.slow
def test_compiled_model() -> None:
    """A compiled network may not run hooks; an extra forward pass gives the same scores."""
    model, data = Module(), loader(6)
    expected = lgm.score(model.network, data.dataset.tensors[0], ["energy", "gradnorm"])
    model.network = torch.compile(model.network, backend="eager")
    callback = lgm.GradientMetrics(["energy", "gradnorm"])
    run("test", callback, model, data)
    for name, values in expected.items():
        torch.testing.assert_close(scores_of(callback, name), values, rtol=1e-4, atol=1e-5)


def test_a_second_run_replaces_the_first() -> None:
    callback = lgm.GradientMetrics("energy")
    used = trainer(callback)
    for n in (5, 3):
        used.test(Module(), loader(n), verbose=False)
        assert callback.results.num_rows == n


def test_docstring_lists_every_argument() -> None:
    arguments = re.findall(r"^ {4,8}(\w+):", lgm.GradientMetrics.__doc__.split("Attributes:")[0], re.M)
    assert set(arguments) >= {"scores", "datasets", "head", "submodule", "split_batch", "logits_fn", "engine", "prefix"}


def test_thresholds_fitted_on_one_run_are_applied_in_the_next(tmp_path) -> None:
    callback, model = lgm.GradientMetrics(["energy", "gradnorm"]), Module()
    run("validate", callback, model, loader(20))
    fitted = lgm.evaluation.fit_thresholds(callback.results, callback.score_names, tpr=0.9)
    (tmp_path / "thresholds.json").write_text(fitted.to_json())
    kept = lgm.evaluation.Thresholds.from_json((tmp_path / "thresholds.json").read_text())
    judging = lgm.GradientMetrics(["energy", "gradnorm"], thresholds=kept)
    run("predict", judging, model, loader(8, labels=False))
    accepted = judging.results["energy_accept"].to_pylist()
    assert accepted == [value <= kept.values["energy"] for value in judging.results["energy"].to_pylist()]


@pytest.mark.parametrize(
    "rule",
    fast_rows(
        ["true_positive_rate", "coverage", "conformal", "selective_risk", "learn_then_test", "joint_risk"],
        ["conformal"],
    ),
)
def test_the_report_states_the_guarantee_of_applied_thresholds_and_their_cost(rule: str, tmp_path: Path) -> None:
    """Each rule is fitted on a table, saved as JSON, applied by the callback and shown as an operating point."""
    rng, size = np.random.default_rng(0), 4000
    held_out = pa.table(
        {
            "dataset": ["a"] * 2000 + ["b"] * 2000,
            "prediction": [0] * size,
            "label": pa.array([int(row % 50 == 0) for row in range(2000)] + [None] * 2000, pa.int64()),
            "energy": np.concatenate([rng.normal(-1.7, 0.3, 2000), rng.normal(3, 0.3, 2000)]),
            "gradnorm": np.concatenate([rng.normal(-1, 0.3, 2000), rng.normal(3, 0.3, 2000)]),
        }
    )
    roles, scores = {"a": "id", "b": "far"}, ["energy", "gradnorm"]
    fitted = lgm.evaluation.fit_thresholds(held_out, scores, rule, roles=roles)
    (tmp_path / "thresholds.json").write_text(fitted.to_json())
    kept = lgm.evaluation.Thresholds.from_json((tmp_path / "thresholds.json").read_text())
    judging = lgm.GradientMetrics(scores, datasets=roles, thresholds=kept)
    run("predict", judging, Answer(lambda b: b[0], lambda z: z), [loader(40), loader(30, labels=False)])
    together = rule == "joint_risk"
    assert ("accept" in judging.results.column_names) == together
    accepted = np.asarray(judging.results["energy"]) <= kept.values["energy"]
    np.testing.assert_array_equal(np.asarray(judging.results["energy_accept"]), accepted)
    if rule not in ("joint_risk", "learn_then_test"):  # a report takes seconds
        return
    page = html.unescape(judging.report(tmp_path / "report.html").read_text())
    assert f"Guarantee of the applied thresholds: {fitted.guarantee}." in page
    assert f"{rule}(" in page and f"fitted on {'4,000' if together else '2,000'} rows" in page
    assert ("all together" in page) == together
    inside = np.asarray(judging.results["energy_accept"])[:40].mean()
    for number in (fitted.coverage["energy"], inside):
        assert f">{100 * number:.1f}<" in page


def test_intervals_on_request() -> None:
    callback = lgm.GradientMetrics(["energy", "gradnorm"], datasets={"a": "id", "b": "far"}, resamples=50)
    run("predict", callback, Answer(lambda b: b[0], lambda z: z), [loader(40), loader(30, labels=False)])
    (record,) = callback.evaluation.find(score="gradnorm", task="ood", dataset="b", metric="auroc")
    assert record["low"] <= record["value"] <= record["high"] and callback.evaluation.statements
