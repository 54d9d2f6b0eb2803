"""The card of an HTML report: an image with boxes, its caption and a chip per name or phrase.

Run reports, `inspect` and `label` make their cards here, and `templates/macros.html.j2` renders them. Boxes are SVG over a
JPEG, so that lines and text stay sharp on any screen.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ["CARD_WIDTH", "Box", "Card", "Chip", "TextPiece", "card_box", "card_image", "text_pieces"]

CARD_WIDTH = 360
"""Width of a card in its own units, about the pixels of a phone; heights follow the image."""


@dataclass(frozen=True)
class Box:
    """A box in units of the card, and its text with its position."""

    x: float
    y: float
    width: float
    height: float
    true: bool
    """A ground truth box, drawn dashed."""
    color: str = ""
    text: str = ""
    text_x: float = 0.0
    text_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class TextPiece:
    """Some characters of a caption; those of a phrase have its color."""

    text: str
    color: str = ""
    state: Literal["", "unasked", "negative", "unlabelled"] = ""
    """unasked: beyond the token budget; negative: of nothing in the image; unlabelled: without a loss where no box is."""


@dataclass(frozen=True)
class Chip:
    """A name or phrase below the image, or a note."""

    text: str
    color: str = ""
    state: Literal["", "right", "wrong", "missed"] = ""
    score: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Card:
    """One image of a report."""

    uri: str
    """The image as a data URI; empty if there is none."""
    height: float
    boxes: tuple[Box, ...]
    caption: tuple[TextPiece, ...]
    chips: tuple[Chip, ...]
    file: str
    """The line below: a file, a record or an example."""
    width: float = float(CARD_WIDTH)


def card_box(box: Any, size: tuple[int, int], color: str = "", text: str = "") -> Box:
    """A box (xyxy pixels) of an image of `size` (height, width) in units of the card; without `color` a true one.

    The text is above it where there is room, else inside.
    """
    height, width = size
    scale = CARD_WIDTH / width
    low, high = np.zeros(4), np.array([width, height, width, height])
    x1, y1, x2, y2 = (round(float(value), 1) for value in np.clip(np.asarray(box, np.float64), low, high) * scale)
    left = x1 < CARD_WIDTH * 0.6
    return Box(
        x1, y1, round(max(x2 - x1, 0.5), 1), round(max(y2 - y1, 0.5), 1), not color, color, text,
        x1 + 3 if left else x2 - 3, y1 - 4 if y1 > 14 else y1 + 12, "start" if left else "end",
    )  # fmt: skip


def card_image(image: UInt8[np.ndarray, "H W 3"]) -> tuple[str, float]:
    """The image as a JPEG data URI, at most twice as wide as a card, and the card's height."""
    height, width = image.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(image))
    if width > 2 * CARD_WIDTH:
        # Twice the card's width is what a screen of double density shows.
        side = max(1, round(height * 2 * CARD_WIDTH / width))
        picture = picture.resize((2 * CARD_WIDTH, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    uri = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    return uri, round(height * CARD_WIDTH / width, 1)


def text_pieces(
    caption: str,
    spans: Sequence[Sequence[tuple[int, int]]],
    colors: Sequence[str],
    unasked: Sequence[int] = (),
    outside: Literal["", "negative"] = "",
) -> tuple[TextPiece, ...]:
    """The caption, cut where a phrase begins or ends.

    `spans`: of each phrase the (begin, end) characters; characters of several phrases belong to the shortest of them.
    `unasked`: indices of phrases beyond the token budget. `outside`: the state of characters of no phrase.
    """
    owner = np.full(len(caption), -1)
    lengths = [sum(end - begin for begin, end in own) for own in spans]
    for index in sorted(range(len(spans)), key=lambda i: -lengths[i]):
        for begin, end in spans[index]:
            owner[begin:end] = index
    cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(caption)] if caption else []
    pieces = []
    for begin, end in zip(cuts, cuts[1:]):
        index = int(owner[begin])
        color = colors[index] if index >= 0 else ""
        state = ("unasked" if index in unasked else "") if index >= 0 else outside
        pieces.append(TextPiece(caption[begin:end], color, state))
    return tuple(pieces)
