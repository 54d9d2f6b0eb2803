"""EfficientNet-Lite0 (arXiv 1905.11946, the Lite variant without squeeze-and-excitation) as a backbone for CPUs.

TensorFlow's SAME padding at stride 2 depends on the parity of the size, so extents and canvases are multiples of 32: then the
padding is (0, 1) for 3 x 3 and (1, 2) for 5 x 5 at every level, and an image reads zeros beyond its extent, as if it were alone.
The three outputs have a LayerNorm, as those of Swin: values of the linear bottlenecks have standard deviations of 3 to 7, with
which the initial offsets of the head would be several cells long. Batch normalization is always frozen: statistics and affine
parameters are folded into `frozen_scale` and `frozen_shift`, which get no gradient.
"""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from glip_jax.config import BackboneConfig
from glip_jax.models.extents import level_size, mask_padding

__all__ = ["OUTPUTS", "STAGES", "EfficientNetLite0", "depthwise"]

STAGES: tuple[tuple[int, int, int, int, int], ...] = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
"""Per stage: blocks, kernel, stride of the first block, expansion, output channels."""
STEM = 32
MULTIPLE = 32
OUTPUTS = (3, 5, 7)
"""Stages whose outputs have strides 8, 16, 32."""


def _padding(kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding for even sizes: (cells before, cells after)."""
    total = kernel - stride
    return total // 2, total - total // 2


def _taps(padded: Float[Array, "B h w C"], size: int, stride: int, height: int, width: int) -> list[Array]:
    """The inputs of each of size x size taps in a padded map, row by row."""
    return [
        padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted(x: Float[Array, "B h w C"], kernel: Float[Array, "k k 1 C"], stride: int) -> Float[Array, "B H W C"]:
    """A depthwise convolution as shifted multiply-adds.

    Automatic differentiation would keep k x k whole maps in memory. As the same sum over shifts of the gradient, with the flipped
    kernel, the backward pass takes a fraction of the time.
    """
    size = kernel.shape[0]
    pad = _padding(size, stride)
    padded = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    taps = _taps(padded, size, stride, x.shape[1] // stride, x.shape[2] // stride)
    return sum((tap * w for tap, w in zip(taps, kernel.reshape(size * size, -1))), start=jnp.zeros((), x.dtype))


def _shifted_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _shifted(x, kernel, stride), (x, kernel)


def _shifted_backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    size, (_, height, width, _) = kernel.shape[0], x.shape
    pad = _padding(size, stride)
    padded = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    taps = _taps(padded, size, stride, g.shape[1], g.shape[2])
    dkernel = jnp.stack([jnp.sum((tap * g).astype(jnp.float32), (0, 1, 2)) for tap in taps])

    # At stride 2 the gradient is dilated with zeros.
    def padding(length: int, outputs: int) -> tuple[int, int, int]:
        return size - 1 - pad[0], length + pad[0] - (stride * (outputs - 1) + 1), stride - 1

    around = ((0, 0, 0), padding(height, g.shape[1]), padding(width, g.shape[2]), (0, 0, 0))
    dilated = jax.lax.pad(g, jnp.zeros((), g.dtype), around)
    flipped = kernel[::-1, ::-1].reshape(size * size, -1)
    dx = sum((tap * w for tap, w in zip(_taps(dilated, size, 1, height, width), flipped)), start=jnp.zeros((), x.dtype))
    return dx, dkernel.reshape(kernel.shape).astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def depthwise(
    x: Float[Array, "B h w C"],
    kernel: Float[Array, "k k 1 C"],
    stride: int,
    implementation: Literal["platform", "shifted", "grouped"] = "platform",
) -> Float[Array, "B H W C"]:
    """Depthwise convolution with SAME padding for even sizes.

    XLA is slow at grouped convolutions on CPUs; there k x k shifted multiply-adds are several times faster. `platform`
    selects the implementation by the platform that the program is compiled for.
    """
    size, channels = kernel.shape[0], kernel.shape[-1]
    pad = _padding(size, stride)

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _shifted(x, kernel, stride)

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            (pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )

    match implementation:
        case "platform":
            return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=grouped)
        case "shifted":
            return shifted(x, kernel)
        case "grouped":
            return grouped(x, kernel)


class _FrozenNorm(nn.Module):
    """Batch normalization with fixed statistics: y = frozen_scale x + frozen_shift."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        scale = self.param("frozen_scale", nn.initializers.ones, (x.shape[-1],))
        shift = self.param("frozen_shift", nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.stop_gradient(scale).astype(self.dtype) + jax.lax.stop_gradient(shift).astype(self.dtype)


class _Block(nn.Module):
    """Inverted residual block: expand, depthwise, project; the input is added if shapes are equal."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B H W D"]:
        start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        y = x
        if self.expansion > 1:
            wide = self.expansion * x.shape[-1]
            y = nn.Dense(wide, use_bias=False, dtype=self.dtype, kernel_init=start, name="expand")(y)
            y = nn.relu6(_FrozenNorm(self.dtype, name="expand_norm")(y))
        # The fan-in of a depthwise kernel is k x k.
        fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("depthwise", fan_in, (self.kernel, self.kernel, 1, y.shape[-1]))
        y = depthwise(mask_padding(y, size), kernel.astype(self.dtype), self.stride)
        y = nn.relu6(_FrozenNorm(self.dtype, name="depthwise_norm")(y))
        y = nn.Dense(self.channels, use_bias=False, dtype=self.dtype, kernel_init=start, name="project")(y)
        y = _FrozenNorm(self.dtype, name="project_norm")(y)
        return x + y if self.stride == 1 and x.shape == y.shape else y


class _Stage(nn.Module):
    """Blocks of one kernel size and width; the first one has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], size: Int[Array, "B 2"]) -> Float[Array, "B H W D"]:
        for number in range(self.blocks):
            stride = self.stride if number == 0 else 1
            block = _Block(self.kernel, stride, self.expansion, self.channels, self.dtype, name=f"block{number + 1}")
            x = block(x, size)
            size = level_size(size, stride)
        return x


