"""How layers keep to each image's own extent inside a shared canvas.

A map on the canvas holds an image's cells in its upper left corner; cells beyond the image's size at that stride are
nobody's. Layers that mix positions read zeros there (`inside`), take statistics without them (`masked_mean`) and
resize by each image's own ratio (`resize_nearest`, `resize_bilinear`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["inside", "level_size", "masked_mean", "resize_bilinear", "resize_nearest", "zero_beyond"]


def level_size(extent: Int[Array, "B 2"], stride: int) -> Int[Array, "B 2"]:
    """Height and width in cells of images of `extent` pixels at `stride`: rounded up, as repeated halving does."""
    return -(-extent // stride)


def inside(size: Int[Array, "B 2"], height: int, width: int) -> Bool[Array, "B h w 1"]:
    """True on the `size` upper left cells of a height x width map."""
    rows = jnp.arange(height)[None, :, None, None] < size[:, 0, None, None, None]
    columns = jnp.arange(width)[None, None, :, None] < size[:, 1, None, None, None]
    return rows & columns


def zero_beyond(x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B h w C"]:
    """`x` with zeros beyond each image's size."""
    return jnp.where(inside(size, x.shape[1], x.shape[2]), x, 0)


def masked_mean(x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B C"]:
    """Mean over each image's own cells, in float32."""
    total = zero_beyond(x.astype(jnp.float32), size).sum((1, 2))
    return total / jnp.prod(size, -1, keepdims=True).astype(jnp.float32)


def _nearest_weights(
    source: Int[Array, " B"], target: Int[Array, " B"], length: int, source_length: int
) -> Float[Array, "B length source"]:
    """Rows pick source cell floor(i * source / target), as torch's 'nearest' does."""
    picked = jnp.minimum(jnp.arange(length)[None] * source[:, None] // target[:, None], source[:, None] - 1)
    return jax.nn.one_hot(picked, source_length)


def _bilinear_weights(
    source: Int[Array, " B"], target: Int[Array, " B"], length: int, source_length: int
) -> Float[Array, "B length source"]:
    """Rows interpolate at i * (source - 1) / (target - 1): first and last cells coincide (align_corners)."""
    ratio = (source - 1).astype(jnp.float32) / jnp.maximum(target - 1, 1)
    position = jnp.where(target[:, None] > 1, jnp.arange(length)[None] * ratio[:, None], 0.0)
    position = jnp.minimum(position, (source - 1).astype(jnp.float32)[:, None])
    return jnp.maximum(0.0, 1.0 - jnp.abs(position[:, :, None] - jnp.arange(source_length)))


def _resample(
    x: Float[Array, "B h w C"],
    rows: Float[Array, "B H h"],
    columns: Float[Array, "B W w"],
) -> Float[Array, "B H W C"]:
    # Two small matrix products instead of gathers: their gradients are products too, not scatters. Float32
    # precision throughout, because the products replace copies.
    kind = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    y = jnp.einsum("bHh,bhwc->bHwc", rows.astype(x.dtype), x, **kind).astype(x.dtype)
    return jnp.einsum("bWw,bHwc->bHWc", columns.astype(x.dtype), y, **kind).astype(x.dtype)


def resize_nearest(
    x: Float[Array, "B h w C"], source: Int[Array, "B 2"], target: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """Resizes each image's own cells from `source` to `target` cells on a canvas of `shape`, nearest neighbour."""
    rows = _nearest_weights(source[:, 0], target[:, 0], shape[0], x.shape[1])
    columns = _nearest_weights(source[:, 1], target[:, 1], shape[1], x.shape[2])
    return _resample(x, rows, columns)


def resize_bilinear(
    x: Float[Array, "B h w C"], source: Int[Array, "B 2"], target: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W C"]:
    """The same, bilinear with align_corners."""
    rows = _bilinear_weights(source[:, 0], target[:, 0], shape[0], x.shape[1])
    columns = _bilinear_weights(source[:, 1], target[:, 1], shape[1], x.shape[2])
    return _resample(x, rows, columns)
