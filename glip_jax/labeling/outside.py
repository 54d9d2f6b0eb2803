"""An outside teacher: boxes that any detector found, as COCO's results file has them, given to phrases by their nouns.

A box of the category "teddy bear" belongs to the phrase that ends with those words up to its head noun ("the two brown
teddy bears on a shelf": singular, without case); where several names fit, the longest does, so that it is no "bear".
Names are compared as they are written: a "man" is no "person". Where two phrases of a caption want the same category,
nobody has said which box is whose: both stay unknown, and are counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from glip_jax.data.importers.entry import SourceError, numbers
from glip_jax.data.importers.readers import JsonFile, integer, need, text
from glip_jax.labeling.phrases.finders import head, head_word
from glip_jax.labeling.teacher import Boxes, Picture, PromptPlan, Query, QueryResult, Span
from glip_jax.structures import boxes as box
from glip_jax.structures.prompts import clean_name

__all__ = ["OutsideTeacher", "category_of", "category_words", "open_detections"]


@dataclass(frozen=True)
class _Found:
    """Of one image."""

    boxes: list[tuple[float, float, float, float]]
    """x, y, width, height, as listed."""
    scores: list[float]
    categories: list[int]


class OutsideTeacher:
    """Answers with what a file says of the images it knows."""

    def __init__(
        self, names: Mapping[int, str], found: Mapping[str, _Found], keys: Mapping[str, str],
        sizes: Mapping[str, tuple[int, int]], thin: int = 0,
    ) -> None:  # fmt: skip
        """`found` by image id, `keys` from what a record's id may be to the image id, `sizes` height and width by id."""
        self.thin = thin
        """Listed boxes above the threshold that were left out, a pixel wide or high at most."""
        self._names = {category_words(name): number for number, name in names.items()}
        self._found, self._keys, self._sizes = found, keys, sizes

    @property
    def images(self) -> int:
        """One: nothing is gained by more."""
        return 1

    def group(self, height: int, width: int) -> Any:  # noqa: ARG002
        """All go together."""
        return 0

    def question(self, key: str, caption: str, spans: tuple[Span, ...]) -> Query:
        """Nothing is to be prepared."""
        return Query(key, caption, spans, PromptPlan((), (), {}))

    def detect_async(self, pictures: Sequence[Picture]) -> Callable[[], list[list[QueryResult]]]:
        """See `Teacher`; nothing is worked on in the meantime."""
        return lambda: [
            [self._answer(question, picture.pixels.shape[:2]) for question in picture.questions] for picture in pictures
        ]

    def _answer(self, question: Query, size: tuple[int, ...]) -> QueryResult:
        nothing = [Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))] * len(question.spans)
        # COCO's captions are named IMAGE#CAPTION.
        image = self._keys.get(question.key, self._keys.get(question.key.rpartition("#")[0]))
        if image is None:
            return QueryResult(nothing, {}, "image: unknown to the detections")
        if self._sizes.get(image, size) != tuple(size):
            return QueryResult(nothing, {}, "image: of another size than where it was detected in")
        wanted = [category_of(question.caption, span, self._names) for span in question.spans]
        unasked: dict[int, str] = {}
        for phrase, category in enumerate(wanted):
            if category is None:
                unasked[phrase] = "names no category of the detections"
            elif wanted.count(category) > 1:
                unasked[phrase] = "shares its category with another phrase"
        own = self._found.get(image, _Found([], [], []))
        corners = box.from_coco_xywh(np.asarray(own.boxes, np.float32).reshape(-1, 4))
        scores, categories = np.asarray(own.scores, np.float32), np.asarray(own.categories, np.int64)
        order = np.argsort(-scores, kind="stable")
        found = []
        for phrase, category in enumerate(wanted):
            chosen = order[categories[order] == category] if phrase not in unasked else order[:0]
            found.append(Boxes(corners[chosen], scores[chosen]))
        return QueryResult(found, unasked)


def category_of(caption: str, span: Span, names: Mapping[tuple[str, ...], int]) -> int | None:
    """The category whose words (`names` by `category_words`) a phrase ends with at its head; the longest, None for none."""
    begin, end = head(caption, span)
    words = (*_plain(caption[span[0] : begin]), *_plain(head_word(caption, span)))
    # "Glasses" are not many a glass, but "wine glasses" are.
    loose = "".join(_plain(caption[begin:end])[-1:]).removesuffix("es")
    for first in range(len(words)):
        if words[first:] in names:
            return names[words[first:]]
        if first < len(words) - 1 and (*words[first:-1], loose) in names:
            return names[(*words[first:-1], loose)]
    return None


def _plain(words: str) -> tuple[str, ...]:
    return tuple(words.casefold().replace("-", " ").split())


def category_words(name: str) -> tuple[str, ...]:
    """A category's name as `category_of` looks for it: small words, the last one singular."""
    words = _plain(clean_name(name))
    return (*words[:-1], head_word(words[-1], (0, len(words[-1])))) if words else ()


def open_detections(detections: epath.PathLike, categories: epath.PathLike, least: float) -> OutsideTeacher:
    """Reads a COCO results file (a list of image_id, category_id, bbox, score), of which boxes above `least` are kept, and
    the annotation file that names its categories and, if it lists `images`, their files and sizes.

    Records are found by their id (or what stands before its last "#"): an image id, or a listed file name with or
    without its ending. Everything is held in memory, some 300 bytes a box. Raises SourceError for what is no such file.
    """
    about = JsonFile(categories)
    names: dict[int, str] = {}
    for place, item in enumerate(about.objects("categories")):
        where = f"{about.path}: categories[{place}]"
        need(item, ("id", "name"), where)
        names[integer(item, "id", where)] = text(item, "name", where, "name")
    keys: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for item in about.objects("images", required=False):
        image = str(item.get("id"))
        file = item.get("file_name")
        if isinstance(file, str):
            keys |= {PurePath(file).stem: image, PurePath(file).name: image, file: image}
        keys[image] = image
        if isinstance(item.get("height"), int) and isinstance(item.get("width"), int):
            sizes[image] = (item["height"], item["width"])
    source = JsonFile(detections)
    found: dict[str, _Found] = {}
    thin = 0
    for place, item in enumerate(source.objects()):
        where = f"{source.path}: item [{place}]"
        need(item, ("image_id", "category_id", "bbox", "score"), where)
        category = integer(item, "category_id", where)
        if category not in names:
            raise SourceError(
                f"{where} has category_id {category}, which {about.path} does not name: give its own file"
            )
        values = numbers([*item["bbox"], item["score"]] if isinstance(item["bbox"], list) else None, 5)
        if values is None or not np.isfinite(values).all() or not 0 <= values[4] <= 1:
            raise SourceError(
                f"{where} has bbox {item['bbox']!r:.60} and score {item['score']!r:.20}: expected four numbers in pixels "
                "(x, y, width, height) and a score in [0, 1]"
            )
        keys.setdefault(str(item["image_id"]), str(item["image_id"]))
        if values[4] <= least:
            continue
        if values[2] <= 1 or values[3] <= 1:
            thin += 1
        else:
            own = found.setdefault(str(item["image_id"]), _Found([], [], []))
            own.boxes.append((values[0], values[1], values[2], values[3]))
            own.scores.append(values[4])
            own.categories.append(category)
    return OutsideTeacher(names, found, keys, sizes, thin)
