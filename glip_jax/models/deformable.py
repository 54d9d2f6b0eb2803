"""Modulated deformable convolution v2 (arXiv 1811.11168), 3 x 3, one group, over the maps of a pyramid, in plain JAX.

Output (y, x) samples tap k = 3 i + j bilinearly at (y * stride - 1 + i + dy, x * stride - 1 + j + dx), times its mask;
what lies outside the image counts zero (glip-reference 2.7). The input must be zero beyond each image's extent: then
no image needs to know its own border.

All maps of a pyramid lie in one array of rows (`Rows`), so that one call serves every level that shares a kernel: few
large operations instead of many small ones, which compile several times as fast.

Three forms of the same sum, with hand-written backward passes that sample again instead of storing samples:

* `gather`: four row gathers a tap; backward scatters. What accelerators want. Many outputs are computed in parts, one
  after another: the samples of four images of 800 x 1344 at once would take gigabytes.
* `loop`: on a single CPU device one loop over samples reads and adds whole rows in place, a few output rows at a time
  so that they stay in the cache. XLA's scatter takes ten times as long there.
* `window`: matrix products instead of gathers, for bounded offsets (`deformable_window`). What a TPU wants.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from glip_jax.models.deformable_tiles import limits
from glip_jax.models.deformable_window import window_backward, window_forward
from glip_jax.models.remat import save_activation
from glip_jax.structures.batch import BATCH_AXES

__all__ = ["Rows", "Taps", "beyond_bound", "bounded", "deformable_convolution", "rows_of"]

_TAPS = 9
_CHUNK = 64
"""Outputs per chunk of the loop form: 64 x 9 samples of 256 channels are 590 kB."""
_GATHERED = 24_576
"""Most outputs at once of the gather form, a little more than an image of 800 x 1344 has on P3 to P7: of 256 channels in
bfloat16 their samples are 113 MB, and a backward pass holds several such arrays."""


class Rows(NamedTuple):
    """Several maps, and their cells as rows, each map padded by one zero cell all round."""

    values: Float[Array, "R C"]
    maps: tuple[Float[Array, "B _ _ C"], ...]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Images, height and width of each map, unpadded."""
        return tuple((x.shape[0], x.shape[1], x.shape[2]) for x in self.maps)


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
    return Rows(jnp.concatenate(padded), tuple(maps))


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
        (dx, dkernel), (part, own) = carry, item
        columns = _gather_columns(x, part)
        dkernel += jnp.matmul(columns.reshape(-1, kernel.shape[0]).T, own, preferred_element_type=jnp.float32)
        dcolumns, dweight = (own @ kernel.T).reshape(columns.shape), []
        for k, row in enumerate(_neighbours(part)):
            near = x.at[row].get(mode="promise_in_bounds")
            dweight.append(jnp.einsum("mc,mc->m", near, dcolumns, preferred_element_type=jnp.float32))
            weighed = dcolumns * part.weight[:, k, None].astype(x.dtype)
            dx = dx.at[row].add(weighed, mode="promise_in_bounds")
        return (dx, dkernel), jnp.stack(dweight, -1)

    start = (jnp.zeros_like(x), jnp.zeros(kernel.shape, jnp.float32))
    outputs, size = g.shape[0], _part_size(samples)
    if size == outputs:
        (dx, dkernel), dweight = one(start, (samples, g))
    else:
        (dx, dkernel), dweight = lax.scan(one, start, (_chunked(samples, size), _rows_chunked(g, size)))
    return dx, dweight.reshape(-1, 4)[: outputs * _TAPS], dkernel.astype(kernel.dtype)