class EfficientNetLite0(nn.Module):
    """The EfficientNet-Lite0 backbone, without its classifier."""

    config: BackboneConfig
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], extent: Int[Array, "B 2"]
    ) -> tuple[Float[Array, "B h8 w8 C8"], Float[Array, "B h16 w16 C16"], Float[Array, "B h32 w32 C32"]]:
        """Maps of strides 8, 16, 32, zero beyond the extent, of normalized images that are zero beyond their size.

        Extents are multiples of 32 (`model.input.extent_multiple`). Raises ValueError for a canvas that is not. `train` has no
        effect: there is no dropout, and batch normalization is frozen.
        """
        height, width = image.shape[1:3]
        if height % MULTIPLE or width % MULTIPLE:
            raise ValueError(
                f"EfficientNet-Lite0 got a canvas of {height} x {width} pixels; its padding needs multiples of {MULTIPLE}"
            )
        frozen = self.config.frozen_stages
        start = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = mask_padding(image.astype(self.dtype), extent)
        pad = _padding(3, 2)
        conv = nn.Conv(
            STEM, (3, 3), (2, 2), (pad, pad), use_bias=False, dtype=self.dtype, kernel_init=start, name="stem"
        )
        x = nn.relu6(_FrozenNorm(self.dtype, name="stem_norm")(conv(x)))
        stride, outputs = 2, []
        for number, (blocks, kernel, step, expansion, channels) in enumerate(STAGES, start=1):
            if number == frozen + 1 and frozen:
                x = jax.lax.stop_gradient(x)
            stage = _Stage(blocks, kernel, step, expansion, channels, self.dtype, name=f"stage{number}")
            x = stage(x, level_size(extent, stride))
            stride *= step
            if number in OUTPUTS:
                # The output of a frozen stage also goes to the pyramid; no gradient may pass there either.
                output = jax.lax.stop_gradient(x) if number <= frozen else x
                norm = nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{len(outputs) + 1}")
                outputs.append(mask_padding(norm(output), level_size(extent, stride)))
        c3, c4, c5 = outputs
        return c3, c4, c5
