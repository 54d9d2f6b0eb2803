"""Dynamic head (DyConv, arXiv 2106.08322) as in GLIP (glip-reference 2.7).

A block applies deformable convolutions to every level and its neighbor levels. They share one offset map per level. The two or
three results per level are normalized, weighted by pooled attention, averaged, and passed through a dynamic ReLU (arXiv 2003.10027):
two passes over the results for their statistics, and one for everything else.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glip_jax.config import HeadConfig
from glip_jax.models.deformable import Taps, clamp_offsets, deformable_convolution, exceeds_bound, rows_of
from glip_jax.models.extents import grid, mask_padding, resize_bilinear, valid_mask
from glip_jax.models.initializers import small_normal, torch_dense, uniform
from glip_jax.models.remat import save_activation

__all__ = ["DynamicConvolution", "GroupNorm", "reread_flat"]

Kind = Literal["coarse", "same", "fine"]
"""The three convolutions of a block: of the coarser, the same and the finer level."""

_OFFSETS = 18
"""Offset channels of an offset map (9 taps x (dy, dx)); 9 mask channels follow."""


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    return nn.relu6(x + 3.0) / 6.0


class _Affine(NamedTuple):
    """scale * x + shift, by channel: what a norm does to a map once its statistics are known."""

    scale: Float[Array, "B C"]
    shift: Float[Array, "B C"]


class _Moments(NamedTuple):
    """Mean and variance of each channel of a map over the valid cells of each image, float32."""

    mean: Float[Array, "B C"]
    variance: Float[Array, "B C"]


def _moments(x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> _Moments:
    """In two passes over the map: in one, a large mean would cancel the variance."""
    valid, count = valid_mask(size, *grid(x)), size.prod(-1).astype(jnp.float32)[:, None]
    x = x.astype(jnp.float32)
    mean = jnp.where(valid, x, 0.0).sum((1, 2)) / count
    return _Moments(mean, jnp.where(valid, jnp.square(x - mean[:, None, None]), 0.0).sum((1, 2)) / count)


class GroupNorm(nn.Module):
    """Group normalization (arXiv 1803.08494) over the valid cells of each image, as an affine map of its channels."""

    groups: int

    @nn.compact
    def __call__(self, moments: _Moments) -> _Affine:
        """The map's statistics to scale and shift, float32."""
        mean, variance = moments
        scale = self.param("scale", nn.initializers.ones, mean.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, mean.shape[-1:])

        def by_group(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
            # All channels have equally many cells, so the mean of a group is the mean over its channels.
            return jnp.repeat(x.reshape(len(x), self.groups, -1).mean(-1), x.shape[-1] // self.groups, 1)

        center = by_group(mean)
        factor = jax.lax.rsqrt(by_group(variance + jnp.square(mean - center)) + 1e-5) * scale
        return _Affine(factor, bias - center * factor)


def reread_flat(
    x: Float[Array, "B h w K"], size: Int[Array, "B 2"], coarse: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W K"]:
    """Offsets of a level for its coarser neighbor, as the original reads them: the buffer with the wrong strides.

    Per image, the memory of [K, h, w] of the size of the image is read as if it were [K, H, W] of the size `coarse`
    (glip-reference 2.7, quirk 1). Released weights depend on it. Cells beyond `coarse` are any of the values.
    """
    return jax.lax.platform_dependent(
        x, size, coarse, tpu=partial(_reread_rows, shape=shape), default=partial(_reread_cells, shape=shape)
    )


def _reread_cells(x: Array, size: Array, coarse: Array, shape: tuple[int, int]) -> Array:
    """Cell by cell."""
    batch, height, width, channels = x.shape
    (fine_h, fine_w), (coarse_h, coarse_w) = size.T[:, :, None, None, None], coarse.T[:, :, None, None, None]
    channel, row, column = jnp.meshgrid(jnp.arange(channels), jnp.arange(shape[0]), jnp.arange(shape[1]), indexing="ij")
    flat = channel * coarse_h * coarse_w + row * coarse_w + column
    # Padding cells may point anywhere; keep their reads in range.
    source, cell = jnp.minimum(flat // (fine_h * fine_w), channels - 1), flat % (fine_h * fine_w)
    flat = ((cell // fine_w) * width + cell % fine_w) * channels + source
    values = jnp.take_along_axis(x.reshape(batch, -1), flat.reshape(batch, -1), 1, mode="clip")
    return jnp.moveaxis(values.reshape(batch, channels, *shape), 1, 3)


def _reread_rows(x: Array, size: Array, coarse: Array, shape: tuple[int, int]) -> Array:
    """Row by row: a TPU gathers and scatters rows some twenty times as fast as single cells.

    A coarse row is not longer than a fine one, so it is the end of one and the beginning of the next.
    """
    batch, height, width, channels = x.shape
    rows = jnp.moveaxis(x, 3, 1).reshape(batch, channels * height, width)
    (fine_h, fine_w), (coarse_h, coarse_w) = size.T[:, :, None, None], coarse.T[:, :, None, None]
    first = ((jnp.arange(channels)[:, None] * coarse_h + jnp.arange(shape[0])) * coarse_w).reshape(batch, -1, 1)
    line, column = first // fine_w, first % fine_w

    def row(line: Array) -> Array:
        index = jnp.minimum(line // fine_h, channels - 1) * height + line % fine_h
        return jnp.take_along_axis(rows, index, 1, mode="clip")

    end, beginning = _rotated(row(line), column), _rotated(row(line + 1), (column - fine_w) % width)
    read = jnp.where(jnp.arange(width) < fine_w - column, end, beginning)[..., : shape[1]]
    return jnp.moveaxis(read.reshape(batch, channels, *shape), 1, 3)


@jax.custom_vjp
def _rotated(x: Float[Array, "B rows w"], by: Int[Array, "B rows 1"]) -> Float[Array, "B rows w"]:
    """Each row rotated to the left by its own number of places, 0 to w - 1: by the powers of two that are in it."""
    for bit in range((x.shape[-1] - 1).bit_length()):
        x = jnp.where((by >> bit) & 1 == 1, jnp.roll(x, -(1 << bit), -1), x)
    return x


def _rotated_forward(x: Array, by: Array) -> tuple[Array, Array]:
    return _rotated(x, by), by


def _rotated_backward(by: Array, gradient: Array) -> tuple[Array, Any]:
    return _rotated(gradient, -by % gradient.shape[-1]), np.zeros(by.shape, jax.dtypes.float0)


_rotated.defvjp(_rotated_forward, _rotated_backward)


def _narrow_convolution(x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C O"], *_: Any, **__: Any) -> Array:
    """`lax.conv_general_dilated` for few output channels, 3 x 3 with stride and padding 1.

    All nine taps are one matrix product, and its shifted outputs, narrower than the inputs, are added. The gradients of XLA's convolution take
    fifty times as long as its forward pass on CPUs, and five times as long as these on TPUs.
    """
    height, width, outputs = *x.shape[1:3], kernel.shape[-1]
    wide = jnp.moveaxis(kernel, 2, 0).reshape(x.shape[-1], 9 * outputs)
    taps = jnp.matmul(x, wide, preferred_element_type=jnp.float32)
    taps = jnp.pad(taps, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(x.shape[0], height + 2, width + 2, 9, outputs)
    shifted = (taps[:, k // 3 : k // 3 + height, k % 3 : k % 3 + width, k] for k in range(9))
    return sum(shifted, start=jnp.zeros((), jnp.float32)).astype(x.dtype)


def _regular_convolution(
    x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C O"], stride: int
) -> Float[Array, "B H W O"]:
    """A 3 x 3 convolution with padding 1, as one matrix product of the nine taps: on CPUs its gradients are several times as fast."""
    kernel = kernel.astype(x.dtype)

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        height, width = (-(-side // stride) for side in x.shape[1:3])
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
                for i in range(3) for j in range(3)]  # fmt: skip
        return jnp.concatenate(taps, -1) @ kernel.reshape(-1, kernel.shape[-1])

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=whole)


class _DynamicReLU(nn.Module):
    """Coefficients of max(a1 x + b1, a2 x + b2) from the mean of x over the valid cells."""

    @nn.compact
    def __call__(self, mean: Float[Array, "B C"]) -> tuple[_Affine, _Affine]:
        channels = mean.shape[-1]
        hidden = nn.relu(torch_dense(channels // 4, channels, jnp.float32, "squeeze")(mean))
        theta = _hard_sigmoid(torch_dense(4 * channels, channels // 4, jnp.float32, "expand")(hidden)) - 0.5
        a1, b1, a2, b2 = jnp.split(theta, 4, -1)
        return _Affine(a1 * 2.0 + 1.0, b1), _Affine(a2 * 2.0, b2)


def _sum(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], start=terms[0])


class _Term(NamedTuple):
    """A convolution of a level, before its norm."""

    map: Float[Array, "B h w C"]
    norm: _Affine
    mean: Float[Array, "B C"]
    """Of the map over the valid cells."""


class DynamicConvolution(nn.Module):
    """One DyConv block over all levels."""

    config: HeadConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, levels: Sequence[Float[Array, "B _ _ C"]], sizes: Sequence[Int[Array, "B 2"]]
    ) -> tuple[Float[Array, "B _ _ C"], ...]:
        """New levels; `sizes`: per level the height and width of each image in cells.

        With `offset_bound`, the collection "intermediates" holds `offsets_clamped`, the fraction of clamped offsets per image.
        """
        levels = [mask_padding(x, size) for x, size in zip(levels, sizes)]
        count, channels, shapes = len(levels), levels[0].shape[-1], [grid(x) for x in levels]
        fan_in = uniform(self.config.offset_scale * (9 * channels) ** -0.5)
        fan_in = fan_in if self.config.deformable else nn.initializers.zeros
        offset = nn.Conv(
            27, (3, 3), padding=1, dtype=self.dtype, kernel_init=fan_in, bias_init=fan_in,
            conv_general_dilated=_narrow_convolution, name="offset",
        )  # fmt: skip
        attention = nn.Dense(1, dtype=jnp.float32, kernel_init=small_normal, name="attention")
        relu, rows = _DynamicReLU(name="relu"), rows_of(levels)

        def convolve(
            name: Kind, sources: range, maps: list[Array], stride: int = 1
        ) -> list[tuple[Float[Array, "B h w C"], _Moments, _Affine]]:
            """Convolution `name` of the levels `sources`, each with an offset map; moments and norm of each result."""
            kernel = self.param(f"{name}_kernel", uniform((9 * channels) ** -0.5), (3, 3, channels, channels))
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (channels,))
            norm = GroupNorm(self.config.groups, name=f"{name}_norm")
            if self.config.deformable:
                taps = [
                    Taps(source, stride, x[..., :_OFFSETS].reshape(*x.shape[:3], 9, 2), nn.sigmoid(x[..., _OFFSETS:]))
                    for source, x in zip(sources, maps)
                ]
                out = deformable_convolution(rows, taps, kernel, bias, bound=self.config.offset_bound)
            else:
                # Offsets of 0, at which the masks are 1/2.
                out = [_regular_convolution(levels[i], kernel / 2, stride) + bias for i in sources]
            targets = [source + 1 if stride == 2 else source for source in sources]
            moments = [_moments(x, sizes[i]) for x, i in zip(out, targets)]
            return [(x, own, norm(own)) for x, own in zip(out, moments)]

        maps = self._bounded([save_activation(offset(x).astype(jnp.float32)) for x in levels], sizes)
        for_coarser = [self._coarser(maps[i], sizes[i], sizes[i + 1], shapes[i + 1]) for i in range(count - 1)]
        same = convolve("same", range(count), maps)
        fine = convolve("fine", range(count - 1), maps[1:], stride=2)
        coarse = convolve("coarse", range(1, count), for_coarser)
        new = []
        for i, size in enumerate(sizes):
            terms = [_Term(x, norm, own.mean) for x, own, norm in (same[i], *fine[i - 1 : i])]
            # The finest level has no finer neighbor, the coarsest no coarser one.
            for x, _, norm in coarse[i : i + 1]:
                # A norm and a resize commute: the weights of a resize have the sum 1.
                resized = resize_bilinear(mask_padding(x, sizes[i + 1]), sizes[i + 1], size, shapes[i])
                terms.append(_Term(resized, norm, _moments(resized, size).mean))
            new.append(self._combined(terms, attention, relu))
        return tuple(new)

    def _combined(self, terms: Sequence[_Term], attention: nn.Dense, relu: _DynamicReLU) -> Float[Array, "B h w C"]:
        """Weighted mean of the terms of a level after their norms, and the dynamic ReLU, in one pass over the maps.

        All but the maximum is affine by channel. So are the means that the weights and the coefficients depend on: they follow from
        those of the terms.
        """
        means = [term.mean * term.norm.scale + term.norm.shift for term in terms]
        weights = [_hard_sigmoid(nn.relu(attention(mean))) / len(terms) for mean in means]
        scales = [term.norm.scale * weight for term, weight in zip(terms, weights)]
        shift = _sum([term.norm.shift * weight for term, weight in zip(terms, weights)])
        first, second = relu(_sum([mean * weight for mean, weight in zip(means, weights)]))

        def over_cells(x: Array) -> Float[Array, "B 1 1 C"]:
            return x[:, None, None]

        total = _sum([term.map.astype(jnp.float32) * over_cells(scale) for term, scale in zip(terms, scales)])
        total += over_cells(shift)
        branches = [total * over_cells(x.scale) + over_cells(x.shift) for x in (first, second)]
        return jnp.maximum(*branches).astype(self.dtype)

    def _bounded(self, maps: list[Array], sizes: Sequence[Int[Array, "B 2"]]) -> list[Array]:
        """The offset maps with offsets clamped to the bound; clamped offsets are counted over the valid cells.

        Offsets for the coarser level are copies or weighted means of these, so they are within the bound as well.
        """
        bound = self.config.offset_bound
        if not bound:
            return maps
        exceeding = [
            exceeds_bound(x[..., :_OFFSETS], bound) & valid_mask(size, *grid(x)) for x, size in zip(maps, sizes)
        ]
        clamped = jnp.stack([x.sum((1, 2, 3)) for x in exceeding]).sum(0)
        self.sow("intermediates", "offsets_clamped", clamped / (_OFFSETS * sum(size.prod(-1) for size in sizes)))
        return [jnp.concatenate([clamp_offsets(x[..., :_OFFSETS], bound), x[..., _OFFSETS:]], -1) for x in maps]

    def _coarser(self, maps: Array, size: Array, coarse: Array, shape: tuple[int, int]) -> Array:
        """The offset map of a level (offsets and mask logits) for its coarser neighbor."""
        masked = jnp.where(valid_mask(size, *maps.shape[1:3]), maps, 0.0)
        match self.config.coarse_offsets:
            case "flat":
                parts = (masked[..., :_OFFSETS], masked[..., _OFFSETS:])
                return jnp.concatenate([reread_flat(part, size, coarse, shape) for part in parts], -1)
            case "resized":
                return resize_bilinear(masked, size, coarse, shape)
