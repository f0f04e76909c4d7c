"""Fitted scores that a configuration names: fitted on a dataloader of the trainer, or loaded from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm
from lightning_gradmetrics.scores import save_fitted
from tests.callback.runs import batches, test_run, trainer
from tests.models import Module, images


class Data(LightningDataModule):
    """Twenty images to fit on, ten to test; the validation data differs from the training data."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(0)
        self.parts = {}
        for name, rows in (("train", 20), ("val", 16), ("test", 10)):
            self.parts[name] = images(rows), torch.randint(0, 5, (rows,))

    def train_dataloader(self) -> DataLoader:
        return batches(*self.parts["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return batches(*self.parts["val"])

    def test_dataloader(self) -> DataLoader:
        return batches(*self.parts["test"])


@pytest.mark.parametrize("source", ["train", "val"])
def test_fit_on_a_dataloader_of_the_data_module(source: str) -> None:
    module, data = Module(), Data()
    callback = lgm.GradientMetrics(["max_softmax", "gradorth", "mahalanobis"], fit_on=source)
    trainer(callback).test(module, datamodule=data, verbose=False)
    x, y = data.parts[source]
    fitted = lgm.fit(module.network, [(x, y)], ["gradorth", "mahalanobis"])
    expected = lgm.score(module.network, data.parts["test"][0], fitted)
    for name, values in expected.items():
        found = torch.tensor(callback.results[name].to_pylist())
        torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("source", ["train", "val"])
def test_fit_on_a_dataloader_of_an_earlier_fit(source: str) -> None:
    x, y = images(20), torch.arange(20) % 5
    parts = {"train": (x[:12], y[:12]), "val": (x[4:], y[4:])}
    module, callback = Module().train(), lgm.GradientMetrics("gradorth", fit_on=source, stages="test")
    used = trainer(callback, max_epochs=1)
    used.fit(module, batches(*parts["train"]), batches(*parts["val"]))
    used.test(module, batches(x, y), verbose=False)
    module.eval()
    expected = lgm.score(module, x, lgm.fit(module, [parts[source][0]], ["gradorth"]))["gradorth"]
    found = torch.tensor(callback.results["gradorth"].to_pylist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_states_from_a_folder(tmp_path: Path) -> None:
    module, x = Module(), images(20)
    fitted = lgm.fit(module, [x], ["gradorth"])
    save_fitted(fitted, tmp_path)
    callback = lgm.GradientMetrics(["energy", "gradorth"], fitted=str(tmp_path))
    test_run(callback, module, batches(x, torch.zeros(20, dtype=torch.long)))
    expected = lgm.score(module, x, fitted)["gradorth"]
    found = torch.tensor(callback.results["gradorth"].to_pylist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_mistakes_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="fit_on='test'; expected one of 'train', 'val'"):
        lgm.GradientMetrics("gradorth", fit_on="test")
    with pytest.raises(ValueError, match="exclude each other"):
        lgm.GradientMetrics("gradorth", fit_on="train", fitted="folder")
    callback = lgm.GradientMetrics("gradorth", fit_on="train")
    with pytest.raises(ValueError, match=r"no train dataloader\. Pass datamodule= to the trainer"):
        test_run(callback, Module(), batches(images(8), torch.zeros(8, dtype=torch.long)))
