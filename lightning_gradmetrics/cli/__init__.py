"""The ``gradmetrics`` command."""
