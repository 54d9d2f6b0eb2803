"""Augmentation: geometry of crop, flip and resize for boxes (xyxy, inclusive corners, pixels), and color jitter."""

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageEnhance

from glip_jax.config import CropConfig, JitterConfig

__all__ = ["crop_boxes", "crop_window", "jitter", "mirror_boxes", "scale_boxes"]


def scale_boxes(
    boxes: Float32[np.ndarray, "N 4"], old: tuple[int, int], new: tuple[int, int]
) -> Float32[np.ndarray, "N 4"]:
    """Boxes of an image that is resized from `old` to `new` (height, width): coordinates are scaled by the ratio of the sides."""
    ratio = np.array([new[1] / old[1], new[0] / old[0]] * 2)
    return (boxes * ratio).astype(np.float32)


def mirror_boxes(boxes: Float32[np.ndarray, "N 4"], width: int) -> Float32[np.ndarray, "N 4"]:
    """Boxes of an image of `width` pixels that is flipped horizontally: x1' = w - x2 - 1, x2' = w - x1 - 1."""
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2] - 1, width - boxes[:, 0] - 1
    return mirrored


def crop_window(height: int, width: int, config: CropConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random window (top, left, height, width) in pixels; each side is at least `config.min_side` of that of the image."""
    sides = [max(1, round(side * rng.uniform(config.min_side, 1))) for side in (height, width)]
    top, left = (int(rng.integers(0, side - part, endpoint=True)) for side, part in zip((height, width), sides))
    return top, left, sides[0], sides[1]


def crop_boxes(
    boxes: Float32[np.ndarray, "N 4"], window: tuple[int, int, int, int], min_visible: float
) -> tuple[Float32[np.ndarray, "N 4"], Bool[np.ndarray, " N"], Float32[np.ndarray, " N"]]:
    """Boxes clipped to `window` (top, left, height, width), in coordinates of the window; which are kept; their visible fractions.

    A box is kept if at least `min_visible` of its area (inclusive corners) is visible and the visible part is wider and higher
    than one pixel.
    """
    top, left, height, width = window
    shifted = boxes - np.array([left, top, left, top], np.float32)
    clipped = np.clip(shifted, 0, np.array([width - 1, height - 1] * 2, np.float32))
    area = (shifted[:, 2:] - shifted[:, :2] + 1).prod(1)
    # Sides of the intersection; negative for a box outside of the window.
    overlap = np.minimum(shifted[:, 2:], [width - 1, height - 1]) - np.maximum(shifted[:, :2], 0) + 1
    visible = (np.maximum(overlap, 0).prod(1) / area).astype(np.float32)
    return clipped, (visible >= min_visible) & (clipped[:, 2:] > clipped[:, :2]).all(1), visible


def jitter(
    image: UInt8[np.ndarray, "H W 3"], config: JitterConfig, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """The image with random brightness, contrast, saturation and hue, applied in this order."""
    brightness, contrast, saturation, hue = (
        rng.uniform(-bound, bound) for bound in (config.brightness, config.contrast, config.saturation, config.hue)
    )
    pil_image = Image.fromarray(np.ascontiguousarray(image))
    pil_image = ImageEnhance.Brightness(pil_image).enhance(1 + brightness)
    pil_image = ImageEnhance.Contrast(pil_image).enhance(1 + contrast)
    pil_image = ImageEnhance.Color(pil_image).enhance(1 + saturation)
    if hue:
        hsv = np.array(pil_image.convert("HSV"))
        hsv[..., 0] += np.uint8(round(hue * 256) % 256)
        pil_image = Image.fromarray(hsv, "HSV").convert("RGB")
    return np.asarray(pil_image)
