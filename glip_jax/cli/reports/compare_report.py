"""The HTML report of a comparison: table, plot, steps and runs."""

from collections.abc import Iterable

from glip_jax.cli.reports.drawing import svg_uri
from glip_jax.cli.reports.html import render_template
from glip_jax.evaluation.comparison import Comparison, Spread

__all__ = ["label", "labels", "render"]

_SHORT_NAMES = {
    "AP50_permuted": "chance", "recall@1": "R@1", "AP_at_0.01": "AP at 0.01", "AP_at_0.05": "AP at 0.05",
    "false_alarms": "false alarms", "absent_found": "absent, found", "present_found": "present, found", "step_seconds": "seconds a step",
}  # fmt: skip


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
        own = kind if number == _SHORT_NAMES["recall@1"] else f"{kind} {number}"
        result[key] = f"  {own.strip() or number}" if name == before else label(key)
        before = name
    return result


def _parts(key: str) -> tuple[str, str, str]:
    """Set, kind of phrase ("" for none or all), and number."""
    name, _, rest = key.partition("/")
    kind, _, number = rest.rpartition("/")
    return name, kind, _SHORT_NAMES.get(number, number)


def render(compared: Comparison, plot: bytes) -> str:
    """The report as HTML text with the plot (SVG) inside; all text is escaped."""
    numbers: dict[str, dict[str, Spread]] = {name: dict(own) for name, own in compared.numbers.items()}
    first = next(iter(compared.runs.values()))[0]
    replicas = any(len(own) > 1 for own in compared.runs.values())
    count = sum(len(own) for own in compared.runs.values())
    return render_template(
        "compare.html.j2", title=f"comparison: {', '.join(compared.runs)}",
        about=f"{count} runs of {len(compared.runs)} configs; a set's annotations and pictures are the same for all.",
        legend="AP50 and AP of detection sets, with the level of chance (the same boxes, names exchanged); R@1: phrases whose "
        "best box is right. AP at 0.05: from the threshold of 0.05 false alarms per image and absent name on. False alarms: boxes of 0.3 or more per "
        "image and absent name. Found: share of the pairs of an "
        "image and an absent (present) name with a box of 0.3 or more, in prompts of many names or alone." + (" Means ± standard deviation over seeds (n - 1)." if replicas else " One run each: no spread."),
        runs=compared.runs, numbers=numbers, rows=labels(next(iter(numbers.values()))), plot=svg_uri(plot),
        steps=compared.steps, differing=compared.differing, label=label,
        sets={name: entry["hashes"] for name, entry in first.summary["sets"].items()},
    )  # fmt: skip
