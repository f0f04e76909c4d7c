"""Several processes write one results directory: each row once, and a failure of one process ends all of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lightning_gradmetrics as lgm
from tests.callback.forked import run_forked

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests fork")]

COMPLETE = """
def work(rank):
    callback = lgm.GradientMetrics(SCORES, datasets=ROLES, output=Output(FOLDER / f"{stage}-{count}", rows_per_part=4))
    getattr(ddp(callback, count), stage)(Stopping(), data())
    return callback.results.num_rows


outcomes = []
for stage, count in (("validate", 2), ("test", 2), ("predict", 2), ("test", 3)):
    outcomes.append(launch(count, work)[:2])
stage, count = "test", 1
work(0)
print(json.dumps(outcomes))
"""


def test_two_and_three_processes_write_the_rows_that_one_writes(tmp_path: Path) -> None:
    """With 23 and 11 rows in batches of four, the sampler repeats rows for two and for three processes."""
    outcomes, _ = run_forked(COMPLETE, tmp_path)
    assert outcomes == [[[0, 0], [34, 34]]] * 3 + [[[0, 0, 0], [34, 34, 34]]]
    alone = lgm.read_results(tmp_path / "test-1")
    assert alone["index"].to_pylist() == [*range(23), *range(11)]
    for name in ("validate-2", "test-2", "predict-2", "test-3"):
        table, keys = lgm.read_results(tmp_path / name), ["dataset", "index", "prediction", "label", "finite"]
        assert table.select(keys).equals(alone.select(keys))
        for score in ("energy", "gradnorm", "pseudo_label(target=all)"):
            assert table[score].to_pylist() == pytest.approx(alone[score].to_pylist(), rel=1e-5)


SAMPLERS = """
rows = TensorDataset(torch.randn(23, 4), torch.arange(23) % 3)


def work(rank):
    if case == "distributed sampler":
        sampler = DistributedSampler(rows, 2, rank, shuffle=True, seed=3)
        loader = DataLoader(rows, 4, sampler=sampler)
    elif case == "split by rank":
        loader = DataLoader(Subset(rows, range(rank, 23, 2)), 4)
    callback = lgm.GradientMetrics(SCORES, output=FOLDER / case)
    ddp(callback, 2, use_distributed_sampler=False).test(Stopping(), loader, verbose=False)


alone = lgm.GradientMetrics(SCORES, output=FOLDER / "alone")
trainer(alone).test(Stopping(), DataLoader(rows, 4), verbose=False)
outcomes = {}
for case in ("distributed sampler", "split by rank"):
    outcomes[case] = launch(2, work)
print(json.dumps(outcomes))
"""


def test_a_distributed_sampler_of_the_user_works_and_data_split_by_rank_are_refused(tmp_path: Path) -> None:
    outcomes, _ = run_forked(SAMPLERS, tmp_path)
    assert outcomes["distributed sampler"][0] == [0, 0]
    alone, table = lgm.read_results(tmp_path / "alone"), lgm.read_results(tmp_path / "distributed sampler")
    assert table["energy"].to_pylist() == pytest.approx(alone["energy"].to_pylist(), rel=1e-5)
    assert table["label"].equals(alone["label"])
    codes, errors, seconds = outcomes["split by rank"]
    assert codes == [1, 1] and seconds < 10
    assert all("the same index to different rows" in error for error in errors)
    assert not list((tmp_path / "split by rank").glob("*.parquet"))


SPAWNED = """
from lightning_gradmetrics.callback.module import check_spawned
from tests.callback.runs import Stepped, mlp


def scored(**options):
    callback = lgm.GradientMetrics(["energy", "gradnorm"], **options)
    try:
        used = trainer(callback, devices=2, strategy="ddp_notebook")
        used.predict(Stepped(mlp(4, 6, 3).float()), data()[0], return_predictions=False)
    except Exception as error:
        return str(error)
    return callback.results["index"].to_pylist()


def refused(strategy):
    try:
        check_spawned(trainer(devices=2, strategy=strategy), "predict", has_output=False, is_fit=False)
    except RuntimeError as error:
        return str(error)


print(json.dumps([scored(), scored(output=FOLDER / "fork"), refused("ddp_spawn")]))
"""


def test_results_of_spawned_processes_come_back_through_a_directory_or_the_run_is_refused(tmp_path: Path) -> None:
    (refused, rows, refused_too), _ = run_forked(SPAWNED, tmp_path)
    assert rows == list(range(23))
    for text in (refused, refused_too):
        assert "the results would be lost with them: pass output='DIR'" in text


SHARDED = """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from tests.callback.runs import Stepped, mlp


