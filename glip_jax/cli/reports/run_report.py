"""The HTML report of a run: one file with its numbers, curves and images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from glip_jax.cli.reports.absence_rows import SHOWN, alarm_rows, threshold_rows
from glip_jax.cli.reports.card import Card
from glip_jax.cli.reports.drawing import draw_curves, draw_shares, svg_uri
from glip_jax.cli.reports.html import number, render_template
from glip_jax.cli.reports.run_cards import cards
from glip_jax.evaluation.average_precision import NUMBERS
from glip_jax.evaluation.chunking import chunking_lines
from glip_jax.evaluation.evaluate import Evaluated, Grounded
from glip_jax.evaluation.recall import PROTOCOLS, RANKS
from glip_jax.training.monitoring.goodput import Goodput

__all__ = ["Curve", "aligned", "render", "table"]

Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""

_RECALLS = tuple(f"{protocol}@{rank}" for protocol in PROTOCOLS for rank in RANKS)


@dataclass(frozen=True)
class _Row:
    """Grounding: the numbers of all phrases, or of a kind."""

    kind: str
    phrases: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class _Set:
    """A set as the template shows it."""

    name: str
    grounding: bool
    images: int
    headline: str
    below: tuple[str, ...]
    cards: tuple[Card, ...]
    threshold: float
    chosen: bool
    """Whether `threshold` was chosen by F1."""
    names: int = 0
    numbers: Mapping[str, float] | None = None
    permuted: float = -1.0
    ratio: str = ""
    bars: tuple[tuple[str, float], ...] = ()
    alarms: float = -1.0
    """False alarms per image and absent name at a score of 0.3."""
    rows: tuple[_Row, ...] = ()
    unasked: int = 0


def render(
    title: str,
    evaluated: Mapping[str, tuple[Evaluated | Grounded, epath.Path]],
    curves: Mapping[str, Mapping[str, Curve]],
    notes: Sequence[str] = (),
    scenes: int = 12,
    threshold: float | None = None,
    summary: Mapping[str, Any] | None = None,
    goodput: Goodput | None = None,
) -> str:
    """The report as HTML text; images are inside it as data URIs, and all text is escaped.

    `evaluated`: per set its evaluation and the folder of its pictures; `curves`: per panel its named curves;
    `scenes`: how many pictures of each set are shown, `threshold`: the score from which detections are drawn (None: where
    F1 over the set is highest); `summary`: evaluation.json, for settings, hashes and prompts; `goodput`: where the wall time of the run went.
    """
    sets = [_shown(name, result, folder, scenes, threshold) for name, (result, folder) in evaluated.items()]
    panels = [(name, svg_uri(draw_curves(lines, name, "svg"))) for name, lines in curves.items() if lines]
    wall = (
        {name: 100 * value / goodput.seconds for name, value in goodput.buckets.items()} if goodput is not None else {}
    )
    recorded = summary or {}
    measured = _measured({name: result for name, (result, _) in evaluated.items()})
    facts, network = _settings_and_hashes(recorded)
    chunked = [{"name": name, "chunks": entry["chunks"]} for name, entry in recorded.get("sets", {}).items()
               if entry.get("chunks")]  # fmt: skip
    return render_template(
        "run.html.j2", title=title, notes=notes, sets=sets, curves=panels, recalls=_RECALLS, facts=facts, network=network,
        numbers=[name for name in NUMBERS if name not in ("AP", "AP50")], prompts=chunked,
        absent=[alarm_rows(measured), threshold_rows(measured)],
        separator=recorded.get("settings", {}).get("data.captions.separator", ". "),
        goodput=(goodput.line(), svg_uri(draw_shares(wall, "% of the wall time"))) if goodput is not None else None,
        detection=[s for s in sets if not s.grounding], grounding=[s for s in sets if s.grounding],
    )  # fmt: skip


def _shown(name: str, result: Evaluated | Grounded, folder: epath.Path, scenes: int, threshold: float | None) -> _Set:
    drawn, score = cards(result, folder, scenes, threshold)
    images = len(result.image_ids)
    shared: dict[str, Any] = {
        "name": name,
        "images": images,
        "cards": tuple(drawn),
        "threshold": score,
        "chosen": threshold is None,
    }
    match result:
        case Evaluated():
            numbers = result.precision.numbers
            ratio = _ratio(numbers["AP50"], result.permuted)
            below = [f"AP50, {len(result.prompts)} names, {images} images"]
            below += (
                [f"{ratio} × chance ({result.permuted:.4f})" if result.permuted else "chance 0.0000"] if ratio else []
            )
            bars = sorted(result.precision.per_class_50.items(), key=lambda item: (-item[1], item[0]))
            return _Set(
                grounding=False, headline=number(numbers["AP50"], 3), below=tuple(below), names=len(result.prompts),
                numbers=numbers, permuted=result.permuted, ratio=ratio or "-", bars=tuple(bars), alarms=_alarms(result), **shared,
            )  # fmt: skip
        case Grounded():
            rows = _rows(result)
            below = [f"recall@1, {rows[0].phrases} phrases"]
            below += [f"{row.kind} {number(row.numbers['recall@1'], 3)}" for row in rows[1:]]
            return _Set(
                grounding=True, headline=number(rows[0].numbers["recall@1"], 3), below=tuple(below), rows=tuple(rows),
                unasked=sum(len(own) for own in result.unasked.values()), **shared,
            )  # fmt: skip


def _rows(result: Grounded) -> list[_Row]:
    found = result.recall.numbers
    return [
        _Row(kind, count, {name: found[f"{kind}/{name}" if kind else name] for name in _RECALLS})
        for kind, count in result.recall.phrases.items()
    ]


def _settings_and_hashes(summary: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Rows of the table of settings and hashes, and of the network's settings."""
    if not summary:
        return [], []

    def text_of(value: Any) -> str:
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return text if text == text.strip() else repr(text)

    settings = {name: text_of(value) for name, value in summary["settings"].items()}
    facts = [(name, text_of(summary[name])) for name in ("date", "workdir", "step", "parameters")]
    facts += [(name, value) for name, value in settings.items() if not name.startswith("model.")]
    budget = "model.text.max_tokens"
    facts += [(budget, settings[budget])] if budget in settings else []
    for what, value in summary["hashes"].items():
        rows = value.items() if isinstance(value, Mapping) else [("", value)]
        facts += [(f"hash: {what} {key}".strip().replace("_", " "), text_of(item)) for key, item in rows]
    for name, entry in summary["sets"].items():
        facts += [(f"hash: {name}, {what}", text_of(value)) for what, value in entry["hashes"].items()]
        facts += [(f"chunking: {name}, {asked}", text) for asked, text in chunking_lines(entry.get("chunking", ()))]
    for name, entry in summary["sets"].items():
        if at := entry.get("at_false_alarms"):
            numbers = ", ".join(f"{key} {value:.4f}" for key, value in at["numbers"].items() if value is not None)
            facts.append(
                (
                    f"{name}, at {at['false_alarms']:g} false alarms",
                    f"from {at['threshold']:.3f} ({at['set']}) on: {numbers}",
                )
            )
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in summary["versions"].items())))
    return facts, [(name, value) for name, value in settings.items() if name.startswith("model.")]


