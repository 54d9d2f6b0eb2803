"""Modulated deformable convolution v2 (arXiv 1811.11168), 3 x 3, one group, over the maps of a pyramid, in plain JAX.

Output (y, x) samples tap k = 3 i + j bilinearly at (y * stride - 1 + i + dy, x * stride - 1 + j + dx) and multiplies it with its
mask; positions outside of the map count as zero (glip-reference 2.7). The input must be zero beyond the extent of each image, so
that the border of the extent needs no further treatment.

All maps of a pyramid are rows of one array (`Rows`), so that one call serves all levels that share a kernel: few large operations
compile several times as fast as many small ones.

Three implementations of the same sum, with custom backward passes that sample again instead of storing samples:

* `gather`: four row gathers per tap; the backward pass scatters. For accelerators. Many outputs are computed in parts, one after
  the other: the samples of four images of 800 x 1344 at once would take gigabytes.
* `loop`: for a single CPU device. One loop over samples reads and adds whole rows in place, for few outputs at a time, so that
  they stay in the cache. XLA's scatter takes ten times as long there.
* `window`: matrix products instead of gathers, for bounded offsets (`kernels.deformable`). For TPUs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from glip_jax.models.kernels.blocks import is_possible, open_batch_axes, per_device
from glip_jax.models.kernels.deformable import window_backward, window_forward
from glip_jax.models.kernels.tiling import limits
from glip_jax.models.remat import save_activation

__all__ = ["Rows", "Taps", "clamp_offsets", "deformable_convolution", "exceeds_bound", "rows_of"]

_TAPS = 9
_CHUNK = 64
"""Outputs per chunk of the implementation `loop`: 64 x 9 samples of 256 channels are 590 kB."""
_MAX_GATHERED = 24_576
"""Maximum number of outputs at once of the implementation `gather`, slightly more than an image of 800 x 1344 has on P3 to P7:
with 256 channels in bfloat16 their samples are 113 MB, and a backward pass holds several such arrays."""


class Rows(NamedTuple):
    """Several maps, and their cells as rows; each map is padded by one zero cell on all sides."""

    values: Float[Array, "R C"]
    maps: tuple[Float[Array, "B _ _ C"], ...]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(images, height, width) of each map without padding."""
        return tuple((x.shape[0], x.shape[1], x.shape[2]) for x in self.maps)


class Taps(NamedTuple):
    """One convolution of a map of `Rows`: index of the map, stride, offsets and masks of the taps."""

    source: int
    stride: int
    offsets: Float[Array, "B h w 9 2"]
    """(dy, dx) in cells."""
    mask: Float[Array, "B h w 9"]


class _Samples(NamedTuple):
    """Sampling positions: M = 9 samples per output cell."""

    upper: Int[Array, " M"]
    """Row of the upper left neighbor; its right neighbor is the next row."""
    lower: Int[Array, " M"]
    """Row of the lower left neighbor."""
    weight: Float[Array, "M 4"]
    """Weights of the neighbors (0,0), (0,1), (1,0), (1,1), multiplied with the mask; zero outside of the map."""


def rows_of(maps: Sequence[Float[Array, "B _ _ C"]]) -> Rows:
    """The rows of maps that are zero beyond the extent of each image."""
    padded = [jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(-1, x.shape[-1]) for x in maps]
    return Rows(jnp.concatenate(padded), tuple(maps))


def _samples(taps: Taps, shapes: tuple[tuple[int, int, int], ...]) -> _Samples:
    b, h, w = taps.offsets.shape[:3]
    _, height, width = shapes[taps.source]
    base = sum(n * (h_ + 2) * (w_ + 2) for n, h_, w_ in shapes[: taps.source])
    tap = jnp.arange(_TAPS)
    top = (jnp.arange(h) * taps.stride - 1)[:, None, None] + tap // 3
    left = (jnp.arange(w) * taps.stride - 1)[None, :, None] + tap % 3
    y, x = taps.offsets[..., 0] + top, taps.offsets[..., 1] + left
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    # Positions that are NaN or outside of the map still need an index in range.
    y, x = jnp.where(inside, y, 0.0), jnp.where(inside, x, 0.0)
    y0, x0 = jnp.floor(y), jnp.floor(x)
    fy, fx = y - y0, x - x0
    weight = jnp.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], -1)
    weight = jnp.where(inside[..., None], weight * taps.mask[..., None], 0.0)
    upper = (y0.astype(jnp.int32) + 1) * (width + 2) + x0.astype(jnp.int32) + 1
    upper += (base + jnp.arange(b) * (height + 2) * (width + 2))[:, None, None, None]
    upper = upper.reshape(-1)
    return _Samples(upper, upper + width + 2, weight.reshape(-1, 4))


