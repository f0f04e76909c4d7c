"""Models of the experiments."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_gradmetrics.cli.data import EvaluationData, digits
from lightning_gradmetrics.cli.models import ResNetCifar, digits_cnn, resnet20_cifar, torchvision_model
from lightning_gradmetrics.cli.models.classifier import load_weights
from lightning_gradmetrics.cli.models.digits_cnn import network


def tiny_data(seed: int = 0) -> EvaluationData:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(32) % 2
    x = torch.rand(32, 1, 8, 8, generator=generator) + y.view(-1, 1, 1, 1)
    return EvaluationData({}, {}, ("a", "b"), TensorDataset(x, y))


def test_resnet20_has_the_papers_size_and_names() -> None:
    model = ResNetCifar()
    assert sum(p.numel() for p in model.parameters()) == 269_722
    keys = set(model.state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer3.2.conv2.weight", "layer2.0.bn1.bias", "linear.bias"} <= keys
    assert not any("shortcut" in key or "downsample" in key for key in keys)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_is_every_second_pixel_between_zeros() -> None:
    block = ResNetCifar().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8)
    out = block.eval()(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_checkpoints(tmp_path, wrap) -> None:
    source = ResNetCifar(1)
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    target = ResNetCifar(1)
    load_weights(target, tmp_path / "weights.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_a_checkpoint_that_does_not_fit(tmp_path) -> None:
    torch.save(ResNetCifar(1).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"does not fit ResNetCifar: it lacks \d+ keys such as \['layer1.1"):
        resnet20_cifar(str(tmp_path / "weights.pt"))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        resnet20_cifar(str(tmp_path / "none.pt"))


def test_digits_network_is_kept_and_used_again(tmp_path) -> None:
    data = tiny_data()
    first = digits_cnn(data, str(tmp_path), width=2, epochs=1)
    (kept,) = tmp_path.iterdir()
    time = kept.stat().st_mtime_ns
    again = digits_cnn(data, str(tmp_path), width=2, epochs=1)
    assert kept.stat().st_mtime_ns == time and not again.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    digits_cnn(tiny_data(1), str(tmp_path), width=2, epochs=1)
    digits_cnn(data, str(tmp_path), width=2, epochs=2)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_truncated_checkpoint_is_trained_again(tmp_path, capsys) -> None:
    data = tiny_data()
    first = digits_cnn(data, str(tmp_path), width=2, epochs=1)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    again = digits_cnn(data, str(tmp_path), width=2, epochs=1)
    assert "is damaged" in capsys.readouterr().err
    assert kept.read_bytes() == whole
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_default_weights_come_with_the_package(tmp_path, capsys) -> None:
    """They fit the default settings and data, and are not used for others."""
    model = digits_cnn(digits(), str(tmp_path))
    assert "weights loaded from the package" in capsys.readouterr().err and not list(tmp_path.iterdir())
    data = digits()
    inputs, labels = data.sets["digits"].tensors
    accuracy = (model(inputs).argmax(1) == labels).double().mean()
    assert 0.9 < accuracy < 0.97
    digits_cnn(digits(seed=1), str(tmp_path), epochs=1, width=2)
    assert len(list(tmp_path.iterdir())) == 1


def test_no_epochs_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model.epochs must be at least 1, got 0"):
        digits_cnn(tiny_data(), epochs=0)


def test_digits_network_needs_training_data() -> None:
    with pytest.raises(ValueError, match="no training set"):
        digits_cnn(EvaluationData({}, {}, ("a", "b")))


def test_digits_network_shape() -> None:
    assert network(8)(torch.randn(3, 1, 8, 8)).shape == (3, 8)


def test_torchvision_models() -> None:
    model = torchvision_model("squeezenet1_1", classes=3)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3) and not model.training
    with pytest.raises(ValueError, match="unknown torchvision model 'resnet19'; did you mean"):
        torchvision_model("resnet19")
