"""Draws synthetic scenes: named pictures pasted on generated backgrounds, with exact boxes of the visible parts and captions.

A scene is a pure function of (pictures, seed, index, style, captioned): the same arguments give the same pixels on any machine
with the same versions of Pillow and NumPy. `scenes.sets` writes scenes as files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image, ImageFilter

from glip_jax import UserError
from glip_jax.data.scenes.backgrounds import background, light
from glip_jax.data.scenes.captions import Phrase, describe
from glip_jax.data.scenes.nouns import conflict
from glip_jax.data.scenes.pictures import Picture

__all__ = ["Scene", "SceneError", "SceneStyle", "draw_scene"]


class SceneError(UserError, ValueError):
    """Pictures or settings are not suitable for scenes."""


@dataclass(frozen=True)
class SceneStyle:
    """Appearance of scenes; lengths in pixels."""

    height: int = 256
    width: int = 256
    objects: tuple[int, int] = (3, 9)
    """Minimum and maximum number of pictures per scene."""
    sides: tuple[float, float] = (40.0, 110.0)
    """Smallest and largest side of a picture before rotation."""
    rotation: float = 25.0
    """Maximum rotation in degrees, in both directions."""
    repeat: float = 0.35
    """Probability that a picture has a name that the scene already shows."""
    min_visible: float = 0.5
    """Minimum fraction of a picture's pixels that must stay visible."""
    light: bool = True
    """Whether to apply brightness, color casts and soft shadows."""
    relational: float = 0.45
    """Probability that a captioned scene is composed for a relational phrase."""


class Scene(NamedTuple):
    """A drawn scene."""

    image: UInt8[np.ndarray, "H W 3"]
    boxes: Float32[np.ndarray, "N 4"]
    """xyxy in pixels, end exclusive, tight around the visible pixels."""
    names: tuple[str, ...]
    """Name of each box."""
    pictures: Int32[np.ndarray, " N"]
    """Index of each box into the pictures that the scene was drawn from."""
    caption: str
    """Empty if the scene has no caption."""
    phrases: tuple[Phrase, ...]


class _Placement(NamedTuple):
    """A picture to paste."""

    picture: int
    side: float
    band: tuple[int, float, float] | None = None
    """Axis (0: x, 1: y), and the range of the center on it as fractions of the canvas."""


def draw_scene(
    pictures: Sequence[Picture], seed: int, index: int, style: SceneStyle = SceneStyle(), captioned: bool = True
) -> Scene:
    """Draws scene `index` of the endless series with the given `seed`; `captioned`: whether it gets a caption.

    Pictures are pasted one over the other. A picture that would leave less than `min_visible` of an earlier one visible is
    tried at other positions a few times, then skipped. Boxes and caption describe what is visible in the end. No scene shows
    two names of which one begins or ends with the other (a car, a police car).

    Raises:
        SceneError: there are no pictures, or the canvas is smaller than the largest picture.
    """
    if not pictures:
        raise SceneError("a scene needs at least one picture")
    if min(style.height, style.width) < style.sides[1]:
        raise SceneError(
            f"a canvas of {style.height} x {style.width} is smaller than the pictures' side {style.sides[1]}"
        )
    # A constant besides seed and index keeps this stream apart from others that are seeded by two numbers.
    rng = np.random.default_rng([0x5CE0E, seed, index])
    canvas = background(rng, style.height, style.width)
    lighting = light(rng, style.height, style.width)
    owner = np.full((style.height, style.width), -1, np.int32)
    shown: list[int] = []
    areas: list[int] = []
    for placement in _compose(rng, pictures, style, captioned):
        sprite = _sprite(
            pictures[placement.picture].image, placement.side, float(rng.uniform(-style.rotation, style.rotation))
        )
        if sprite.shape[0] > style.height or sprite.shape[1] > style.width:
            continue
        solid = sprite[..., 3] > 0.5
        position = _find_position(rng, solid, owner, np.asarray(areas), style.min_visible, placement.band)
        if position is None:
            continue
        rows, columns = (
            slice(position[0], position[0] + solid.shape[0]),
            slice(position[1], position[1] + solid.shape[1]),
        )
        alpha = sprite[..., 3:]
        if style.light and lighting.shadow[0]:
            _cast_shadow(canvas, sprite[..., 3], position, lighting.shadow)
        canvas[rows, columns] = canvas[rows, columns] * (1 - alpha) + sprite[..., :3] * alpha
        owner[rows, columns][solid] = len(shown)
        shown.append(placement.picture)
        areas.append(int(solid.sum()))
    boxes = np.array([_box(owner == i) for i in range(len(shown))], np.float32).reshape(-1, 4)
    names = tuple(pictures[i].name for i in shown)
    caption, phrases = "", ()
    if captioned:
        caption, phrases = describe(rng, names, [pictures[i].color for i in shown], boxes, style.sides)
    lit = canvas * lighting.gain if style.light else canvas
    image = np.clip(np.rint(lit), 0, 255).astype(np.uint8)
    return Scene(image, boxes, names, np.array(shown, np.int32), caption, phrases)


