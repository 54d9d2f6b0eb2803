"""Masked operations on feature maps: each image is restricted to its own extent inside the shared canvas.

A feature map holds the cells of an image in its upper left corner; cells beyond the extent of the image are padding. Layers that
mix positions read zeros there (`mask_padding`), exclude them from statistics (`valid_mask`) and resize by the ratio of each image
(`resize_nearest`, `resize_bilinear`). A pyramid can be packed as [B A C]: the cells of its levels one after the other, row-major.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

__all__ = [
    "grid", "level_size", "mask_padding", "pack", "place_features", "resize_bilinear", "resize_nearest", "unpack", "valid_mask",
]  # fmt: skip


def level_size(extent: Int[Array, "B 2"], stride: int) -> Int[Array, "B 2"]:
    """Height and width in cells of images of `extent` pixels at `stride`, rounded up, as repeated halving does."""
    return -(-extent // stride)


def grid(x: Float[Array, "B h w C"]) -> tuple[int, int]:
    """Height and width of a map, in cells."""
    return x.shape[1], x.shape[2]


def valid_mask(size: Int[Array, "B 2"], height: int, width: int) -> Bool[Array, "B h w 1"]:
    """True on the `size` (height, width) upper left cells of a map of height x width cells."""
    rows = jnp.arange(height)[None, :, None, None] < size[:, 0, None, None, None]
    columns = jnp.arange(width)[None, None, :, None] < size[:, 1, None, None, None]
    return rows & columns


def mask_padding(x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B h w C"]:
    """`x` with zeros in the cells beyond `size` of each image."""
    return jnp.where(valid_mask(size, x.shape[1], x.shape[2]), x, 0)


_WAVES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Waves across an image."""


def place_features(size: Int[Array, "B 2"], height: int, width: int) -> Float[Array, "B h w F"]:
    """Where each cell of a map lies in its image: both coordinates from -1 to 1, and their sines and cosines, as in transformers (arXiv 1706.03762, 3.5)."""
    middles = [2 * (jnp.arange(count) + 0.5) / size[:, axis, None] - 1 for axis, count in ((0, height), (1, width))]
    rows, columns = middles[0][:, :, None], middles[1][:, None, :]
    shape = (len(size), height, width)
    turns = [place * np.pi * wave for place in (rows, columns) for wave in _WAVES]
    features = [rows, columns, *map(jnp.sin, turns), *map(jnp.cos, turns)]
    return jnp.stack([jnp.broadcast_to(each, shape) for each in features], -1)


def pack(levels: Sequence[Shaped[Array, "B _ _ C"]]) -> Shaped[Array, "B A C"]:
    """Packs levels into one array of cells."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels], 1)


def unpack(packed: Float[Array, "B A C"], shapes: Sequence[tuple[int, int]]) -> list[Float[Array, "B _ _ C"]]:
    """Inverse of `pack` for levels of `shapes` (height, width)."""
    ends = np.cumsum([h * w for h, w in shapes])[:-1].tolist()
    parts = jnp.split(packed, ends, 1)
    return [part.reshape(part.shape[0], *shape, -1) for part, shape in zip(parts, shapes)]


def _nearest_weights(
    source: Int[Array, " B"], target: Int[Array, " B"], length: int, source_length: int
) -> Float[Array, "B length source"]:
    """Row i selects the source cell floor(i * source / target), as PyTorch's 'nearest'."""
    selected = jnp.minimum(jnp.arange(length)[None] * source[:, None] // target[:, None], source[:, None] - 1)
    return jax.nn.one_hot(selected, source_length)


def _bilinear_weights(
    source: Int[Array, " B"], target: Int[Array, " B"], length: int, source_length: int
) -> Float[Array, "B length source"]:
    """Row i interpolates at i * (source - 1) / (target - 1): first and last cells coincide (align_corners)."""
    ratio = (source - 1).astype(jnp.float32) / jnp.maximum(target - 1, 1)
    position = jnp.where(target[:, None] > 1, jnp.arange(length)[None] * ratio[:, None], 0.0)
    position = jnp.minimum(position, (source - 1).astype(jnp.float32)[:, None])
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, :, None] - jnp.arange(source_length)))


def _resample(
    x: Float[Array, "B h w C"],
    rows: Float[Array, "B H h"],
    columns: Float[Array, "B W w"],
) -> Float[Array, "B H W C"]:
    # Two small matrix products instead of gathers: their gradients are products, not scatters. Full float32 precision, because
    # the products replace copies.
    options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    y = jnp.einsum("bHh,bhwc->bHwc", rows.astype(x.dtype), x, **options).astype(x.dtype)
    return jnp.einsum("bWw,bHwc->bHWc", columns.astype(x.dtype), y, **options).astype(x.dtype)


def resize_nearest(
    x: Float[Array, "B h w C"], source: Int[Array, "B 2"], target: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """Resizes the valid cells of each image from `source` to `target` on a map of `shape` (height, width), nearest neighbor."""
    rows = _nearest_weights(source[:, 0], target[:, 0], shape[0], x.shape[1])
    columns = _nearest_weights(source[:, 1], target[:, 1], shape[1], x.shape[2])
    return _resample(x, rows, columns)


def resize_bilinear(
    x: Float[Array, "B h w C"], source: Int[Array, "B 2"], target: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """Same as `resize_nearest`, but bilinear with align_corners."""
    rows = _bilinear_weights(source[:, 0], target[:, 0], shape[0], x.shape[1])
    columns = _bilinear_weights(source[:, 1], target[:, 1], shape[1], x.shape[2])
    return _resample(x, rows, columns)
