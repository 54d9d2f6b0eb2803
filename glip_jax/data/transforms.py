"""Image and box geometry on the way into a batch: crop, flip, scale, and random colours.

Boxes are inclusive xyxy.
"""

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageEnhance

from glip_jax.config import CropConfig, JitterConfig

__all__ = ["crop_boxes", "crop_window", "jitter", "mirror_boxes", "scale_boxes"]


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
    """A random part of an image: top, left, height, width in pixels, each side at least `min_side` of the image's."""
    sides = [max(1, round(side * rng.uniform(config.min_side, 1))) for side in (height, width)]
    top, left = (int(rng.integers(0, side - part, endpoint=True)) for side, part in zip((height, width), sides))
    return top, left, sides[0], sides[1]


def crop_boxes(
    boxes: Float32[np.ndarray, "N 4"], window: tuple[int, int, int, int], min_visible: float
) -> tuple[Float32[np.ndarray, "N 4"], Bool[np.ndarray, "N"], Float32[np.ndarray, "N"]]:
    """Boxes cut to `window` (top, left, height, width) in its coordinates, which of them stay, and their visible shares.

    A box stays if at least `min_visible` of its area (in pixels, inclusive) does and what is left is wider and higher
    than one pixel.
    """
    top, left, height, width = window
    moved = boxes - np.array([left, top, left, top], np.float32)
    cut = np.clip(moved, 0, np.array([width - 1, height - 1] * 2, np.float32))
    area = (moved[:, 2:] - moved[:, :2] + 1).prod(1)
    # Beyond the window both corners are cut to the same edge: nothing of the box is left.
    inside = np.minimum(moved[:, 2:], [width - 1, height - 1]) - np.maximum(moved[:, :2], 0) + 1
    visible = (np.maximum(inside, 0).prod(1) / area).astype(np.float32)
    return cut, (visible >= min_visible) & (cut[:, 2:] > cut[:, :2]).all(1), visible


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
