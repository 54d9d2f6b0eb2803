"""The page of a labelling, drawn from what lies in its folder: report.json and the pseudo records."""

import json
from collections.abc import Mapping
from typing import Any

import jinja2
from etils import epath

from glip_jax.cli.reports.drawing import draw_counts, svg_uri
from glip_jax.cli.reports.inspect_cards import record_cards
from glip_jax.cli.reports.inspect_template import CARD, OWN
from glip_jax.cli.reports.run_template import STYLE
from glip_jax.data.manifest import read_file
from glip_jax.data.shards import Shards
from glip_jax.io import gcs
from glip_jax.io.workdir import write_atomic

__all__ = ["render", "write_page"]

_PAGE = (
    CARD
    + """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>"""
    + STYLE
    + OWN
    + """.counts td:nth-child(3) { text-align: left; white-space: normal; overflow-wrap: anywhere; color: var(--soft) }
</style></head><body><main>
<h1>{{ title }}</h1><p class="soft">{{ about }}</p>
<div class="tiles">{% for name, value, below in tiles %}<div class="tile"><span class="name">{{ name }}</span><b>{{ value }}</b>
<span class="soft">{{ below }}</span></div>{% endfor %}</div>
{% if sources | length > 1 %}<div class="wide"><table><tr><th>source</th><th>captions</th><th>kept</th><th>share</th><th>boxes</th><th>threshold</th></tr>
{% for s in sources %}<tr>{% for cell in s %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
<h2>Scores and boxes</h2><p class="soft">A score is {{ score }}. The dashed line is the {{ "lowest threshold" if sources | length > 1 else "threshold" }}:
a phrase whose best box is left of it stays unknown.</p>
<div class="plots">{% for name, picture in plots %}<figure><figcaption>{{ name }}</figcaption><img src="{{ picture }}" alt="{{ name }}"></figure>{% endfor %}</div>
<h2>Concepts</h2><p class="soft">{{ concepts }}</p>
<div class="two"><div><h3>Most frequent, boxes each</h3>{% if frequent %}{{ bars(frequent) }}{% else %}<p class="soft">none</p>{% endif %}</div>
<div><h3>Rarest with a box, boxes each</h3>{% if rarest %}{{ bars(rarest) }}{% else %}<p class="soft">none</p>{% endif %}</div>
<div><h3>Concepts never found, phrases each</h3>{% if lost %}{{ bars(lost) }}{% else %}<p class="soft">none</p>{% endif %}</div>
<div><h3>Phrases never found, times asked</h3>{% if lost_phrases %}{{ bars(lost_phrases) }}{% else %}<p class="soft">none</p>{% endif %}</div></div>
<h2>What was left out, and what should be known</h2>
{% if counts %}<div class="wide"><table class="counts">{% for what, count, first in counts %}<tr><td>{{ what }}</td><td>{{ "{:,}".format(count) }}</td>
<td>first: {{ first }}</td></tr>{% endfor %}</table></div>{% else %}<p class="soft">nothing</p>{% endif %}
<h2>Samples</h2><p class="soft">{{ cards | length }} records, evenly spread, not chosen. Each phrase with a box has its colour and the score of its best box.</p>
<div class="cards">{% for item in cards %}{{ card(item) }}{% endfor %}</div>
<h2>What this rests on</h2><div class="wide"><table class="facts">{% for name, value in facts %}<tr><td>{{ name }}</td><td><code>{{ value }}</code></td></tr>{% endfor %}</table></div>
</main></body></html>
"""
)


def write_page(out: str, samples: int = 24) -> str:
    """Draws OUT/report.html of a finished folder, local or gs://; returns its path. OSError if it cannot be written."""
    page, text = f"{out}/report.html", render(out, samples)
    if gcs.is_remote(page):
        gcs.put(page, text.encode())
    else:
        write_atomic(epath.Path(page), text)
    return page


def render(out: str, samples: int = 24) -> str:
    """The page as HTML text with its pictures inside; `samples` records are drawn."""
    report = json.loads(read_file(f"{out}/report.json"))
    told, settings = report["summary"], report["settings"]
    share = told["phrases_with_boxes"] / max(told["phrases"], 1)
    outside = settings["teacher"].startswith("detections")
    tiles = [
        ("captions kept", f"{told['kept_share']:.1%}", f"{told['kept']:,} of {told['captions']:,}"),
        ("phrases with a box", f"{share:.1%}", f"{told['phrases_with_boxes']:,} of {told['phrases']:,}; the others are unknown"),
        ("boxes", f"{told['boxes']:,}", f"{told['boxes_per_phrase_with_boxes']:.2f} for a phrase with any"),
        ("concepts", f"{told['concepts_with_boxes']:,}", f"with a box, of {told['concepts']:,} asked for, by head noun"),
    ]  # fmt: skip
    forgotten = told["phrases_forgotten"]
    concepts = (
        f"{told['concepts']:,} head nouns, of which {told['concepts_never_found']:,} have no box anywhere; "
        f"{told['different_phrases']:,} different phrases, of which {told['phrases_never_found']:,} have none"
        + (f"; {forgotten:,} phrases asked for once are not counted by their words" if forgotten else "")
        + "."
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_PAGE).render(
        title=f"labelling: {report['name']}", about=report["command"], tiles=tiles, concepts=concepts,
        score="the detector's own" if outside else "the root of alignment (how well the place fits the words) times "
        "centerness (how central in its object it is)",
        sources=[
            (name, f"{own['captions']:,}", f"{own['kept']:,}", f"{own['kept'] / max(own['captions'], 1):.1%}",
             f"{own['boxes']:,}", settings["thresholds"][name])
            for name, own in told["sources"].items()
        ],
        plots=[(name, svg_uri(picture)) for name, picture in _plots(told, min(settings["thresholds"].values()))],
        frequent=told["frequent_concepts"], rarest=told["rarest_concepts"][::-1],
        lost=told["most_asked_concepts_never_found"], lost_phrases=told["most_asked_phrases_never_found"],
        counts=[(what, own["count"], own["first"]) for kind in ("drops", "notes") for what, own in told[kind].items()],
        cards=record_cards(Shards(out), samples), facts=_facts(report),
    )  # fmt: skip


def _plots(told: Mapping[str, Any], threshold: float) -> list[tuple[str, bytes]]:
    bins = len(told["best_scores"])
    edges = [place / bins for place in range(bins + 1)]
    series = {"best box of each phrase": told["best_scores"], "boxes kept": told["box_scores"]}
    numbers = {int(number): count for number, count in told["phrases_by_boxes"].items()}
    most = max(numbers, default=0)
    boxes = [numbers.get(number, 0) for number in range(most + 1)]
    return [
        ("Scores", draw_counts(series, edges, "score", mark=threshold)),
        ("Boxes of a phrase", draw_counts({"phrases": boxes}, [n - 0.5 for n in range(most + 2)], "boxes; 0: unknown")),
    ]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, told = report["settings"], report["summary"]
    facts = [(name, str(value)) for name, value in settings.items() if name not in ("inputs", "thresholds", "format")]
    facts += [(f"threshold of {name}", str(value)) for name, value in settings["thresholds"].items()]
    columns = settings["inputs"].items()
    facts += [(f"captions of {name}", f"{path} {own}") for path, (name, own) in zip(report["inputs"], columns)]
    facts += [(f"code {code}", f"{count:,} records") for code, count in told["code"].items()]
    facts.append(("hours of all processes", f"{told['seconds'] / 3600:.2f}"))
    return [*facts, ("licence", report["licence"]), *((name, str(value)) for name, value in report["versions"].items())]
