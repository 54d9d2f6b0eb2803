"""The HTML report of a labelling, from report.json and the pseudo records of its folder."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from glip_jax.cli.reports.drawing import draw_counts, svg_uri
from glip_jax.cli.reports.html import render_template
from glip_jax.cli.reports.inspect_cards import record_cards
from glip_jax.data.manifest import read_file
from glip_jax.data.shards import Shards
from glip_jax.io import gcs
from glip_jax.io.workdir import write_atomic

__all__ = ["render", "write_report"]


def write_report(out: str, samples: int = 24) -> str:
    """Writes OUT/report.html of a finished folder, local or gs://; returns its path. OSError if it cannot be written."""
    path, text = f"{out}/report.html", render(out, samples)
    if gcs.is_remote(path):
        gcs.put(path, text.encode())
    else:
        write_atomic(epath.Path(path), text)
    return path


def render(out: str, samples: int = 24) -> str:
    """The report as HTML text with its images inside; `samples` records are drawn."""
    report = json.loads(read_file(f"{out}/report.json"))
    counts, settings = report["summary"], report["settings"]
    share = counts["phrases_with_boxes"] / max(counts["phrases"], 1)
    outside = settings["teacher"].startswith("detections")
    tiles = [
        ("captions kept", f"{counts['kept_share']:.1%}", f"{counts['kept']:,} of {counts['captions']:,}"),
        ("phrases with a box", f"{share:.1%}", f"{counts['phrases_with_boxes']:,} of {counts['phrases']:,}; the others are unlabelled"),
        ("boxes", f"{counts['boxes']:,}", f"{counts['boxes_per_phrase_with_boxes']:.2f} for a phrase with any"),
        ("concepts", f"{counts['concepts_with_boxes']:,}", f"with a box, of {counts['concepts']:,} queried, by head noun"),
    ]  # fmt: skip
    if "verifier" in settings:
        judged = counts["phrases_judged"]
        text = f"{counts['phrases_vetoed']:,} of {judged:,} judged phrases; {counts['phrases_not_judged']:,} not judged"
        tiles.append(("vetoed", f"{counts['phrases_vetoed'] / max(judged, 1):.1%}", text))
    forgotten = counts["phrases_forgotten"]
    concepts = (
        f"{counts['concepts']:,} head nouns, of which {counts['concepts_never_found']:,} have no box anywhere; "
        f"{counts['different_phrases']:,} different phrases, of which {counts['phrases_never_found']:,} have none"
        + (f"; {forgotten:,} phrases queried once are not counted by their text" if forgotten else "")
        + "."
    )
    return render_template(
        "label.html.j2", title=f"labelling: {report['name']}", about=report["command"], tiles=tiles, concepts=concepts,
        score="the detector's own" if outside else "the root of alignment (how well the location matches the text) times "
        "centerness (how central in its object it is)",
        sources=[
            (name, f"{own['captions']:,}", f"{own['kept']:,}", f"{own['kept'] / max(own['captions'], 1):.1%}",
             f"{own['boxes']:,}", settings["thresholds"][name])
            for name, own in counts["sources"].items()
        ],
        plots=[(name, svg_uri(picture)) for name, picture in _plots(counts, min(settings["thresholds"].values()))],
        frequent=counts["frequent_concepts"], rarest=counts["rarest_concepts"][::-1],
        lost=counts["most_asked_concepts_never_found"], lost_phrases=counts["most_asked_phrases_never_found"],
        counts=[(what, own["count"], own["first"]) for kind in ("drops", "notes") for what, own in counts[kind].items()],
        cards=record_cards(Shards(out), samples), facts=_settings_and_hashes(report),
    )  # fmt: skip


def _plots(counts: Mapping[str, Any], threshold: float) -> list[tuple[str, bytes]]:
    bins = len(counts["best_scores"])
    edges = [i / bins for i in range(bins + 1)]
    series = {"best box of each phrase": counts["best_scores"], "boxes kept": counts["box_scores"]}
    numbers = {int(number): count for number, count in counts["phrases_by_boxes"].items()}
    most = max(numbers, default=0)
    boxes = [numbers.get(number, 0) for number in range(most + 1)]
    return [
        ("Scores", draw_counts(series, edges, "score", mark=threshold)),
        (
            "Boxes of a phrase",
            draw_counts({"phrases": boxes}, [n - 0.5 for n in range(most + 2)], "boxes; 0: unlabelled"),
        ),
    ]


def _settings_and_hashes(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, counts = report["settings"], report["summary"]
    facts = [
        (name, str(value))
        for name, value in settings.items()
        if name not in ("inputs", "records", "thresholds", "format")
    ]
    facts += [(f"threshold of {name}", str(value)) for name, value in settings["thresholds"].items()]
    columns = settings["inputs"].items()
    facts += [(f"captions of {name}", f"{path} {own}") for path, (name, own) in zip(report["inputs"], columns)]
    facts += [(f"code {code}", f"{count:,} records") for code, count in counts["code"].items()]
    facts.append(("hours of all processes", f"{counts['seconds'] / 3600:.2f}"))
    return [*facts, ("licence", report["licence"]), *((name, str(value)) for name, value in report["versions"].items())]
