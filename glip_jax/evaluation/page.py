"""The page of a run: one HTML file with its numbers, its curves and its scenes, that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from etils import epath

from glip_jax.drawing import Mark, colour, contact_sheet, draw_boxes, draw_curves, png
from glip_jax.evaluation.average_precision import NUMBERS, AveragePrecision
from glip_jax.evaluation.evaluate import Evaluated, read_image

__all__ = ["Curve", "draw_evaluated", "render", "table"]

Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 86rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } th, td { padding: .2rem .7rem; text-align: right }
th:first-child, td:first-child { text-align: left } tr { border-bottom: 1px solid #ddd } img { max-width: 100% }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } .note { color: #666 }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in notes %}<p class="note">{{ line }}</p>{% endfor %}
{% if sets %}<h2>Results</h2><table><tr><th>set</th><th>images</th>{% for n in numbers %}<th>{{ n }}</th>{% endfor %}</tr>
{% for set in sets %}<tr><td>{{ set.name }}</td><td>{{ set.images }}</td>
{% for n in numbers %}<td>{{ set.precision.numbers[n] | number }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% for name, picture in curves %}<h2>{{ name }}</h2><img src="{{ picture }}" alt="curves of {{ name }}">{% endfor %}
{% for set in sets %}<h2>{{ set.name }}: scenes</h2>
<p class="note">Green: true boxes. Other colours: the boxes found with a score of at least {{ least }}, one colour a name,
with name and score.</p><img src="{{ set.sheet }}" alt="scenes of {{ set.name }} with true and found boxes">
<h2>{{ set.name }}: by category</h2><table><tr><th>category</th><th>AP</th><th>AP50</th></tr>
{% for name, value in set.precision.per_class.items() %}<tr><td>{{ name }}</td><td>{{ value | number }}</td>
<td>{{ set.precision.per_class_50[name] | number }}</td></tr>{% endfor %}</table>{% endfor %}
</body></html>
"""


@dataclass(frozen=True)
class _Set:
    name: str
    images: int
    precision: AveragePrecision
    sheet: str


def render(
    title: str,
    evaluated: Mapping[str, tuple[Evaluated, epath.Path]],
    curves: Mapping[str, Mapping[str, Curve]],
    notes: Sequence[str] = (),
    scenes: int = 12,
    least: float = 0.3,
) -> str:
    """The page as HTML text; pictures are inside it as data URIs, and all text is escaped.

    `evaluated`: per set its evaluation and the folder of its pictures; `curves`: per panel its named curves;
    `scenes`: how many pictures of each set are drawn, `least`: the score from which found boxes are drawn.
    """
    sets = [
        _Set(name, len(result.image_ids), result.precision,
             _uri(png(contact_sheet(*draw_evaluated(result, folder, scenes, least)))))
        for name, (result, folder) in evaluated.items()
    ]  # fmt: skip
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _number
    panels = [(name, _uri(draw_curves(lines, name))) for name, lines in curves.items() if lines]
    return environment.from_string(_PAGE).render(
        title=title, notes=notes, sets=sets, curves=panels, numbers=NUMBERS, least=least
    )


def draw_evaluated(
    result: Evaluated, folder: epath.Path, limit: int = 12, least: float = 0.3
) -> tuple[list, list[str]]:
    """The first `limit` pictures of a set with true boxes (green) and found ones from score `least` on, and captions."""
    truth = result.truth
    entries = {entry["id"]: entry for entry in truth.content["images"]}
    pictures, captions = [], []
    for image_id in result.image_ids[:limit]:
        found = result.detections[image_id]
        true = [
            (x, y, x + w, y + h)
            for x, y, w, h in (a["bbox"] for a in truth.content["annotations"] if a["image_id"] == image_id)
        ]
        marks = [Mark(box, "", (20, 170, 60)) for box in true]
        shown = np.flatnonzero((np.asarray(found.phrases) >= 0) & (np.asarray(found.scores) >= least))
        for row in shown[::-1]:
            # Worst first, so that the best stays on top.
            phrase = int(found.phrases[row])
            box = found.boxes[row]
            marks.append(
                Mark(
                    (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                    f"{result.prompts[phrase]} {float(found.scores[row]):.2f}",
                    colour(phrase),
                )
            )
        image = read_image(folder, entries[image_id])
        pictures.append(draw_boxes(image, marks, min(2.0, 320 / image.shape[1])))
        captions.append(f"{entries[image_id]['file_name']}: {len(true)} true boxes, {len(shown)} found")
    return pictures, captions


def table(evaluated: Mapping[str, tuple[AveragePrecision, int]]) -> str:
    """The numbers of each set (and its count of images) as aligned lines for a terminal."""
    width = max([len("set"), *(len(name) for name in evaluated)])
    lines = [f"{'set':<{width}}  images  " + "  ".join(f"{name:>6}" for name in NUMBERS)]
    for name, (precision, images) in evaluated.items():
        values = "  ".join(f"{_number(precision.numbers[number]):>6}" for number in NUMBERS)
        lines.append(f"{name:<{width}}  {images:>6}  {values}")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Four decimals; COCO's -1 means that the set has nothing to measure it on."""
    return "-" if value < 0 else f"{value:.4f}"


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
