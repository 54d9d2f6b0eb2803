"""Feature pyramid (arXiv 1612.03144, P6 and P7 as in RetinaNet) with DropBlock (arXiv 1810.12890) in training.

glip-reference 2.3: lateral and output convolutions have no norm or activation; P6 is computed from P5, P7 from relu(P6).
DropBlock is applied to the merged laterals of strides 8 and 16, just before their output convolution; the top-down path is not
dropped.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glip_jax.config import PyramidConfig
from glip_jax.models.dropout import bernoulli
from glip_jax.models.extents import grid, level_size, mask_padding, resize_nearest, valid_mask
from glip_jax.models.initializers import kaiming_uniform

__all__ = ["Pyramid", "drop_block"]


def drop_block(
    key: jax.Array, x: Float[Array, "B h w C"], size: Int[Array, "B 2"], config: PyramidConfig
) -> Float[Array, "B h w C"]:
    """Zeroes squares of `drop_block_size` x `drop_block_size` cells over all channels and rescales the rest.

    Centers are Bernoulli(rate / size^2) per cell. The rest is divided by the kept fraction, which is taken per image over its
    valid cells, or over the whole canvas of all examples on a device, as in the original.
    """
    block = config.drop_block_size
    centers = bernoulli(key, config.drop_block / block**2, (*x.shape[:3], 1)).astype(jnp.float32)
    valid = valid_mask(size, x.shape[1], x.shape[2])
    if config.drop_block_over == "image":
        centers = jnp.where(valid, centers, 0.0)
    keep = 1.0 - nn.max_pool(centers, (block, block), padding="SAME")
    match config.drop_block_over:
        case "image":
            keep = jnp.where(valid, keep, 0.0)
            share = valid.sum((1, 2), keepdims=True) / jnp.maximum(keep.sum((1, 2), keepdims=True), 1.0)
        case "batch":
            share = keep.size / jnp.maximum(keep.sum(), 1.0)
    return (x * keep * share).astype(x.dtype)


class Pyramid(nn.Module):
    """Feature pyramid with the strides of the config, from backbone maps of strides 8, 16 and 32."""

    config: PyramidConfig
    train: bool = False
    dtype: Any = jnp.float32

    def _conv(self, name: str, kernel: int, stride: int = 1) -> nn.Conv:
        return nn.Conv(
            self.config.channels, (kernel, kernel), stride, padding=kernel // 2, dtype=self.dtype,
            kernel_init=kaiming_uniform, name=name,
        )  # fmt: skip

    @nn.compact
    def __call__(
        self, features: tuple[Float[Array, "B _ _ _"], ...], extent: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B _ _ C"], ...]:
        """(p3, ..., p7), or the levels in `strides`, from (c3, c4, c5); zero beyond the extent."""
        strides = self.config.strides
        merged: Array | None = None
        outputs: dict[int, Array] = {}
        for level, feature in reversed(list(enumerate(features, start=3))):
            stride = 2**level
            if stride < strides[0]:
                break
            size = level_size(extent, stride)
            lateral = self._conv(f"lateral{level}", 1)(feature)
            if merged is not None:
                lateral += resize_nearest(merged, level_size(extent, 2 * stride), size, grid(lateral))
            merged = kept = mask_padding(lateral, size)
            if self.train and self.config.drop_block > 0 and stride < 32:
                kept = drop_block(self.make_rng("dropout"), merged, size, self.config)
            outputs[stride] = mask_padding(self._conv(f"output{level}", 3)(kept), size)
        for level, stride in enumerate(strides, start=strides[0].bit_length() - 1):
            if stride > 32:
                finer = outputs[stride // 2]
                x = nn.relu(finer) if stride > 64 else finer
                outputs[stride] = mask_padding(self._conv(f"extra{level}", 3, 2)(x), level_size(extent, stride))
        return tuple(outputs[stride] for stride in strides)
