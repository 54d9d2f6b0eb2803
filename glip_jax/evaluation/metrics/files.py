"""Files of predictions and annotations as the metrics read them, and the one error that they raise for bad input.

Forms of predictions:

- COCO's results: a list of `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}`, in one file or in a folder of files
  (`result_blocks`);
- boxes by image: `{"<image id>": {"boxes": [[x1, y1, x2, y2], ...], "scores": [...]}}` (`boxes_by_image`);
- any other list of objects (`objects`) or JSON value (`read_json`), whose fields the metric checks itself.

Paths are local or gs://. What is no finite number ("0.5" and true are none) is refused, not skipped.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float64, Int32

from glip_jax import UserError
from glip_jax.data.importers.entry import SourceError, one_line
from glip_jax.data.importers.readers import JsonFile, as_integer, identity, other_forms
from glip_jax.io import gcs, text_files
from glip_jax.io.formats import explain

__all__ = [
    "Ids", "MetricError", "Results", "ScoredBoxes", "boxes_by_image", "box_array", "id_of", "number_array", "objects", "prediction_files",
    "read_json", "required", "result_blocks",
]  # fmt: skip

_BLOCK = 100_000
"""Rows that are in memory as objects at a time."""


class MetricError(UserError, ValueError):
    """Annotations or predictions that cannot be scored. The message is one printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, 1000))


class ScoredBoxes(NamedTuple):
    """The boxes that were predicted for one image (or expression), in the order of the file."""

    boxes: Float64[np.ndarray, "N 4"]
    """x1, y1, x2, y2 in pixels."""
    scores: Float64[np.ndarray, " N"]


class Ids:
    """Ids of images or categories in ascending order; an id's position is its index in arrays.

    Numbers come before texts. Ids that are all integers written as text ("2299") are ordered as numbers. An id is found in
    its other form too: 1 where "1" is listed and the reverse.
    """

    def __init__(self, keys: Iterable[Any], what: str, path: str) -> None:
        """`what`, `path`: of the ids, for messages. Raises MetricError for an id that is listed twice."""
        listed = list(keys)
        integers = [as_integer(key) for key in listed]
        if None not in integers and len(set(integers)) == len(listed):
            order = sorted(range(len(listed)), key=lambda i: integers[i] or 0)
            self.keys = tuple(listed[i] for i in order)
        else:
            self.keys = tuple(sorted(listed, key=lambda key: (isinstance(key, str), key)))
        self._index: dict[Any, int] = {}
        for i, key in enumerate(self.keys):
            if key in self._index:
                raise MetricError(f"{path}: the id {key!r} occurs twice in {what}: ids must be unique")
            self._index[key] = i
        for i, key in enumerate(self.keys):
            for form in other_forms(key):
                self._index.setdefault(form, i)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: Any) -> int:
        """The index of an id; -1 if it is not listed in any form."""
        try:
            found = self._index.get(key, -1)
        except TypeError:  # a list or an object
            return -1
        if found < 0:
            for form in other_forms(key):
                found = self._index.get(form, found)
        return -1 if isinstance(key, bool) else found


class Results(NamedTuple):
    """Rows of COCO's results form as arrays, in the order of the files."""

    images: Int32[np.ndarray, " N"]
    """Index into the images' `Ids`."""
    categories: Int32[np.ndarray, " N"]
    """Index into the categories' `Ids`; -1: not listed."""
    boxes: Float64[np.ndarray, "N 4"]
    """x, y, width, height."""
    scores: Float64[np.ndarray, " N"]


def prediction_files(path: str) -> list[epath.Path]:
    """The file itself, or the *.json files of a folder in the order of their names, numbers in names by value.

    Raises MetricError if there is none.
    """
    place = epath.Path(path)
    match gcs.kind(place):
        case "file":
            return [place]
        case "folder":
            names = gcs.list_files(path) if gcs.is_remote(path) else [each.name for each in place.iterdir()]
            chosen = sorted((name for name in names if name.endswith(".json")), key=_natural)
            if not chosen:
                raise MetricError(
                    f"the folder of predictions {path} has no *.json files: expected files of predictions"
                )
            return [place / name for name in chosen]
    raise MetricError(f"the predictions {path} do not exist: expected a JSON file, or a folder of such files")


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", name) if part]


