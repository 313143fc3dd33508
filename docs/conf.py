"""The site: `sphinx-build -W -b html docs OUT`. It is made of this checkout alone; nothing is fetched."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "docs" / "_ext")]
# Help texts are as wide as a page; argparse asks the terminal.
os.environ |= {"COLUMNS": "92", "NO_COLOR": "1"}

import coupfast  # noqa: E402

project = "coupfast"
author = "The coupfast authors"
project_copyright = "The coupfast authors, MIT licence"
release = coupfast.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "rendered",
    "docstrings",
]
exclude_patterns = ["_build", "_ext"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # in the signature they would be twice as long as the text
autodoc_default_options = {"members": True}
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False
add_module_names = False
# The names of a class's attributes become links, and two classes may have one of a name.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"coupfast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
