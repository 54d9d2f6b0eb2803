"""A teacher that reads another detector's boxes from a COCO results file and assigns them to phrases by category name.

A box of the category "teddy bear" belongs to a phrase whose words up to its head noun end with that name ("the two brown
teddy bears on a shelf"; singular, ignoring case). Of several names that match, the longest is taken, here not "bear". Names
are compared literally: "man" does not match "person". If two phrases of a caption match the same category, the boxes cannot
be attributed: both phrases stay unlabelled, and are counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from glip_jax.data.importers.entry import SourceError, as_numbers
from glip_jax.data.importers.readers import JsonFile, integer_field, require_keys, text_field
from glip_jax.labeling.phrases.finders import head, head_word
from glip_jax.labeling.teacher import ImageQueries, PhraseDetections, PromptPlan, Query, QueryResult, Span
from glip_jax.structures import boxes as box
from glip_jax.structures.prompts import clean_name

__all__ = ["OutsideTeacher", "category_of", "category_words", "open_detections"]


@dataclass(frozen=True)
class _ImageDetections:
    """Detections of one image."""

    boxes: list[tuple[float, float, float, float]]
    """x, y, width, height in pixels, as in the file."""
    scores: list[float]
    categories: list[int]


class OutsideTeacher:
    """Teacher that returns the detections which a file lists for an image."""

    def __init__(
        self, names: Mapping[int, str], detections: Mapping[str, _ImageDetections], keys: Mapping[str, str],
        sizes: Mapping[str, tuple[int, int]], thin: int = 0,
    ) -> None:  # fmt: skip
        """`names` by category id, `detections` by image id, `keys` from possible record ids to image ids, `sizes`
        (height, width) by image id.
        """
        self.thin = thin
        """Number of boxes above the threshold that were dropped because they are at most one pixel wide or high."""
        self._names = {category_words(name): number for number, name in names.items()}
        self._detections, self._keys, self._sizes = detections, keys, sizes

    @property
    def batch_size(self) -> int:
        """1: looking detections up gains nothing from batches."""
        return 1

    def batch_key(self, height: int, width: int) -> Any:  # noqa: ARG002
        """The same for all images."""
        return 0

    def make_query(self, key: str, caption: str, spans: tuple[Span, ...]) -> Query:
        """A query without prompts, which this teacher does not need."""
        return Query(key, caption, spans, PromptPlan((), (), {}))

    def detect_async(self, images: Sequence[ImageQueries]) -> Callable[[], list[list[QueryResult]]]:
        """See `Teacher`; the lookup happens when the returned function is called."""
        return lambda: [[self._result(query, image.pixels.shape[:2]) for query in image.queries] for image in images]

    def _result(self, query: Query, size: tuple[int, ...]) -> QueryResult:
        empty = [PhraseDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))] * len(query.spans)
        # Ids of COCO's captions have the form IMAGE#CAPTION.
        image = self._keys.get(query.key, self._keys.get(query.key.rpartition("#")[0]))
        if image is None:
            return QueryResult(empty, {}, "image: not among the detections")
        if self._sizes.get(image, size) != tuple(size):
            return QueryResult(empty, {}, "image: size differs from the one that was detected in")
        categories = [category_of(query.caption, span, self._names) for span in query.spans]
        skipped: dict[int, str] = {}
        for phrase, category in enumerate(categories):
            if category is None:
                skipped[phrase] = "names no category of the detections"
            elif categories.count(category) > 1:
                skipped[phrase] = "shares its category with another phrase"
        listed = self._detections.get(image, _ImageDetections([], [], []))
        corners = box.from_coco_xywh(np.asarray(listed.boxes, np.float32).reshape(-1, 4))
        scores, labels = np.asarray(listed.scores, np.float32), np.asarray(listed.categories, np.int64)
        order = np.argsort(-scores, kind="stable")
        detections = []
        for phrase, category in enumerate(categories):
            chosen = order[labels[order] == category] if phrase not in skipped else order[:0]
            detections.append(PhraseDetections(corners[chosen], scores[chosen]))
        return QueryResult(detections, skipped)


def category_of(caption: str, span: Span, names: Mapping[tuple[str, ...], int]) -> int | None:
    """The category whose name ends at the phrase's head noun; of several the longest name, None if there is none.

    `names`: category ids by `category_words`.
    """
    begin, end = head(caption, span)
    words = (*_plain(caption[span[0] : begin]), *_plain(head_word(caption, span)))
    # "glasses" is not the plural of the category "glass", but "wine glasses" is that of "wine glass".
    depluralized = "".join(_plain(caption[begin:end])[-1:]).removesuffix("es")
    for first in range(len(words)):
        if words[first:] in names:
            return names[words[first:]]
        if first < len(words) - 1 and (*words[first:-1], depluralized) in names:
            return names[(*words[first:-1], depluralized)]
    return None


def _plain(words: str) -> tuple[str, ...]:
    return tuple(words.casefold().replace("-", " ").split())


def category_words(name: str) -> tuple[str, ...]:
    """The words of a category name as `category_of` compares them: lower case, the last one in the singular."""
    words = _plain(clean_name(name))
    return (*words[:-1], head_word(words[-1], (0, len(words[-1])))) if words else ()


def open_detections(detections: epath.PathLike, categories: epath.PathLike, threshold: float) -> OutsideTeacher:
    """Reads a COCO results file (a list of image_id, category_id, bbox, score) and the annotation file of its categories.

    Boxes with a score above `threshold` are kept. If the annotation file lists `images`, their file names and sizes are used.
    A record is matched by its id, or by the part before its last "#": an image id, or the name of a listed file with or
    without its extension. All boxes are held in memory, about 300 bytes each. Raises SourceError for a malformed file.
    """
    annotations = JsonFile(categories)
    names: dict[int, str] = {}
    for index, item in enumerate(annotations.objects("categories")):
        where = f"{annotations.path}: categories[{index}]"
        require_keys(item, ("id", "name"), where)
        names[integer_field(item, "id", where)] = text_field(item, "name", where, "name")
    keys: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for item in annotations.objects("images", required=False):
        image = str(item.get("id"))
        file = item.get("file_name")
        if isinstance(file, str):
            keys |= {PurePath(file).stem: image, PurePath(file).name: image, file: image}
        keys[image] = image
        if isinstance(item.get("height"), int) and isinstance(item.get("width"), int):
            sizes[image] = (item["height"], item["width"])
    source = JsonFile(detections)
    by_image: dict[str, _ImageDetections] = {}
    thin = 0
    for index, item in enumerate(source.objects()):
        where = f"{source.path}: item [{index}]"
        require_keys(item, ("image_id", "category_id", "bbox", "score"), where)
        category = integer_field(item, "category_id", where)
        if category not in names:
            raise SourceError(
                f"{where} has category_id {category}, which {annotations.path} does not name: give the annotation file of these detections"
            )
        values = as_numbers([*item["bbox"], item["score"]] if isinstance(item["bbox"], list) else None, 5)
        if values is None or not np.isfinite(values).all() or not 0 <= values[4] <= 1:
            raise SourceError(
                f"{where} has bbox {item['bbox']!r:.60} and score {item['score']!r:.20}: expected four numbers in pixels "
                "(x, y, width, height) and a score in [0, 1]"
            )
        keys.setdefault(str(item["image_id"]), str(item["image_id"]))
        if values[4] <= threshold:
            continue
        if values[2] <= 1 or values[3] <= 1:
            thin += 1
        else:
            image = by_image.setdefault(str(item["image_id"]), _ImageDetections([], [], []))
            image.boxes.append((values[0], values[1], values[2], values[3]))
            image.scores.append(values[4])
            image.categories.append(category)
    return OutsideTeacher(names, by_image, keys, sizes, thin)
