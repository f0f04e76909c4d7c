"""GradTrust's demo and table, compared with the description of the demo in plain autograd, and as commands."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradmetrics.cli.gradtrust_demo import LINES, demo_block, demo_values, read_image
from lightning_gradmetrics.cli.selective_areas import areas_grid, selective_areas
from lightning_gradmetrics.meters import AUAC, AUFC
from lightning_gradmetrics.report.tables import print_grid
from tests.cli.conftest import Command
from tests.models import cnn, images
from tests.scores import trust_cases


def purview(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return mean squared gradient norms of the first and the last parameters, split as in the demo, starting from zero."""
    loss = F.binary_cross_entropy_with_logits(model(x), torch.ones_like(model(x)))
    squares = [float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters()))]
    j = len(squares) - 1
    return float(np.mean(squares[: math.floor(j / 2)])), float(np.mean(squares[math.ceil(j / 2) :]))


def as_described(model: nn.Module, x: Tensor) -> dict[str, float]:
    p = model(x).softmax(1)[0]
    first, second = p.topk(2).values
    initial, final = purview(model, x)
    return {
        "GradTrust": -trust_cases.trust(model, x),
        "Softmax Confidence": first,
        "Entropy": (p * p.log()).sum(),
        "Margin": first - second,
        "Log-likelihood": -F.nll_loss(model(x), model(x).argmax(1)),
        "ODIN": 1 - trust_cases.odin(model, x),
        "MC-Dropout": -trust_cases.entropy(model, x),
        "Purview (Initial layers)": -initial,
        "Purview (Final layers)": -final,
        "Grad Norm": -trust_cases.grad_norm(model, x),
    }


def test_the_values_equal_the_description() -> None:
    model, x = cnn(6).double(), images(1).double()
    prediction, found = demo_values(model, x)
    assert prediction == int(model(x).argmax()) and list(found) == list(LINES)
    for line, value in as_described(model, x).items():
        assert found[line] == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-7), line


def test_the_block_has_the_demos_lines() -> None:
    block = demo_block(cnn(), images(1), ["A note."]).splitlines()
    assert re.fullmatch(r"The prediction is : \[\d\] with GradTrust: [\d.]+", block[0])
    assert block[1] == "Comparison Metrics:"
    assert [line.partition(":")[0] for line in block[2:11]] == list(LINES)[1:]
    assert re.fullmatch(r"Entropy: \[-[\d.e-]+\]", block[3])
    assert "no dropout module" in block[11] and block[12] == "A note."


def test_an_image_is_stretched_and_normalised(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "red.png")
    found = read_image(tmp_path / "red.png", 8)
    assert found.shape == (1, 3, 8, 8)
    torch.testing.assert_close(found[0, :, 3, 3], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    with pytest.raises(FileNotFoundError, match="no image"):
        read_image(tmp_path / "blue.png")


def test_areas_equal_those_of_the_meters_on_labelled_rows() -> None:
    generator = np.random.default_rng(0)
    score, label = generator.normal(size=40), generator.integers(0, 2, 40)
    results = pa.table(
        {
            "dataset": ["a"] * 40 + ["b"],
            "prediction": [1] * 41,
            "label": pa.array([*label.tolist(), None], pa.int64()),
            "finite": [True] * 39 + [False, True],
            "s": [*score, 0.0],
            "flat": [1.0] * 41,
        }
    )
    first, flat = selective_areas(results, ["s", "flat"])
    wrong = torch.from_numpy((label != 1).astype(int))[:39]
    for name, meter in (("auac", AUAC), ("aufc", AUFC)):
        for mode in ("coverage", "threshold"):
            judge = meter(mode=mode)
            judge.update(torch.from_numpy(score)[:39], wrong)
            assert first[f"{name}_{mode}"] == pytest.approx(judge.compute().item(), rel=1e-6)
    assert flat["auac_coverage"] == pytest.approx(1 - wrong.double().mean().item())
    assert math.isnan(flat["auac_threshold"])
    console = Console(width=100, file=io.StringIO())
    print_grid(console, areas_grid([first, flat]))
    shown = " ".join(console.file.getvalue().split())
    assert "scale matters" in shown and "–" in shown and shown.index("coverage") < shown.index("threshold")


@pytest.mark.slow
def test_demo_command(tmp_path: Path, command: Command) -> None:
    """One image, a random network, offline; nothing is written."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "bird.png")
    options = ["experiment=gradtrust_demo", "model.name=resnet18", "model.classes=7"]
    found = command(*options, "image=bird.png", "size=64")
    assert found.returncode == 0, found.stderr
    lines = dict(line.split(": ", 1) for line in found.stdout.splitlines()[2:11])
    assert list(lines) == list(LINES)[1:]
    values = {line: float(value.strip("[]")) for line, value in lines.items()}
    assert all(map(math.isfinite, values.values())) and values["MC-Dropout"] == pytest.approx(
        values["Entropy"], rel=1e-5
    )
    assert "weights are random" in found.stdout and "no dropout module" in found.stdout and not found.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bird.png"]
    missing = command(*options, "image=nowhere.png")
    assert missing.returncode != 0 and "no image 'nowhere.png'" in missing.stderr


@pytest.mark.slow
def test_table_command(tmp_path: Path, command: Command) -> None:
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pictures" / ("ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    found = command(
        "experiment=gradtrust_table",
        "data.id=pictures",
        "data.size=32",
        "data.resize=32",
        "model.name=mobilenet_v3_small",
        "model.classes=2",
        "logger=none",
    )
    assert found.returncode == 0, found.stderr
    assert "AUAC" in found.stdout and "AUFC" in found.stdout and "the scale" in found.stdout
    (run,) = (tmp_path / "outputs").glob("*/*")
    rows = list(csv.DictReader((run / "auac_aufc.csv").read_text().splitlines()))
    assert len(rows) == 10 and {row["score"] for row in rows} >= {"gradtrust", "odin", "purview_final", "gradnorm_kl"}
    assert all(0 <= float(row["auac_coverage"]) <= 1 for row in rows)
