"""COCO's twelve metrics, by pycocotools, of detections on any COCO JSON."""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from glip_jax import UserError
from glip_jax.config import EvaluationSet
from glip_jax.data.importers.coco_json import AnnotatedImage, read_detections
from glip_jax.data.importers.entry import Report, SourceError, as_numbers
from glip_jax.data.importers.losses import refuse_losses
from glip_jax.evaluation.metrics.per_category import mean_of
from glip_jax.structures.batch import Detections

__all__ = [
    "NUMBERS", "AveragePrecision", "GroundTruth", "GroundTruthError", "ListedNames", "average_precision", "coco_numbers", "coco_results",
    "derangement", "labels", "load_ground_truth", "permuted_ap50", "setting_names",
]  # fmt: skip

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of COCO's metrics in the order of pycocotools. A metric is -1 where the ground truth has no boxes for it."""


class GroundTruthError(UserError, ValueError):
    """Annotations that cannot be used for evaluation."""


class ListedNames(NamedTuple):
    """Names that an image lists besides its boxes, as indices into `GroundTruth.names`."""

    known_absent: tuple[int, ...]
    """What is known not to be in the image, and has no box in it."""
    look_alikes: tuple[int, ...]
    """Those of them that resemble what the image shows."""
    not_exhaustive: tuple[int, ...]
    """Names not all of whose objects have a box."""


@dataclass(frozen=True)
class GroundTruth:
    """A COCO detection JSON as it is evaluated, with its categories in the order of the prompts (by id)."""

    path: str
    content: dict[str, Any]
    """COCO's images, annotations and categories, without what is left out: paths below the image folder, categories that are
    prompted for, boxes with width, height, area and iscrowd 0 or 1; `height` and `width` of an image only if they are listed."""
    category_ids: tuple[int | str, ...]
    names: tuple[str, ...]
    """Names in the file, for reports."""
    prompts: tuple[str, ...] = ()
    """Names in the prompts."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Counts of what is not evaluated or was repaired, by reason."""
    listed: dict[Any, ListedNames] = field(default_factory=dict)
    """By image id."""


class AveragePrecision(NamedTuple):
    """Results of an evaluation."""

    numbers: dict[str, float]
    """The twelve of `NUMBERS`."""
    per_class: dict[str, float]
    """AP of each category by name, -1 for one without boxes."""
    per_class_50: dict[str, float]
    """AP50 of each category by name."""


def load_ground_truth(path: str, dataset: EvaluationSet | None = None, name: str = "NAME") -> GroundTruth:
    """Reads a COCO detection JSON as `data coco` does: `glip_jax.data.importers.coco_json`.

    `dataset`: options and image folder; None: neither. `name`: of the set, for messages. Crowd boxes are COCO's regions in which
    nothing counts, unless `dataset.crowds` is keep.

    Raises:
        GroundTruthError: what the import of the file would refuse, no box that can be used, or most lost for one reason.
    """
    given, report = dataset or EvaluationSet(path, ""), Report()
    with setting_names(name):
        data = read_detections(
            path, given.images, report, rename=given.names, merge_names=given.merge_names, boxes=given.boxes or None,
            crowds=given.crowds or None,
        )  # fmt: skip
        known, images, annotations, ignored = data.categories, [], [], 0
        number = {name: i for i, name in enumerate(known.names)}
        names: dict[Any, ListedNames] = {}
        for image in data.images:
            names[image.id] = _listed_names(image, number, report)
            size = {} if image.height is None else {"height": image.height, "width": image.width}
            images.append({"id": image.id, "file_name": image.file, **size})
            for box in image.boxes:
                *_, width, height = box.xywh
                where = f"annotation {box.key} of image {image.id}"
                if width <= 0 or height <= 0:
                    report.drop("box: no area", where)
                    continue
                if box.crowd:
                    ignored += 1
                    report.drop("box: crowd", where)
                area = as_numbers([box.area], 1)
                usable = area is not None and 0 < area[0] < math.inf
                report.note("box: area unusable, width x height taken", where, box.area is not None and not usable)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image.id, "category_id": known.ids[box.label],
                    "bbox": list(box.xywh), "area": area[0] if area and usable else width * height,
                    "iscrowd": int(box.crowd),
                })  # fmt: skip
        chosen = {"box: crowd"} if given.crowds == "drop" else set()
        refuse_losses(report, len(images), len(annotations) - ignored, data.path, chosen, given.allow_drops)
    content = {
        "images": images, "annotations": annotations,
        "categories": [{"id": i, "name": title} for i, title in zip(known.ids, known.titles, strict=True)],
    }  # fmt: skip
    return GroundTruth(path, content, known.ids, known.titles, known.names, dict(report.dropped + report.noted), names)


def _listed_names(image: AnnotatedImage, number: Mapping[str, int], report: Report) -> ListedNames:
    """`number`: index by name."""
    boxed, absent = {box.label for box in image.boxes}, [number[name] for name in image.known_absent or ()]
    both = [name for name in image.known_absent or () if number[name] in boxed]
    report.note("name: known absent but boxed, not kept as absent", f"image {image.id}, {both[:1]}", len(both))
    alike, unfinished = ([number[name] for name in names] for names in (image.look_alikes, image.not_exhaustive))
    return ListedNames(
        tuple(i for i in absent if i not in boxed), tuple(i for i in alike if i not in boxed), tuple(unfinished)
    )


