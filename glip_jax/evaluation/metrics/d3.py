"""D3, Described Object Detection: COCO's AP over descriptions, all of them (FULL), of presence (PRES) and of absence (ABS).

A description is a category, and ABS descriptions ("a dog without a leash") have targets like the others; as in
`scripts/eval_and_analysis_json.py` of d-cube. The three numbers come from the same predictions. Intra- and inter-scenario differ in
what an image was asked: the descriptions of its group, or all.

The released annotations keep, of each box, the descriptions of its own group only, so that in the inter-scenario a right find of
another group's description counts as wrong. With `inter`, the numbers are given too against all descriptions of the boxes, which
the pickles of the release hold.
"""

import io
import logging
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from glip_jax.evaluation.metrics import coco
from glip_jax.evaluation.metrics.annotations import Annotations, read_annotations
from glip_jax.evaluation.metrics.files import MetricError, Results
from glip_jax.io import gcs

__all__ = ["LENGTHS", "PARTS", "of_all_groups", "pickles_beside", "read_pickles", "score"]

logger = logging.getLogger(__name__)

PARTS = {"FULL": "d3_full_annotations.json", "PRES": "d3_pres_annotations.json", "ABS": "d3_abs_annotations.json"}
"""The numbers, and the file of the release for each."""

LENGTHS = {"short": (1, 3), "mid": (4, 6), "long": (7, 9), "very_long": (10, 1_000_000)}
"""Least and greatest number of words of a description."""

_PICKLES = {
    "sentences": ("is_negative",), "annotations": ("sent_id", "bbox", "area"), "images": ("anno_id",),
    "groups": ("inner_sent_id", "img_id"),
}  # fmt: skip
"""The files, and the fields of their objects that are needed."""

_PLAIN = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "defaultdict"), ("collections", "OrderedDict"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("builtins", name) for name in ("list", "dict", "set", "frozenset", "tuple", "int", "float", "bytes", "bytearray")),
}  # fmt: skip
"""What a pickle may build: plain values and arrays."""


def score(
    annotations: str, predictions: str, *, inter: bool = False, top: int = 100, per_class: bool = False
) -> dict[str, Any]:
    """D3's numbers of predictions in COCO's results form, in which a category is a description.

    `annotations`: the folder of d3_full_annotations.json, d3_pres_annotations.json and d3_abs_annotations.json, the first of
    these files, or any file of COCO's form. Which descriptions are of absence tell the files beside it, else `is_negative` of its
    categories, else sentences.pkl of the release. `inter`: the predictions are of the inter-scenario. `top`, `per_class`: see
    `coco.score`.

    Returns the twelve numbers of COCO over all descriptions; "FULL", "PRES" and "ABS", their AP, -1 where it is not known which
    descriptions these are; "length", for each of them the mean AP of descriptions by number of words (`LENGTHS`); with `inter`
    "all_groups", FULL, PRES and ABS against all descriptions of the boxes, null without the pickles; and "counts".

    Raises:
        MetricError: the files cannot be read, or do not belong together.
    """
    full_path, pickles = _full(annotations), pickles_beside(annotations)
    full = read_annotations(full_path)
    negative = _negative(full, pickles)
    parts = _parts(full_path, full, negative)
    detected = coco.read_detected(predictions, full, top)
    result: dict[str, Any] = {}
    lengths = {}
    for name, truth in parts.items():
        if truth is None:
            result[name], lengths[name] = -1.0, dict.fromkeys(LENGTHS, -1.0)
            continue
        twelve, by_name, by_name_50 = coco.numbers(truth, _rows(detected.rows, full, truth), top)
        lengths[name] = _by_length(truth, list(by_name.values()))
        if name == "FULL":
            result = {**twelve, **result}
            if per_class:
                result |= {"per_class": by_name, "per_class_50": by_name_50}
        result[name] = twelve["AP"]
    result["length"] = lengths
    if inter:
        result["all_groups"] = None if pickles is None else _all_groups(full, pickles, negative, detected.rows, top)
        if pickles is None:
            logger.warning(
                f"note: {annotations} has no d3_pkl beside it, so finds of other groups' descriptions count as wrong"
            )
    sizes = {name: 0 if truth is None else len(truth.categories) for name, truth in parts.items()}
    result["counts"] = {**detected.counts, "descriptions": sizes}
    return result