def _part_size(samples: _Samples) -> int:
    """Outputs of each part of the gather form: equal parts, none above _GATHERED."""
    outputs = samples.upper.shape[0] // _TAPS
    return -(-outputs // -(-outputs // _GATHERED))


def _chunked(samples: _Samples, size: int) -> _Samples:
    """Samples in chunks of `size` outputs (a leading axis), padded by samples of weight zero."""
    spare = -(samples.upper.shape[0] // _TAPS) % size * _TAPS
    upper, lower = (jnp.pad(row, (0, spare)).reshape(-1, size * _TAPS) for row in (samples.upper, samples.lower))
    weight = jnp.pad(samples.weight, ((0, spare), (0, 0))).reshape(-1, size * _TAPS, 4)
    return _Samples(upper, lower, weight)


def _rows_chunked(g: Float[Array, "P O"], size: int) -> Float[Array, "_ size O"]:
    """Gradients of outputs in the chunks of `_chunked`."""
    return jnp.pad(g, ((0, -g.shape[0] % size), (0, 0))).reshape(-1, size, g.shape[1])


# --- the loop form ---------------------------------------------------------------------------------------------------


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


# --- both ------------------------------------------------------------------------------------------------------------

Form = Literal["auto", "gather", "loop", "window"]


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
        case _:
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


def _in_one(rows: Rows, taps: Sequence[Taps], kernel: Float[Array, "3 3 C O"], form: Form) -> Float[Array, "P O"]:
    """The forms `gather` and `loop`, without bias, all outputs as rows."""
    parts = [_samples(t._replace(offsets=t.offsets.astype(jnp.float32)), rows.shapes) for t in taps]
    samples = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    flat = kernel.reshape(-1, kernel.shape[-1]).astype(rows.values.dtype)
    return _convolve(rows.values, samples, flat, form)


def _apart(out: Float[Array, "P O"], taps: Sequence[Taps]) -> list[Float[Array, "B _ _ O"]]:
    """Rows of outputs as maps."""
    shapes = [t.mask.shape[:3] for t in taps]
    ends = np.cumsum([b * h * w for b, h, w in shapes])[:-1].tolist()
    return [part.reshape(*shape, -1) for part, shape in zip(jnp.split(out, ends), shapes)]


# --- bounded offsets -------------------------------------------------------------------------------------------------


def beyond_bound(offsets: Float[Array, "*shape"], bound: int) -> Bool[Array, "*shape"]:
    """True where `bounded` changes an offset."""
    low, high = limits(bound)
    return (offsets < low) | (offsets > high)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded(offsets: Float[Array, "*shape"], bound: int) -> Float[Array, "*shape"]:
    """Offsets clamped to `limits(bound)`, the bound less 1/256 of a cell on both sides.

    The gradient of a clamped offset, which is that of the sample at the bound, passes where a step down the gradient
    brings the offset back, and is zero where it would drive it further out. A plain clamp's would be zero both ways, and
    what is once beyond would stay there.
    """
    return jnp.clip(offsets, *limits(bound))


def _bounded_forward(offsets: Array, bound: int) -> tuple[Array, Array]:
    return bounded(offsets, bound), offsets


def _bounded_backward(bound: int, offsets: Array, g: Array) -> tuple[Array]:
    low, high = limits(bound)
    outwards = ((offsets < low) & (g > 0)) | ((offsets > high) & (g < 0))
    return (jnp.where(outwards, 0, g),)


bounded.defvjp(_bounded_forward, _bounded_backward)


class _Bounded(NamedTuple):
    """What is fixed of a convolution with bounded offsets."""

    sources: tuple[int, ...]
    stride: int
    bound: int
    form: Form
    mesh: Any
    """The mesh of the program around, of whose axes BATCH_AXES split the images; empty where none was set."""


def _plain(how: _Bounded) -> tuple[Any, Any]:
    """Forward and backward pass of the other forms."""

    def near(offsets: Any) -> tuple[Array, ...]:
        # Once more, against what rounding may have added. The gradient passes: this is not part of what is derived.
        return tuple(jnp.clip(x, *limits(how.bound)) for x in offsets)

    def convolve(maps: Any, offsets: Any, masks: Any, kernel: Any) -> list[Array]:
        taps = [Taps(*rest) for rest in zip(how.sources, [how.stride] * len(masks), offsets, masks)]
        return _apart(_in_one(rows_of(maps), taps, kernel, how.form), taps)

    def forward(maps: Any, offsets: Any, masks: Any, kernel: Any) -> list[Array]:
        return convolve(maps, near(offsets), masks, kernel)

    def backward(maps: Any, offsets: Any, masks: Any, kernel: Any, g: Any) -> tuple[Any, ...]:
        return jax.vjp(convolve, maps, near(offsets), masks, kernel)[1](g)

    return forward, backward


def _windowed(how: _Bounded, interpret: bool) -> tuple[Any, Any]:
    """Forward and backward pass of the form `window`: each device convolves its own images."""
    # In a jax.shard_map over these axes the images are this device's own already.
    axes = tuple(axis for axis in BATCH_AXES if axis in how.mesh.axis_names and axis not in how.mesh.manual_axes)
    settings = (how.stride, how.bound, interpret)

    def forward(maps: Any, offsets: Any, masks: Any, kernel: Any) -> list[Array]:
        return window_forward([maps[i] for i in how.sources], offsets, masks, kernel, *settings)

    def backward(maps: Any, offsets: Any, masks: Any, kernel: Any, g: Any) -> tuple[Any, ...]:
        read = [maps[i] for i in how.sources]
        parts, doffsets, dmasks, dkernel = window_backward(read, offsets, masks, kernel, g, *settings)
        dmaps = [jnp.zeros_like(x) for x in maps]
        for source, part in zip(how.sources, parts):
            dmaps[source] += part
        dkernel = lax.psum(dkernel, axes) if axes else dkernel
        found = tuple(dmaps), tuple(doffsets), tuple(dmasks), dkernel
        return jax.tree.map(lambda x, like: x.astype(like.dtype), found, (maps, offsets, masks, kernel))

    if not axes:
        return forward, backward
    split, whole = PartitionSpec(axes), PartitionSpec()
    kind = {"mesh": how.mesh, "check_vma": False}
    given = (split, split, split, whole)
    return (
        jax.shard_map(forward, in_specs=given, out_specs=split, **kind),
        jax.shard_map(backward, in_specs=(*given, split), out_specs=given, **kind),
    )


def _by_window(how: _Bounded, images: int) -> bool:
    """Whether `auto` may take the kernel on a TPU: a program for several devices must say how its images are split."""
    if not how.mesh.empty and how.mesh.manual_axes:
        return len(how.mesh.manual_axes) == len(how.mesh.axis_names)
    shares = int(np.prod([how.mesh.shape.get(axis, 1) for axis in BATCH_AXES]))
    return jax.device_count() == 1 if how.mesh.empty else images % shares == 0


def _run(how: _Bounded, which: int, *arrays: Any) -> Any:
    """Pass `which` (0 forward, 1 backward) in the form asked for."""
    images = arrays[0][0].shape[0]
    match how.form:
        case "window":
            kernel, interpreted = _windowed(how, False)[which], _windowed(how, True)[which]
            return lax.platform_dependent(*arrays, tpu=kernel, default=interpreted)
        case "auto" if _by_window(how, images):
            return lax.platform_dependent(*arrays, tpu=_windowed(how, False)[which], default=_plain(how)[which])
        case _:
            return _plain(how)[which](*arrays)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _convolve_bounded(maps: Any, offsets: Any, masks: Any, kernel: Array, how: _Bounded) -> list[Array]:
    return _run(how, 0, maps, offsets, masks, kernel)


def _convolve_bounded_forward(maps: Any, offsets: Any, masks: Any, kernel: Array, how: _Bounded) -> tuple[Any, Any]:
    return _convolve_bounded(maps, offsets, masks, kernel, how), (maps, offsets, masks, kernel)


def _convolve_bounded_backward(how: _Bounded, saved: Any, g: Any) -> Any:
    return _run(how, 1, *saved, g)


_convolve_bounded.defvjp(_convolve_bounded_forward, _convolve_bounded_backward)


def deformable_convolution(
    rows: Rows,
    taps: Sequence[Taps],
    kernel: Float[Array, "3 3 C O"],
    bias: Float[Array, " O"],
    form: Form = "auto",
    bound: int = 0,
) -> list[Float[Array, "B _ _ O"]]:
    """One output per element of `taps`, of its offsets' height and width, all with one kernel.

    The maps in `rows` must be zero beyond each image's own cells. `bound` 0: any offsets. Otherwise they must be those
    of `bounded`, all taps of one stride, and `auto` takes the form `window` on TPUs: on one device, or within
    `jax.sharding.use_abstract_mesh` on several (otherwise `gather`). Asked for by name it runs anywhere, slowly. Raises
    ValueError for strides that differ, and for `window` without a bound.
    """
    if not bound:
        if form == "window":
            raise ValueError("form 'window' without a bound: give the largest offset in cells, or another form")
        return _apart(save_activation(_in_one(rows, taps, kernel, form)) + bias.astype(rows.values.dtype), taps)
    strides = {t.stride for t in taps}
    if len(strides) > 1:
        raise ValueError(f"taps with a bound have strides {sorted(strides)}: expected one; call once per stride")
    mesh: Any = jax.sharding.get_abstract_mesh()
    how = _Bounded(tuple(t.source for t in taps), taps[0].stride, bound, form, mesh)
    offsets, masks = tuple(t.offsets for t in taps), tuple(t.mask for t in taps)
    parts: Any = _convolve_bounded(rows.maps, offsets, masks, kernel, how)
    return [save_activation(part) + bias.astype(part.dtype) for part in parts]
