"""The tables and the HTML report of a benchmark, from the content of results.json."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from glip_jax import UserError
from glip_jax.cli.reports.absence_rows import SHOWN
from glip_jax.cli.reports.card import Card, Chip, card_box, card_image, text_pieces
from glip_jax.cli.reports.drawing import hex_color
from glip_jax.cli.reports.html import render_template
from glip_jax.cli.reports.run_report import aligned
from glip_jax.evaluation.benchmark.mistakes import Mistake, mistakes
from glip_jax.evaluation.benchmark.results import release_of, rows, scored_counts, scored_paths
from glip_jax.evaluation.benchmark.sets import BenchmarkSet
from glip_jax.evaluation.chunking import chunking_lines
from glip_jax.io.image_files import read_upright
from glip_jax.io.paths import within
from glip_jax.structures.prompts import listed

__all__ = ["absence_lines", "mistake_card", "overlap_lines", "percent", "protocol_line", "render", "table"]

logger = logging.getLogger(__name__)

_DRAWN = 40
"""Detections, and names of missed boxes, on an image whose errors are drawn."""


def percent(value: float | None) -> str:
    """One decimal; "-" where the set has nothing to measure."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def table(results: Mapping[str, Any]) -> str:
    """The numbers in percent as lines for a terminal; below each set its protocol and its overlap with the training data."""
    parts = []
    for name, own in results["sets"].items():
        every = [*rows({"sets": {name: own}})]
        sizes = {mode: scored_counts(asked) for mode, asked in own["asks"].items()}
        lines = [["", "prompts", "%", "images", "boxes", "published"]]
        lines += [
            [
                f"{name} {row.label}",
                row.mode,
                percent(row.value),
                *(_count(sizes[row.mode].get(what)) for what in ("images", "boxes")),
                _published(row.published),
            ]
            for row in every
            if row.main
        ]
        notes = []
        for main in (row for row in every if row.main):
            beside = [row for row in every if (row.mode, row.label) == (main.mode, main.label) and not row.main]
            numbers = ", ".join(f"{row.key} {percent(row.value)}" for row in beside)
            notes += [f"  {main.mode}, {main.label}: {numbers}"] if beside else []
        notes += [f"  {mode}: {protocol_line(results, asked)}" for mode, asked in own["asks"].items()]
        notes += [f"  {line}" for line in _notes(own)]
        parts.append("\n".join([aligned(lines), *notes]))
    for name, columns in results["groups"].items():
        for column, own in columns.items():
            absent = f"; without {listed(own['missing'])}" if own["missing"] else ""
            published = f"; published: {_published(own['published'])}" if own["published"] else ""
            mean, median = percent(own["mean"]), percent(own["median"])
            parts.append(f"{name}, {column}: mean {mean}, median {median} of {own['sets']} sets{absent}{published}")
    return "\n\n".join(parts)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _published(entries: Sequence[Mapping[str, Any]]) -> str:
    """`GLIP-T 26.0, GLIP-L 37.3; other protocol: 5`."""
    same = ", ".join(f"{each['model']} {each['value']:g}" for each in entries if not each["differs"])
    others = sum(1 for each in entries if each["differs"])
    return "; ".join(filter(None, [same, f"other protocol: {others}" if others else ""]))