def _compose(
    rng: np.random.Generator, pictures: Sequence[Picture], style: SceneStyle, captioned: bool
) -> list[_Placement]:
    """Chooses the pictures to paste, in order: those for a relational phrase first, then others."""
    count = int(rng.integers(style.objects[0], style.objects[1] + 1))
    placements = _related(rng, pictures, style) if captioned and rng.random() < style.relational else []
    fixed = {pictures[placement.picture].name for placement in placements}
    names = list(fixed)
    while len(placements) < count:
        repeated = [placement.picture for placement in placements if pictures[placement.picture].name not in fixed]
        if repeated and rng.random() < style.repeat:
            picture = _same_name(rng, pictures, repeated[int(rng.integers(len(repeated)))])
        else:
            picture = _other_name(rng, pictures, names, fixed)
            if picture is None:
                break
            names.append(pictures[picture].name)
        placements.append(_Placement(picture, _side(rng, style.sides)))
    return placements


def _related(rng: np.random.Generator, pictures: Sequence[Picture], style: SceneStyle) -> list[_Placement]:
    """Chooses two to four objects of one name that differ by their position relative to another group, or by size."""
    target = int(rng.integers(len(pictures)))
    count = int(rng.integers(2, 4))
    anchor = _other_name(rng, pictures, [pictures[target].name], {pictures[target].name})
    if anchor is None or rng.random() < 0.3:
        low, high = style.sides
        # Two classes of size whose lengths differ by more than captions require, also after rotation.
        small = int(rng.integers(1, count))
        ranges = [(low, low * 1.25)] * small + [(max(low * 2, high * 0.85), max(low * 2, high))] * (count - small)
        order = rng.permutation(count)
        return [_Placement(_same_name(rng, pictures, target), _side(rng, ranges[int(i)])) for i in order]
    axis = int(rng.integers(2))
    ends = [0, 1, int(rng.integers(2))][:count]
    # Anchors are in the narrow middle, so that the objects are clearly on either side of them.
    between = (0.42, 0.58)
    low, high = style.sides
    anchors = [
        _Placement(_same_name(rng, pictures, anchor), _side(rng, (low, (low + high) / 2)), (axis, *between))
        for _ in range(int(rng.integers(1, 3)))
    ]
    outer = [(axis, 0.0, 0.28), (axis, 0.72, 1.0)]
    targets = [
        _Placement(_same_name(rng, pictures, target), _side(rng, (low, (low + high) / 2)), outer[end]) for end in ends
    ]
    placements = anchors + targets
    return [placements[int(i)] for i in rng.permutation(len(placements))]


