"""Settings of Sphinx; `scripts/docs.sh` builds the site with them."""

import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "_ext")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # modules are imported for their docstrings, on whatever machine

project = "glip_jax"
author = "the glip_jax authors"
copyright = "the glip_jax authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "glip_jax"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
# Types of other libraries and of shapes are text here, not links.
nitpick_ignore_regex = [("py:.*", ".*")]


def setup(app: Any) -> None:
    """Docstrings of the package are plain text: nothing but backticks is markup in them."""
    app.connect("autodoc-process-docstring", _plain)


def _plain(_: Any, __: str, ___: str, ____: Any, _____: Any, lines: list[str]) -> None:
    """Escapes what reStructuredText would read as markup; indented lines become literal blocks."""
    result, code = [], False
    for line in lines:
        indented = line.startswith("    ") and not code and (not result or not result[-1].strip())
        if indented and result and not code:
            result += ["::", ""]
        code = bool(indented or (code and (line.startswith("    ") or not line.strip())))
        if not code and line.strip() and result and result[-1].startswith("    "):
            result.append("")
        result.append(line if code else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(f"`{part}`" if part.startswith("`") else re.sub(r"([*|\\])", r"\\\1", part) for part in parts)
