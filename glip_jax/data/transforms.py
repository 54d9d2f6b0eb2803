"""Image and box geometry on the way into a batch: crop, size rule, resize, flip, canvas, and random colours.

Boxes are inclusive xyxy.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8
from PIL import Image, ImageEnhance

from glip_jax.config import CropConfig, JitterConfig

__all__ = [
    "canvas_size",
    "crop_boxes",
    "crop_window",
    "fit",
    "jitter",
    "mirror_boxes",
    "nearest_aspect",
    "place",
    "resize",
    "scale_boxes",
    "target_size",
]


def target_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width after resizing so that the short side is `short_side` (the original's rule, glip-reference 4.7).

    Where the long side would exceed `long_side`, the short side becomes round(long_side * short / long) with Python's
    rounding of halves to even; the other side is cut to an integer. As the short side is rounded first, the long side
    of a very elongated image can exceed `long_side` by a little.
    """
    short, long = sorted((height, width))
    side = short_side
    if long / short * side > long_side:
        side = max(1, round(long_side * short / long))
    if side == short:
        return height, width
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


def canvas_size(short_side: int, aspect: float, long_side: int, multiple: int = 32) -> tuple[int, int]:
    """Static height and width of a bucket: `aspect` = height / width, sides rounded up to `multiple` pixels.

    Both sides shrink together where the long one would exceed `long_side`.
    """
    height, width = (short_side * aspect, short_side) if aspect >= 1 else (short_side, short_side / aspect)
    scale = min(1.0, long_side / max(height, width))
    # A hair less, so that 640.0000001 does not become 672.
    sides = (math.ceil(side * scale / multiple - 1e-3) * multiple for side in (height, width))
    height, width = (max(multiple, side) for side in sides)
    return height, width


def nearest_aspect(
    heights: Int[np.ndarray, "n"], widths: Int[np.ndarray, "n"], aspects: Sequence[float]
) -> Int[np.ndarray, "n"]:
    """Per image the index of the aspect (height / width) nearest to its own, by ratio."""
    return np.abs(np.log(heights / widths)[:, None] - np.log(np.asarray(aspects))).argmin(1)


def fit(height: int, width: int, short_side: int, long_side: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """`target_size`, shrunk in proportion where it would not fit into the canvas (height, width)."""
    h, w = target_size(height, width, short_side, long_side)
    scale = min(canvas[0] / h, canvas[1] / w)
    if scale >= 1:
        return h, w
    return min(canvas[0], max(1, round(h * scale))), min(canvas[1], max(1, round(w * scale)))


def resize(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The image at (height, width) by PIL's bilinear filter, which averages when shrinking."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def scale_boxes(
    boxes: Float32[np.ndarray, "N 4"], old: tuple[int, int], new: tuple[int, int]
) -> Float32[np.ndarray, "N 4"]:
    """Boxes of an image resized from `old` to `new` (height, width): every coordinate times its side's ratio."""
    ratio = np.array([new[1] / old[1], new[0] / old[0]] * 2)
    return (boxes * ratio).astype(np.float32)


def mirror_boxes(boxes: Float32[np.ndarray, "N 4"], width: int) -> Float32[np.ndarray, "N 4"]:
    """Boxes of an image of `width` pixels that is mirrored left to right: x1' = w - x2 - 1, x2' = w - x1 - 1."""
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2] - 1, width - boxes[:, 0] - 1
    return mirrored


def crop_window(height: int, width: int, config: CropConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of an image: top, left, height, width in pixels, each side at least `least_side` of the image's."""
    sides = [max(1, round(side * rng.uniform(config.least_side, 1))) for side in (height, width)]
    top, left = (int(rng.integers(0, side - part, endpoint=True)) for side, part in zip((height, width), sides))
    return top, left, sides[0], sides[1]


def crop_boxes(
    boxes: Float32[np.ndarray, "N 4"], window: tuple[int, int, int, int], least_visible: float
) -> tuple[Float32[np.ndarray, "N 4"], Bool[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Boxes cut to `window` (top, left, height, width) in its coordinates, which of them stay, and their visible shares.

    A box stays if at least `least_visible` of its area (in pixels, inclusive) does and what is left is wider and higher
    than one pixel.
    """
    top, left, height, width = window
    moved = boxes - np.array([left, top, left, top], np.float32)
    cut = np.clip(moved, 0, np.array([width - 1, height - 1] * 2, np.float32))
    area = (moved[:, 2:] - moved[:, :2] + 1).prod(1)
    # Beyond the window both corners are cut to the same edge: nothing of the box is left.
    inside = np.minimum(moved[:, 2:], [width - 1, height - 1]) - np.maximum(moved[:, :2], 0) + 1
    visible = (np.maximum(inside, 0).prod(1) / area).astype(np.float32)
    return cut, (visible >= least_visible) & (cut[:, 2:] > cut[:, :2]).all(1), visible


def jitter(
    image: UInt8[np.ndarray, "H W 3"], config: JitterConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """The image with brightness, contrast and saturation times random factors, then its hue turned; same `rng`, same pixels."""
    brightness, contrast, saturation, hue = (
        rng.uniform(-most, most) for most in (config.brightness, config.contrast, config.saturation, config.hue)
    )
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture = ImageEnhance.Brightness(picture).enhance(1 + brightness)
    picture = ImageEnhance.Contrast(picture).enhance(1 + contrast)
    picture = ImageEnhance.Color(picture).enhance(1 + saturation)
    if hue:
        turned = np.array(picture.convert("HSV"))
        turned[..., 0] += np.uint8(round(hue * 256) % 256)
        picture = Image.fromarray(turned, "HSV").convert("RGB")
    return np.asarray(picture)


def place(image: UInt8[np.ndarray, "h w 3"], canvas: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The image in the upper left of a canvas (height, width) of zeros; it must fit."""
    height, width = image.shape[:2]
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(f"an image of {height} x {width} does not fit on a canvas of {canvas[0]} x {canvas[1]}")
    result = np.zeros((*canvas, 3), np.uint8)
    result[:height, :width] = image
    return result
