"""COCO's twelve metrics, by pycocotools, of detections on any COCO JSON."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Float64
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from glip_jax import UserError
from glip_jax.structures.batch import Detections

__all__ = [
    "NUMBERS", "AveragePrecision", "GroundTruth", "GroundTruthError", "average_precision", "coco_results",
    "derangement", "load_ground_truth", "permuted_ap50", "read_lists",
]  # fmt: skip

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of COCO's metrics in the order of pycocotools. A metric is -1 where the ground truth has no boxes for it."""


class GroundTruthError(UserError, ValueError):
    """Annotations that cannot be used for evaluation."""


@dataclass(frozen=True)
class GroundTruth:
    """A COCO detection JSON with its categories in the order of the prompts (by id)."""

    path: str
    content: dict[str, Any]
    category_ids: tuple[int, ...]
    names: tuple[str, ...]


class AveragePrecision(NamedTuple):
    """Results of an evaluation."""

    numbers: dict[str, float]
    """The twelve of `NUMBERS`."""
    per_class: dict[str, float]
    """AP of each category by name, -1 for one without boxes."""
    per_class_50: dict[str, float]
    """AP50 of each category by name."""


def read_lists(path: str, lists: Sequence[str], expected: str) -> dict[str, Any]:
    """The JSON object in `path`, which holds the named lists; `expected` names the format in messages.

    Raises:
        GroundTruthError: the file is missing, is no JSON object, or lacks a list.
    """
    file = epath.Path(path)
    if not file.exists():
        raise GroundTruthError(f"{path} does not exist: expected {expected} with {', '.join(lists)}")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise GroundTruthError(f"{path} is no JSON: {error}") from error
    missing = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise GroundTruthError(f"{path} lacks the lists {', '.join(missing)}: expected {expected}")
    return content


def load_ground_truth(path: str) -> GroundTruth:
    """Reads a COCO detection JSON.

    Raises:
        GroundTruthError: the file is missing or no COCO detection JSON, an id occurs twice, or a box is of an unknown image or
            category.
    """
    content = read_lists(path, ("images", "annotations", "categories"), "a COCO detection JSON")
    try:
        for key in ("images", "annotations", "categories"):
            ids = [entry["id"] for entry in content[key]]
            if len(ids) != len(set(ids)):
                raise GroundTruthError(f"{path}: ids of {key} occur twice: expected one entry an id")
        for entry in content["annotations"]:
            if not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4:
                raise GroundTruthError(
                    f"{path}: annotation {entry['id']} has bbox {entry['bbox']}: expected x, y, w, h"
                )
            # Data sets of users may lack these two; the defaults are those of COCO.
            entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
            entry.setdefault("iscrowd", 0)
        categories = sorted((entry["id"], str(entry["name"])) for entry in content["categories"])
        images = {entry["id"] for entry in content["images"]}
        known = {number for number, _ in categories}
        orphans = [
            a["id"] for a in content["annotations"] if a["image_id"] not in images or a["category_id"] not in known
        ]
    except (KeyError, TypeError) as error:
        raise GroundTruthError(f"{path}: an entry lacks {error}: expected a COCO detection JSON") from error
    if orphans:
        raise GroundTruthError(
            f"{path}: {len(orphans)} annotations (first {orphans[:3]}) name unknown images or categories"
        )
    return GroundTruth(path, content, tuple(i for i, _ in categories), tuple(name for _, name in categories))


def coco_results(
    truth: GroundTruth, detections: Mapping[int, Detections], widths: Literal["plus_one", "plain"] = "plus_one"
) -> list[dict[str, Any]]:
    """Detections by image id in COCO's results format; unused rows (phrase -1) are left out.

    Boxes are xyxy in original pixels, phrases index `truth.names`. `plus_one` writes w = x2 - x1 + 1 as the original
    does for COCO (glip-reference 5.2: its boxes are inclusive pixels); `plain` writes w = x2 - x1.
    """
    extra = 1.0 if widths == "plus_one" else 0.0
    rows = []
    for image, found in detections.items():
        for box, score, phrase in zip(np.asarray(found.boxes), np.asarray(found.scores), np.asarray(found.phrases)):
            if phrase < 0:
                continue
            x1, y1, x2, y2 = (float(value) for value in box)
            rows.append({
                "image_id": image, "category_id": truth.category_ids[int(phrase)],
                "bbox": [x1, y1, x2 - x1 + extra, y2 - y1 + extra], "score": float(score),
            })  # fmt: skip
    return rows


