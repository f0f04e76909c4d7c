"""``python -m lightning_gradmetrics.cli``: the ``gradmetrics`` command."""

from lightning_gradmetrics.cli.command import main

main()
