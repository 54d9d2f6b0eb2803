"""The job `report`: the page of a run, from what the run recorded (metrics.jsonl, evaluation.json, detections)."""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import tyro
from etils import epath

from glip_jax.evaluation.average_precision import AveragePrecision, GroundTruth, GroundTruthError, load_ground_truth
from glip_jax.evaluation.evaluate import Evaluated, EvaluationError
from glip_jax.evaluation.page import Curve, render
from glip_jax.structures import Detections
from glip_jax.training.metrics import read

__all__ = ["Report", "ReportError", "main", "write_page"]


class ReportError(ValueError):
    """A working folder of which no page can be made."""


@dataclass(frozen=True)
class Report:
    """Draw the page of a run."""

    workdir: str
    """Folder of the run, local or gs://."""
    scenes: int = 12
    """Pictures drawn of each evaluated set."""
    least: float = 0.3
    """Score from which found boxes are drawn."""


def main(argv: Sequence[str]) -> int:
    """Runs `report --workdir=DIR`; returns 0, or 2 after one line about what is wrong."""
    job = tyro.cli(Report, prog="python -m glip_jax report", args=list(argv))
    try:
        print(f"drawn page: {write_page(job.workdir, job.scenes, job.least)}")
    except (ReportError, GroundTruthError, EvaluationError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def write_page(workdir: str, scenes: int = 12, least: float = 0.3) -> epath.Path:
    """Writes `workdir`/report.html and returns its path.

    Raises:
        ReportError: nothing is recorded there, or evaluation.json and its detections cannot be read.
        GroundTruthError, EvaluationError: annotations or pictures of an evaluated set are gone or changed.
    """
    folder = epath.Path(workdir)
    lines = read(workdir)
    recorded = folder / "evaluation.json"
    if not lines and not recorded.exists():
        raise ReportError(f"{folder} holds neither metrics.jsonl nor evaluation.json: expected a --workdir of `train`")
    evaluated, notes = {}, [f"{len(lines)} recorded points"] if lines else []
    try:
        if recorded.exists():
            summary = json.loads(recorded.read_text())
            notes.append(f"evaluated: step {summary['step']}, {summary['parameters']} parameters")
            for name, entry in summary["sets"].items():
                evaluated[name] = (_evaluated(folder, name, entry), epath.Path(entry["images"]))
    except (KeyError, TypeError, json.JSONDecodeError, FileNotFoundError) as error:
        raise ReportError(f"{recorded} or its detections cannot be read ({error!r}): run `evaluate` again") from error
    title = f"glip_jax: {PurePath(workdir).name}"
    page = folder / "report.html"
    page.write_text(render(title, evaluated, _curves(lines), notes, scenes, least))
    return page


def _evaluated(folder: epath.Path, name: str, entry: dict[str, Any]) -> Evaluated:
    """An evaluation as it was, from evaluation.json and the detections beside it."""
    truth = load_ground_truth(entry["annotations"])
    rows = json.loads((folder / f"detections_{name}.json").read_text())
    by_image: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_image[row["image_id"]].append(row)
    precision = AveragePrecision(entry["numbers"], entry["per_class"], entry["per_class_50"])
    return Evaluated(
        truth,
        tuple(entry["prompts"]),
        tuple(entry["image_ids"]),
        {image: _detections(truth, by_image[image]) for image in entry["image_ids"]},
        precision,
    )


def _detections(truth: GroundTruth, rows: list[dict[str, Any]]) -> Detections:
    """The inverse of `coco_results` with its width of x2 - x1 + 1."""
    boxes = np.array([row["bbox"] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2] - 1
    return Detections(
        boxes,
        np.array([row["score"] for row in rows], np.float32),
        np.array([truth.category_ids.index(row["category_id"]) for row in rows], np.int32),
    )


def _curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Panels of curves: the loss and its parts, those of each source, AP and AP50 of the sets."""

    def curve(key: str) -> Curve:
        # Values that are not finite are recorded as words, which float() reads.
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
        elif parts[0] == "evaluation" and parts[-1] in ("AP", "AP50"):
            panels["average precision"]["/".join(parts[1:])] = curve(key)
    return dict(panels)