def average_precision(
    truth: GroundTruth, results: list[dict[str, Any]], image_ids: list[int] | None = None
) -> AveragePrecision:
    """COCO's box AP and AR of `results` (COCO's results format), on `image_ids` or on all images.

    Without any result the metrics are 0 wherever the ground truth has boxes.

    Raises:
        GroundTruthError: a result or an id of `image_ids` names an image that the ground truth does not have.
    """
    # Hides the progress that pycocotools prints.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(truth, results, image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"], np.float64)[:, :, :, 0, -1]
    return AveragePrecision(
        dict(zip(NUMBERS, (float(value) for value in evaluation.stats), strict=True)),
        dict(zip(_labels(truth), _mean_precision(precision), strict=True)),
        dict(zip(_labels(truth), _mean_precision(precision[:1]), strict=True)),
    )


def derangement(count: int) -> tuple[int, ...]:
    """A fixed permutation of `count` categories without fixed points: one cycle through a shuffled order.

    Shuffled, because neighbors in a list of names are often similar. Raises ValueError for fewer than 2.
    """
    if count < 2:
        raise ValueError(f"{count} categories have no derangement: expected at least 2")
    order = np.random.default_rng(0).permutation(count)
    following = np.empty(count, np.int64)
    following[order] = np.roll(order, -1)
    return tuple(following.tolist())


def permuted_ap50(truth: GroundTruth, results: list[dict[str, Any]], image_ids: list[int] | None = None) -> float:
    """AP50 of the same boxes and scores with the categories permuted by `derangement`: the level of chance.

    A detector that localises objects but does not know their names reaches this AP50. It equals permuting the embeddings of the
    names where these do not depend on one another. -1 with fewer than two categories or without boxes.

    Raises:
        GroundTruthError: as `average_precision`.
    """
    if len(truth.category_ids) < 2:
        return -1.0
    ids = truth.category_ids
    other = {ids[i]: ids[j] for i, j in enumerate(derangement(len(ids)))}
    permuted = [row | {"category_id": other[row["category_id"]]} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(truth, permuted, image_ids)
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"], np.float64)
    return float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0


def _evaluation(truth: GroundTruth, results: list[dict[str, Any]], image_ids: list[int] | None) -> COCOeval:
    """The evaluation of pycocotools, set up with copies of its inputs, because it writes into them."""
    known = {entry["id"] for entry in truth.content["images"]}
    named = {row["image_id"] for row in results} | set(image_ids or ())
    if named - known:
        raise GroundTruthError(f"{truth.path} has no images {sorted(named - known)[:5]} that detections refer to")
    dataset = _indexed({
        "info": truth.content.get("info", {}),
        "images": truth.content["images"],
        "categories": truth.content["categories"],
        # pycocotools records the id of the box that a detection matches, and takes 0 for none: ids from 1.
        "annotations": [entry | {"id": number} for number, entry in enumerate(truth.content["annotations"], 1)],
    })  # fmt: skip
    evaluation = COCOeval(dataset, _results(dataset, results), "bbox")
    evaluation.params.catIds = list(truth.category_ids)
    evaluation.params.imgIds = sorted(known if image_ids is None else set(image_ids))
    return evaluation


def _indexed(content: dict[str, Any]) -> COCO:
    dataset: Any = COCO()
    dataset.dataset = content
    dataset.createIndex()
    return dataset


def _results(dataset: Any, results: list[dict[str, Any]]) -> COCO:
    if results:
        return dataset.loadRes([dict(row) for row in results])
    # loadRes reads the first row, so it cannot load an empty list.
    return _indexed({**dataset.dataset, "annotations": []})


def _labels(truth: GroundTruth) -> list[str]:
    """The names, with their id where two categories share one."""
    return [
        name if truth.names.count(name) == 1 else f"{name} (id {number})"
        for name, number in zip(truth.names, truth.category_ids, strict=True)
    ]


def _mean_precision(precision: Float64[np.ndarray, "thresholds recalls K"]) -> list[float]:
    """Mean over thresholds and recall points per category; -1 where pycocotools has no value (no boxes)."""
    values: list[float] = []
    for index in range(precision.shape[2]):
        column: Float[np.ndarray, " n"] = precision[:, :, index][precision[:, :, index] > -1]
        values.append(float(column.mean()) if column.size else -1.0)
    return values