@contextlib.contextmanager
def setting_names(name: str) -> Iterator[None]:
    """Turns errors of the reader into GroundTruthError, with the options as settings of the evaluation set `name`."""
    try:
        yield
    except SourceError as error:
        setting = re.compile(r"--(names|merge-names|boxes|crowds|folders|images|allow-drops)\b")
        text = setting.sub(lambda found: f"evaluation.sets.{name}.{found[1].replace('-', '_')}", str(error))
        raise GroundTruthError(text) from None


def coco_results(
    truth: GroundTruth, detections: Mapping[Any, Detections], widths: Literal["plus_one", "plain"] = "plus_one"
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
    truth: GroundTruth, results: list[dict[str, Any]], image_ids: list[Any] | None = None, top: int = 100
) -> AveragePrecision:
    """COCO's box AP and AR of `results` (COCO's results format), on `image_ids` or on all images.

    `top`: the most detections per image and category, 100 in COCO's protocol; "AR100" is named by it. Without any result the
    metrics are 0 wherever the ground truth has boxes.

    Raises:
        GroundTruthError: a result or an id of `image_ids` names an image that the ground truth does not have.
    """
    # Hides the progress that pycocotools prints.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(truth, results, image_ids)
        evaluation.params.maxDets = caps = sorted({1, 10, top})
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"], np.float64)[..., caps.index(top)]
    return AveragePrecision(
        coco_numbers(precision, np.asarray(evaluation.eval["recall"], np.float64), caps, top),
        dict(zip(labels(truth), _mean_precision(precision[..., 0]), strict=True)),
        dict(zip(labels(truth), _mean_precision(precision[:1, ..., 0]), strict=True)),
    )


def coco_numbers(
    precision: Float64[np.ndarray, "T R K A"], recall: Float64[np.ndarray, "T K A M"], caps: Sequence[int], top: int
) -> dict[str, float]:
    """COCO's twelve numbers of what COCOeval accumulates, as its `summarize` computes them.

    `caps`: the M maximum numbers of detections, with 1, 10 and `top` among them; `precision` is at `top`. `summarize` itself gives AP
    for the cap 100 only.
    """
    last = caps.index(top)
    values = [
        *(mean_of(precision[chosen, :, :, 0]) for chosen in (slice(None), [0], [5])),
        *(mean_of(precision[..., area]) for area in (1, 2, 3)),
        *(mean_of(recall[..., 0, caps.index(cap)]) for cap in (1, 10, top)),
        *(mean_of(recall[..., area, last]) for area in (1, 2, 3)),
    ]
    names = [f"AR{top}" if name == "AR100" else name for name in NUMBERS]
    return dict(zip(names, values, strict=True))


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


def permuted_ap50(truth: GroundTruth, results: list[dict[str, Any]], image_ids: list[Any] | None = None) -> float:
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
    return mean_of(np.asarray(evaluation.eval["precision"], np.float64))


def _evaluation(truth: GroundTruth, results: list[dict[str, Any]], image_ids: list[Any] | None) -> COCOeval:
    """The evaluation of pycocotools, set up with copies of its inputs, because it writes into them.

    Images and categories are numbered in order of their ids, because ids may be texts.
    """
    images = {key: i for i, key in enumerate(sorted((e["id"] for e in truth.content["images"]), key=_by_number), 1)}
    order = {key: i for i, key in enumerate(truth.category_ids, 1)}
    named = {row["image_id"] for row in results} | set(image_ids or ())
    if named - set(images):
        unknown = sorted(named - set(images), key=str)[:5]
        raise GroundTruthError(f"{truth.path} has no images {unknown} that detections refer to")

    def numbered(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"image_id": images[row["image_id"]], "category_id": order[row["category_id"]]}

    dataset = _indexed({
        "info": {},
        "images": [{"id": number} for number in images.values()],
        "categories": [{"id": order[entry["id"]], "name": entry["name"]} for entry in truth.content["categories"]],
        # pycocotools records the id of the box that a detection matches, and takes 0 for none: ids from 1.
        "annotations": [numbered(entry) for entry in truth.content["annotations"]],
    })  # fmt: skip
    evaluation = COCOeval(dataset, _results(dataset, [numbered(row) for row in results]), "bbox")
    evaluation.params.catIds = list(order.values())
    evaluation.params.imgIds = sorted(images.values() if image_ids is None else {images[key] for key in image_ids})
    return evaluation


def _by_number(key: Any) -> tuple[bool, Any]:
    return isinstance(key, str), key


def _indexed(content: dict[str, Any]) -> COCO:
    dataset: Any = COCO()
    dataset.dataset = content
    dataset.createIndex()
    return dataset


def _results(dataset: Any, results: list[dict[str, Any]]) -> COCO:
    if results:
        return dataset.loadRes(results)
    # loadRes reads the first row, so it cannot load an empty list.
    return _indexed({**dataset.dataset, "annotations": []})


def labels(truth: GroundTruth) -> list[str]:
    """The names of the categories, with their id where two share one: the keys of `AveragePrecision.per_class`."""
    return [
        name if truth.names.count(name) == 1 else f"{name} (id {number})"
        for name, number in zip(truth.names, truth.category_ids, strict=True)
    ]


def _mean_precision(precision: Float64[np.ndarray, "thresholds recalls K"]) -> list[float]:
    """Mean over thresholds and recall points per category; -1 where pycocotools has no value (no boxes)."""
    return [mean_of(precision[:, :, index]) for index in range(precision.shape[2])]
