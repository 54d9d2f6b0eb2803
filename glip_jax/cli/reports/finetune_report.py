"""The table and the HTML report of a fine-tuning, from an `evaluation.transfer.Transfer` and the errors that are left."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from glip_jax import UserError
from glip_jax.cli.reports.benchmark_report import mistake_card, percent
from glip_jax.cli.reports.card import Card
from glip_jax.cli.reports.drawing import draw_curves, svg_uri
from glip_jax.cli.reports.html import render_template
from glip_jax.cli.reports.run_report import aligned
from glip_jax.evaluation.benchmark.mistakes import Mistake
from glip_jax.evaluation.detection_errors import KINDS, SIZES, DetectionErrors
from glip_jax.evaluation.transfer import MAIN, Spread, Transfer, over_seeds

__all__ = ["Errors", "headline", "render", "table"]

logger = logging.getLogger(__name__)

_SHOWN = 40
"""Names in the table for a terminal."""
_CONFUSED = 20
"""Pairs of names in the report."""
_HEAD = [f"{number} {when}" for number in MAIN for when in ("zero-shot", "tuned", "difference")] + ["images", "boxes"]
_ALL = "all names"


class Errors(NamedTuple):
    """The errors on the reported split; those of `tuned` at the thresholds of the result, where it has some."""

    zero_shot: DetectionErrors
    tuned: DetectionErrors


def table(result: Transfer) -> str:
    """The numbers in percent as lines for a terminal: each split and its names before and after, kept sets, runs, what comes next."""
    parts = [headline(result)]
    for name, own in result.splits.items():
        rows = [list(row) for row in _rows(result, name)]
        note = []
        if name != result.split:
            rows = rows[:1]
        elif len(rows) > _SHOWN + 1:
            most = sorted(own.class_boxes, key=lambda each: -own.class_boxes[each])[:_SHOWN]
            note = [
                f"({len(rows) - 1 - _SHOWN} more names are in finetune.json; shown are the {_SHOWN} with most boxes)"
            ]
            rows = [row for row in rows if row[0] in (_ALL, *most)]
        parts.append("\n".join([aligned([[f"{name}, %", *_HEAD], *rows]), *note]))
    for rows in (_kept_rows(result), _interpolation_rows(result), _run_rows(result)):
        parts += [aligned(rows)] if rows else []
    parts += ["\n".join(f"note: {note}" for note in result.notes)] if result.notes else []
    parts += ["\n".join(f"{what}:\n  {command}" for what, command in result.commands)] if result.commands else []
    return "\n\n".join(parts)


def headline(result: Transfer) -> str:
    """What the result is, in one sentence; says so where training gained nothing."""
    length = f"{result.steps} steps, {result.minutes:.1f} minutes of training"
    if not result.best_step:
        return (
            f"{result.name}, {result.tune}: no evaluation on valid was better than the one before training ({length}); the result is the "
            f"{'checkpoint it started from' if result.base else 'network before training'}"
        )
    return f"{result.name}, {result.tune}: step {result.best_step} is the best on valid ({length})"


def _rows(result: Transfer, split: str) -> Iterator[tuple[str, ...]]:
    """Cells of the whole split and of each name, as the columns of `_HEAD`."""
    own = result.splits[split]
    numbers = [[run.numbers[key] for run in (own.zero_shot, own.tuned)] for key in MAIN]
    yield _ALL, *_cells(numbers), str(own.images), str(own.boxes)
    for name in own.class_boxes:
        numbers = [
            [getattr(run, kind)[name] for run in (own.zero_shot, own.tuned)] for kind in ("per_class", "per_class_50")
        ]
        yield name, *_cells(numbers), str(own.class_images[name]), str(own.class_boxes[name])


def _cells(numbers: Sequence[Sequence[float]]) -> Iterator[str]:
    for before, after in numbers:
        yield from (percent(before), percent(after), _difference(before, after))


def _difference(before: float, after: float) -> str:
    return "-" if before < 0 or after < 0 else f"{100 * (after - before):+.1f}"


def _kept_rows(result: Transfer) -> list[list[str]]:
    """Sets of the old names before and after; [] without any."""
    rows = [
        [f"{name} {own.metric}", percent(own.before), percent(own.after), _difference(own.before, own.after), _share(own.before, own.after)]
        for name, own in result.kept.items()
    ]  # fmt: skip
    return [["kept, %", "before", "after", "difference", "after / before"], *rows] if rows else []


def _share(before: float, after: float) -> str:
    return f"{after / before:.3f}" if before > 0 else "-"


def _interpolation_rows(result: Transfer) -> list[list[str]]:
    """Shares of the tuned parameters with the AP of the new names and the metrics of the kept sets; [] without any."""
    if not result.interpolation:
        return []
    kept = list(result.interpolation[0].kept)
    rows = [
        [f"{point.share:g}", percent(point.new), *(percent(point.kept[name]) for name in kept)]
        for point in result.interpolation
    ]
    return [["share of tuned", "AP of valid, %", *(f"{name}, %" for name in kept)], *rows]


def _run_rows(result: Transfer) -> list[list[str]]:
    """Means over runs, by number of shots; [] for one run."""
    if len(result.runs) < 2:
        return []
    rows = [
        ["all data" if not shots else f"{shots}-shot", str(own["AP"][0].count), *(
            _spread(spread) for name in MAIN for spread in own[name]
        )] for shots, own in over_seeds(result.runs).items()
    ]  # fmt: skip
    return [
        ["mean ± sd of runs, %", "runs", *(f"{name} {when}" for name in MAIN for when in ("zero-shot", "tuned"))],
        *rows,
    ]


def _spread(spread: Spread) -> str:
    return percent(spread.mean) + ("" if spread.deviation is None else f" ±{100 * spread.deviation:.1f}")


def render(result: Transfer, errors: Errors | None, images: str) -> str:
    """The report as HTML text with its images inside.

    `errors`: those on `result.split`, None where it has no detections to look at; `images`: the folder of the split's images. An image
    that cannot be read is left out with a warning.
    """
    order = sorted(result.splits, key=lambda name: name != result.split)
    splits = [(name, result.splits[name], [*_rows(result, name)]) for name in order]
    curves = {
        name: ([point.step for point in result.curve], [getattr(point, name) for point in result.curve])
        for name in MAIN
    }
    main = result.splits[result.split]
    tiles = [
        (f"{name}, {result.split}", percent(main.tuned.numbers[name]),
         f"zero-shot {percent(main.zero_shot.numbers[name])}, {_difference(main.zero_shot.numbers[name], main.tuned.numbers[name])}")
        for name in reversed(MAIN)
    ]  # fmt: skip
    tiles.append(("steps", str(result.steps), f"{result.minutes:.1f} minutes of training"))
    tiles.append(("best step", str(result.best_step), "chosen on valid" if result.best_step else "before training"))
    return render_template(
        "finetune.html.j2", title=f"fine-tuning: {result.name}", about=headline(result), tiles=tiles, head=_HEAD, split=result.split,
        splits=splits, curve=svg_uri(draw_curves(curves, "valid", "svg")) if result.curve else "",
        tables=[(title, rows) for title, rows in (("Kept sets", _kept_rows(result)), ("Runs", _run_rows(result))) if rows], runs=result.runs,
        interpolation=_interpolation_rows(result), exchange=_exchange(result), errors=errors and _error_values(errors, images),
        notes=result.notes, commands=result.commands, base=result.base, thresholds=bool(result.thresholds), settings=result.settings,
    )  # fmt: skip


def _exchange(result: Transfer) -> str:
    """The plot of the new AP against the kept ones, along the interpolation; "" without both."""
    if not result.interpolation or not result.interpolation[0].kept:
        return ""
    new = [100 * point.new for point in result.interpolation]
    curves = {
        name: (new, [100 * point.kept[name] for point in result.interpolation]) for name in result.interpolation[0].kept
    }
    return svg_uri(draw_curves(curves, "kept sets, %", "svg", across="AP of the new names on valid, %"))


def _error_values(errors: Errors, images: str) -> dict[str, Any]:
    """What the template shows of the errors."""
    kinds = [
        (name, percent(point.precision), percent(point.recall), percent(point.f1), f"{point.threshold:.2f}",
         [errors.tuned.kinds[name][kind] for kind in ("right", *KINDS)])
        for name, point in errors.tuned.points.items()
    ]  # fmt: skip
    sizes = [
        (size, found[1], *(percent(own.sizes[size][0] / found[1] if found[1] else None) for own in errors))
        for size, found in ((size, errors.tuned.sizes[size]) for size in SIZES)
    ]
    confused = errors.tuned.confused
    return {
        "kinds": kinds, "names": KINDS, "sizes": sizes, "confused": confused[:_CONFUSED], "more": len(confused) - _CONFUSED,
        "false_alarms": _cards(errors.tuned.false_alarms, images), "misses": _cards(errors.tuned.misses, images),
    }  # fmt: skip


def _cards(chosen: Sequence[Mistake], images: str) -> list[Card]:
    drawn = []
    for mistake in chosen:
        try:
            drawn.append(mistake_card(mistake, epath.Path(images)))
        except (UserError, OSError, ValueError) as error:
            logger.warning(f"{mistake.file} is not drawn: {error}")
    return drawn