class Sharded(Stepped):
    def configure_model(self):
        if not hasattr(self, "is_sharded"):
            self.is_sharded = True
            for layer in (self.net[0], self.net[-1], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def network():
    torch.manual_seed(0)
    return mlp(4, 6, 3).float()


def work(rank):
    callback = lgm.GradientMetrics(names, output=FOLDER / str(len(names)))
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer(callback, devices=2, strategy=strategy).test(Sharded(network()), data()[0], verbose=False)


outcomes = []
for names in (["energy", "gradnorm"], ["pseudo_label(target=all)"]):
    outcomes.append(launch(2, work)[:2])
alone = lgm.GradientMetrics(["energy", "gradnorm"], output=FOLDER / "alone")
trainer(alone).test(Stepped(network()), data()[0], verbose=False)
print(json.dumps(outcomes))
"""


def test_logit_and_head_scores_of_a_sharded_model_are_right_and_others_are_refused(tmp_path: Path) -> None:
    """FSDP2 (``fully_shard``) on two processes; Lightning refuses ``FSDPStrategy`` on a CPU."""
    outcomes, _ = run_forked(SHARDED, tmp_path)
    assert outcomes[0][0] == [0, 0] and outcomes[1][0] == [1, 1]
    assert all("shards the parameters, and the scores" in error for error in outcomes[1][1])
    alone, sharded = lgm.read_results(tmp_path / "alone"), lgm.read_results(tmp_path / "2")
    assert sharded["index"].equals(alone["index"])
    for score in ("energy", "gradnorm"):
        assert sharded[score].to_pylist() == pytest.approx(alone[score].to_pylist(), rel=1e-5)


SHARDED_BY_HAND = """
from torch.distributed.fsdp import FullyShardedDataParallel
from tests.callback.runs import Stepped, mlp

seen = []


def closed_forms(layer, arguments, logits):
    p, length = logits.softmax(1), arguments[0].abs().sum(1)
    uniform = -length * (p - 1 / 3).abs().sum(1)
    pseudo = length * (p - torch.nn.functional.one_hot(p.argmax(1), 3)).abs().sum(1)
    seen.extend(torch.stack([-logits.logsumexp(1), uniform, pseudo], 1).tolist())


class Sharded(Stepped):
    def configure_model(self):
        if not hasattr(self, "is_sharded"):
            self.is_sharded = True
            self.net[-1].register_forward_hook(closed_forms)
            self.net = FullyShardedDataParallel(self.net, device_id=torch.device("cpu"))


def work(rank):
    callback = lgm.GradientMetrics(names, output=FOLDER / str(len(names)))
    ddp(callback, 2).test(Sharded(mlp(4, 6, 3).float()), data()[0], verbose=False)
    return seen


outcomes = []
for names in (["energy", "gradnorm", "pseudo_label"], ["pseudo_label(target=all)"]):
    outcomes.append(launch(2, work)[:2])
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_logit_and_head_scores_of_a_module_wrapped_in_fsdp_are_right_and_others_are_refused(tmp_path: Path) -> None:
    """FSDP1 (``FullyShardedDataParallel``) under another strategy, compared with closed forms of what its last layer received."""
    (codes, forms), (refused, errors) = run_forked(SHARDED_BY_HAND, tmp_path)[0]
    assert codes == [0, 0] and refused == [1, 1]
    assert all("FullyShardedDataParallel shards the parameters, and the scores" in error for error in errors)
    table = lgm.read_results(tmp_path / "3")
    assert table.num_rows == 23
    columns = [table[name].to_pylist() for name in ("energy", "gradnorm", "pseudo_label")]
    wanted = {tuple(round(value, 5) for value in row) for rank in forms for row in rank}  # one row is padding
    for found, expected in zip(sorted(zip(*columns, strict=True)), sorted(wanted), strict=True):
        assert found == pytest.approx(expected, abs=2e-5)


STOPPED = """
class Failing(Stopping):
    def step(self, batch):
        time.sleep(0.0 if failing is None else 0.2)
        if failing == self.trainer.global_rank and self.seen >= 12:
            if how == "error":
                raise RuntimeError(f"rank {failing} is on fire")
            os.kill(os.getpid(), getattr(signal, how))
        return super().step(batch)


def work(rank):
    callback = lgm.GradientMetrics(SCORES, datasets=ROLES, output=Output(FOLDER / name, True, rows_per_part=4))
    left = lgm.unfinished(dict(zip(ROLES, data(size=400))), FOLDER / name)
    getattr(ddp(callback, 2), stage)(Failing(), left)


outcomes = {}
for name in sys.argv[2:]:
    stage, how, victim = name.split("-")
    failing = int(victim)
    outcomes[name] = *launch(2, work), lgm.read_results(FOLDER / name, incomplete=True).num_rows
    if how in ("error", "SIGKILL"):
        failing = None
        assert launch(2, work)[0] == [0, 0]
print(json.dumps(outcomes))
"""

CASES = {
    "test-error-0": (1, "RuntimeError: rank 0 is on fire"),
    "predict-error-1": (1, "RuntimeError: rank 1 is on fire"),
    "predict-SIGTERM-0": (143, "SIGTERMException"),
    "test-SIGTERM-1": (143, "SIGTERMException"),
    "test-SIGINT-1": (1, "KeyboardInterrupt"),
    "test-SIGKILL-0": (-9, ""),
}
"""The exit code of the process that fails, and what the other one reports."""


def test_an_error_or_a_signal_on_any_rank_ends_every_process_in_seconds_and_the_run_resumes(tmp_path: Path) -> None:
    """Otherwise the other process would score 50 batches for 10 seconds, and then wait for 30 minutes."""
    outcomes, said = run_forked(STOPPED, tmp_path, *CASES)
    for name, (code, cause) in CASES.items():
        codes, values, seconds, kept = outcomes[name]
        failed = int(name[-1])
        other = 1 - failed
        assert codes[failed] == code and codes[other] == 1, name
        assert seconds < 5 and 16 <= kept < 100, name
        report = f"rank {failed} failed, so rank {other} stops too. Its error: {cause}" if cause else "rank 0 ended"
        assert report in values[other], name
    assert "resume=True" in said
    for name in ("test-error-0", "predict-error-1", "test-SIGKILL-0"):
        table = lgm.read_results(tmp_path / name)
        assert table["index"].to_pylist() == [*range(400), *range(11)]
