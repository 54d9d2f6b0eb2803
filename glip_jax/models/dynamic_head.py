"""The head's image side: dynamic convolution blocks (arXiv 2106.08322) as GLIP has them (glip-reference 2.7).

A block looks at every level together with its neighbours through deformable convolutions that share one offset map per
level, weighs the two or three terms by pooled attention, and ends in a dynamic ReLU (arXiv 2003.10027).
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glip_jax.config import HeadConfig
from glip_jax.models.deformable import deformable_convolution
from glip_jax.models.extents import inside, masked_mean, resize_bilinear, zero_beyond
from glip_jax.models.initial import small_normal, torch_dense, uniform

__all__ = ["DynamicConvolution", "GroupNorm", "reread_flat"]

_OFFSETS = 18
"""Channels of an offset map that are displacements (9 taps x (dy, dx)); 9 masks follow."""


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    return nn.relu6(x + 3.0) / 6.0


class GroupNorm(nn.Module):
    """Group normalisation (arXiv 1803.08494) with statistics over each image's own cells, float32."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B h w C"]:
        b, h, w, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        # Sums of channels first, then of the group's channels: mean and spread over equally many cells each.
        mean = masked_mean(y, size).reshape(b, self.groups, -1).mean(-1)
        mean = jnp.repeat(mean, channels // self.groups, 1)[:, None, None, :]
        variance = masked_mean(jnp.square(y - mean), size).reshape(b, self.groups, -1).mean(-1)
        variance = jnp.repeat(variance, channels // self.groups, 1)[:, None, None, :]
        return ((y - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(self.dtype)


def reread_flat(
    x: Float[Array, "B h w K"], size: Int[Array, "B 2"], coarse: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W K"]:
    """The original's reading of a fine level's offsets at the coarser level: its buffer with the wrong strides.

    Per image, flat [K, h, w] memory of its own size is read as if it were [K, H, W] of the coarser `coarse` size
    (glip-reference 2.7, quirk 1). Released weights depend on it.
    """
    batch, height, width, channels = x.shape
    (fine_h, fine_w), (coarse_h, coarse_w) = size.T[:, :, None, None, None], coarse.T[:, :, None, None, None]
    channel, row, column = jnp.meshgrid(jnp.arange(channels), jnp.arange(shape[0]), jnp.arange(shape[1]), indexing="ij")
    flat = channel * coarse_h * coarse_w + row * coarse_w + column
    # Cells beyond the coarse size may point anywhere; keep their reads in range.
    source, cell = jnp.minimum(flat // (fine_h * fine_w), channels - 1), flat % (fine_h * fine_w)
    flat = ((cell // fine_w) * width + cell % fine_w) * channels + source
    values = jnp.take_along_axis(x.reshape(batch, -1), flat.reshape(batch, -1), 1, mode="clip")
    return jnp.moveaxis(values.reshape(batch, channels, *shape), 1, 3)


class _DynamicReLU(nn.Module):
    """max(a1 y + b1, a2 y + b2) with coefficients from the pooled map."""

    dtype: Any

    @nn.compact
    def __call__(self, y: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B h w C"]:
        channels = y.shape[-1]
        pooled = masked_mean(y, size)
        hidden = nn.relu(torch_dense(channels // 4, channels, jnp.float32, "squeeze")(pooled))
        theta = _hard_sigmoid(torch_dense(4 * channels, channels // 4, jnp.float32, "expand")(hidden))
        a1, b1, a2, b2 = jnp.split((theta - 0.5)[:, None, None, :], 4, -1)
        a1, a2 = a1 * 2.0 + 1.0, a2 * 2.0
        y = y.astype(jnp.float32)
        return jnp.maximum(y * a1 + b1, y * a2 + b2).astype(self.dtype)


class DynamicConvolution(nn.Module):
    """One block over all levels."""

    config: HeadConfig
    dtype: Any

    def _term(self, name: str, channels: int) -> tuple[Array, Array, GroupNorm]:
        """Kernel, bias and norm of one of the three deformable convolutions."""
        start = uniform((9 * channels) ** -0.5)
        kernel = self.param(f"{name}_kernel", start, (3, 3, channels, channels))
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (channels,))
        return kernel, bias, GroupNorm(self.config.groups, self.dtype, name=f"{name}_norm")

    @nn.compact
    def __call__(
        self, levels: tuple[Float[Array, "B _ _ C"], ...], sizes: tuple[Int[Array, "B 2"], ...]
    ) -> tuple[Float[Array, "B _ _ C"], ...]:
        """New levels from old ones; `sizes` are each image's cells per level."""
        channels = levels[0].shape[-1]
        levels = tuple(zero_beyond(x, size) for x, size in zip(levels, sizes))
        fan_in = uniform((9 * channels) ** -0.5)
        offset = nn.Conv(27, (3, 3), padding=1, dtype=self.dtype, kernel_init=fan_in, bias_init=fan_in, name="offset")
        attention = nn.Dense(1, dtype=jnp.float32, kernel_init=small_normal, name="attention")
        relu = _DynamicReLU(self.dtype, name="relu")
        terms = {name: self._term(name, channels) for name in ("coarse", "same", "fine")}

        def convolve(
            name: Literal["coarse", "same", "fine"], source: int, maps: Array, size: Array, stride: int = 1
        ) -> Array:
            kernel, bias, norm = terms[name]
            offsets = maps[..., :_OFFSETS].reshape(*maps.shape[:3], 9, 2)
            mask = nn.sigmoid(maps[..., _OFFSETS:])
            return norm(deformable_convolution(levels[source], offsets, mask, kernel, bias, stride), size)

        outputs = []
        for level, (x, size) in enumerate(zip(levels, sizes)):
            maps = offset(x).astype(jnp.float32)
            found = [convolve("same", level, maps, size)]
            if level > 0:
                found.append(convolve("fine", level - 1, maps, size, stride=2))
            if level + 1 < len(levels):
                coarse = sizes[level + 1]
                moved = self._coarser(maps, size, coarse, levels[level + 1].shape[1:3])
                term = convolve("coarse", level + 1, moved, coarse)
                found.append(resize_bilinear(zero_beyond(term, coarse), coarse, size, x.shape[1:3]))
            weights = [_hard_sigmoid(nn.relu(attention(masked_mean(term, size)))) for term in found]
            mean = sum(
                (term.astype(jnp.float32) * weight[:, None, None, :] for term, weight in zip(found, weights)),
                start=jnp.zeros((), jnp.float32),
            ) / len(found)
            outputs.append(relu(mean, size))
        return tuple(outputs)

    def _coarser(self, maps: Array, size: Array, coarse: Array, shape: tuple[int, int]) -> Array:
        """The offset maps of a level (offsets and mask logits) for its coarser neighbour."""
        own = jnp.where(inside(size, *maps.shape[1:3]), maps, 0.0)
        match self.config.coarse_offsets:
            case "flat":
                parts = (own[..., :_OFFSETS], own[..., _OFFSETS:])
                return jnp.concatenate([reread_flat(part, size, coarse, shape) for part in parts], -1)
            case "resized":
                return resize_bilinear(own, size, coarse, shape)
