# SPDX-License-Identifier: Apache-2.0
"""How the documentation is built: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

from cuda_progcache import __version__

sys.path.insert(0, str(Path(__file__).parent))  # tables.py, which is beside this file

project = "cuda_progcache"
author = "The cuda_progcache authors"
project_copyright = author
version = release = __version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx_click", "tables"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nitpicky = False
suppress_warnings = ["myst.header"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"cuda_progcache {version}"
html_show_copyright = False
html_show_sphinx = False
