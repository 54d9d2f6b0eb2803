"""Backgrounds and lighting of synthetic scenes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

__all__ = ["Light", "background", "light"]


class Light(NamedTuple):
    """Lighting of a scene."""

    gain: Float32[np.ndarray, "H W 3"]
    """Factor of every pixel: brightness, color cast, and a gradient across the scene."""
    shadow: tuple[float, float, float, float]
    """Shadows: strength (0-1), offset to the right and down in pixels, and blur radius in pixels."""


def light(rng: np.random.Generator, height: int, width: int) -> Light:
    """Draws the lighting of a scene: gains of about 0.75 to 1.2, color casts of at most 6 %, usually soft shadows."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j].astype(np.float32)
    slope = np.float32(rng.uniform(0, 0.25)) * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    gain = np.float32(rng.uniform(0.8, 1.12)) * (1 + slope)[..., None] * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    strength = float(rng.uniform(0.2, 0.6)) if rng.random() < 0.7 else 0.0
    far = float(rng.uniform(2, 8)) * min(height, width) / 256
    # Shadows fall away from the brighter side.
    return Light(gain, (strength, -far * float(np.cos(angle)), -far * float(np.sin(angle)), far))


def background(rng: np.random.Generator, height: int, width: int) -> Float32[np.ndarray, "H W 3"]:
    """Draws a background: plain color, gradient, stripes, checks, dots, patches, clouds or horizon, with noise; values 0-255."""
    first, second = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    # Saturation between nearly gray and fully as drawn.
    saturation = np.float32(rng.uniform(0.25, 1))
    first, second = (saturation * color + (1 - saturation) * color.mean() for color in (first, second))
    if rng.random() < 0.5:
        # Two similar colors, since high-contrast patterns are rare behind real objects.
        second = np.clip(first + rng.uniform(-50, 50, 3), 0, 255).astype(np.float32)
    share = _pattern(rng, height, width)
    canvas = first + (second - first) * share[..., None]
    noise = rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(1, 16))
    return np.clip(canvas + noise, 0, 255).astype(np.float32)


def _pattern(rng: np.random.Generator, height: int, width: int) -> Float32[np.ndarray, "H W"]:
    """Weight (0-1) of the second color at each pixel."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
    period = np.float32(2 * np.pi / rng.uniform(12, 60))
    match int(rng.integers(8)):
        case 0:
            return (along - along.min()) / (np.ptp(along) + 1)
        case 1:
            return (np.sin(along * period) > 0).astype(np.float32)
        case 2:
            return ((np.sin(along * period) > 0) ^ (np.sin(across * period) > 0)).astype(np.float32)
        case 3:
            return (np.sin(along * period) + np.sin(across * period) > 1).astype(np.float32)
        case 4:
            return _cells(rng, height, width, int(rng.integers(3, 12)))
        case 5:
            parts = [_cells(rng, height, width, 3 * 2**octave) * 0.5**octave for octave in range(4)]
            return np.clip(np.add.reduce(parts) - 0.4, 0, 1).astype(np.float32)
        case 6:
            horizon = rng.uniform(0.3, 0.7) * height + 8 * np.sin(x * period / 4)
            return np.where(y > horizon, 0.75 + 0.25 * y / height, 0.25 * y / height).astype(np.float32)
        case _:
            return np.zeros((height, width), np.float32)


def _cells(rng: np.random.Generator, height: int, width: int, count: int) -> Float32[np.ndarray, "H W"]:
    """Smooth patches: `count` random values along each side, interpolated."""
    cells = Image.fromarray(rng.random((count, count)).astype(np.float32))
    return np.clip(np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC)), 0, 1).astype(np.float32)
