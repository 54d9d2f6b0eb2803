"""Modulated deformable convolution v2 (arXiv 1811.11168), 3 x 3, one group, over the maps of a pyramid, in plain JAX.

Output (y, x) samples tap k = 3 i + j bilinearly at (y * stride - 1 + i + dy, x * stride - 1 + j + dx), times its mask;
what lies outside the image counts zero (glip-reference 2.7). The input must be zero beyond each image's extent: then
no image needs to know its own border.

All maps of a pyramid lie in one array of rows (`Rows`), so that one call serves every level that shares a kernel: few
large operations instead of many small ones, which compile several times as fast.

Two forms of the same sum, with a hand-written backward pass that samples again instead of storing samples:

* `gather`: four row gathers a tap; backward scatters. What accelerators and sharded arrays want.
* `loop`: on a single CPU device one loop over samples reads and adds whole rows in place, a few output rows at a time
  so that they stay in the cache. XLA's scatter takes ten times as long there.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from glip_jax.models.remat import costly

__all__ = ["Rows", "Taps", "deformable_convolution", "rows_of"]

_TAPS = 9
_CHUNK = 64
"""Outputs per chunk of the loop form: 64 x 9 samples of 256 channels are 590 kB."""


class Rows(NamedTuple):
    """The cells of several maps as rows, each map padded by one zero cell all round."""

    values: Float[Array, "R C"]
    shapes: tuple[tuple[int, int, int], ...]
    """Images, height and width of each map, unpadded."""


class Taps(NamedTuple):
    """One convolution of a map of `Rows`: which map, its stride, and where its taps go."""

    source: int
    stride: int
    offsets: Float[Array, "B h w 9 2"]
    """(dy, dx) in cells."""
    mask: Float[Array, "B h w 9"]


class _Samples(NamedTuple):
    """Where to sample: M = 9 samples per output cell."""

    upper: Int[Array, " M"]
    """Row of the upper left neighbour; its right neighbour is the next row."""
    lower: Int[Array, " M"]
    """Row of the lower left neighbour."""
    weight: Float[Array, "M 4"]
    """Weights of the neighbours (0,0), (0,1), (1,0), (1,1), mask included; zero outside."""


def rows_of(maps: Sequence[Float[Array, "B _ _ C"]]) -> Rows:
    """Maps, zero beyond each image's own cells, as rows."""
    padded = [jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(-1, x.shape[-1]) for x in maps]
    return Rows(jnp.concatenate(padded), tuple((x.shape[0], x.shape[1], x.shape[2]) for x in maps))


def _samples(taps: Taps, shapes: tuple[tuple[int, int, int], ...]) -> _Samples:
    b, h, w = taps.offsets.shape[:3]
    _, height, width = shapes[taps.source]
    base = sum(n * (h_ + 2) * (w_ + 2) for n, h_, w_ in shapes[: taps.source])
    tap = jnp.arange(_TAPS)
    top = (jnp.arange(h) * taps.stride - 1)[:, None, None] + tap // 3
    left = (jnp.arange(w) * taps.stride - 1)[None, :, None] + tap % 3
    y, x = taps.offsets[..., 0] + top, taps.offsets[..., 1] + left
    seen = (y > -1) & (y < height) & (x > -1) & (x < width)
    # NaN and far away positions fail `seen`; their index must still be in range.
    y, x = jnp.where(seen, y, 0.0), jnp.where(seen, x, 0.0)
    y0, x0 = jnp.floor(y), jnp.floor(x)
    fy, fx = y - y0, x - x0
    weight = jnp.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
    weight = jnp.where(seen[..., None], weight * taps.mask[..., None], 0.0)
    upper = (y0.astype(jnp.int32) + 1) * (width + 2) + x0.astype(jnp.int32) + 1
    upper += (base + jnp.arange(b) * (height + 2) * (width + 2))[:, None, None, None]
    upper = upper.reshape(-1)
    return _Samples(upper, upper + width + 2, weight.reshape(-1, 4))


def _neighbours(samples: _Samples) -> tuple[Array, Array, Array, Array]:
    """Rows of the four neighbours, in the order of the weights."""
    return samples.upper, samples.upper + 1, samples.lower, samples.lower + 1


# --- the gather form -------------------------------------------------------------------------------------------------


def _gather_columns(x: Float[Array, "R C"], samples: _Samples) -> Float[Array, "M C"]:
    parts = (
        x.at[row].get(mode="promise_in_bounds") * samples.weight[:, k, None].astype(x.dtype)
        for k, row in enumerate(_neighbours(samples))
    )
    return sum(parts, start=jnp.zeros((), x.dtype))


def _forward_gather(x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"]) -> Float[Array, "P O"]:
    columns = _gather_columns(x, samples)
    return columns.reshape(-1, kernel.shape[0]) @ kernel


def _backward_gather(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], g: Float[Array, "P O"]
) -> tuple[Float[Array, "R C"], Float[Array, "M 4"], Float[Array, "K O"]]:
    columns = _gather_columns(x, samples)
    dkernel = columns.reshape(-1, kernel.shape[0]).T @ g
    dcolumns = (g @ kernel.T).reshape(columns.shape)
    dx, dweight = jnp.zeros_like(x), []
    for k, row in enumerate(_neighbours(samples)):
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
    upper, lower = (jnp.pad(row, (0, spare)).reshape(chunks, -1) for row in (samples.upper, samples.lower))
    weight = jnp.pad(samples.weight, ((0, spare), (0, 0))).reshape(chunks, -1, 4)
    return _Samples(upper, lower, weight), chunks


