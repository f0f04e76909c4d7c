"""``python -m lightning_gradmetrics.cli``: the ``gradmetrics`` command."""

from lightning_gradmetrics.cli.process import run_process

run_process()