def _neighbors(samples: _Samples) -> tuple[Array, Array, Array, Array]:
    """Rows of the four neighbors, in the order of the weights."""
    return samples.upper, samples.upper + 1, samples.lower, samples.lower + 1


# --- gather ----------------------------------------------------------------------------------------------------------


def _gather_columns(x: Float[Array, "R C"], samples: _Samples) -> Float[Array, "M C"]:
    parts = (
        x.at[row].get(mode="promise_in_bounds") * samples.weight[:, k, None].astype(x.dtype)
        for k, row in enumerate(_neighbors(samples))
    )
    return sum(parts, start=jnp.zeros((), x.dtype))


def _forward_gather(x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"]) -> Float[Array, "P O"]:
    def one(part: _Samples) -> Float[Array, "p O"]:
        return _gather_columns(x, part).reshape(-1, kernel.shape[0]) @ kernel

    outputs, size = samples.upper.shape[0] // _TAPS, _part_size(samples)
    if size == outputs:
        return one(samples)
    return lax.map(one, _chunked(samples, size)).reshape(-1, kernel.shape[1])[:outputs]


def _backward_gather(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], g: Float[Array, "P O"]
) -> tuple[Float[Array, "R C"], Float[Array, "M 4"], Float[Array, "K O"]]:
    def one(carry: tuple[Array, Array], item: tuple[_Samples, Array]) -> tuple[tuple[Array, Array], Array]:
        (dx, dkernel), (part, g_part) = carry, item
        columns = _gather_columns(x, part)
        dkernel += jnp.matmul(columns.reshape(-1, kernel.shape[0]).T, g_part, preferred_element_type=jnp.float32)
        dcolumns, dweight = (g_part @ kernel.T).reshape(columns.shape), []
        for k, row in enumerate(_neighbors(part)):
            near = x.at[row].get(mode="promise_in_bounds")
            dweight.append(jnp.einsum("mc,mc->m", near, dcolumns, preferred_element_type=jnp.float32))
            weighted = dcolumns * part.weight[:, k, None].astype(x.dtype)
            dx = dx.at[row].add(weighted, mode="promise_in_bounds")
        return (dx, dkernel), jnp.stack(dweight, -1)

    start = (jnp.zeros_like(x), jnp.zeros(kernel.shape, jnp.float32))
    outputs, size = g.shape[0], _part_size(samples)
    if size == outputs:
        (dx, dkernel), dweight = one(start, (samples, g))
    else:
        (dx, dkernel), dweight = lax.scan(one, start, (_chunked(samples, size), _rows_chunked(g, size)))
    return dx, dweight.reshape(-1, 4)[: outputs * _TAPS], dkernel.astype(kernel.dtype)