def _other_name(
    rng: np.random.Generator, pictures: Sequence[Picture], names: Sequence[str], taken: set[str]
) -> int | None:
    """A picture whose name conflicts with none of `names` and is not in `taken`; None after some tries."""
    for _ in range(20):
        picture = int(rng.integers(len(pictures)))
        name = pictures[picture].name
        if name not in taken and not any(conflict(name, other) for other in names if other != name):
            return picture
    return None


def _same_name(rng: np.random.Generator, pictures: Sequence[Picture], picture: int) -> int:
    """A random picture with the same name; pictures of a name are consecutive, one per style."""
    name, first, last = pictures[picture].name, picture, picture
    while first and pictures[first - 1].name == name:
        first -= 1
    while last + 1 < len(pictures) and pictures[last + 1].name == name:
        last += 1
    return int(rng.integers(first, last + 1))


def _side(rng: np.random.Generator, sides: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(sides[0]), np.log(sides[1]))))


def _sprite(image: Image.Image, side: float, angle: float) -> Float32[np.ndarray, "h w 4"]:
    """The picture at `side` pixels, rotated by `angle` degrees, cropped to its opaque part; alpha in [0, 1]."""
    scale = side / max(image.size)
    small = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    # Pillow resizes and rotates RGBA with premultiplied colors, so nothing transparent bleeds into the edge.
    values = np.asarray(small.rotate(angle, Image.Resampling.BICUBIC, expand=True), np.float32)
    values[..., 3] /= 255
    x1, y1, x2, y2 = _box(values[..., 3] > 0.5)
    return values[y1:y2, x1:x2]


def _cast_shadow(
    canvas: Float32[np.ndarray, "H W 3"],
    alpha: Float32[np.ndarray, "h w"],
    position: tuple[int, int],
    shadow: tuple[float, float, float, float],
) -> None:
    """Darkens the canvas in place by the soft shadow of an object; `position`: row and column of the object."""
    strength, right, down, softness = shadow
    margin = int(2 * softness) + 1
    padded = np.pad(np.rint(alpha * 255).astype(np.uint8), margin)
    soft = np.asarray(Image.fromarray(padded).filter(ImageFilter.GaussianBlur(softness)), np.float32) / 255
    top, left = position[0] - margin + round(down), position[1] - margin + round(right)
    y1, x1 = max(top, 0), max(left, 0)
    y2, x2 = min(top + soft.shape[0], canvas.shape[0]), min(left + soft.shape[1], canvas.shape[1])
    if y1 < y2 and x1 < x2:
        canvas[y1:y2, x1:x2] *= 1 - strength * soft[y1 - top : y2 - top, x1 - left : x2 - left, None]


def _find_position(
    rng: np.random.Generator,
    solid: Bool[np.ndarray, "h w"],
    owner: Int32[np.ndarray, "H W"],
    areas: np.ndarray,
    min_visible: float,
    band: tuple[int, float, float] | None,
) -> tuple[int, int] | None:
    """Row and column at which `solid` leaves every earlier picture sufficiently visible; None after eight tries."""
    ranges = []
    for axis in (1, 0):
        size, canvas = solid.shape[1 - axis], owner.shape[1 - axis]
        low, high = 0, canvas - size
        if band is not None and band[0] == axis:
            low = int(np.clip(band[1] * canvas - size / 2, 0, high))
            high = int(np.clip(band[2] * canvas - size / 2, low, high))
        ranges.append((low, high + 1))
    visible = np.bincount(owner[owner >= 0], minlength=len(areas)) if len(areas) else areas
    for _ in range(8):
        row, column = int(rng.integers(*ranges[0])), int(rng.integers(*ranges[1]))
        if not len(areas):
            return row, column
        under = owner[row : row + solid.shape[0], column : column + solid.shape[1]][solid]
        left = visible - np.bincount(under[under >= 0], minlength=len(areas))
        if (left >= min_visible * areas).all():
            return row, column
    return None


def _box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """xyxy, end exclusive, around the true pixels; zeros if there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