def _full(annotations: str) -> str:
    """The file of all descriptions."""
    if gcs.kind(annotations) != "folder":
        return annotations
    places = [epath.Path(annotations) / below / PARTS["FULL"] for below in ("", "d3_json")]
    found = next((place for place in places if gcs.kind(place) == "file"), None)
    if found is None:
        raise MetricError(f"the folder of annotations {annotations} has no {PARTS['FULL']}, and no d3_json with it")
    return str(found)


def pickles_beside(annotations: str) -> dict[str, dict[Any, dict[str, Any]]] | None:
    """The pickles of the release, from d3_pkl beside the annotations or above them; None without."""
    place = epath.Path(annotations)
    folder = place if gcs.kind(annotations) == "folder" else place.parent
    candidates = [folder, folder / "d3_pkl", folder.parent / "d3_pkl"]
    found = next((each for each in candidates if gcs.kind(each / "sentences.pkl") == "file"), None)
    return None if found is None else read_pickles(str(found))


def _negative(full: Annotations, pickles: Mapping[str, Any] | None) -> np.ndarray | None:
    """Which descriptions are of absence, by the annotations or by the pickles; None where neither tells."""
    if any("is_negative" in fields for fields in full.category_fields):
        return np.array([bool(fields.get("is_negative")) for fields in full.category_fields])
    if pickles is None:
        return None
    negative = np.zeros(len(full.categories), bool)
    for key, sentence in pickles["sentences"].items():
        if (index := full.categories.find(key)) >= 0:
            negative[index] = bool(sentence["is_negative"])
    return negative


def _parts(full_path: str, full: Annotations, negative: np.ndarray | None) -> dict[str, Annotations | None]:
    """The annotations of each of `PARTS`; None where it is not known which descriptions these are."""
    files = {name: epath.Path(full_path).parent / file for name, file in PARTS.items() if name != "FULL"}
    if all(gcs.kind(file) == "file" for file in files.values()):
        parts: dict[str, Annotations | None] = {"FULL": full}
        for name, file in files.items():
            parts[name] = part = read_annotations(str(file), notes=False)
            if part.images.keys != full.images.keys:
                raise MetricError(
                    f"{file} lists {len(part.images)} images and {full_path} {len(full.images)}, or others: the files are of "
                    "different versions"
                )
            if min(full.categories.find(key) for key in part.categories.keys) < 0:
                raise MetricError(
                    f"{file} lists descriptions that {full_path} lacks: the files are of different versions"
                )
        return parts
    if negative is None:
        logger.warning(
            f"note: {full_path} does not tell which descriptions are of absence (expected {PARTS['PRES']} and {PARTS['ABS']} beside "
            "it, is_negative in its categories, or d3_pkl): PRES and ABS are -1"
        )
        return {"FULL": full, "PRES": None, "ABS": None}
    return {
        "FULL": full,
        "PRES": full.of_categories(~negative) if not negative.all() else None,
        "ABS": full.of_categories(negative) if negative.any() else None,
    }


def _rows(rows: Results, full: Annotations, part: Annotations) -> Results:
    """The detections of the descriptions of a part, by its indices."""
    place = np.array([part.categories.find(key) for key in full.categories.keys], np.int32)
    rows = rows._replace(categories=place[rows.categories])
    return Results(*(column[rows.categories >= 0] for column in rows))


