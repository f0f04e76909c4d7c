"""Sphinx: MyST pages, and an API reference generated from the docstrings. ``sphinx-build -W docs OUT`` builds it."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch  # noqa: F401  its import sets the level below

import lightning_gradmetrics

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # outputs of examples need no notes on hardware

project = "lightning_gradmetrics"
author = "the lightning_gradmetrics developers"
version = release = lightning_gradmetrics.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = "gradmetrics"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_js_files = ["numbers.js"]
html_show_copyright = False
exclude_patterns = ["_build"]
myst_heading_anchors = 3

RUN = (
    "callback",
    "cosine_maps",
    "label_audit",
    "meta_classifier",
    "own_score",
    "predict_with_threshold",
    "segmentation",
    "without_trainer",
)
"""The examples that run in the build, for their output and pictures; the tests run all."""

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": rf"/({'|'.join(RUN)})\.py$",
    "within_subsection_order": "ExampleTitleSortKey",
    "default_thumb_file": str(Path(__file__).parent / "images" / "thumbnail.png"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True  # a dataclass's field is documented once, as an argument
napoleon_custom_sections = ["Reference"]


def skip_undocumented_fields(app: object, what: str, name: str, item: object, skip: bool, options: object) -> bool:
    """Leave out the fields of dataclasses: the class's docstring has them as arguments."""
    is_field = type(item).__name__ == "member_descriptor" or isinstance(
        item, (int, float, str, bool, type(None), tuple)
    )
    return skip or (what == "class" and is_field)


def setup(app: object) -> None:
    """Connect the function above."""
    app.connect("autodoc-skip-member", skip_undocumented_fields)  # type: ignore[attr-defined]
