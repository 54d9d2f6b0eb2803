"""Modulated deformable convolution v2 (arXiv 1811.11168), 3 x 3, one group, in plain JAX.

Output (y, x) samples tap k = 3 i + j bilinearly at (y * stride - 1 + i + dy, x * stride - 1 + j + dx), times its mask;
what lies outside the image counts zero (glip-reference 2.7). The input must be zero beyond each image's extent: then
no image needs to know its own border.

Two forms of the same sum, with a hand-written backward pass that samples again instead of storing samples:

* `gather`: four row gathers a tap; backward scatters. What accelerators and sharded arrays want.
* `loop`: on a single CPU device one loop over samples reads and adds whole rows in place, a few output rows at a time
  so that they stay in the cache. XLA's scatter takes ten times as long there.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = ["deformable_convolution"]

_TAPS = 9
_CHUNK = 64
"""Outputs per chunk of the loop form: 64 x 9 samples of 256 channels are 590 kB."""


class _Samples(NamedTuple):
    """Where to sample: M = B * h * w * 9 samples, in the flat rows of a map padded by one cell all round."""

    row: Int[Array, " M"]
    """Flat index of the upper left neighbour."""
    weight: Float[Array, "M 4"]
    """Weights of the neighbours (0,0), (0,1), (1,0), (1,1), mask included; zero outside."""


def _samples(
    offsets: Float[Array, "B h w 9 2"], mask: Float[Array, "B h w 9"], shape: tuple[int, int], stride: int
) -> _Samples:
    b, h, w = offsets.shape[:3]
    height, width = shape
    tap = jnp.arange(_TAPS)
    top = (jnp.arange(h) * stride - 1)[:, None, None] + tap // 3
    left = (jnp.arange(w) * stride - 1)[None, :, None] + tap % 3
    y, x = offsets[..., 0] + top, offsets[..., 1] + left
    seen = (y > -1) & (y < height) & (x > -1) & (x < width)
    # NaN and far away positions fail `seen`; their index must still be in range.
    y, x = jnp.where(seen, y, 0.0), jnp.where(seen, x, 0.0)
    y0, x0 = jnp.floor(y), jnp.floor(x)
    fy, fx = y - y0, x - x0
    weight = jnp.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
    weight = jnp.where(seen[..., None], weight * mask[..., None], 0.0)
    row = (y0.astype(jnp.int32) + 1) * (width + 2) + x0.astype(jnp.int32) + 1
    row += (jnp.arange(b) * (height + 2) * (width + 2))[:, None, None, None]
    return _Samples(row.reshape(-1), weight.reshape(-1, 4))


def _neighbours(width: int) -> tuple[int, int, int, int]:
    """Flat distance of the four neighbours from the upper left one, in rows of `width` padded cells."""
    return 0, 1, width, width + 1


# --- the gather form -------------------------------------------------------------------------------------------------


def _gather_columns(x: Float[Array, "R C"], samples: _Samples, width: int) -> Float[Array, "M C"]:
    parts = (
        x.at[samples.row + step].get(mode="promise_in_bounds") * samples.weight[:, k, None].astype(x.dtype)
        for k, step in enumerate(_neighbours(width))
    )
    return sum(parts, start=jnp.zeros((), x.dtype))


def _forward_gather(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], width: int
) -> Float[Array, "P O"]:
    columns = _gather_columns(x, samples, width)
    return columns.reshape(-1, kernel.shape[0]) @ kernel


def _backward_gather(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], g: Float[Array, "P O"], width: int
) -> tuple[Float[Array, "R C"], Float[Array, "M 4"], Float[Array, "K O"]]:
    columns = _gather_columns(x, samples, width)
    dkernel = columns.reshape(-1, kernel.shape[0]).T @ g
    dcolumns = (g @ kernel.T).reshape(columns.shape)
    dx, dweight = jnp.zeros_like(x), []
    for k, step in enumerate(_neighbours(width)):
        row = samples.row + step
        near = x.at[row].get(mode="promise_in_bounds")
        dweight.append(jnp.einsum("mc,mc->m", near, dcolumns, preferred_element_type=jnp.float32))
        part = dcolumns * samples.weight[:, k, None].astype(x.dtype)
        dx = dx.at[row].add(part, mode="promise_in_bounds")
    return dx, jnp.stack(dweight, -1), dkernel


# --- the loop form ---------------------------------------------------------------------------------------------------


def _chunked(samples: _Samples, outputs: int) -> tuple[_Samples, int]:
    """Samples in chunks of _CHUNK outputs, padded by samples of weight zero."""
    chunks = -(-outputs // _CHUNK)
    spare = (chunks * _CHUNK - outputs) * _TAPS
    row = jnp.pad(samples.row, (0, spare)).reshape(chunks, -1)
    weight = jnp.pad(samples.weight, ((0, spare), (0, 0))).reshape(chunks, -1, 4)
    return _Samples(row, weight), chunks


def _columns_of_chunk(x: Float[Array, "R C"], chunk: _Samples, width: int) -> Float[Array, "m C"]:
    channels = x.shape[1]

    def body(i: Array, columns: Float[Array, "m C"]) -> Float[Array, "m C"]:
        near = [lax.dynamic_slice(x, (chunk.row[i] + step, 0), (1, channels)) for step in _neighbours(width)]
        weight = chunk.weight[i].astype(x.dtype)
        sample = near[0] * weight[0] + near[1] * weight[1] + near[2] * weight[2] + near[3] * weight[3]
        return lax.dynamic_update_slice(columns, sample, (i, 0))

    size = chunk.row.shape[0]
    return lax.fori_loop(0, size, body, jnp.zeros((size, channels), x.dtype))


def _forward_loop(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], width: int
) -> Float[Array, "P O"]:
    outputs = samples.row.shape[0] // _TAPS
    chunked, _ = _chunked(samples, outputs)

    def one(chunk: _Samples) -> Float[Array, "p O"]:
        return _columns_of_chunk(x, chunk, width).reshape(_CHUNK, -1) @ kernel

    return lax.map(one, chunked).reshape(-1, kernel.shape[1])[:outputs]


def _backward_loop(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], g: Float[Array, "P O"], width: int
) -> tuple[Float[Array, "R C"], Float[Array, "M 4"], Float[Array, "K O"]]:
    outputs, channels = g.shape[0], x.shape[1]
    chunked, chunks = _chunked(samples, outputs)
    spare = chunks * _CHUNK - outputs
    g_chunks = jnp.pad(g, ((0, spare), (0, 0))).reshape(chunks, _CHUNK, -1)

    def one(carry: tuple[Array, Array], item: tuple[_Samples, Array]) -> tuple[tuple[Array, Array], Array]:
        dx, dkernel = carry
        chunk, g_chunk = item
        columns = _columns_of_chunk(x, chunk, width).reshape(_CHUNK, -1)
        dkernel += jnp.matmul(columns.T, g_chunk, preferred_element_type=jnp.float32)
        dcolumns = (g_chunk @ kernel.T).reshape(-1, channels)

        def body(i: Array, inner: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, dweight = inner
            d = lax.dynamic_slice(dcolumns, (i, 0), (1, channels))
            near = [lax.dynamic_slice(x, (chunk.row[i] + step, 0), (1, channels)) for step in _neighbours(width)]
            share = jnp.concatenate(near, 0) @ d[0]
            dweight = lax.dynamic_update_slice(dweight, share[None].astype(jnp.float32), (i, 0))
            for k, step in enumerate(_neighbours(width)):
                at = (chunk.row[i] + step, 0)
                old = lax.dynamic_slice(dx, at, (1, channels))
                dx = lax.dynamic_update_slice(dx, old + d * chunk.weight[i, k].astype(x.dtype), at)
            return dx, dweight

        dx, dweight = lax.fori_loop(0, dcolumns.shape[0], body, (dx, jnp.zeros(chunk.weight.shape, jnp.float32)))
        return (dx, dkernel), dweight

    start = (jnp.zeros_like(x), jnp.zeros(kernel.shape, jnp.float32))
    (dx, dkernel), dweight = lax.scan(one, start, (chunked, g_chunks))
    return dx, dweight.reshape(-1, 4)[: outputs * _TAPS], dkernel.astype(kernel.dtype)


# --- both ------------------------------------------------------------------------------------------------------------

Form = Literal["auto", "gather", "loop"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _convolve(
    x: Float[Array, "R C"], row: Int[Array, " M"], weight: Float[Array, "M 4"], kernel: Float[Array, "K O"],
    width: int, form: Form,
) -> Float[Array, "P O"]:  # fmt: skip
    return _dispatch(form, _forward_gather, _forward_loop, x, _Samples(row, weight), kernel, width)


def _dispatch(form: Form, gather: Any, loop: Any, *operands: Any) -> Any:
    *arrays, width = operands
    gather, loop = partial(gather, width=width), partial(loop, width=width)
    match form:
        case "gather":
            return gather(*arrays)
        case "loop":
            return loop(*arrays)
        case "auto":
            # A loop over a sharded batch would gather all of it on every device.
            if jax.device_count() > 1:
                return gather(*arrays)
            return lax.platform_dependent(*arrays, cpu=loop, default=gather)


def _convolve_forward(x, row, weight, kernel, width, form):  # noqa: ANN001, ANN202
    return _convolve(x, row, weight, kernel, width, form), (x, row, weight, kernel)


def _convolve_backward(width, form, saved, g):  # noqa: ANN001, ANN202
    x, row, weight, kernel = saved
    dx, dweight, dkernel = _dispatch(form, _backward_gather, _backward_loop, x, _Samples(row, weight), kernel, g, width)
    return dx, None, dweight, dkernel


_convolve.defvjp(_convolve_forward, _convolve_backward)


def deformable_convolution(
    x: Float[Array, "B H W C"],
    offsets: Float[Array, "B h w 9 2"],
    mask: Float[Array, "B h w 9"],
    kernel: Float[Array, "3 3 C O"],
    bias: Float[Array, " O"],
    stride: int = 1,
    form: Form = "auto",
) -> Float[Array, "B h w O"]:
    """Samples `x` at the taps moved by `offsets` (dy, dx; cells) and weighted by `mask`, then applies `kernel`.

    The output has the offsets' height and width. `x` must be zero beyond each image's own cells.
    """
    b, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    samples = _samples(offsets.astype(jnp.float32), mask.astype(jnp.float32), (height, width), stride)
    flat = kernel.reshape(_TAPS * channels, -1).astype(x.dtype)
    out = _convolve(padded.reshape(-1, channels), samples.row, samples.weight, flat, width + 2, form)
    return out.reshape(*offsets.shape[:3], -1) + bias.astype(x.dtype)