def _by_length(truth: Annotations, values: list[float]) -> dict[str, float]:
    """The mean AP of descriptions by number of words; those without a box do not count."""
    words = [len(str(fields.get("name", "")).split(" ")) for fields in truth.category_fields]
    means = {}
    for name, (least, greatest) in LENGTHS.items():
        chosen = [
            value for value, count in zip(values, words, strict=True) if value > -1 and least <= count <= greatest
        ]
        means[name] = sum(chosen) / len(chosen) if chosen else -1.0
    return means


def _all_groups(
    full: Annotations, pickles: Mapping[str, Any], negative: np.ndarray | None, rows: Results, top: int
) -> dict[str, float]:
    """AP against boxes with all their descriptions."""
    truth = of_all_groups(full, pickles)
    parts = {"FULL": np.ones(len(full.categories), bool)}
    if negative is not None:
        parts |= {"PRES": ~negative, "ABS": negative}
    result = dict.fromkeys(PARTS, -1.0)
    for name, keep in parts.items():
        if keep.any():
            part = truth.of_categories(keep)
            result[name] = coco.numbers(part, _rows(rows, truth, part), top)[0]["AP"]
    return result


def of_all_groups(full: Annotations, pickles: Mapping[str, Any]) -> Annotations:
    """The boxes with all their descriptions, by the pickles; `full`: the released file. Raises MetricError for other versions."""
    columns: list[tuple[int, int, Any, float]] = []
    for key, image in pickles["images"].items():
        index = full.images.find(key)
        for annotation in (pickles["annotations"].get(each) for each in image["anno_id"]):
            if annotation is None:
                raise MetricError(
                    f"d3_pkl: image {key!r:.40} has annotations that annotations.pkl lacks: copy the files again"
                )
            box = [int(value) for value in np.asarray(annotation["bbox"]).reshape(-1, 4)[0]]
            area = float(int(np.asarray(annotation["area"]).reshape(-1)[0]))
            columns += [(index, full.categories.find(sentence), box, area) for sentence in annotation["sent_id"]]
    if not columns or min(min(column[:2]) for column in columns) < 0:
        raise MetricError(
            f"d3_pkl and {full.path} do not list the same images and descriptions: they are of different versions"
        )
    image, category, boxes, areas = zip(*columns)
    no = np.zeros(len(columns), bool)
    return Annotations(
        full.path, full.images, full.categories, full.image_fields, full.category_fields, np.array(image, np.int32),
        np.array(category, np.int32), np.array(boxes, np.float64), np.array(areas), no, no,
    )  # fmt: skip


def read_pickles(folder: str) -> dict[str, dict[Any, dict[str, Any]]]:
    """sentences, annotations, images and groups of D3's release (d3_pkl), each by id.

    Only plain values and NumPy arrays are built, so the files cannot run code. Raises MetricError for a file that is missing,
    damaged, or holds anything else.
    """
    tables = {}
    for name, fields in _PICKLES.items():
        path = epath.Path(folder) / f"{name}.pkl"
        if gcs.kind(path) != "file":
            raise MetricError(
                f"{path} does not exist: expected D3's pickles, {', '.join(f'{each}.pkl' for each in _PICKLES)}"
            )
        with gcs.open_file(path) as file:
            data = file.read()
        try:
            table = _PlainUnpickler(io.BytesIO(data)).load()
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            TypeError,
            AttributeError,
            ImportError,
            IndexError,
        ) as error:
            raise MetricError(f"{path} cannot be read ({error}): copy it again") from None
        if not isinstance(table, dict) or not all(isinstance(item, dict) for item in table.values()):
            raise MetricError(f"{path} holds a {type(table).__name__}, expected objects by id")
        for key, item in table.items():
            if lacking := [each for each in fields if each not in item]:
                raise MetricError(f"{path}: the object {key!r:.40} lacks {', '.join(lacking)}")
        tables[name] = table
    return tables


class _PlainUnpickler(pickle.Unpickler):
    """Builds plain values and arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function, if a pickle may use it; UnpicklingError otherwise."""
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it uses {module}.{name}, expected plain values and NumPy arrays")
        return super().find_class(module, name)
