"""Swin Transformer v1 (arXiv 2103.14030) as in GLIP, with the extent of each image masked.

As the released weights require (glip-reference 2.2), maps are padded to whole windows with zeros *after* the first norm, and these
zeros take part in attention; patches are merged in the order (0,0), (1,0), (0,1), (1,1); output norms apply to the outputs only.
Cells beyond the whole windows of an image are masked with -1e30, so the result is that of the image alone. Regions that the shift
joins are masked with -100, as in the original.

The logits of large maps are never stored whole: rows of windows are processed one after the other, and the backward pass
recomputes a row. On a TPU a kernel (`kernels.windows`) keeps them in on-chip memory.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import BackboneConfig, Remat
from glip_jax.models.dropout import drop_path
from glip_jax.models.extents import level_size, mask_padding
from glip_jax.models.gelu import gelu
from glip_jax.models.initializers import torch_dense, uniform
from glip_jax.models.kernels.blocks import has_small_memory, is_possible, on_chip_bytes
from glip_jax.models.kernels.windows import Grouping, grouping, labelled, window_attention
from glip_jax.models.remat import images_at_once, rematerialized
from glip_jax.models.tensor_parallel import column_parallel_input, row_parallel_dot_general, tensor_shards
from glip_jax.structures.canvas import PATCH

__all__ = ["Swin", "relative_position_index"]

_MASKED = -1e30
_MAX_LOGITS_BYTES = 32 * 2**20
"""Maximum bytes of logits at once; maps with more are processed by rows of windows."""
_MAX_ROW_BYTES = 8 * 2**20
"""Maximum bytes of the logits of a row over several images. For Swin-T at 800 x 1344, a row has 1.4 MB per image in every stage
(heads double as rows halve); all logits of the first stage of four images have 160 MB."""


def relative_position_index(window: int) -> np.ndarray:
    """Row of the bias table for each (query, key) pair of a window: Int[n n]."""
    cells = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    delta = cells[:, :, None] - cells[:, None, :] + window - 1
    return delta[0] * (2 * window - 1) + delta[1]


def _partition(x: jax.Array, window: int) -> jax.Array:
    """[B h w ...] -> [B windows n ...], windows and cells row-major."""
    b, h, w, *rest = x.shape
    x = x.reshape(b, h // window, window, w // window, window, *rest)
    return jnp.moveaxis(x, 3, 2).reshape(b, -1, window * window, *rest)


def _merge_windows(x: Float[Array, "B windows n C"], height: int, window: int) -> Float[Array, "B h w C"]:
    """Inverse of `_partition` for a map of `height` cells."""
    b, _, _, channels = x.shape
    x = x.reshape(b, height // window, -1, window, window, channels)
    return jnp.moveaxis(x, 3, 2).reshape(b, height, -1, channels)


class _Regions(NamedTuple):
    """Labels of the cells of a shifted, padded map; attention between different labels is masked."""

    shifted: Int[Array, "B h w"]
    """Region of the map before the shift."""
    beyond: Bool[Array, "B h w"]
    """True beyond the whole windows of the image."""


def _label_regions(size: Int[Array, "B 2"], height: int, width: int, window: int) -> _Regions:
    shift = window // 2
    whole = -(-size // window) * window
    rows, columns = jnp.arange(height), jnp.arange(width)
    beyond = (rows[None, :, None] >= whole[:, 0, None, None]) | (columns[None, None, :] >= whole[:, 1, None, None])

    def region(cells: jax.Array, length: int) -> jax.Array:
        return (cells >= length - window).astype(jnp.int32) + (cells >= length - shift)

    label = 3 * region(rows, height)[:, None] + region(columns, width)[None, :]
    return _Regions(jnp.broadcast_to(label, beyond.shape), jnp.roll(beyond, (-shift, -shift), (1, 2)))


def _attention_mask(regions: _Regions, window: int) -> Float[Array, "B windows n n"]:
    """Values that shifted attention adds to its logits."""
    shifted, beyond = (_partition(x, window) for x in regions)
    mask = jnp.where(shifted[..., :, None] != shifted[..., None, :], -100.0, 0.0)
    return jnp.where(beyond[..., :, None] != beyond[..., None, :], _MASKED, mask)


class _Dense(nn.Module):
    """Kernel and bias of a dense layer, with the initial values of torch.nn.Linear, in the type of its product."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Float[Array, "C D"], Float[Array, " D"]]:
        start = uniform(1 / math.sqrt(inputs))
        kernel = self.param("kernel", start, (inputs, self.features))
        return kernel.astype(self.dtype), self.param("bias", start, (self.features,)).astype(self.dtype)


