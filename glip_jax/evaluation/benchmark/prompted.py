"""The prompts of a set by image, and rows of predictions files from the detections of these prompts.

The detector returns one `Detections` per prompt of an image; `prediction_rows` turns these into rows of the file. No
pixels are held; images that are all prompted alike share their prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float32, Shaped

from glip_jax.evaluation.benchmark.sets import BenchmarkSet, PromptMode
from glip_jax.structures.batch import Detections, Prompt

__all__ = [
    "PromptedImage",
    "ImageEntry",
    "ImagePrompt",
    "PromptedSet",
    "SharedPrompts",
    "prediction_arrays",
    "prediction_rows",
    "join_rows",
]


class ImagePrompt(NamedTuple):
    """A prompt for an image."""

    id: Any
    """What the detections belong to: the id of the image, of the expression, or (image id, sentence id) of Flickr30k."""
    prompt: Prompt | None
    """None: no phrase has a token within the budget, so nothing is detected."""
    keys: tuple[Any, ...]
    """Per phrase of the prompt: category id, index of the phrase of the caption, expression id, or description id."""
    phrases: int = 0
    """Flickr30k: phrases of the caption, those without a token or over the budget included."""


class PromptedImage(NamedTuple):
    """An image and its prompts, without pixels."""

    id: Any
    """Unique within `PromptedSet.images`: the image's id, or for captions and expressions its file."""
    file: str
    """Path below `PromptedSet.folder`."""
    height: int | None
    """As annotated; None: not listed."""
    width: int | None
    image_prompts: tuple[ImagePrompt, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of the detector, in order."""
        return [image_prompt.prompt for image_prompt in self.image_prompts if image_prompt.prompt is not None]


@dataclass(frozen=True)
class PromptedSet:
    """A set in one prompt mode: the prompts of all images."""

    item: BenchmarkSet
    mode: PromptMode
    annotations: epath.Path
    folder: epath.Path
    """Folder of the images."""
    images: Sequence[PromptedImage]
    counts: Mapping[str, int]
    """images, prompts, and by layout categories, boxes, expressions, captions, phrases, descriptions."""
    names: Mapping[Any, str] = field(default_factory=dict)
    """By key: the name, for reports."""
    notes: tuple[str, ...] = ()
    """Lines for the user: names or phrases that cannot be asked, an image list that is not the expected one."""
    as_published: bool = True
    """False: the files have other counts, or another image list, than those of which numbers are published."""


class ImageEntry(NamedTuple):
    """An image of an annotation file."""

    id: Any
    file: str
    height: int | None
    width: int | None


class SharedPrompts(Sequence[PromptedImage]):
    """Images that all have the same prompts; a `PromptedImage` is made when it is read."""

    def __init__(self, entries: Sequence[ImageEntry], parts: Sequence[tuple[Prompt, tuple[Any, ...]]]) -> None:
        """`parts`: prompts, each with the keys of its phrases."""
        self.entries, self.parts = entries, parts

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SharedPrompts(self.entries[index], self.parts)
        entry = self.entries[index]
        return PromptedImage(
            entry.id,
            entry.file,
            entry.height,
            entry.width,
            tuple(ImagePrompt(entry.id, prompt, keys) for prompt, keys in self.parts),
        )


def prediction_arrays(
    image: PromptedImage, found: Sequence[Detections]
) -> tuple[Shaped[np.ndarray, " N"], Float32[np.ndarray, "N 4"], Float32[np.ndarray, " N"]]:
    """Keys (objects), boxes xyxy and scores of an image over all its prompts, in order of descending score.

    `found`: one Detections per prompt of `image.prompts`.
    """
    keys, boxes, scores = [np.zeros(0, object)], [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)]
    prompted = [image_prompt for image_prompt in image.image_prompts if image_prompt.prompt is not None]
    for image_prompt, each in zip(prompted, found, strict=True):
        phrases = np.asarray(each.phrases)
        own = np.empty(len(image_prompt.keys), object)
        own[:] = image_prompt.keys
        keys.append(own[phrases[phrases >= 0]])
        boxes.append(np.asarray(each.boxes, np.float32)[phrases >= 0])
        scores.append(np.asarray(each.scores, np.float32)[phrases >= 0])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return np.concatenate(keys)[order], np.concatenate(boxes)[order], np.concatenate(scores)[order]


def prediction_rows(item: BenchmarkSet, image: PromptedImage, found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Rows of the file of predictions for one image; `found`: one Detections per prompt of `image.prompts`.

    coco: {"image_id", "category_id", "bbox" xywh, "score"}; flickr: {"image_id", "sentence_id", "boxes" xyxy per phrase}, with a
    box of zeros at the end of each as the original writes; expressions: {"id", "boxes" xyxy, "scores"}; omnilabel: {"image_id",
    "bbox" xywh, "description_ids", "scores"}.
    """
    if item.form in ("coco", "omnilabel"):
        extra = 1.0 if item.widths == "plus_one" else 0.0
        rows = []
        for key, box, score in zip(*prediction_arrays(image, found), strict=True):
            x1, y1, x2, y2 = (float(value) for value in box)
            bbox = [x1, y1, x2 - x1 + extra, y2 - y1 + extra]
            row = {"image_id": image.id, "category_id": key, "bbox": bbox, "score": float(score)}
            if item.form == "omnilabel":
                row = {"image_id": image.id, "bbox": bbox, "description_ids": [key], "scores": [float(score)]}
            rows.append(row)
        return rows
    remaining = iter(found)
    pairs = [
        (image_prompt, next(remaining) if image_prompt.prompt is not None else None)
        for image_prompt in image.image_prompts
    ]
    return [_prediction_row(item, image_prompt, each) for image_prompt, each in pairs]


def _prediction_row(item: BenchmarkSet, image_prompt: ImagePrompt, found: Detections | None) -> dict[str, Any]:
    """The row of one caption or expression."""
    boxes, scores, phrases = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    if found is not None:
        order = np.argsort(-np.asarray(found.scores), kind="stable")
        order = order[np.asarray(found.phrases)[order] >= 0]
        boxes, scores, phrases = (np.asarray(each)[order] for each in (found.boxes, found.scores, found.phrases))
    if item.form == "expressions":
        return {"id": image_prompt.id, "boxes": boxes.astype(float).tolist(), "scores": scores.astype(float).tolist()}
    lists: list[list[list[float]]] = [[] for _ in range(image_prompt.phrases)]
    for row, index in enumerate(image_prompt.keys):
        lists[index] = boxes[phrases == row].astype(float).tolist()
    image, sentence = image_prompt.id
    return {"image_id": image, "sentence_id": sentence, "boxes": [[*each, [0.0, 0.0, 0.0, 0.0]] for each in lists]}


def join_rows(item: BenchmarkSet, rows: Iterable[Mapping[str, Any]]) -> Any:
    """The content of the file of predictions: the rows as a list; for expressions {id as text: {"boxes", "scores"}}."""
    if item.form == "expressions":
        return {str(row["id"]): {"boxes": row["boxes"], "scores": row["scores"]} for row in rows}
    return list(rows)
