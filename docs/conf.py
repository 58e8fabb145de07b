"""Settings of the documentation: Sphinx with MyST pages, tables written from the package, nothing fetched."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "textbrewer"
author = "The textbrewer developers"
copyright = author
version = release = version_of("textbrewer")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "tables",
]
exclude_patterns = ["_build", "generated"]

html_theme = "furo"
html_title = f"textbrewer {release}"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
# "Reference:" is a section of this project's docstrings.
napoleon_custom_sections = [("Reference", "references")]