def _near(x: Float[Array, "R C"], chunk: _Samples, i: Array) -> list[Float[Array, "1 C"]]:
    """The four neighbours of sample `i`."""
    rows = (chunk.upper[i], chunk.upper[i] + 1, chunk.lower[i], chunk.lower[i] + 1)
    return [lax.dynamic_slice(x, (row, 0), (1, x.shape[1])) for row in rows]


def _columns_of_chunk(x: Float[Array, "R C"], chunk: _Samples) -> Float[Array, "m C"]:
    channels = x.shape[1]

    def body(i: Array, columns: Float[Array, "m C"]) -> Float[Array, "m C"]:
        near = _near(x, chunk, i)
        weight = chunk.weight[i].astype(x.dtype)
        sample = near[0] * weight[0] + near[1] * weight[1] + near[2] * weight[2] + near[3] * weight[3]
        return lax.dynamic_update_slice(columns, sample, (i, 0))

    size = chunk.upper.shape[0]
    return lax.fori_loop(0, size, body, jnp.zeros((size, channels), x.dtype))


def _forward_loop(x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"]) -> Float[Array, "P O"]:
    outputs = samples.upper.shape[0] // _TAPS
    chunked, _ = _chunked(samples, outputs)

    def one(chunk: _Samples) -> Float[Array, "p O"]:
        return _columns_of_chunk(x, chunk).reshape(_CHUNK, -1) @ kernel

    return lax.map(one, chunked).reshape(-1, kernel.shape[1])[:outputs]


def _backward_loop(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], g: Float[Array, "P O"]
) -> tuple[Float[Array, "R C"], Float[Array, "M 4"], Float[Array, "K O"]]:
    outputs, channels = g.shape[0], x.shape[1]
    chunked, chunks = _chunked(samples, outputs)
    spare = chunks * _CHUNK - outputs
    g_chunks = jnp.pad(g, ((0, spare), (0, 0))).reshape(chunks, _CHUNK, -1)

    def one(carry: tuple[Array, Array], item: tuple[_Samples, Array]) -> tuple[tuple[Array, Array], Array]:
        dx, dkernel = carry
        chunk, g_chunk = item
        columns = _columns_of_chunk(x, chunk).reshape(_CHUNK, -1)
        dkernel += jnp.matmul(columns.T, g_chunk, preferred_element_type=jnp.float32)
        dcolumns = (g_chunk @ kernel.T).reshape(-1, channels)

        def body(i: Array, inner: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, dweight = inner
            d = lax.dynamic_slice(dcolumns, (i, 0), (1, channels))
            share = jnp.concatenate(_near(x, chunk, i), 0) @ d[0]
            dweight = lax.dynamic_update_slice(dweight, share[None].astype(jnp.float32), (i, 0))
            rows = (chunk.upper[i], chunk.upper[i] + 1, chunk.lower[i], chunk.lower[i] + 1)
            for k, row in enumerate(rows):
                at = (row, 0)
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


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], form: Form
) -> Float[Array, "P O"]:
    return _dispatch(form, _forward_gather, _forward_loop, x, samples, kernel)


def _dispatch(form: Form, gather: Any, loop: Any, *arrays: Any) -> Any:
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


def _convolve_forward(x: Array, samples: _Samples, kernel: Array, form: Form) -> tuple[Array, Any]:
    return _convolve(x, samples, kernel, form), (x, samples, kernel)


def _convolve_backward(form: Form, saved: Any, g: Array) -> tuple[Array, _Samples, Array]:
    x, samples, kernel = saved
    dx, dweight, dkernel = _dispatch(form, _backward_gather, _backward_loop, x, samples, kernel, g)
    # Integers have no gradient; JAX spells that as a zero of type float0.
    none = np.zeros(samples.upper.shape, jax.dtypes.float0)
    return dx, _Samples(none, none, dweight), dkernel  # pyright: ignore[reportArgumentType]


_convolve.defvjp(_convolve_forward, _convolve_backward)


def deformable_convolution(
    rows: Rows,
    taps: Sequence[Taps],
    kernel: Float[Array, "3 3 C O"],
    bias: Float[Array, " O"],
    form: Form = "auto",
) -> list[Float[Array, "B _ _ O"]]:
    """One output per element of `taps`, of its offsets' height and width, all with one kernel.

    The maps in `rows` must be zero beyond each image's own cells.
    """
    parts = [_samples(t._replace(offsets=t.offsets.astype(jnp.float32)), rows.shapes) for t in taps]
    samples = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(rows.values.dtype)
    convolved = costly(_convolve(rows.values, samples, flat, form))
    out = convolved + bias.astype(rows.values.dtype)
    shapes = [t.mask.shape[:3] for t in taps]
    ends = np.cumsum([b * h * w for b, h, w in shapes])[:-1].tolist()
    return [part.reshape(*shape, -1) for part, shape in zip(jnp.split(out, ends), shapes)]
