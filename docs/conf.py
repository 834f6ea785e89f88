"""Sphinx's settings. The source is the repository's root, so that links are those that work on GitHub: `make docs`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports transformers, which the pages of the integrations do: a build asks no network.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

project = "qempo_fast"
author = "The qempo_fast authors"
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_pages",
]

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md"]
# Folders that Sphinx need not walk through on its way to the patterns above.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "docs"]

# Quotation marks stand round the values of arguments.
smartquotes = False
html_theme = "furo"
html_title = "qempo_fast"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

# README's picture has a width of its own.
myst_enable_extensions = ["html_image"]
# Anchors as GitHub makes them, of every heading.
myst_heading_anchors = 6

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

nitpicky = True
# What is not documented here: other libraries and Python's own. Nothing is fetched to find them.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|trl|typing|collections|datasets|peft)(\..*)?"),
    ("py:.*", r"(int|float|bool|str|list|dict|tuple|None|Any|Callable|Sequence|Mapping)"),
    ("py:class", r"qempo_fast\._backends\.Table"),  # a list that prints well
    ("py:exc", r"\w+Error(, \w+Error)*"),
]
