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
extensions = ["myst_parser", "sphinx.ext.autodoc", "generated"]
toc_object_entries_show_parents = "hide"
exclude_patterns = ["_build"]
smartquotes = False  # of two dashes it would make one

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
autoclass_content = "both"
# Types of other libraries and of shapes are text here, not links.
nitpick_ignore_regex = [("py:.*", ".*")]

_SECTIONS = ("Args:", "Returns:", "Raises:")


def setup(app: Any) -> None:
    """Docstrings of the package are plain text: nothing but backticks and *emphasis* is markup in them."""
    app.connect("autodoc-process-docstring", _plain)


def _plain(_: Any, __: str, ___: str, ____: Any, _____: Any, lines: list[str]) -> None:
    """Makes a docstring reStructuredText: indented paragraphs become literal blocks, sections such as `Raises:` lists."""
    result: list[str] = []
    code, section = False, ""
    for line in lines:
        if line.startswith("Create new instance of "):  # what Python says of a NamedTuple
            continue
        indented = line.startswith("    ")
        section = line if line in _SECTIONS else section if indented or not line.strip() else ""
        if section and indented:
            name, colon, text = line.strip().partition(": ")
            if line.startswith("     ") or not colon or section == "Returns:":
                result.append(f"  {_escaped(line.strip())}")
            else:
                result += ["", f"* ``{name}``: {_escaped(text)}"]
            continue
        if indented and not code and not "".join(result[-1:]).strip():
            result += ["::", ""]
            code = True
        elif not indented and line.strip() and code:
            result.append("")
            code = False
        result.append(line if code else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]*`|\*\w[\w -]*\*)", line)
    marked = [f"`{part}`" if part.startswith("`") else part for part in parts[1::2]]
    plain = [re.sub(r"([*|\\])", r"\\\1", part) for part in parts[::2]]
    return "".join(one + other for one, other in zip(plain, [*marked, ""]))