def objects(path: epath.PathLike, key: str = "", what: str = "predictions") -> Iterator[dict[str, Any]]:
    """Yields the objects of the JSON list under `key` ("": the file is the list), as a stream.

    NaN and Infinity are the texts "NaN" and "Infinity"; `number_array` and `box_array` refuse texts. `what`: the kind of file,
    for messages. Raises MetricError if the file does not exist, is not JSON, or has no such list of objects.
    """
    _require_file(path, what)
    try:
        yield from JsonFile(path).objects(key)
    except SourceError as error:
        raise MetricError(f"{what}: {error}") from None


def read_json(path: epath.PathLike, what: str = "predictions") -> Any:
    """The JSON value of a whole file; MetricError if it does not exist, is not JSON, or an object has a key twice."""
    _require_file(path, what)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise MetricError(f"the {what} {path} have the key {key!r:.40} twice in one object: keys must be unique")
        return found

    try:
        with gcs.open_file(path) as file:
            return json.loads(text_files.decoded(file.read()), object_pairs_hook=unique)
    except MetricError:
        raise
    except OSError as error:
        if isinstance(error, UserError):  # of the storage, with its own exit code
            raise
        raise MetricError(f"the {what} {path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        found = explain(epath.Path(path)) or f"is not JSON ({error}): repair it or copy it again"
        raise MetricError(f"the {what} {path}: it {found}") from None


def _require_file(path: epath.PathLike, what: str) -> None:
    match gcs.kind(path):
        case "":
            raise MetricError(f"the {what} {path} do not exist")
        case "folder":
            raise MetricError(f"the {what} {path} are a folder, expected a file")


def number_array(values: Any, where: str, what: str = "scores") -> Float64[np.ndarray, " N"]:
    """A list of finite numbers as float64; MetricError with `where` and the first item that is not one."""
    array = _floats(values)
    if array is None or array.ndim != 1 or not np.isfinite(array).all():
        _refuse(values, where, what, lambda item: np.ndim(item) == 0, "a finite number")
    assert array is not None
    return array


def box_array(values: Any, where: str, what: str = "boxes") -> Float64[np.ndarray, "N 4"]:
    """A list of boxes of four finite numbers as float64; MetricError with `where` and the first item that is not one."""
    if isinstance(values, list) and not values:
        return np.zeros((0, 4))
    array = _floats(values)
    if array is None or array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        _refuse(values, where, what, lambda item: np.shape(item) == (4,), "four finite numbers")
    assert array is not None
    return array


def required(item: dict[str, Any], key: str, where: str) -> Any:
    """The value under a key of an object; MetricError with `where` if it has none."""
    if key not in item:
        raise MetricError(f"{where} lacks {key}")
    return item[key]


def id_of(item: dict[str, Any], where: str) -> int | str:
    """The id of an object, a number or text; MetricError with `where` for none or another one."""
    required(item, "id", where)
    try:
        return identity(item, "id", where)
    except SourceError as error:
        raise MetricError(str(error)) from None


def _floats(values: Any) -> Float64[np.ndarray, "..."] | None:
    """Numbers, or lists of numbers, as an array; None for texts, true, false and null, and where lists differ in length."""
    items = values if isinstance(values, list) else [values]
    types = set(map(type, items))
    if types == {list}:
        types = set(map(type, itertools.chain.from_iterable(items)))
    if not types <= {int, float}:  # NumPy takes "0.5" and true for numbers
        return None
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None


def _refuse(values: Any, where: str, what: str, shaped: Any, expected: str) -> None:
    if not isinstance(values, list):
        raise MetricError(f"{where}: {what} {values!r:.60}, expected a list")
    for i, item in enumerate(values):
        array = _floats(item)
        if array is None or not shaped(array) or not np.isfinite(array).all():
            raise MetricError(f"{where}: {what}[{i}] is {item!r:.60}, expected {expected}")
    raise MetricError(f"{where}: {what} cannot be used, expected {expected} each")


def boxes_by_image(path: str, what: str = "predictions") -> dict[str, ScoredBoxes]:
    """Predictions of the form `{"<image id>": {"boxes": [[x1, y1, x2, y2], ...], "scores": [...]}}`, ids as text.

    Raises MetricError for another form, numbers that are not finite, and boxes and scores that differ in number.
    """
    content = read_json(path, what)
    if not isinstance(content, dict):
        found = type(content).__name__
        raise MetricError(f"the {what} {path} hold a {found}, expected an object with boxes and scores by image id")
    found = {}
    for key, item in content.items():
        where = f"the {what} {path}, image {key!s:.40}"
        if not isinstance(item, dict) or "boxes" not in item or "scores" not in item:
            raise MetricError(f"{where}: {item!r:.60}, expected an object with boxes and scores")
        boxes, scores = box_array(item["boxes"], where), number_array(item["scores"], where)
        if len(boxes) != len(scores):
            raise MetricError(f"{where}: {len(boxes)} boxes and {len(scores)} scores, expected one score a box")
        found[key] = ScoredBoxes(boxes, scores)
    return found


def result_blocks(path: str, images: Ids, categories: Ids, annotations: str) -> Iterator[Results]:
    """Yields COCO results of a file or of a folder of files, in order, some 100,000 rows at a time.

    `annotations`: the path of the annotations, for messages.

    Raises:
        MetricError: a row lacks a field, a number is not finite, or a row names an image that the annotations do not list
            (predictions of another image list).
    """
    for file in prediction_files(path):
        rows: list[dict[str, Any]] = []
        begin = 0
        for row in objects(file):
            rows.append(row)
            if len(rows) == _BLOCK:
                yield _results(rows, begin, file, images, categories, annotations)
                begin, rows = begin + len(rows), []
        if rows:
            yield _results(rows, begin, file, images, categories, annotations)


def _results(
    rows: list[dict[str, Any]], begin: int, file: epath.Path, images: Ids, categories: Ids, annotations: str
) -> Results:
    try:
        columns = [[row[key] for row in rows] for key in ("image_id", "category_id", "bbox", "score")]
    except KeyError:
        i, key = next(
            (i, k) for i, row in enumerate(rows) for k in ("image_id", "category_id", "bbox", "score") if k not in row
        )
        raise MetricError(
            f"the predictions {file}: item [{begin + i}] lacks {key}; expected rows of image_id, category_id, bbox and score"
        ) from None
    image = np.fromiter((images.find(key) for key in columns[0]), np.int32, len(rows))
    if (image < 0).any():
        unknown = list(dict.fromkeys(str(columns[0][i])[:40] for i in np.flatnonzero(image < 0)))
        raise MetricError(
            f"the predictions {file} are of another image list: {annotations} has no images {', '.join(unknown[:5])} (in all "
            f"{len(unknown)} of the {len(set(map(str, columns[0])))} images in these rows); give the annotations that they were "
            "made for"
        )
    boxes, scores = _floats(columns[2]), _floats(columns[3])
    if boxes is None or boxes.shape != (len(rows), 4) or scores is None or scores.shape != (len(rows),):
        boxes = scores = None
    if boxes is None or scores is None or not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        for i, row in enumerate(rows):
            where = f"the predictions {file}, item [{begin + i}], image {row['image_id']!s:.40}"
            box_array([row["bbox"]], where, "bbox")
            number_array([row["score"]], where, "score")
        raise MetricError(f"the predictions {file} cannot be used: expected bbox of four numbers and score a number")
    category = np.fromiter((categories.find(key) for key in columns[1]), np.int32, len(rows))
    return Results(image, category, boxes, scores)