def table(evaluated: Mapping[str, Evaluated | Grounded]) -> str:
    """The numbers of every set as aligned lines for a terminal: detection sets, grounding sets with their kinds, absent names."""
    detection = {name: result for name, result in evaluated.items() if isinstance(result, Evaluated)}
    grounding = {name: result for name, result in evaluated.items() if isinstance(result, Grounded)}
    parts = []
    if detection:
        head = [
            "set",
            "images",
            "AP",
            "AP50",
            "permuted",
            "ratio",
            "alarms",
            *(n for n in NUMBERS if n not in ("AP", "AP50")),
        ]
        rows = []
        for name, result in detection.items():
            numbers = result.precision.numbers
            rows.append([
                name, str(len(result.image_ids)), number(numbers["AP"]), number(numbers["AP50"]),
                number(result.permuted), _ratio(numbers["AP50"], result.permuted) or "-", number(_alarms(result)),
                *(number(numbers[n]) for n in head[7:]),
            ])  # fmt: skip
        parts.append(aligned([head, *rows]))
    if grounding:
        rows = [
            ["set", "captions", "phrases", *(n.replace("recall", "R").replace("_", " ") for n in _RECALLS), "not asked"]
        ]
        for name, result in grounding.items():
            for row in _rows(result):
                lost = "" if row.kind else str(sum(len(own) for own in result.unasked.values()))
                rows.append([
                    f"  {row.kind}" if row.kind else name, "" if row.kind else str(len(result.image_ids)),
                    str(row.phrases), *(number(row.numbers[n]) for n in _RECALLS), lost,
                ])  # fmt: skip
        parts.append(aligned(rows))
    measured = _measured(evaluated)
    parts += [aligned(rows) for rows in (alarm_rows(measured), threshold_rows(measured)) if rows]
    return "\n\n".join(parts)


def _measured(evaluated: Mapping[str, Evaluated | Grounded]) -> dict[str, dict[str, Any]]:
    """The measures of absent names of the sets that have them."""
    detection = {name: result for name, result in evaluated.items() if isinstance(result, Evaluated)}
    return {name: result.absence for name, result in detection.items() if result.absence is not None}


def _alarms(result: Evaluated) -> float:
    """False alarms per image and absent name at a score of 0.3; -1 for a set that lists no absent names."""
    return -1.0 if result.absence is None else result.absence["thresholds"][SHOWN[0]]["false_alarms"]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )


def _ratio(value: float, chance: float) -> str:
    """How many times chance; empty where there is none to compare with."""
    if value < 0 or chance < 0:
        return ""
    if chance == 0:
        return "∞" if value > 0 else ""
    return f"{value / chance:.1f}"
