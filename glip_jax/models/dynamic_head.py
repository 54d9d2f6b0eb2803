"""Dynamic head (DyConv, arXiv 2106.08322) as in GLIP (glip-reference 2.7).

A block applies deformable convolutions to every level and its neighbor levels. They share one offset map per level. The two or
three results per level are weighted by pooled attention, averaged, and passed through a dynamic ReLU (arXiv 2003.10027).
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from glip_jax.config import HeadConfig
from glip_jax.models.deformable import Taps, clamp_offsets, deformable_convolution, exceeds_bound, rows_of
from glip_jax.models.extents import (
    Cells,
    broadcast_levels,
    cells_of,
    grid,
    level_mean,
    mask_padding,
    pack,
    resize_bilinear,
    unpack,
    valid_mask,
)  # fmt: skip
from glip_jax.models.initializers import small_normal, torch_dense, uniform

__all__ = ["DynamicConvolution", "GroupNorm", "reread_flat"]

Term = Literal["coarse", "same", "fine"]
"""The three convolutions of a block: of the coarser, the same and the finer level."""

_OFFSETS = 18
"""Offset channels of an offset map (9 taps x (dy, dx)); 9 mask channels follow."""


def _hard_sigmoid(x: jax.Array) -> jax.Array:
    return nn.relu6(x + 3.0) / 6.0


class GroupNorm(nn.Module):
    """Group normalization (arXiv 1803.08494) per level of a packed pyramid, over the valid cells of each image."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, packed: Float[Array, "B A C"], cells: Cells) -> Float[Array, "B A C"]:
        """Statistics and products in float32."""
        channels = packed.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def by_group(mean: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
            # All channels have equally many cells, so the mean of a group is the mean over its channels.
            mean = mean.reshape(*mean.shape[:2], self.groups, -1).mean(-1)
            return jnp.repeat(mean, channels // self.groups, 2)

        centered = packed.astype(jnp.float32) - broadcast_levels(by_group(level_mean(packed, cells)), cells)
        variance = by_group(level_mean(jnp.square(centered), cells))
        return (centered * broadcast_levels(jax.lax.rsqrt(variance + 1e-5) * scale, cells) + bias).astype(self.dtype)


def reread_flat(
    x: Float[Array, "B h w K"], size: Int[Array, "B 2"], coarse: Int[Array, "B 2"], shape: tuple[int, int]
) -> Float[Array, "B H W K"]:
    """Offsets of a level for its coarser neighbor, as the original reads them: the buffer with the wrong strides.

    Per image, the memory of [K, h, w] of the size of the image is read as if it were [K, H, W] of the size `coarse`
    (glip-reference 2.7, quirk 1). Released weights depend on it.
    """
    batch, height, width, channels = x.shape
    (fine_h, fine_w), (coarse_h, coarse_w) = size.T[:, :, None, None, None], coarse.T[:, :, None, None, None]
    channel, row, column = jnp.meshgrid(jnp.arange(channels), jnp.arange(shape[0]), jnp.arange(shape[1]), indexing="ij")
    flat = channel * coarse_h * coarse_w + row * coarse_w + column
    # Padding cells may point anywhere; keep their reads in range.
    source, cell = jnp.minimum(flat // (fine_h * fine_w), channels - 1), flat % (fine_h * fine_w)
    flat = ((cell // fine_w) * width + cell % fine_w) * channels + source
    values = jnp.take_along_axis(x.reshape(batch, -1), flat.reshape(batch, -1), 1, mode="clip")
    return jnp.moveaxis(values.reshape(batch, channels, *shape), 1, 3)


def _narrow_convolution(
    x: Float[Array, "B h w C"], kernel: Float[Array, "3 3 C O"], *args: Any, **kwargs: Any
) -> Array:
    """`lax.conv_general_dilated` for few output channels, 3 x 3 with stride and padding 1.

    On CPUs the gradients of XLA's convolution take fifty times as long as its forward pass. There, all nine taps are one
    matrix product, and its shifted outputs, narrower than the inputs, are added.
    """

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        height, width, outputs = *x.shape[1:3], kernel.shape[-1]
        taps = x @ jnp.moveaxis(kernel, 2, 0).reshape(x.shape[-1], 9 * outputs)
        taps = jnp.pad(taps, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(x.shape[0], height + 2, width + 2, 9, outputs)
        return sum(
            (taps[:, k // 3 : k // 3 + height, k % 3 : k % 3 + width, k] for k in range(9)),
            start=jnp.zeros((), x.dtype),
        )

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=whole)


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
    """max(a1 x + b1, a2 x + b2) with coefficients from the mean of each level."""

    dtype: Any

    @nn.compact
    def __call__(self, packed: Float[Array, "B A C"], cells: Cells) -> Float[Array, "B A C"]:
        channels = packed.shape[-1]
        pooled = level_mean(packed, cells)
        hidden = nn.relu(torch_dense(channels // 4, channels, jnp.float32, "squeeze")(pooled))
        theta = _hard_sigmoid(torch_dense(4 * channels, channels // 4, jnp.float32, "expand")(hidden)) - 0.5
        a1, b1, a2, b2 = jnp.split(theta, 4, -1)
        a1, b1, a2, b2 = (broadcast_levels(x, cells) for x in (a1 * 2.0 + 1.0, b1, a2 * 2.0, b2))
        return jnp.maximum(packed * a1 + b1, packed * a2 + b2).astype(self.dtype)


class DynamicConvolution(nn.Module):
    """One DyConv block over all levels."""

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
        rows = rows_of(levels)

        def convolve(name: Term, sources: range, maps: list[Array], stride: int = 1) -> tuple[Array, Cells]:
            """Convolution `name` with its norm for the levels `sources`, each with an offset map; packed."""
            kernel, bias, norm = self._term(name, channels)
            targets = [source + 1 if stride == 2 else source for source in sources]
            cells = cells_of([shapes[i] for i in targets], [sizes[i] for i in targets])
            if not self.config.deformable:
                # Offsets of 0, at which the masks are 1/2.
                return norm(
                    pack([_regular_convolution(levels[i], kernel / 2, stride) + bias for i in sources]), cells
                ), cells
            taps = [
                Taps(source, stride, x[..., :_OFFSETS].reshape(*x.shape[:3], 9, 2), nn.sigmoid(x[..., _OFFSETS:]))
                for source, x in zip(sources, maps)
            ]
            out = deformable_convolution(rows, taps, kernel, bias, bound=self.config.offset_bound)
            return norm(pack(out), cells), cells

        def weighted(term: Array, cells: Cells) -> Array:
            weight = _hard_sigmoid(nn.relu(attention(level_mean(term, cells))))
            return term.astype(jnp.float32) * broadcast_levels(weight, cells)

        maps = self._bounded([offset(x).astype(jnp.float32) for x in levels], sizes)
        for_coarser = [self._coarser(maps[i], sizes[i], sizes[i + 1], shapes[i + 1]) for i in range(count - 1)]
        same, cells = convolve("same", range(count), maps)
        fine, below = convolve("fine", range(count - 1), maps[1:], stride=2)
        coarse, _ = convolve("coarse", range(1, count), for_coarser)
        resized = [
            resize_bilinear(mask_padding(term, sizes[i + 1]), sizes[i + 1], sizes[i], shapes[i])
            for i, term in enumerate(unpack(coarse, shapes[1:]))
        ]
        above = cells_of(shapes[:-1], sizes[:-1])
        # The finest level has no finer neighbor, the coarsest no coarser one.
        missing, last = (int(np.prod(shape)) for shape in (shapes[0], shapes[-1]))
        total = weighted(same, cells)
        total += jnp.pad(weighted(fine, below), ((0, 0), (missing, 0), (0, 0)))
        total += jnp.pad(weighted(pack(resized), above), ((0, 0), (0, last), (0, 0)))
        terms = np.repeat([2.0, *[3.0] * (count - 2), 2.0], [h * w for h, w in shapes]).astype(np.float32)
        return tuple(unpack(_DynamicReLU(self.dtype, name="relu")(total / terms[:, None], cells), shapes))

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
