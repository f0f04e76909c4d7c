"""Adds the group ``callbacks`` of lightning_gradmetrics to the search path of every Hydra app in the environment."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["GradientMetricsSearchPath"]


class GradientMetricsSearchPath(SearchPathPlugin):
    """Makes ``+callbacks=gradient_metrics`` available. The app's own configuration files come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder of the callback's configuration.

        Args:
            search_path: The search path of the app.
        """
        package = find_spec("lightning_gradmetrics")
        if package is not None and package.submodule_search_locations:
            folder = Path(package.submodule_search_locations[0]) / "cli" / "hydra_search_path"
            search_path.append("lightning-gradmetrics", f"file://{folder}")