def _part_size(samples: _Samples) -> int:
    """Outputs of each part of the implementation `gather`: equal parts, none above _MAX_GATHERED."""
    outputs = samples.upper.shape[0] // _TAPS
    return -(-outputs // -(-outputs // _MAX_GATHERED))


def _chunked(samples: _Samples, size: int) -> _Samples:
    """Samples in chunks of `size` outputs (a new leading axis), padded by samples of weight zero."""
    spare = -(samples.upper.shape[0] // _TAPS) % size * _TAPS
    upper, lower = (jnp.pad(row, (0, spare)).reshape(-1, size * _TAPS) for row in (samples.upper, samples.lower))
    weight = jnp.pad(samples.weight, ((0, spare), (0, 0))).reshape(-1, size * _TAPS, 4)
    return _Samples(upper, lower, weight)


def _rows_chunked(g: Float[Array, "P O"], size: int) -> Float[Array, "_ size O"]:
    """Gradients of outputs in the chunks of `_chunked`."""
    return jnp.pad(g, ((0, -g.shape[0] % size), (0, 0))).reshape(-1, size, g.shape[1])


# --- loop ------------------------------------------------------------------------------------------------------------


def _near(x: Float[Array, "R C"], chunk: _Samples, i: Array) -> list[Float[Array, "1 C"]]:
    """The four neighbors of sample `i`."""
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

    def one(chunk: _Samples) -> Float[Array, "p O"]:
        return _columns_of_chunk(x, chunk).reshape(_CHUNK, -1) @ kernel

    return lax.map(one, _chunked(samples, _CHUNK)).reshape(-1, kernel.shape[1])[:outputs]


def _backward_loop(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], g: Float[Array, "P O"]
) -> tuple[Float[Array, "R C"], Float[Array, "M 4"], Float[Array, "K O"]]:
    outputs, channels = g.shape[0], x.shape[1]

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
    (dx, dkernel), dweight = lax.scan(one, start, (_chunked(samples, _CHUNK), _rows_chunked(g, _CHUNK)))
    return dx, dweight.reshape(-1, 4)[: outputs * _TAPS], dkernel.astype(kernel.dtype)


# --- gather or loop --------------------------------------------------------------------------------------------------

Implementation = Literal["auto", "gather", "loop", "window"]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(
    x: Float[Array, "R C"], samples: _Samples, kernel: Float[Array, "K O"], implementation: Implementation
) -> Float[Array, "P O"]:
    return _dispatch(implementation, _forward_gather, _forward_loop, x, samples, kernel)


def _dispatch(implementation: Implementation, gather: Any, loop: Any, *arrays: Any) -> Any:
    match implementation:
        case "gather":
            return gather(*arrays)
        case "loop":
            return loop(*arrays)
        case _:
            # A loop over a sharded batch would gather the batch on every device.
            if jax.device_count() > 1:
                return gather(*arrays)
            return lax.platform_dependent(*arrays, cpu=loop, default=gather)


def _convolve_forward(x: Array, samples: _Samples, kernel: Array, implementation: Implementation) -> tuple[Array, Any]:
    return _convolve(x, samples, kernel, implementation), (x, samples, kernel)


def _convolve_backward(implementation: Implementation, saved: Any, g: Array) -> tuple[Array, _Samples, Array]:
    x, samples, kernel = saved
    dx, dweight, dkernel = _dispatch(implementation, _backward_gather, _backward_loop, x, samples, kernel, g)
    # Integers have no gradient; JAX represents it as zeros of type float0.
    none = np.zeros(samples.upper.shape, jax.dtypes.float0)
    return dx, _Samples(none, none, dweight), dkernel  # pyright: ignore[reportArgumentType]


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _convolve_rows(
    rows: Rows, taps: Sequence[Taps], kernel: Float[Array, "3 3 C O"], implementation: Implementation
) -> Float[Array, "P O"]:
    """The implementations `gather` and `loop`, without bias; all outputs as rows."""
    parts = [_samples(t._replace(offsets=t.offsets.astype(jnp.float32)), rows.shapes) for t in taps]
    samples = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(rows.values.dtype)
    return _convolve(rows.values, samples, flat, implementation)


def _split_maps(out: Float[Array, "P O"], taps: Sequence[Taps]) -> list[Float[Array, "B _ _ O"]]:
    """Maps from rows of outputs."""
    shapes = [t.mask.shape[:3] for t in taps]
    ends = np.cumsum([b * h * w for b, h, w in shapes])[:-1].tolist()
    return [part.reshape(*shape, -1) for part, shape in zip(jnp.split(out, ends), shapes)]


# --- bounded offsets -------------------------------------------------------------------------------------------------


def exceeds_bound(offsets: Float[Array, "*shape"], bound: int) -> Bool[Array, "*shape"]:
    """True where `clamp_offsets` changes an offset."""
    low, high = limits(bound)
    return (offsets < low) | (offsets > high)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def clamp_offsets(offsets: Float[Array, "*shape"], bound: int) -> Float[Array, "*shape"]:
    """Offsets clamped to `limits(bound)`, the bound minus 1/256 of a cell on both sides.

    The gradient of a clamped offset is that of the sample at the bound, if gradient descent moves the offset back, and zero if
    it would move it further out. The gradient of a plain clamp would be zero both ways, so a clamped offset would never return.
    """
    return jnp.clip(offsets, *limits(bound))


def _clamp_forward(offsets: Array, bound: int) -> tuple[Array, Array]:
    return clamp_offsets(offsets, bound), offsets


def _clamp_backward(bound: int, offsets: Array, g: Array) -> tuple[Array]:
    low, high = limits(bound)
    outward = ((offsets < low) & (g > 0)) | ((offsets > high) & (g < 0))
    return (jnp.where(outward, 0, g),)


clamp_offsets.defvjp(_clamp_forward, _clamp_backward)


class _Settings(NamedTuple):
    """Static settings of a convolution with bounded offsets."""

    sources: tuple[int, ...]
    stride: int
    bound: int
    implementation: Implementation
    mesh: Any
    """The mesh of the enclosing program, whose BATCH_AXES shard the images; empty if none is set."""


def _plain(settings: _Settings) -> tuple[Any, Any]:
    """Forward and backward pass of `gather` and `loop`."""

    def clamped(offsets: Any) -> tuple[Array, ...]:
        # Offsets may exceed the bound by rounding. The backward pass does not differentiate this.
        return tuple(jnp.clip(x, *limits(settings.bound)) for x in offsets)

    def convolve(maps: Any, offsets: Any, masks: Any, kernel: Any) -> list[Array]:
        taps = [Taps(*rest) for rest in zip(settings.sources, [settings.stride] * len(masks), offsets, masks)]
        return _split_maps(_convolve_rows(rows_of(maps), taps, kernel, settings.implementation), taps)

    def forward(maps: Any, offsets: Any, masks: Any, kernel: Any) -> list[Array]:
        return convolve(maps, clamped(offsets), masks, kernel)

    def backward(maps: Any, offsets: Any, masks: Any, kernel: Any, g: Any) -> tuple[Any, ...]:
        return jax.vjp(convolve, maps, clamped(offsets), masks, kernel)[1](g)

    return forward, backward


def _windowed(settings: _Settings, interpret: bool) -> tuple[Any, Any]:
    """Forward and backward pass of `window`: each device convolves its own images."""
    axes = open_batch_axes(settings.mesh)
    arguments = (settings.stride, settings.bound, interpret)

    def forward(maps: Any, offsets: Any, masks: Any, kernel: Any) -> list[Array]:
        return window_forward([maps[i] for i in settings.sources], offsets, masks, kernel, *arguments)

    def backward(maps: Any, offsets: Any, masks: Any, kernel: Any, g: Any) -> tuple[Any, ...]:
        read = [maps[i] for i in settings.sources]
        parts, doffsets, dmasks, dkernel = window_backward(read, offsets, masks, kernel, g, *arguments)
        dmaps = [jnp.zeros_like(x) for x in maps]
        for source, part in zip(settings.sources, parts):
            dmaps[source] += part
        dkernel = lax.psum(dkernel, axes) if axes else dkernel
        gradients = tuple(dmaps), tuple(doffsets), tuple(dmasks), dkernel
        return jax.tree.map(lambda x, like: x.astype(like.dtype), gradients, (maps, offsets, masks, kernel))

    read = (0, 0, 0, None)
    return per_device(forward, settings.mesh, read, 0), per_device(backward, settings.mesh, (*read, 0), read)


def _run(settings: _Settings, which: int, *arrays: Any) -> Any:
    """Pass `which` (0 forward, 1 backward) of the selected implementation."""
    images = arrays[0][0].shape[0]
    match settings.implementation:
        case "window":
            kernel, interpreted = _windowed(settings, False)[which], _windowed(settings, True)[which]
            return lax.platform_dependent(*arrays, tpu=kernel, default=interpreted)
        case "auto" if is_possible(settings.mesh, images):
            return lax.platform_dependent(
                *arrays, tpu=_windowed(settings, False)[which], default=_plain(settings)[which]
            )
        case _:
            return _plain(settings)[which](*arrays)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve_bounded(maps: Any, offsets: Any, masks: Any, kernel: Array, settings: _Settings) -> list[Array]:
    return _run(settings, 0, maps, offsets, masks, kernel)


def _convolve_bounded_forward(
    maps: Any, offsets: Any, masks: Any, kernel: Array, settings: _Settings
) -> tuple[Any, Any]:
    return _convolve_bounded(maps, offsets, masks, kernel, settings), (maps, offsets, masks, kernel)


def _convolve_bounded_backward(settings: _Settings, saved: Any, g: Any) -> Any:
    return _run(settings, 1, *saved, g)


_convolve_bounded.defvjp(_convolve_bounded_forward, _convolve_bounded_backward)


def deformable_convolution(
    rows: Rows,
    taps: Sequence[Taps],
    kernel: Float[Array, "3 3 C O"],
    bias: Float[Array, " O"],
    implementation: Implementation = "auto",
    bound: int = 0,
) -> list[Float[Array, "B _ _ O"]]:
    """Convolves maps with one kernel: one output per element of `taps`, of the height and width of its offsets.

    The maps in `rows` must be zero beyond the extent of each image. `bound` 0: unbounded offsets. Otherwise offsets must be
    results of `clamp_offsets`, all `taps` must have the same stride, and `auto` uses `window` on TPUs: on one device, or on
    several within `jax.sharding.use_abstract_mesh` (otherwise `gather`). Selected explicitly, `window` runs on any platform, but
    slowly. Raises ValueError for different strides, and for `window` without a bound.
    """
    if not bound:
        if implementation == "window":
            raise ValueError(
                "implementation 'window' needs a bound: expected the maximum offset in cells, or another implementation"
            )
        return _split_maps(
            save_activation(_convolve_rows(rows, taps, kernel, implementation)) + bias.astype(rows.values.dtype), taps
        )
    strides = {t.stride for t in taps}
    if len(strides) > 1:
        raise ValueError(f"taps with a bound have strides {sorted(strides)}: expected one stride per call")
    mesh: Any = jax.sharding.get_abstract_mesh()
    settings = _Settings(tuple(t.source for t in taps), taps[0].stride, bound, implementation, mesh)
    offsets, masks = tuple(t.offsets for t in taps), tuple(t.mask for t in taps)
    parts: Any = _convolve_bounded(rows.maps, offsets, masks, kernel, settings)
    return [save_activation(part) + bias.astype(part.dtype) for part in parts]