def protocol_line(results: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What the numbers of one prompt mode depend on."""
    protocol, checkpoint = asked["protocol"], results["checkpoint"]
    names = str(protocol["chunk"]) if protocol["chunk"] else "the token budget"
    each = f", {protocol['prompts_per_image']} prompts an image" if "prompts_per_image" in protocol else ""
    parts = [
        f"step {checkpoint.get('step')}, {checkpoint.get('parameters')} parameters",
        f"sides {protocol['short_side']} to {protocol['long_side']}",
        f"names a prompt: {names} (longest {asked['longest_prompt']}){each}, order {protocol['order']}",
        f"boxes kept: {protocol['boxes']} a prompt"
        + (f", {protocol['boxes_per_image']} an image" if protocol["boxes_per_image"] else ""),
        f"threshold {protocol['threshold']:g}, {protocol['token_scores']} of tokens",
        f"images: {protocol['images']}"
        + "".join(f", {count:,} {what}" for what, count in scored_counts(asked).items())
        + ("" if protocol["counts"] == "as published" else ", other counts than published"),
        *dict.fromkeys(metric["evaluator"] for metric in asked["metrics"].values()),
        *(f"{role} {file['sha256'][:16]}{_known(file)}" for role, file in asked["files"].items()),
    ]
    return "; ".join(parts)


def _known(file: Mapping[str, str]) -> str:
    if not file["known"]:
        return ""
    return " (as published)" if file["known"] == file["sha256"] else f" (NOT the published {file['known'][:16]})"


def overlap_lines(overlap: Mapping[str, Any]) -> list[str]:
    """How far the set is zero-shot: its images and names that the training data hold."""
    lines = []
    if images := overlap.get("images"):
        sources = ", ".join(f"{name} {count}" for name, count in images["by_source"].items())
        lines.append(
            f"training images: {images['found']} of {images['images']} image files are in the training data"
            + (f" ({sources})" if sources else "")
        )
    if names := overlap.get("names"):
        lines.append(
            f"training names: {names['found']} of {names['names']} names are category names of the training data"
        )
    lines += [f"training source {name} is not compared: {reason}" for name, reason in overlap["unread"].items()]
    if not overlap["sources"] and not overlap["unread"]:
        lines.append("overlap with the training data is not known: the checkpoint names no sources")
    return lines


def absence_lines(metric: Mapping[str, Any]) -> list[str]:
    """False alarms for names that are known to be absent, at fixed thresholds and at those of fixed rates; [] for other metrics."""
    if "refused" in metric:
        return [f"absent names are not measured: {metric['refused']}"]
    found = metric["numbers"]
    if metric["module"] != "absence":
        return []
    fixed = "; ".join(
        f"at {t}: {found['thresholds'][t]['false_alarms']:.4f}, presence MCC {_plain(found['thresholds'][t]['presence_MCC'])}, "
        f"cgF1 {_plain(found['thresholds'][t]['cgF1'])}"
        for t in SHOWN
    )
    rates = "; ".join(
        f"{rate}: {own['threshold']:.3f}" + (f", AP {percent(own['AP'])}" if "AP" in own else "")
        for rate, own in found["rates"].items()
    )
    return [
        f"absent names: false alarms per image and name ({found['absent_pairs']:,} pairs) {fixed}",
        f"absent names: threshold at a false-alarm rate of {rates}",
    ]


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def render(
    results: Mapping[str, Any], items: Sequence[BenchmarkSet], data: str, workdir: epath.Path, drawn: int
) -> str:
    """The report as HTML text with its images inside; `drawn`: images with the worst errors of each set."""
    by_name = {item.name: item for item in items}
    sets = [
        {
            "name": name, "title": own["title"], "licence": own["licence"], "notes": _notes(own),
            "rows": [(row, percent(row.value), row.published) for row in rows({"sets": {name: own}})],
            "protocols": [(mode, protocol_line(results, asked).split("; ")) for mode, asked in own["asks"].items()],
            "bars": list(_class_bars(own)), "cards": _cards(by_name[name], own, data, workdir, drawn) if name in by_name else [],
        }
        for name, own in results["sets"].items()
    ]  # fmt: skip
    main = [
        (f"{row.name} {row.mode} {row.label}", row.key, row.value, percent(row.value))
        for row in rows(results)
        if row.main
    ]
    groups = [(name, column, percent(own["mean"]), percent(own["median"]), own["sets"], own["missing"], own["published"])
              for name, columns in results["groups"].items() for column, own in columns.items()]  # fmt: skip
    checkpoint = results["checkpoint"]
    return render_template(
        "benchmark.html.j2", title=f"benchmark: {checkpoint['name']}", about=results["command"], sets=sets, main=main, groups=groups,
        missing=results["missing"], failed=results["failed"],
        facts=[(key, json.dumps(checkpoint[key])) for key in ("workdir", "step", "parameters", "started_from", "hashes", "versions")],
        date=results["date"],
    )  # fmt: skip


def _notes(own: Mapping[str, Any]) -> list[str]:
    absent = [
        f"{mode}: {line}"
        for mode, asked in own["asks"].items() for metric in asked["metrics"].values() for line in absence_lines(metric)
    ]  # fmt: skip
    chunking = [
        f"{mode}, {chunk}: {numbers}"
        for mode, asked in own["asks"].items() for chunk, numbers in chunking_lines(asked.get("chunking", ()))
    ]  # fmt: skip
    noted = [f"{mode}: {line}" for mode, asked in own["asks"].items() for line in asked["notes"]]
    return [*overlap_lines(own["overlap"]), *absent, *chunking, *noted, *own["notes"]]


def _class_bars(own: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[tuple[str, float, str]]]]:
    """By metric, the numbers of single names, in the order of the file."""
    for mode, asked in own["asks"].items():
        for label, metric in asked["metrics"].items():
            per_class = metric["numbers"].get("per_class") if isinstance(metric["numbers"], Mapping) else None
            if isinstance(per_class, Mapping):
                bars = [
                    (name, value, percent(value)) for name, value in per_class.items() if isinstance(value, int | float)
                ]
                yield f"{mode}, {label}", bars


def _cards(item: BenchmarkSet, own: Mapping[str, Any], data: str, workdir: epath.Path, drawn: int) -> list[Card]:
    """Cards of the images with the worst errors in the set's first prompt mode; none if its files cannot be read any more."""
    mode = next(iter(own["asks"]))
    folder = workdir / item.name / mode
    try:
        done = json.loads((folder / "done.json").read_text())
        annotations, predictions = scored_paths(item, data, folder, workdir, own["asks"][mode]["protocol"])
        worst = mistakes(item, annotations["annotations"], predictions, done["files"], drawn, release_of(item, data))
        return [mistake_card(each, item.path("images", data)) for each in worst if each.file]
    except (UserError, OSError, ValueError, KeyError) as error:
        logger.warning(f"{item.name}: the worst errors are not drawn: {error}")
        return []


def mistake_card(mistake: Mistake, folder: epath.Path) -> Card:
    """The image of `mistake` below `folder` with its true boxes and detections, of these only those up to the worst one.

    Where it is known which true boxes nothing has found, the 40 largest of these carry their names, and of all detections the best 40
    are drawn. Raises OSError or UserError for an image that cannot be read.
    """
    image, _ = read_upright(within(folder, mistake.file))
    size = (image.shape[0], image.shape[1])
    colors = {name: hex_color(i) for i, name in enumerate(dict.fromkeys([*mistake.true_names, *mistake.names]))}
    boxes, chips = [card_box(box, size) for box in mistake.true], []
    drawn = max(1, sum(1 for score in mistake.scores if np.isnan(score) or score >= mistake.badness))
    missed = [name for name in mistake.true_names if name not in mistake.names[:drawn]]
    if mistake.missed:
        drawn = min(len(mistake.names), _DRAWN)
        missed = [name for name, lost in zip(mistake.true_names, mistake.missed, strict=True) if lost]
        areas = np.where(mistake.missed, np.prod(mistake.true[:, 2:] - mistake.true[:, :2], axis=1), -1.0)
        for row in np.argsort(-areas, kind="stable")[: min(_DRAWN, sum(mistake.missed))]:
            name = mistake.true_names[row]
            boxes[row] = replace(card_box(mistake.true[row], size, text=name), color=colors[name])
    for box, name, score, right in list(zip(mistake.found, mistake.names, mistake.scores, mistake.right, strict=True))[
        :drawn
    ]:
        boxes.insert(len(mistake.true), card_box(box, size, colors[name], name if right else f"✗ {name}"))
        text = "" if np.isnan(score) else f"{score:.2f}"
        chips.append(Chip(name or "box", colors[name], "right" if right else "wrong", text))
    chips += [Chip(name, state="missed") for name in dict.fromkeys(filter(None, missed))]
    if mistake.missed and drawn < len(mistake.names):
        chips.append(Chip(f"{len(mistake.names) - drawn} more detections"))
    uri, height = card_image(image)
    return Card(uri, height, tuple(boxes), text_pieces(mistake.text, (), ()), tuple(chips), mistake.file)
