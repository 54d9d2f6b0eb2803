"""HTML of the reports: the jinja2 templates in `templates/`, filled in; all text is escaped, and a report is one file."""

from typing import Any

import jinja2

__all__ = ["number", "render_template"]


def number(value: float, digits: int = 4) -> str:
    """Four decimals; COCO's -1, which means that the set has nothing to measure, is "-"."""
    return "-" if value < 0 else f"{value:.{digits}f}"


def render_template(name: str, **values: Any) -> str:
    """The template of this name with `values`; a name that a template uses and nobody gives is an error."""
    loader = jinja2.PackageLoader("glip_jax.cli.reports")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number
    return environment.get_template(name).render(values)
