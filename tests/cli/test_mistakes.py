"""Mistakes on the command line print one line with the remedy, quickly if nothing needs to run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_gradmetrics.cli import command
from lightning_gradmetrics.cli.arguments import check_arguments
from lightning_gradmetrics.cli.errors import UsageError, one_line, unknown_name
from lightning_gradmetrics.cli.help import help_text
from tests.cli.conftest import Command

CASES = [
    (["score=[gradnrom]"], "unknown score 'gradnrom'; did you mean 'gradnorm'"),
    (["score=gradnorm(target=all)"], "as in score=gradnorm score.gradnorm.ARGUMENT=VALUE"),
    (["bacth_size=3"], "unknown key 'bacth_size'; did you mean 'batch_size'"),
    (["data=image_folders", "data.sze=3"], "unknown key 'data.sze'; did you mean 'data.size'"),
    (
        ["experiment=cifar10", "root=x", "data.near={mine: x}"],
        "data.near is a mapping with other keys; to replace all of it, write '~data.near' '+data.near={...}'",
    ),
    (["model=torchvison"], "unknown model 'torchvison'; did you mean 'torchvision'?"),
    (["experiment=cifar"], "unknown experiment 'cifar'; did you mean 'cifar10'?"),
    (["batch_size=0"], "batch_size must be a whole number of at least 1, got 0"),
    (["model=resnet20_cifar"], "on the first batch of 'digits' (inputs (1, 1, 8, 8)) fails: Given groups=1"),
    (["list"], "unknown command 'list'; available: compare, help, report, scores, version"),
    (["scors"], "did you mean 'scores'?"),
    (["scores", "all"], "gradmetrics scores takes no arguments"),
]
SLOW = [
    (["cross_validation_folds=5", "fitted_folder=x"], "exclude each other"),
    (["trainer.accelerator=gpu"], "gpu"),
    (["trainer.accelerator=cpu", "trainer.devices=9999"], "set trainer.devices to at most"),
    (["experiment=cifar10"], "root is missing: give it a value, as in root=VALUE"),
    (["score=[]"], "score is empty: choose at least one of"),
    (
        ["score.gradnorm.temprature=3"],
        "unknown key 'score.gradnorm.temprature'; did you mean 'score.gradnorm.temperature'",
    ),
    (["seed=abc"], "seed must be a whole number of at least 0, got 'abc'"),
    (["report=maybe"], "report must be true or false, got 'maybe'"),
    (["cross_validation_folds=1"], "cross_validation_folds must be a whole number of at least 2, got 1"),
    (["callback.top_k=grand"], "callback.top_k must map scores to numbers, as in {grand: 20}, got 'grand'"),
    (["score.gradnorm.temperature=-1"], "score.gradnorm: the score 'gradnorm(temperature=-1)' got temperature=-1"),
    (["model.epochs=0"], "model.epochs must be at least 1, got 0"),
    (["data=image_folders", "data.size=32", "data.id=nowhere"], "no folder 'nowhere'"),
]


ROWS = [*CASES, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]


@pytest.mark.parametrize(("arguments", "words"), ROWS, ids=[" ".join(arguments) for arguments, _ in CASES + SLOW])
def test_a_mistake_is_one_line(command: Command, arguments: list[str], words: str) -> None:
    done = command(*arguments)
    assert done.returncode == 1 and not done.stdout
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("gradmetrics: ") and words in lines[-1], done.stderr
    assert len(lines) <= 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_settings_without_effect_are_named(command: Command) -> None:
    quick = ("score=[max_softmax]", "logger=none", "report=false", "resamples=0")
    done = command(*quick, "cross_validation_folds=5")
    assert done.returncode == 0 and "cross_validation_folds has no effect: none of the scores is fitted" in done.stderr
    done = command(*quick, "fitted_folder=nowhere", "hydra.run.dir=again")
    assert done.returncode == 0 and "fitted_folder has no effect: none of the scores is fitted" in done.stderr


@pytest.mark.slow
def test_the_traceback_is_shown_on_request(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_gradmetrics.cli", "batch_size=0"]
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" in done.stderr and "batch_size must be" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["score=[gradnrom]"]], ids=" ".join)
def test_no_heavy_import_unless_something_runs(tmp_path: Path, arguments: list[str]) -> None:
    """At most 0.6 s, which importing torch would exceed."""
    code = (
        "import sys; sys.argv[1:] = sys.argv[1:]\n"
        "from lightning_gradmetrics.cli.command import main\n"
        "try:\n    main()\nfinally:\n    assert not {'torch', 'hydra', 'lightning', 'pyarrow'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr, done.stderr
    assert done.stdout or "did you mean" in done.stderr
    assert time.perf_counter() - start < 3  # a loaded machine; 0.1 s on an idle one


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, lightning_gradmetrics as lgm; assert not {'torch', 'lightning'} & set(sys.modules); dir(lgm)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_help_names_everything() -> None:
    text = help_text()
    for words in (
        "gradmetrics scores",
        "image_folders",
        "resnet20_cifar",
        "cross_validation_folds",
        "outputs/DATE/TIME",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 140


def test_unknown_words_are_refused() -> None:
    check_arguments(["-m", "seed=1,2", "--cfg", "job", "--config-dir", "conf", "~logger", "+a=b"], ["scores"])
    with pytest.raises(UsageError, match="unknown command 'report1'; did you mean 'report'"):
        check_arguments(["report1"], ["scores", "report"])
    check_arguments(["--config-dir", "mine", "score=[doctor]"], [])  # the folder may have that score


def test_ctrl_c_while_scoring_has_the_status_of_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_run(arguments: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    monkeypatch.setattr(command, "_dispatch", interrupted_run)
    with pytest.raises(SystemExit) as ending:
        command.main()
    assert ending.value.code == 130


def test_unexpected_errors_are_named() -> None:
    assert one_line(KeyError("x")) == "KeyError: 'x' (HYDRA_FULL_ERROR=1 shows the traceback)"
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert unknown_name("score", "zzz", ["b", "a"]) == "unknown score 'zzz'; available: a, b"
