"""Sphinx configuration: MyST pages, API pages from the docstrings. Warnings are errors (sphinx-build -W)."""

from __future__ import annotations

from importlib.metadata import version as _version

project = "Bitsmith"
author = "The Bitsmith authors"
release = _version("bitsmith")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Bitsmith {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
