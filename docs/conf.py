"""Sphinx: pages are MyST Markdown, the API comes from docstrings, the configuration from code.

python -m sphinx -W --keep-going -b html docs docs/_build
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import jax  # noqa: E402

jax.Array.__name__ = jax.Array.__qualname__ = "Array"  # as annotations in the code have it

import kdrl_jax  # noqa: E402

project = "kdrl_jax"
version = release = kdrl_jax.__version__
copyright = "the kdrl_jax authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "configuration",
    "markdown_docstrings",
    "modules",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "ignore-module-all": True,  # what a package re-exports is described where it is defined
}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "kdrl_jax"
html_show_copyright = False
html_copy_source = False
smartquotes = False