def _layout_of_kernel(images: int, heads: int, depth: int, window: int) -> Grouping | None:
    """The layout for the kernel; None where attention by rows runs: not on a TPU, or on one with little on-chip memory."""
    chosen = on_chip_bytes() and not has_small_memory() and is_possible(jax.sharding.get_abstract_mesh(), images)
    return grouping(heads, depth, window) if chosen else None


def _attend_by_rows(
    qkv: Float[Array, "B h w D"], bias: Float[Array, "heads n n"], regions: _Regions | None, window: int
) -> Float[Array, "B h w C"]:
    """Attention in all windows at once, or in rows of windows one after the other where the logits are large."""
    b, height, width, channels = *qkv.shape[:3], qkv.shape[3] // 3
    heads = len(bias)

    def attended(qkv: Float[Array, "B rows w D"], regions: _Regions | None) -> Float[Array, "B rows w C"]:
        windows = _partition(qkv, window)
        query, key, value = jnp.moveaxis(windows.reshape(*windows.shape[:3], 3, heads, -1), 3, 0)
        query = query * (channels // heads) ** -0.5
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=jnp.float32) + bias
        if regions is not None:
            logits += _attention_mask(regions, window)[:, :, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(qkv.dtype)
        read = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value).reshape(*windows.shape[:3], channels)
        return _merge_windows(read, qkv.shape[1], window)

    if 4 * b * height * width * window**2 * heads <= _MAX_LOGITS_BYTES:
        return attended(qkv, regions)
    group = images_at_once(b, 4 * width * window**3 * heads, _MAX_ROW_BYTES)

    def by_row(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(b, -1, window, *x.shape[2:]), 1, 0).reshape(-1, group, window, *x.shape[2:])

    rows = jax.lax.map(jax.checkpoint(lambda row: attended(*row)), jax.tree.map(by_row, (qkv, regions)))
    rows = rows.reshape(-1, b, *rows.shape[2:])
    return jnp.moveaxis(rows, 0, 1).reshape(b, height, width, channels)


class _Block(nn.Module):
    """Window attention and MLP, both pre-norm residual branches."""

    heads: int
    window: int
    shifted: bool
    train: bool
    dtype: Any

    def _attend(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B h w C"]:
        b, h, w, channels = x.shape
        window, shift, heads = self.window, self.window // 2, self.heads
        x = jnp.pad(x, ((0, 0), (0, -h % window), (0, -w % window), (0, 0)))
        if self.shifted:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        kernel, offset = _Dense(3 * channels, self.dtype, name="qkv")(channels)
        out_kernel, out_offset = _Dense(channels, self.dtype, name="projection")(channels)
        table = self.param("bias_table", nn.initializers.truncated_normal(0.02), ((2 * window - 1) ** 2, heads))
        bias = jnp.moveaxis(table[relative_position_index(window)], -1, 0)
        regions = _label_regions(size, x.shape[1], x.shape[2], window) if self.shifted else None
        if layout := _layout_of_kernel(b, heads, channels // heads, window):
            qkv = x @ layout.spread(kernel) + layout.spread(offset)
            qkv = qkv if regions is None else labelled(qkv, regions.shifted, regions.beyond, layout)
            read: Any = window_attention(qkv, bias, layout, window, jax.sharding.get_abstract_mesh())
            x = read @ layout.spread_rows(out_kernel) + out_offset
        else:
            x = _attend_by_rows(x @ kernel + offset, bias, regions, window) @ out_kernel + out_offset
        if self.shifted:
            x = jnp.roll(x, (shift, shift), (1, 2))
        return x[:, :h, :w]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"], rate: Float[Array, ""]
    ) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm1")(x)
        x = x + drop_path(self, self._attend(mask_padding(y, size), size), rate, self.train)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm2")(x)
        y = torch_dense(4 * channels // tensor_shards(), channels, self.dtype, "mlp_in")(column_parallel_input(y))
        y = gelu(y)
        y = torch_dense(channels, 4 * channels, self.dtype, "mlp_out", dot_general=row_parallel_dot_general)(y)
        return x + drop_path(self, y, rate, self.train)


class _Pair(nn.Module):
    """A block with regular windows and one with shifted windows: the body of the scan of a stage."""

    heads: int
    window: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], rates: Float[Array, "2"], size: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B h w C"], None]:
        block = (self.heads, self.window)
        x = _Block(*block, False, self.train, self.dtype, name="plain")(x, size, rates[0])
        return _Block(*block, True, self.train, self.dtype, name="shifted")(x, size, rates[1]), None


class _Stage(nn.Module):
    """`depth` blocks: scanned pairs, and one more regular block if the depth is odd."""

    depth: int
    heads: int
    window: int
    train: bool
    dtype: Any
    remat: Remat

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"], rates: Float[Array, " depth"]
    ) -> Float[Array, "B h w C"]:
        pairs = self.depth // 2
        if pairs:
            body = rematerialized(_Pair, self.remat)
            scan = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=pairs,
            )
            pair = scan(self.heads, self.window, self.train, self.dtype, name="pairs")
            x, _ = pair(x, rates[: 2 * pairs].reshape(pairs, 2), size)
        if self.depth % 2:
            x = _Block(self.heads, self.window, False, self.train, self.dtype, name="last")(x, size, rates[-1])
        return x


