"""Data and models by name: torchvision, NumPy, timm, Hugging Face and Lightning checkpoints, on generated files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import nn

from lightning_gradmetrics.cli.data import huggingface_data, npz_data, torchvision_data
from lightning_gradmetrics.cli.models import huggingface_model, lightning_model, timm_model
from tests.cli.conftest import Command


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray, prefix: str = "t10k") -> None:
    """Write files in the format of MNIST."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, np.ndarray]:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    for prefix in ("t10k", "train"):
        write_mnist(
            tmp_path, images if prefix == "t10k" else images[:2], labels[: 6 if prefix == "t10k" else 2], prefix
        )
    return tmp_path, images


def test_torchvision_data(mnist: tuple[Path, np.ndarray]) -> None:
    root, images = mnist
    fake = {"noise": {"dataset": "FakeData", "size": 3, "image_size": [3, 20, 20]}}
    data = torchvision_data("MNIST", 28, far=fake, root=str(root), fit_on_train=True, mean=[0] * 3, std=[1] * 3)
    assert dict(data.roles) == {"MNIST": "id", "noise": "far"} and len(data.classes) == 10
    pixels, label = data.sets["MNIST"][4]
    assert label == 4 and torch.equal(pixels[1], torch.from_numpy(images[4]).float() / 255)
    pixels, label = data.sets["noise"][0]
    assert label == -1 and pixels.shape == (3, 28, 28) and len(data.sets["noise"]) == 3
    loaders, _ = data.fit_loaders(4)
    assert len(loaders["train"].dataset) == 2
    with pytest.raises(ValueError, match=r"unknown torchvision dataset 'MNISST'; did you mean 'MNIST'"):
        torchvision_data("MNISST", 28)


def test_npz_data(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    np.savez(tmp_path / "mine.npz", inputs=values, labels=np.arange(5))
    np.savez(tmp_path / "svhn.npz", inputs=values.astype(np.float32))
    np.savez(tmp_path / "words.npz", x=np.arange(10).reshape(5, 2))
    data = npz_data(str(tmp_path / "mine.npz"), far=str(tmp_path / "svhn.npz"))
    assert dict(data.roles) == {"mine": "id", "svhn": "far"}
    assert torch.equal(data.sets["mine"].tensors[0], torch.from_numpy(values).float())
    assert data.sets["mine"].tensors[1].tolist() == [0, 1, 2, 3, 4] and (data.sets["svhn"].tensors[1] == -1).all()
    words = npz_data(str(tmp_path / "words.npz"), inputs="x")
    assert words.sets["words"].tensors[0].dtype == torch.int64
    np.savez(tmp_path / "bytes.npz", inputs=np.zeros((2, 2), np.uint8))
    np.savez(tmp_path / "short.npz", inputs=values, labels=np.arange(4))
    for name, words in (
        ("words", "has no array 'inputs'; it has x"),
        ("bytes", "are uint8; save"),
        ("short", "5 inputs"),
    ):
        with pytest.raises(ValueError, match=words):
            npz_data(str(tmp_path / f"{name}.npz"))
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.npz'"):
        npz_data("nowhere.npz")


class Net(LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    model = Net(width=5)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = lightning_model(f"{__name__}.Net", str(tmp_path / "last.ckpt"))
    assert torch.equal(loaded.layer.weight, model.layer.weight) and not loaded.training
    for arguments, words in (
        (("nowhere.Net", "x"), "cannot be imported"),
        (("torch.nn.Linear", "x"), "is not a LightningModule"),
    ):
        with pytest.raises(ValueError, match=words):
            lightning_model(*arguments)
    with pytest.raises(FileNotFoundError, match="no checkpoint 'x'"):
        lightning_model(f"{__name__}.Net", "x")


@pytest.mark.slow
def test_a_model_of_timm() -> None:
    pytest.importorskip("timm")
    model = timm_model("resnet10t", classes=4)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4) and not model.training
    with pytest.raises(ValueError, match="unknown timm model 'resnet19'; did you mean"):
        timm_model("resnet19")


def test_a_model_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    model = huggingface_model(str(tmp_path / "vit"))
    assert model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="unknown kind 'sound'"):
        huggingface_model(str(tmp_path / "vit"), "sound")


def test_they_work_in_the_command(tmp_path: Path, command: Command) -> None:
    """A Hugging Face model on image folders and arrays."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    generator = np.random.default_rng(0)
    images = generator.normal(size=(12, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", inputs=images, labels=generator.integers(0, 3, 12))
    np.savez(tmp_path / "other.npz", inputs=images + 1)
    done = command(
        "data=npz",
        "data.id=mine.npz",
        "data.far=other.npz",
        "model=huggingface",
        "model.name=vit",
        "score=[max_softmax,gradnorm,pseudo_label_all]",
        "logger=none",
        "report=false",
        "resamples=0",
    )
    assert done.returncode == 0, done.stderr
    assert "errors: mine" in done.stdout and "far: other" in done.stdout


def test_huggingface_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": [0, 1, 1, 0]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict(columns, kinds)
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "pets"))
    made.remove_columns("label").save_to_disk(str(tmp_path / "noise"))
    data = huggingface_data(str(tmp_path / "pets"), far=str(tmp_path / "noise"), size=20, mean=[0] * 3, std=[1] * 3)
    assert dict(data.roles) == {"pets": "id", "noise": "far"} and data.classes == ("cat", "dog")
    image, label = data.sets["pets"][1]
    assert label == 1 and torch.equal(image, torch.from_numpy(pixels[1]).permute(2, 0, 1).float() / 255)
    assert data.sets["noise"][3][1] == -1 and len(data.sets["noise"]) == 4
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has test: set data\.split"):
        huggingface_data(str(tmp_path / "pets"), size=20, split="dev")
    with pytest.raises(ValueError, match="no column 'label'"):
        huggingface_data(str(tmp_path / "noise"), size=20)
    with pytest.raises(ValueError, match=r"data\.size is missing"):
        huggingface_data(str(tmp_path / "pets"))


@pytest.mark.slow
def test_huggingface_texts_with_a_model_of_transformers(tmp_path: Path, command: Command) -> None:
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "rain"]
    known = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    base = tokenizers.Tokenizer(known)
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=base, unk_token="[UNK]", pad_token="[PAD]")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 6,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = transformers.BertConfig(**sizes, num_labels=2)
    for part in (fast, transformers.BertForSequenceClassification(config)):
        part.save_pretrained(tmp_path / "bert")
    texts = {"text": ["good film", "bad film", "good rain", "bad bad"] * 5, "label": [1, 0, 1, 0] * 5}
    datasets.Dataset.from_dict(texts).save_to_disk(str(tmp_path / "films"))
    datasets.Dataset.from_dict({"text": ["rain rain rain", "nothing"] * 10}).save_to_disk(str(tmp_path / "weather"))
    done = command(
        *("data=huggingface", "data.id=films", "data.far=weather", "data.text=text", "data.tokenizer=bert"),
        *(
            "data.max_length=4",
            "model=huggingface",
            "model.name=bert",
            "model.kind=text",
            "score=[max_softmax,gradnorm]",
        ),
        *("resamples=0", "logger=none", "hydra.run.dir=made"),
    )
    assert done.returncode == 0, done.stderr
    assert "films: 20 samples (id)" in done.stdout and "far: weather" in done.stdout
    assert (tmp_path / "made" / "report.html").is_file()
