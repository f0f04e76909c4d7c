"""What the jobs of a sweep share: the values are those of jobs that share nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from lightning_gradmetrics.callback.stages import ScoreStage
from lightning_gradmetrics.cli.shared_scorer import SharedScorer, batch_key
from lightning_gradmetrics.cli.sharing import SharedFolder
from lightning_gradmetrics.results.rows import Rows
from lightning_gradmetrics.results.stores import MemoryStore
from lightning_gradmetrics.scoring.batch import ObservedBatch
from lightning_gradmetrics.scoring.registry import resolve
from lightning_gradmetrics.scoring.scorer import Scorer
from lightning_gradmetrics.scoring.step import StepObserver
from tests.cli.conftest import Command


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def scored(scorer: Scorer, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    batch = StepObserver(scorer, model).own(images)
    return scorer(scorer.evidence(model, batch))


@pytest.mark.parametrize("part", ["inputs", "labels", "logits"])
def test_one_changed_bit_is_another_batch(part: str) -> None:
    tensors = {"inputs": torch.ones(2, 3), "labels": torch.tensor([0, 1]), "logits": torch.zeros(2, 3)}
    key = batch_key(ObservedBatch(**tensors))
    assert key == batch_key(ObservedBatch(**{name: tensor.clone() for name, tensor in tensors.items()}))
    changed = tensors[part].clone()
    changed[0] += 1
    assert key != batch_key(ObservedBatch(**{**tensors, part: changed}))


def test_stored_values_are_read_for_the_same_batch_alone(tmp_path: Path, model: nn.Module) -> None:
    folder, names = SharedFolder(tmp_path, {"model": "this"}), ["max_softmax", "gradnorm(target='all')"]
    first, second = torch.randn(2, 5, 1, 4, 4)
    expected = scored(Scorer(resolve(names)), model, first)
    writer = folder.scorer(Scorer(resolve(names)))
    assert all(torch.equal(scored(writer, model, first)[name], expected[name]) for name in expected)
    folder.store(writer)

    reader = folder.scorer(Scorer(resolve([*names, "energy"])))
    known = reader.known["gradnorm(target=all)"]
    assert isinstance(known, dict)
    (key,) = known
    known[key] = known[key] + 1  # a value that no computation returns
    values = scored(reader, model, first)
    assert list(values) == ["max_softmax", "gradnorm(target=all)", "energy"]
    torch.testing.assert_close(values["gradnorm(target=all)"], expected["gradnorm(target=all)"] + 1)
    assert set(reader.added) == {"energy"}
    other = scored(reader, model, second)
    torch.testing.assert_close(other, scored(Scorer(resolve([*names, "energy"])), model, second))


def test_small_batches_are_stored_and_read_one_by_one(tmp_path: Path, model: nn.Module) -> None:
    model.float()  # float32 logits can be scored together
    folder, batches = SharedFolder(tmp_path, {}), torch.randn(11, 1, 4, 4).float().split([4, 4, 3])
    plain = Scorer(resolve(["energy"]))
    expected = torch.cat([scored(plain, model, images)["energy"] for images in batches])
    for reads in (set[str](), {"energy"}):
        scorer, rows = folder.scorer(plain), Rows("test", ["energy"])
        stage = ScoreStage(scorer, [rows], MemoryStore([rows], lambda table: table))
        for images in batches:
            batch = StepObserver(scorer, model).own(images)
            stage.add(0, batch, scorer.evidence(model, batch), torch.arange(batch.size))
        stage.settle()
        folder.store(scorer)
        assert rows.table()["energy"].to_pylist() == expected.tolist() and scorer.read == reads
    assert sorted(map(len, folder.scorer(plain).known["energy"].values())) == [3, 4, 4]


def test_other_arguments_other_models_and_objects_are_not_shared(tmp_path: Path) -> None:
    folder = SharedFolder(tmp_path, {"model": "this"})
    scores = ["gradnorm", "gradnorm(temperature=2)", "gradnorm(target='all')"]
    paths = {folder._path(*resolve([score])) for score in scores}
    paths |= {SharedFolder(tmp_path, {"model": "other"})._path(*resolve(["gradnorm"]))}
    assert len(paths) == 4 and None not in paths
    own = resolve([{"gradnorm": {"target": lambda name: "weight" in name}}])
    assert folder._path(*own) is None


def test_without_a_score_to_compute_the_pictures_are_still_drawn(tmp_path: Path, model: nn.Module) -> None:
    folder, images = SharedFolder(tmp_path, {}), torch.randn(5, 1, 4, 4)
    writer = folder.scorer(Scorer(resolve(["energy"])))
    scored(writer, model, images)
    folder.store(writer)
    seen = []
    reader = folder.scorer(Scorer(resolve(["energy"])))
    assert isinstance(reader, SharedScorer)
    reader.looks = [lambda evidence: seen.append(evidence.features)]
    assert scored(reader, model, images)["energy"].shape == (5,)
    assert not reader.added and seen


@pytest.mark.slow
def test_a_sweep_that_shares_has_the_results_of_one_that_does_not(tmp_path: Path, command: Command) -> None:
    quick = ("score=[max_softmax,gradnorm_all,oberdiek]", "logger=none", "report=false", "resamples=0")
    for directory, shares in (("on", "true"), ("off", "false")):
        sweep = ("-m", "score.gradnorm_all.temperature=1,2", f"hydra.sweep.dir={directory}", f"share_scores={shares}")
        done = command(*sweep, *quick)
        assert done.returncode == 0, done.stderr
        assert ("2 of 3 scores: read from another job" in done.stderr) == (shares == "true")
    for job in ("0", "1"):
        with_sharing, without = (pq.read_table(tmp_path / name / job / "results.parquet") for name in ("on", "off"))
        assert with_sharing.equals(without)
    assert not (tmp_path / "off" / "shared").exists()
    with (tmp_path / "on" / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "auroc"]
    runs = {row["score"]: row["runs"] for row in rows}
    assert runs == {
        "max_softmax": "2",
        "oberdiek": "2",
        "gradnorm_all(temperature=1)": "1",
        "gradnorm_all(temperature=2)": "1",
    }


NETS = """
import torch
from torch import nn


def net(data=None, act="relu"):
    torch.manual_seed(0)
    activation = nn.ReLU() if act == "relu" else nn.Tanh()
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), activation, nn.Linear(16, 8))
"""


@pytest.mark.slow
def test_models_with_equal_weights_and_other_arguments_share_nothing(tmp_path: Path, command: Command) -> None:
    """The fit of one would be wrong for the other, and the scores of a random pass too."""
    (tmp_path / "own_nets.py").write_text(NETS)
    model = ("model=custom", "model._target_=own_nets.net", "+model.act=relu,tanh")
    quick = ("score=[max_softmax,mahalanobis]", "logger=none", "report=false", "resamples=0")
    for directory, shares in (("on", "true"), ("off", "false")):
        done = command("-m", *model, *quick, f"hydra.sweep.dir={directory}", f"share_scores={shares}")
        assert done.returncode == 0, done.stderr
        assert "read from another job" not in done.stderr
    for job in ("0", "1"):
        with_sharing, without = (pq.read_table(tmp_path / name / job / "results.parquet") for name in ("on", "off"))
        assert with_sharing.equals(without)
