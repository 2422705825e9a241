"""The site: Sphinx with MyST notebooks. `make docs` builds it with warnings as errors."""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "anywidth"
author = "the anywidth authors"
copyright = "2026, the anywidth authors"
release = version = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
    "colab",
]

html_theme = "furo"
html_title = "anywidth"
html_static_path = ["_static"]
html_css_files = ["anywidth.css"]
html_show_sourcelink = False
exclude_patterns = ["_build", "README.md"]

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

# The notebooks are run when the site is built; ANYWIDTH_FULL=1 runs them at the sizes of the papers.
nb_execution_mode = "cache"
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "myst"  # derivations have equations and tables
os.environ.setdefault("JAX_PLATFORMS", "cpu")

default_role = "code"  # of docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True  # as they are written: jnp.tanh, not the object that it is
autosummary_generate = True
# Shapes of jaxtyping are no names, and no inventory of other projects is loaded: the site builds without a network.
nitpick_ignore_regex = [("py:.*", r"'.*'|jaxtyping\..*|(np\.|numpy\.)?ndarray|jax\..*|Array|.*\.Array")]
napoleon_google_docstring = True
napoleon_use_rtype = False

# Links are checked where there is an internet (make docs LINKS=1); anchors of web applications are not in their pages.
linkcheck_timeout = 20
linkcheck_anchors = False


def without_aliases(app, what, name, obj, skip, options):
    """Fields of named tuples say no more than their number: the docstring of the class speaks of them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else skip


def setup(app):
    app.connect("autodoc-skip-member", without_aliases)
