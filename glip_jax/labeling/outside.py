"""A teacher that reads another detector's boxes from a COCO results file and assigns them to phrases by category name.

A box of the category "teddy bear" belongs to a phrase whose words up to its head noun end with that name ("the two brown
teddy bears on a shelf"; singular, ignoring case). Of several names that match, the longest is taken, here not "bear". Names
are compared literally: "man" does not match "person". If two phrases of a caption match the same category, the boxes cannot
be attributed: both phrases stay unlabelled, and are counted.

Which image of the detections a record shows is found by `glip_jax.labeling.matching`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from glip_jax.data.importers.coco_json import BoxFormatCheck, image_size, listed_categories
from glip_jax.data.importers.entry import Report, SourceError, as_numbers
from glip_jax.data.importers.readers import JsonFile, identity, other_forms, require_keys, text_field
from glip_jax.labeling.matching import ListedImages, Match
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
    categories: list[Any]


class OutsideTeacher:
    """Teacher that returns the detections which a file lists for an image."""

    def __init__(
        self, names: Mapping[tuple[str, ...], Any], detections: Mapping[str, _ImageDetections], images: ListedImages,
        sizes: Mapping[str, tuple[int, int]], notes: Sequence[str] = (), shared: bool = False,
    ) -> None:  # fmt: skip
        """`names`: category by the words of its name; `detections` and `sizes` (height, width) by image id; `shared`: phrases
        of one category all have its boxes, for a verifier, which asks whether the thing exists.
        """
        self.notes = tuple(notes)
        """What was left out or taken together while the files were read."""
        self._names, self._detections, self._images, self._sizes = names, detections, images, sizes
        self._shared = shared

    @property
    def group_size(self) -> int:
        """1: looking detections up gains nothing from batches."""
        return 1

    def batch_key(self, height: int, width: int) -> Any:  # noqa: ARG002
        """The same for all images."""
        return 0

    def make_query(
        self, key: str, caption: str, spans: tuple[Span, ...], file: str = "", image_id: str = ""
    ) -> Query:  # fmt: skip
        """A query without prompts, which this teacher does not need."""
        return Query(key, caption, spans, PromptPlan((), (), {}), file, image_id)

    def detect_async(self, images: Sequence[ImageQueries]) -> Callable[[], list[list[QueryResult]]]:
        """See `Teacher`; the lookup happens when the returned function is called."""
        return lambda: [[self._result(query, image.pixels.shape[:2]) for query in image.queries] for image in images]

    def find(self, key: str, file: str, image_id: str, size: tuple[int, ...]) -> tuple[str | None, str]:
        """The id of the image of `size` (height, width) that a record shows, or None and the reason; see `ListedImages.find`."""
        image, reason = self._images.find(key, file, image_id)
        if image is not None and self._sizes.get(image, size) != tuple(size):
            return None, "image: size differs from the one that was detected in"
        return image, reason

    def _result(self, query: Query, size: tuple[int, ...]) -> QueryResult:
        empty = [PhraseDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))] * len(query.spans)
        image, reason = self.find(query.key, query.file, query.image_id, size)
        if image is None:
            return QueryResult(empty, {}, reason)
        categories = [category_of(query.caption, span, self._names) for span in query.spans]
        skipped: dict[int, str] = {}
        for phrase, category in enumerate(categories):
            if category is None:
                skipped[phrase] = "names no category of the detections"
            elif not self._shared and categories.count(category) > 1:
                skipped[phrase] = "shares its category with another phrase"
        listed = self._detections.get(image, _ImageDetections([], [], []))
        corners = box.from_coco_xywh(np.asarray(listed.boxes, np.float32).reshape(-1, 4))
        scores, labels = np.asarray(listed.scores, np.float32), np.asarray(listed.categories, object)
        order = np.argsort(-scores, kind="stable")
        detections = []
        for phrase, category in enumerate(categories):
            chosen = order[labels[order] == category] if phrase not in skipped else order[:0]
            detections.append(PhraseDetections(corners[chosen], scores[chosen]))
        return QueryResult(detections, skipped)


def category_of(caption: str, span: Span, names: Mapping[tuple[str, ...], Any]) -> Any:
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


def open_detections(
    detections: epath.PathLike, categories: epath.PathLike, threshold: float, match: Match = "", shared: bool = False
) -> OutsideTeacher:
    """Reads a COCO results file (a list of image_id, category_id, bbox, score) and the annotation file of its categories.

    Boxes with a score above `threshold` are kept. If the annotation file lists `images`, their file names and sizes are used.
    `match`: how records are matched with images, see `ListedImages`; `shared`: see `OutsideTeacher`. Categories whose names are equal in the singular count as
    one. All boxes are held in memory, about 300 bytes each. Raises SourceError for a malformed file.
    """
    annotations, report = JsonFile(categories), Report()
    listed = listed_categories(annotations, report)
    names: dict[tuple[str, ...], Any] = {}
    groups = {key: names.setdefault(category_words(item["name"]), key) for key, item in listed.items()}
    report.note(
        "categories of the name of another, taken together",
        next((f"{key!r} and {group!r}" for key, group in groups.items() if key != group), ""), len(groups) - len(names),
    )  # fmt: skip
    images, sizes = _listed_images(annotations, match)
    source = JsonFile(detections)
    by_image: dict[str, _ImageDetections] = {}
    format_check = BoxFormatCheck()
    for index, item in enumerate(source.objects()):
        where = f"{source.path}: item [{index}]"
        require_keys(item, ("image_id", "category_id", "bbox", "score"), where)
        category = identity(item, "category_id", where)
        known = next((groups[form] for form in (category, *other_forms(category)) if form in groups), None)
        if known is None:
            raise SourceError(
                f"{where} has category_id {category!r}, which {annotations.path} does not name: give the annotation file of these detections"
            )
        values = as_numbers([*item["bbox"], item["score"]] if isinstance(item["bbox"], list) else None, 5)
        if values is None or not np.isfinite(values).all() or not 0 <= values[4] <= 1:
            raise SourceError(
                f"{where} has bbox {item['bbox']!r:.60} and score {item['score']!r:.20}: expected four numbers in pixels "
                "(x, y, width, height) and a score in [0, 1]"
            )
        image = images.add_unlisted(identity(item, "image_id", where))
        format_check.add((values[0], values[1], values[2], values[3]), *sizes.get(image, (None, None)), where)
        if values[4] <= threshold:
            continue
        if values[2] <= 1 or values[3] <= 1:
            report.note("boxes of a pixel's width or height left out", where)
        else:
            found = by_image.setdefault(image, _ImageDetections([], [], []))
            found.boxes.append((values[0], values[1], values[2], values[3]))
            found.scores.append(values[4])
            found.categories.append(known)
    format_check.raise_if_wrong(source.path, "expected bbox to be x, y, width, height")
    notes = [f"{count} {what} (first: {report.first[what]})" for what, count in report.noted.items()]
    return OutsideTeacher(names, by_image, images, sizes, notes, shared)


def _listed_images(data: JsonFile, match: Match) -> tuple[ListedImages, dict[str, tuple[int, int]]]:
    """The images of an annotation file, and their sizes by id; SourceError for one without an id, or with that of another."""
    images, sizes = ListedImages(match), {}
    for index, item in enumerate(data.objects("images", required=False)):
        where = f"{data.path}: images[{index}]"
        require_keys(item, ("id",), where)
        key = str(identity(item, "id", where))
        if item.get("file_name") is None and isinstance(item.get("coco_url"), str):
            item["file_name"] = "/".join(item["coco_url"].split("/")[-2:])
        named = item.get("file_name") is not None
        if not images.add(key, text_field(item, "file_name", where, "file name") if named else ""):
            raise SourceError(f"{data.path}: the id {key!r} occurs twice in images: ids must be unique")
        height, width = image_size(item, where, Report())  # unlisted: not compared
        if height is not None and width is not None:
            sizes[key] = (height, width)
    return images, sizes