class _Merge(nn.Module):
    """Patch merging: 2 x 2 cells become one of twice the channels; odd maps are padded by a zero row or column."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B H W D"]:
        x = mask_padding(x, size)
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        # Not by strided slices: their gradient is a pad between cells, which takes a v6e 45 million cycles an image in all.
        b, height, width, channels = x.shape
        pairs = x.reshape(b, height // 2, 2, width // 2, 2 * channels)
        quarters = [
            pairs[:, :, row, :, column * channels : (column + 1) * channels]
            for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))
        ]
        y = jnp.concatenate(quarters, -1)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")(y)
        start = nn.initializers.truncated_normal(0.02)
        return nn.Dense(2 * x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=start, name="reduction")(y)


class _PatchEmbedding(nn.Module):
    """A convolution of 4 x 4 with stride 4; of patches a product."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, image: Float[Array, "B H W values"]) -> Float[Array, "B h w C"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (PATCH, PATCH, 3, self.width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        image = image.astype(self.dtype)
        if image.shape[-1] != 3:
            return image @ kernel.reshape(-1, self.width) + bias
        image = jnp.pad(image, ((0, 0), (0, -image.shape[1] % PATCH), (0, -image.shape[2] % PATCH), (0, 0)))
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, (PATCH, PATCH), "VALID", dimension_numbers=dimensions) + bias


class Swin(nn.Module):
    """The Swin backbone."""

    config: BackboneConfig
    train: bool = False
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W values"], extent: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B h8 w8 C8"], Float[Array, "B h16 w16 C16"], Float[Array, "B h32 w32 C32"]]:
        """Maps of strides 8, 16, 32, zero beyond the extent, of normalized images (pixels or patches) that are zero beyond their size."""
        config = self.config
        x = _PatchEmbedding(config.width, self.dtype, name="patch_embedding")(image)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="patch_norm")(x)
        rates = jnp.asarray(np.linspace(0, config.drop_path, sum(config.depths)), jnp.float32)
        outputs = []
        for stage, depth in enumerate(config.depths):
            size = level_size(extent, 4 * 2**stage)
            first = sum(config.depths[:stage])
            train = self.train and stage >= config.frozen_stages
            body = _Stage(
                depth, config.heads[stage], config.window, train, self.dtype, self.remat, name=f"stage{stage + 1}"
            )
            x = body(x, size, rates[first : first + depth])
            if stage > 0:
                norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{stage}")
                outputs.append(mask_padding(norm(x), size))
            if stage < 3:
                x = _Merge(self.dtype, name=f"merge{stage + 1}")(x, size)
            if stage < config.frozen_stages:
                x = jax.lax.stop_gradient(x)
        c3, c4, c5 = outputs
        return c3, c4, c5
