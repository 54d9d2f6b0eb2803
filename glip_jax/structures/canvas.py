"""Resizing of images, and the canvases of static shape that they are padded to."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num, UInt8
from PIL import Image

__all__ = [
    "PATCH", "canvas_size", "fit", "nearest_aspect", "pad_to_canvas", "patches_of", "pixels_of", "resize", "target_size",
]  # fmt: skip

PATCH = 4
"""Side of the patches that a Swin network begins with, pixels."""


def target_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after resizing the short side to `short_side` pixels, as in the original (glip-reference 4.7).

    If the long side would exceed `long_side`, the short side is round(long_side * short / long), halves rounded to even. The
    other side is truncated to an integer. Because the short side is rounded first, the long side of a very elongated image
    can exceed `long_side` slightly.
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
    """(height, width) of the canvas of a bucket, pixels: `aspect` = height / width, sides rounded up to `multiple`.

    If the long side would exceed `long_side`, both sides are scaled down.
    """
    height, width = (short_side * aspect, short_side) if aspect >= 1 else (short_side, short_side / aspect)
    scale = min(1.0, long_side / max(height, width))
    # The tolerance keeps 640.0000001 from becoming 672.
    sides = (math.ceil(side * scale / multiple - 1e-3) * multiple for side in (height, width))
    height, width = (max(multiple, side) for side in sides)
    return height, width


def nearest_aspect(
    heights: Int[np.ndarray, " n"], widths: Int[np.ndarray, " n"], aspects: Sequence[float]
) -> Int[np.ndarray, " n"]:
    """Per image: index of the aspect (height / width) nearest to its own in log scale."""
    return np.abs(np.log(heights / widths)[:, None] - np.log(np.asarray(aspects))).argmin(1)


def fit(height: int, width: int, short_side: int, long_side: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """`target_size`, scaled down if it does not fit on the canvas (height, width)."""
    h, w = target_size(height, width, short_side, long_side)
    scale = min(canvas[0] / h, canvas[1] / w)
    if scale >= 1:
        return h, w
    return min(canvas[0], max(1, round(h * scale))), min(canvas[1], max(1, round(w * scale)))


def patches_of(
    images: UInt8[np.ndarray, "B H W 3"], out: UInt8[np.ndarray, "B h w 48"] | None = None
) -> UInt8[np.ndarray, "B h w 48"]:
    """Images as patches of 4 x 4 pixels, row-major with the channels last, written to `out`. Sides are multiples of 4."""
    count, height, width, _ = images.shape
    grid = (count, height // PATCH, width // PATCH)
    out = np.empty((*grid, 3 * PATCH**2), np.uint8) if out is None else out
    # A row of a patch is 12 bytes: three words are copied faster than as many bytes.
    rows = np.ascontiguousarray(images).reshape(-1).view(np.uint32).reshape(count, grid[1], PATCH, grid[2], 3)
    out.view(np.uint32).reshape(*grid, PATCH, 3)[:] = rows.swapaxes(2, 3)
    return out


def pixels_of(patches: Num[Any, "B h w 48"]) -> Num[Any, "B H W 3"]:
    """Inverse of `patches_of`; numpy or jax."""
    count, height, width, values = patches.shape
    x = patches.reshape(count, height, width, PATCH, values // PATCH).swapaxes(2, 3)
    return x.reshape(count, height * PATCH, width * PATCH, values // PATCH**2)


def resize(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "H2 W2 3"]:
    """The image resized to `size` (height, width) by PIL's bilinear filter, which averages when it shrinks."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def pad_to_canvas(image: UInt8[np.ndarray, "h w 3"], canvas: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The image in the upper left corner of a canvas (height, width) of zeros. Raises ValueError if it does not fit."""
    height, width = image.shape[:2]
    if height > canvas[0] or width > canvas[1]:
        raise ValueError(f"an image of {height} x {width} does not fit on a canvas of {canvas[0]} x {canvas[1]}")
    result = np.zeros((*canvas, 3), np.uint8)
    result[:height, :width] = image
    return result
