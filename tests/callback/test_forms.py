"""The forms of batches, outputs and modules that the callback scores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lightning_gradmetrics as lgm
from tests.callback.image_runs import Answer, loader, run, scores_of
from tests.models import Module, cnn, images


class Samples(Dataset):
    """A dataset that applies a function to each image and label."""

    def __init__(self, make, n: int = 6) -> None:
        self.x, self.make = images(n), make

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.make(self.x[index], index % 5)


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
