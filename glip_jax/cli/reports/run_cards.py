"""Cards of evaluated images for the run report: true and detected boxes, and which detections are right.

A detection is right if it overlaps a true box of its name or phrase, which no better one has matched, by at least one half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from glip_jax.cli.reports.card import Box, Card, Chip, TextPiece, card_box, card_image, text_pieces
from glip_jax.cli.reports.drawing import hex_color
from glip_jax.evaluation.detection_errors import operating_point
from glip_jax.evaluation.evaluate import Evaluated, Grounded, read_image
from glip_jax.evaluation.recall import match
from glip_jax.structures.batch import Detections

__all__ = ["cards"]


@dataclass(frozen=True)
class _View:
    """The boxes of one picture, whatever they are of; xyxy pixels, numbers are categories or phrases."""

    entry: dict[str, Any]
    true: Any
    true_numbers: Any
    found: Detections


def cards(
    result: Evaluated | Grounded, folder: epath.Path, limit: int, threshold: float | None
) -> tuple[list[Card], float]:
    """Cards of the first `limit` pictures of a set, and the score from which detections are drawn.

    `threshold` is that score; None takes the one of the best F1 of the whole set. Of a phrase the best box is always drawn.
    Raises EvaluationError if a picture is gone or has changed its size.
    """
    views = _detection_views(result) if isinstance(result, Evaluated) else _grounding_views(result)
    met = [match(v.found.boxes, v.found.phrases, v.true, v.true_numbers) for v in views]
    if threshold is None:
        scores = np.concatenate([np.asarray(view.found.scores) for view in views])
        true = sum(len(view.true) for view in views)
        threshold = operating_point(scores, np.concatenate(met) >= 0, true).threshold
    drawn = []
    for view, own in list(zip(views, met, strict=True))[:limit]:
        image = read_image(folder, view.entry, result.orientation)
        match result:
            case Evaluated():
                drawn.append(_detection_card(result, view, own, image, threshold))
            case Grounded():
                drawn.append(_grounding_card(result, view, own, image, threshold))
    return drawn, threshold


def _sorted(found: Detections, extra: float = 0.0) -> Detections:
    """Real detections, best first, as plain corners: x2 = x1 + width."""
    numbers, scores = np.asarray(found.phrases), np.asarray(found.scores)
    order = np.argsort(-scores, kind="stable")
    order = order[numbers[order] >= 0]
    boxes = np.asarray(found.boxes, np.float32).reshape(-1, 4)[order] + np.array([0, 0, extra, extra], np.float32)
    return Detections(boxes, scores[order], numbers[order])


def _detection_views(result: Evaluated) -> list[_View]:
    index = {number: i for i, number in enumerate(result.truth.category_ids)}
    true: dict[Any, list[tuple[list[float], int]]] = {key: [] for key in result.image_ids}
    for note in result.truth.content["annotations"]:
        if note["image_id"] in true and not note["iscrowd"]:
            x, y, width, height = note["bbox"]
            true[note["image_id"]].append(([x, y, x + width, y + height], index[note["category_id"]]))
    entries = {entry["id"]: entry for entry in result.truth.content["images"]}
    return [
        _View(
            entries[key],
            np.array([box for box, _ in true[key]], np.float32).reshape(-1, 4),
            np.array([number for _, number in true[key]], np.int64),
            # Found corners are inclusive pixels, as they are written for COCO.
            _sorted(result.detections[key], 1.0),
        )
        for key in result.image_ids
    ]


def _grounding_views(result: Grounded) -> list[_View]:
    images = {image.id: image for image in result.truth.images}
    views = []
    for key in result.image_ids:
        phrases = images[key].phrases
        numbers = np.repeat(np.arange(len(phrases)), [len(phrase.boxes) for phrase in phrases])
        boxes = np.concatenate([np.asarray(phrase.boxes, np.float32) for phrase in phrases])
        views.append(_View(images[key].entry, boxes, numbers, _sorted(result.detections[key])))
    return views


def _detection_card(result: Evaluated, view: _View, met: np.ndarray, image: Any, threshold: float) -> Card:
    shown = [row for row in range(len(met)) if view.found.scores[row] >= threshold]
    names = result.prompts
    # Colors by order of appearance: few in a picture, and far apart.
    present = dict.fromkeys([*view.true_numbers.tolist(), *view.found.phrases[shown].tolist()])
    colors = {number: hex_color(i) for i, number in enumerate(present)}
    boxes = [card_box(box, image.shape[:2]) for box in view.true]
    chips = []
    for row in shown:
        number, right = int(view.found.phrases[row]), met[row] >= 0
        text = names[number] if right else f"✗ {names[number]}"
        # Worst first, so that the best stays on top.
        boxes.insert(len(view.true), card_box(view.found.boxes[row], image.shape[:2], colors[number], text))
        chips.append(
            Chip(names[number], colors[number], "right" if right else "wrong", f"{view.found.scores[row]:.2f}")
        )
    missed = set(range(len(view.true))) - set(met[shown].tolist())
    chips += [Chip(names[int(view.true_numbers[row])], state="missed") for row in sorted(missed)]
    return _card(view, image, boxes, chips, ())


def _grounding_card(result: Grounded, view: _View, met: np.ndarray, image: Any, threshold: float) -> Card:
    captioned = next(image for image in result.truth.images if image.id == view.entry["id"])
    unasked = result.unasked.get(captioned.id, ())
    boxes = [card_box(box, image.shape[:2]) for box in view.true]
    chips = []
    for number, phrase in enumerate(captioned.phrases):
        own = np.flatnonzero(view.found.phrases == number)
        text = " … ".join(captioned.caption[begin:end] for begin, end in phrase.spans)
        for row in own:
            if row == own[0] or view.found.scores[row] >= threshold:
                boxes.append(card_box(view.found.boxes[row], image.shape[:2], hex_color(number)))
        if not len(own):
            chips.append(Chip(text, hex_color(number), "missed", "not asked" if number in unasked else "", phrase.kind))
            continue
        state = "right" if met[own[0]] >= 0 else "wrong"
        chips.append(Chip(text, hex_color(number), state, f"{view.found.scores[own[0]]:.2f}", phrase.kind))
    spans = [phrase.spans for phrase in captioned.phrases]
    caption = text_pieces(captioned.caption, spans, [hex_color(i) for i in range(len(spans))], unasked)
    return _card(view, image, boxes, chips, caption)


def _card(
    view: _View,
    image: UInt8[np.ndarray, "H W 3"],
    boxes: Sequence[Box],
    chips: Sequence[Chip],
    caption: tuple[TextPiece, ...],
) -> Card:
    uri, height = card_image(image)
    return Card(uri, height, tuple(boxes), caption, tuple(chips), view.entry["file_name"])
