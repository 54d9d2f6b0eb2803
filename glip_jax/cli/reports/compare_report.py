"""The page of a comparison: table, plot, steps and runs in one HTML file."""

from collections.abc import Iterable

import jinja2

from glip_jax.cli.reports.drawing import svg_uri
from glip_jax.cli.reports.run_template import STYLE
from glip_jax.evaluation.comparison import Comparison, Spread

__all__ = ["label", "labels", "render"]

_PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + STYLE
    + """.plot { width: 100%; max-width: 62rem; height: auto; display: block; margin: .5rem 0 } td small { color: var(--soft) }
tr.of td { border-top: 2px solid var(--line) } .up { color: var(--good) } .down { color: var(--bad) }
</style></head><body><main>
<h1>{{ title }}</h1><p class="soft">{{ about }}</p>
{% macro cell(s, sign) %}{{ sign | format(s.mean) }}{% if s.deviation is not none %} <small>±{{ "%.4f" | format(s.deviation) }}</small>{% endif %}{% endmacro %}
<h2>Numbers</h2><p class="soft">{{ legend }}</p>
<div class="wide"><table><tr><th>number</th>{% for name, own in runs.items() %}<th>{{ name }}</th>{% endfor %}</tr>
{% for key, words in rows.items() %}<tr{% if loop.first or not words.startswith(" ") %} class="of"{% else %} class="kind"{% endif %}><td>{{ words }}</td>
{% for name in runs %}{% set s = numbers[name][key] %}<td title="{{ "%.4f to %.4f" | format(s.min, s.max) }}">{{ cell(s, "%.4f") }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Plot</h2><p class="soft">A dot a run, a line at the mean of each config. Every panel has its own scale.</p>
<img class="plot" src="{{ plot }}" alt="numbers by config">
{% for step in steps %}<h2>{{ step.new }} − {{ step.old }}</h2>
<div class="wide"><table><tr><th>number</th><th>mean</th>{% for seed in step.seeds %}<th>seed {{ seed }}</th>{% endfor %}</tr>
{% for key, s in step.differences.items() %}<tr><td>{{ label(key) }}</td>
<td class="main {{ "up" if s.min > 0 else "down" if s.max < 0 }}">{{ cell(s, "%+.4f") }}</td>
{% for value in s["values"] %}<td>{{ "%+.4f" | format(value) }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endfor %}
{% if steps %}<p class="soft">Green and red: the difference has one sign for all seeds.</p>{% endif %}
{% if differing %}<h2>What is not the same everywhere</h2>
<div class="wide"><table><tr><th>setting</th>{% for name in runs %}<th>{{ name }}</th>{% endfor %}</tr>
{% for name, values in differing %}<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
<h2>Runs</h2><div class="wide"><table class="facts">{% for name, own in runs.items() %}{% for run in own %}<tr><td>{{ name }}, seed {{ run.seed }}</td>
<td>{{ run.path }}, step {{ run.summary.step }}, evaluated {{ run.summary.date }}, checkpoint <code>{{ run.summary.hashes.checkpoint[:16] }}</code></td></tr>{% endfor %}{% endfor %}
{% for name, hashes in sets.items() %}<tr><td>{{ name }}</td><td>{% for what, digest in hashes.items() %}{{ what }} <code>{{ digest[:16] }}</code> {% endfor %}</td></tr>{% endfor %}
</table></div></main></body></html>
"""
)

_WORDS = {"AP50_permuted": "chance", "recall@1": "R@1"}


def label(key: str) -> str:
    """How a number is called: `scenes AP50`, `phrases plain R@1`."""
    return " ".join(filter(None, _parts(key)))


def labels(keys: Iterable[str]) -> dict[str, str]:
    """How numbers are called in a table whose rows they are, in this order: `scenes AP50`, then its others indented."""
    result: dict[str, str] = {}
    before = ""
    for key in keys:
        name, kind, number = _parts(key)
        # "plain R@1" below "phrases R@1" is "plain".
        result[key] = f"  {kind or number}" if name == before else label(key)
        before = name
    return result


def _parts(key: str) -> tuple[str, str, str]:
    """Set, kind of phrase ("" for none or all), and number."""
    name, _, rest = key.partition("/")
    kind, _, number = rest.rpartition("/")
    return name, kind, _WORDS.get(number, number)


def render(compared: Comparison, plot: bytes) -> str:
    """The page as HTML text with the plot (SVG) inside; all text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    numbers: dict[str, dict[str, Spread]] = {name: dict(own) for name, own in compared.numbers.items()}
    first = next(iter(compared.runs.values()))[0]
    replicas = any(len(own) > 1 for own in compared.runs.values())
    count = sum(len(own) for own in compared.runs.values())
    return environment.from_string(_PAGE).render(
        title=f"comparison: {', '.join(compared.runs)}",
        about=f"{count} runs of {len(compared.runs)} configs; a set's annotations and pictures are the same for all.",
        legend="AP50 and AP of detection sets, with the level of chance (the same boxes, names exchanged); R@1: phrases whose "
        "best box is right." + (" Means ± standard deviation over seeds (n - 1)." if replicas else " One run each: no spread."),
        runs=compared.runs, numbers=numbers, rows=labels(next(iter(numbers.values()))), plot=svg_uri(plot),
        steps=compared.steps, differing=compared.differing, label=label,
        sets={name: entry["hashes"] for name, entry in first.summary["sets"].items()},
    )  # fmt: skip
