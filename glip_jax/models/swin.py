"""Swin Transformer v1 (arXiv 2103.14030) as GLIP uses it, for images that keep to their own extent.

Faithful to the released weights (glip-reference 2.2): maps are padded to whole windows with zeros *after* the first
norm, and those zeros take part in attention; patches merge in the order (0,0), (1,0), (0,1), (1,1); output norms apply
to the outputs only. Cells beyond the image's own whole windows are separated by minus infinity, so an image sees what
it would see alone; between the regions that a shift brings together the original's -100 stays.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glip_jax.config import BackboneConfig, Remat
from glip_jax.models.dropout import bernoulli
from glip_jax.models.extents import level_size, zero_beyond
from glip_jax.models.initial import torch_dense
from glip_jax.models.remat import rematerialized

__all__ = ["Swin", "relative_position_index"]

_SEPARATED = -1e30


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


def _separation(size: Int[Array, "B 2"], height: int, width: int, window: int) -> Float[Array, "B windows n n"]:
    """What shifted attention adds to its logits on a padded height x width map."""
    shift = window // 2
    whole = -(-size // window) * window
    rows, columns = jnp.arange(height), jnp.arange(width)
    beyond = (rows[None, :, None] >= whole[:, 0, None, None]) | (columns[None, None, :] >= whole[:, 1, None, None])
    beyond = _partition(jnp.roll(beyond, (-shift, -shift), (1, 2)), window)

    def region(cells: jax.Array, length: int) -> jax.Array:
        return (cells >= length - window).astype(jnp.int32) + (cells >= length - shift)

    label = 3 * region(rows, height)[:, None] + region(columns, width)[None, :]
    label = _partition(label[None], window)
    apart = jnp.where(label[..., :, None] != label[..., None, :], -100.0, 0.0)
    return jnp.where(beyond[..., :, None] != beyond[..., None, :], _SEPARATED, apart)


def _drop_path(module: nn.Module, x: jax.Array, rate: jax.Array, train: bool) -> jax.Array:
    """Drops whole images of a residual branch (arXiv 1603.09382); `rate` may be traced."""
    if not train:
        return x
    keep = bernoulli(module.make_rng("dropout"), 1.0 - rate, (x.shape[0], 1, 1, 1))
    return (x * keep / (1.0 - rate)).astype(x.dtype)


class _Block(nn.Module):
    """Windowed attention and MLP, both pre-norm residual branches."""

    heads: int
    window: int
    shifted: bool
    train: bool
    dtype: Any

    def _attend(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B h w C"]:
        b, h, w, channels = x.shape
        window, shift, heads = self.window, self.window // 2, self.heads
        x = jnp.pad(x, ((0, 0), (0, -h % window), (0, -w % window), (0, 0)))
        height, width = x.shape[1:3]
        if self.shifted:
            x = jnp.roll(x, (-shift, -shift), (1, 2))
        x = _partition(x, window)
        qkv = torch_dense(3 * channels, channels, self.dtype, "qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(*x.shape[:3], 3, heads, channels // heads), 3, 0)
        query = query * (channels // heads) ** -0.5
        logits = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key, preferred_element_type=jnp.float32)
        table = self.param("bias_table", nn.initializers.truncated_normal(0.02), ((2 * window - 1) ** 2, heads))
        logits += jnp.moveaxis(table[relative_position_index(window)], -1, 0)
        if self.shifted:
            logits += _separation(size, height, width, window)[:, :, None]
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        x = jnp.einsum("bwhqk,bwkhd->bwqhd", weights, value).reshape(x.shape)
        x = torch_dense(channels, channels, self.dtype, "projection")(x)
        x = x.reshape(b, height // window, width // window, window, window, channels)
        x = jnp.moveaxis(x, 3, 2).reshape(b, height, width, channels)
        if self.shifted:
            x = jnp.roll(x, (shift, shift), (1, 2))
        return x[:, :h, :w]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"], rate: Float[Array, ""]
    ) -> Float[Array, "B h w C"]:
        channels = x.shape[-1]
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm1")(x)
        x = x + _drop_path(self, self._attend(zero_beyond(y, size), size), rate, self.train)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm2")(x)
        y = nn.gelu(torch_dense(4 * channels, channels, self.dtype, "mlp_in")(y), approximate=False)
        y = torch_dense(channels, 4 * channels, self.dtype, "mlp_out")(y)
        return x + _drop_path(self, y, rate, self.train)


class _Pair(nn.Module):
    """A block on the plain lattice of windows and one on the shifted: the body of a stage's scan."""

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
    """`depth` blocks: scanned pairs, and one plain block more if the depth is odd."""

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
    """2 x 2 neighbours become one cell of twice the channels; odd maps are padded by a zero row or column."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B H W D"]:
        x = zero_beyond(x, size)
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        quarters = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        y = jnp.concatenate(quarters, -1)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name="norm")(y)
        start = nn.initializers.truncated_normal(0.02)
        return nn.Dense(2 * x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=start, name="reduction")(y)


class Swin(nn.Module):
    """The backbone."""

    config: BackboneConfig
    train: bool = False
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], extent: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B h8 w8 C8"], Float[Array, "B h16 w16 C16"], Float[Array, "B h32 w32 C32"]]:
        """Normalised images, zero beyond their size, to maps of strides 8, 16, 32, zero beyond the extent."""
        config = self.config
        image = jnp.pad(image, ((0, 0), (0, -image.shape[1] % 4), (0, -image.shape[2] % 4), (0, 0)))
        x = nn.Conv(config.width, (4, 4), (4, 4), padding="VALID", dtype=self.dtype, name="patch_embedding")(image)
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
                outputs.append(zero_beyond(norm(x), size))
            if stage < 3:
                x = _Merge(self.dtype, name=f"merge{stage + 1}")(x, size)
            if stage < config.frozen_stages:
                x = jax.lax.stop_gradient(x)
        c3, c4, c5 = outputs
        return c3, c4, c5
