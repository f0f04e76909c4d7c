"""The help text of the command, which needs no heavy imports."""

from __future__ import annotations

import textwrap

from lightning_gradmetrics.cli.configuration import configuration_directory, option_names

__all__ = ["help_text", "version_text"]

INTRODUCTION = """\
gradmetrics: score the predictions of a classifier, and show which scores detect errors and out-of-distribution samples.

usage: gradmetrics [KEY=VALUE ...]       score data with a model; without arguments, handwritten digits
       gradmetrics scores                list all scores with paper, needs, cost and arguments
       gradmetrics compare DIR...        compare runs, with mean and spread over seeds
       gradmetrics report DIR            rewrite the report of a finished run
       gradmetrics --help | --version

examples:
  gradmetrics                                             a complete run that needs no download
  gradmetrics 'score=[max_softmax,energy,gradnorm]'       choose scores
  gradmetrics score.gradnorm.temperature=2                change an argument of a score
  gradmetrics data=image_folders data.id=photos/test data.far=photos/other data.size=224 \\
              model=torchvision model.name=resnet18 model.checkpoint=weights.pt
  gradmetrics model._target_=mine.make_net data._target_=mine.make_data
                                                          a model and data of your own (mine.py)
  gradmetrics experiment=audit                            find mislabelled training samples
  gradmetrics -m seed=0,1,2                               one run per seed, then a table of all

A run writes results.parquet, metrics.json, metrics.csv, table.md, table.tex and report.html to
outputs/DATE/TIME; hydra.run.dir=DIR chooses another directory. Tables go to the standard output stream,
everything else to the standard error stream. HYDRA_FULL_ERROR=1 shows the traceback of an error.
"""
GROUPS = ("data", "model", "score", "experiment", "trainer", "logger")
WIDTH = 100


def help_text() -> str:
    """Return the help: usage, examples, the options of every configuration group, and the keys with their defaults."""
    parts = [INTRODUCTION, "options (GROUP=NAME; several scores as 'score=[A,B]'):"]
    for group in GROUPS:
        parts.append(_wrapped(f"  {group:<11}", option_names(group)))
    parts += ["", "keys and defaults (gradmetrics --cfg job shows all, with those of the chosen options):", _keys()]
    parts.append("The command is a Hydra application: see https://hydra.cc for sweeps and overrides.")
    return "\n".join(parts)


def _wrapped(start: str, words: list[str]) -> str:
    lines, line = [], start
    for word in words:
        if len(line) + len(word) + 1 > WIDTH:
            lines.append(line)
            line = " " * len(start)
        line += f" {word}"
    return "\n".join([*lines, line])


def _keys() -> str:
    """Return the keys of ``conf/config.yaml`` with their comments."""
    text = (configuration_directory() / "config.yaml").read_text(encoding="utf-8")
    _, _, keys = text.partition("\ntask:")
    keys, _, _ = keys.partition("\nhydra:")
    return textwrap.indent(f"task:{keys}".rstrip(), "  ")


def version_text() -> str:
    """Return the name and version of the package."""
    from lightning_gradmetrics import __version__

    return f"gradmetrics {__version__}"
