"""The job `report`: the HTML report of a run, from what the run recorded (metrics.jsonl, evaluation.json, detections)."""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from glip_jax import UserError
from glip_jax.cli.command_line import flags
from glip_jax.cli.reports.run_report import Curve, render
from glip_jax.config import PathStr, current_names
from glip_jax.config.ranges import Fraction, Limit
from glip_jax.distributed import exit_codes
from glip_jax.evaluation.average_precision import (
    NUMBERS,
    AveragePrecision,
    GroundTruth,
    load_ground_truth,
)
from glip_jax.evaluation.evaluate import Evaluated, Grounded, saved_set
from glip_jax.evaluation.recall import Recall, load_grounding
from glip_jax.io.provenance import file_hash
from glip_jax.io.workdir import write_atomic
from glip_jax.structures.batch import Detections
from glip_jax.training.monitoring.goodput import goodput
from glip_jax.training.monitoring.metrics import read

__all__ = ["FORMAT", "Report", "ReportError", "main", "write_report"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of evaluation.json."""


class ReportError(UserError, ValueError):
    """A working folder of which no HTML report can be made."""


@dataclass(frozen=True)
class Report:
    """Write the HTML report of a run again: numbers, curves, images with true and detected boxes, settings and hashes."""

    workdir: PathStr
    """Folder of the run, local or gs://."""
    out: PathStr = ""
    """Folder with evaluation.json, where report.html goes; default: the working folder."""
    scenes: Limit = 12
    """Images shown of each evaluated set."""
    threshold: Fraction | None = None
    """Score from which detections are drawn; default: where F1 over the set is highest."""


def main(argv: Sequence[str]) -> int:
    """Runs `report --workdir=DIR`. Raises CommandLineError, and what `write_report` raises."""
    job = flags(argv, Report, "report", "--workdir=runs/demo --scenes=24", {"--least": "--threshold"})
    logger.info(f"HTML report: {write_report(job.workdir, job.scenes, job.threshold, job.out)}")
    return exit_codes.DONE


def write_report(workdir: str, scenes: int = 12, threshold: float | None = None, out: str = "") -> epath.Path:
    """Writes report.html from `workdir`/metrics.jsonl and `out`/evaluation.json into `out`, and returns its path.

    `out` is `workdir` where it is empty.

    Raises:
        ReportError: nothing is recorded there, or evaluation.json and its detections cannot be read.
        GroundTruthError, EvaluationError: annotations or pictures of an evaluated set are gone or changed.
    """
    folder = epath.Path(out or workdir)
    lines = read(workdir, times=True)
    recorded = folder / "evaluation.json"
    if not lines and not recorded.exists():
        raise ReportError(
            f"{workdir} holds no metrics.jsonl and {folder} no evaluation.json: expected a --workdir of `train`"
        )
    summary: dict[str, Any] | None = None
    evaluated: dict[str, tuple[Evaluated | Grounded, epath.Path]] = {}
    notes = []
    try:
        if recorded.exists():
            summary = json.loads(recorded.read_text())
            if summary is None or summary.get("format") != FORMAT:
                raise ReportError(f"{recorded} is of another version of glip_jax: run `evaluate` again")
            summary["settings"] = current_names(summary["settings"])
            notes.append(
                f"config {summary['name']}, evaluated at step {summary['step']}, {summary['parameters']} parameters"
            )
            for name, entry in summary["sets"].items():
                evaluated[name] = (_evaluated(folder, name, entry), epath.Path(entry["images"]))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, FileNotFoundError) as error:
        raise ReportError(f"{recorded} or its detections cannot be read ({error!r}): run `evaluate` again") from error
    path = folder / "report.html"
    title = f"glip_jax: {PurePath(workdir).name}"
    wall = goodput(lines)
    if wall is not None:
        logger.info(wall.line())
    text = render(title, evaluated, _curves(lines), notes, scenes, threshold, summary, wall)
    write_atomic(path, text)
    return path


def _evaluated(folder: epath.Path, name: str, entry: dict[str, Any]) -> Evaluated | Grounded:
    """An evaluation as it was, from evaluation.json and the detections beside it."""
    grounding = entry["kind"] == "grounding"
    load = load_grounding if grounding else load_ground_truth
    truth = load(entry["annotations"], saved_set(entry), name)
    if file_hash(entry["annotations"]) != entry["hashes"]["annotations"]:
        raise ReportError(f"{entry['annotations']} has changed since it was evaluated: run `evaluate` again")
    by_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in json.loads((folder / f"detections_{name}.json").read_text()):
        by_image[row["image_id"]].append(row)
    ids, numbers = tuple(entry["image_ids"]), entry["numbers"]
    if isinstance(truth, GroundTruth):
        precision = AveragePrecision({n: numbers[n] for n in NUMBERS}, entry["per_class"], entry["per_class_50"])
        index = {number: i for i, number in enumerate(truth.category_ids)}
        found = {key: _detections([(index[row["category_id"]], row) for row in by_image[key]], 1.0) for key in ids}
        return Evaluated(
            truth, tuple(entry["prompts"]), ids, found, precision, numbers["AP50_permuted"], entry["hashes"]["pictures"],
            absence=entry.get("absence"),
        )  # fmt: skip
    found = {key: _detections([(row["phrase"], row) for row in by_image[key]], 0.0) for key in ids}
    unasked = {key: tuple(lost) for key, lost in entry["unasked"]}
    recall = Recall(numbers, entry["phrases"])
    return Grounded(truth, ids, found, recall, unasked, entry["counts"], entry["hashes"]["pictures"])


def _detections(rows: list[tuple[int, dict[str, Any]]], extra: float) -> Detections:
    """The inverse of `coco_results` and `phrase_results`, whose widths are x2 - x1 + `extra`."""
    boxes = np.array([row["bbox"] for _, row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2] - np.float32(extra)
    scores = np.array([row["score"] for _, row in rows], np.float32)
    return Detections(boxes, scores, np.array([number for number, _ in rows], np.int32))


def _curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Panels of curves: the loss and its parts, those of each source; AP, AP50 and recall@1, a curve a set."""

    def curve(key: str) -> Curve:
        # Values that are not finite are recorded as text, which float() reads.
        points = [(line["step"], float(line[key])) for line in lines if key in line]
        return [step for step, _ in points], [value for _, value in points]

    keys = list(dict.fromkeys(key for line in lines for key in line))
    panels: defaultdict[str, dict[str, Curve]] = defaultdict(dict)
    for key in keys:
        parts = key.split("/")
        if key == "loss" or parts[0] == "loss":
            panels["loss"][key] = curve(key)
        elif parts[0] == "source" and parts[-2] == "loss":
            panels[f"losses of {'/'.join(parts[1:-2])}"][parts[-1]] = curve(key)
        elif parts[0] == "evaluation" and parts[-1] in ("AP", "AP50", "recall@1"):
            panels[parts[-1]]["/".join(parts[1:-1])] = curve(key)
    return dict(panels)
