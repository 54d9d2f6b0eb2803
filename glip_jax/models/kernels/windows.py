"""Swin's window attention as Pallas kernels for TPUs that read and write the map where it lies.

A program holds a row of windows. Columns become aligned pieces of eight, one for each window and row, by a product with a one-hot matrix,
which is exact; the 8 x 7 or fewer pieces of a window are the rows of its queries. The heads of a group share the lanes: their keys
stand below one another, each head's rows with the channels of the others zero, so one product gives the logits of all heads. Sums over the
keys of a head are products with ones.

Which cells may attend to one another is in the lanes that the channels leave free (`labelled`): their share of the product of query and key
is what is added to the logits. The layout of the heads' channels is that of `Grouping`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from glip_jax.models.kernels.blocks import LANES, padded_bytes, per_device, product
from glip_jax.models.remat import save_activation

__all__ = ["Grouping", "grouping", "labelled", "window_attention", "window_attention_backward", "window_attention_forward"]  # fmt: skip

_LOG2E = math.log2(math.e)
_NEVER = -1e30
"""Bias of keys that are none."""
_BEYOND = -1e9
"""Added to logits between cells of the image and cells beyond it; times an exponent it is still a number in bfloat16."""
_REGIONS = 9
_LABELS = 16
"""Lanes that labels take: a one-hot region, and whether a cell lies beyond the image; the rest is empty."""
_PIECE = 8
"""Rows of a window's row: a tile has 8."""
_KEYS = 64
"""Rows of a head's keys: 8 pieces."""
_GROUP = 16
"""Windows whose columns one product moves: their columns, 16 times the window, begin at multiples of a tile."""
_TOGETHER = 3
"""Windows whose operations overlap."""


class Grouping(NamedTuple):
    """How the channels of `heads` attention heads lie in lanes: groups of 3 x 128 lanes, for queries, keys and values."""

    heads: int
    depth: int
    """Channels of a head."""
    together: int
    """Heads of a group."""

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.heads // self.together

    @property
    def channels(self) -> int:
        """Lanes of a group that hold channels; those after them are for labels."""
        return self.together * self.depth

    def spread(self, x: Float[Array, "... D"]) -> Float[Array, "... L"]:
        """Columns of queries, keys and values of all heads, one after the other, in the layout of the kernels: L is groups x 384."""
        x = x.reshape(*x.shape[:-1], 3, self.groups, self.channels)
        x = jnp.pad(jnp.moveaxis(x, -3, -2), [*[(0, 0)] * (x.ndim - 1), (0, LANES - self.channels)])
        return x.reshape(*x.shape[:-3], -1)

    def spread_rows(self, x: Float[Array, "C D"]) -> Float[Array, "K D"]:
        """The rows of a matrix that is multiplied with what all heads read, in the layout of the kernels' results."""
        x = x.reshape(self.groups, self.channels, -1)
        return jnp.pad(x, ((0, 0), (0, LANES - self.channels), (0, 0))).reshape(self.groups * LANES, -1)


def grouping(heads: int, depth: int, window: int) -> Grouping | None:
    """The layout for windows of so many cells a side; None where the kernels have none: more than 8 cells, more than 112 channels a head."""
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and n * depth + _LABELS <= LANES]
    return Grouping(heads, depth, max(fitting)) if fitting and window <= _PIECE else None


def labelled(
    qkv: Float[Array, "B h w L"], regions: Int[Array, "B h w"], beyond: Bool[Array, "B h w"], layout: Grouping
) -> Float[Array, "B h w L"]:
    """Adds the labels of the cells: attention between regions (below 9) gets -100, that between the image and what lies beyond it -1e9."""
    region = jax.nn.one_hot(regions, _REGIONS, dtype=qkv.dtype)
    outside = jnp.stack([beyond, ~beyond], -1).astype(qkv.dtype)
    query = jnp.concatenate([-100.0 * region, _BEYOND * outside], -1)
    key = jnp.concatenate([1.0 - region, 1.0 - outside], -1)
    free = [(0, 0)] * 3
    lanes = [
        jnp.pad(x, [*free, (layout.channels, LANES - layout.channels - x.shape[-1])])
        for x in (query, key, jnp.zeros_like(key))
    ]
    return qkv + jnp.concatenate(lanes * layout.groups, -1)


# --- the kernels -----------------------------------------------------------------------------------------------------


class _Constants(NamedTuple):
    """What all programs read."""

    move: Array
    """One-hot [16 x 8, 16 x window]: columns of 16 windows to their pieces."""
    query_scale: Array
    """[1, 128]: of channels and labels; logits are to base 2."""
    key_lanes: Array
    """[heads, 128]: lanes of a head's channels, and of the labels."""
    value_lanes: Array
    """[heads, 128]: lanes of a head's channels."""
    sums: Array
    """[heads x 64, 128]: a head's keys to its channels."""
    sums_of_keys: Array
    """[heads x 64, heads x 64]: a head's keys to its keys."""


def _constants(layout: Grouping, window: int, dtype: Any) -> _Constants:
    columns = np.arange(_GROUP * window)
    move = np.zeros((_GROUP * _PIECE, len(columns)), np.float32)
    move[_PIECE * (columns // window) + columns % window, columns] = 1
    lanes = np.arange(LANES)
    own = (lanes // layout.depth == np.arange(layout.together)[:, None]) & (lanes < layout.channels)
    scale = np.where(lanes < layout.channels, layout.depth**-0.5, 1.0)[None] * _LOG2E
    of_head = np.repeat(own, _KEYS, 0)
    of_keys = np.kron(np.eye(layout.together), np.ones((_KEYS, _KEYS)))
    return _Constants(
        jnp.asarray(move, dtype), jnp.asarray(scale, jnp.float32), jnp.asarray(own | (lanes >= layout.channels), jnp.float32),
        jnp.asarray(own, jnp.float32), jnp.asarray(of_head, dtype), jnp.asarray(of_keys, dtype),
    )  # fmt: skip


def _below(x: Any, lanes: Any, dtype: Any) -> Any:
    """[heads x 64, 128]: the rows of a window once for each head, with its own lanes."""
    x = jnp.concatenate([x, jnp.zeros((_KEYS - len(x), LANES), x.dtype)]) if len(x) < _KEYS else x
    return jnp.concatenate([x * lanes[head : head + 1] for head in range(lanes.shape[0])]).astype(dtype)


def _powers(query: Any, keys: Any, bias: Any) -> Any:
    """Powers of two of the logits less the largest of the head, [rows, heads x 64]."""
    logits = product(query, keys, (1, 1)) + bias
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    parts = []
    for first in range(0, logits.shape[1], LANES):
        part = logits[:, first : first + LANES]
        if part.shape[1] == _KEYS:
            parts.append(part - jnp.max(part, 1, keepdims=True))
            continue
        low, high = (
            jnp.max(jnp.where(own, part, 2 * _NEVER), 1, keepdims=True) for own in (lane < _KEYS, lane >= _KEYS)
        )
        parts.append(part - jnp.where(lane < _KEYS, low, high))
    return jnp.exp2(jnp.concatenate(parts, 1))


def _groups(windows: int) -> list[tuple[int, int]]:
    """(first window, number) of the groups whose columns one product moves."""
    return [(first, min(_GROUP, windows - first)) for first in range(0, windows, _GROUP)]


def _to_pieces(pieces: Any, columns: Any, move: Any, window: int) -> None:
    for first, count in _groups(columns.shape[2] // window):
        one_hot = move[: count * _PIECE, : count * window]
        for row in range(window):
            here = columns[0, row, first * window : (first + count) * window]
            pieces[row, first * _PIECE : (first + count) * _PIECE] = product(one_hot, here, (1, 0))


def _to_columns(columns: Any, pieces: Any, move: Any, window: int) -> None:
    for first, count in _groups(columns.shape[2] // window):
        one_hot = move[: count * _PIECE, : count * window]
        for row in range(window):
            here = pieces[row, first * _PIECE : (first + count) * _PIECE].astype(one_hot.dtype)
            columns[0, row, first * window : (first + count) * window] = product(one_hot, here, (0, 0)).astype(
                columns.dtype
            )


def _window(pieces: Any, index: Any) -> Any:
    """[window x 8, lanes]: the pieces of a window."""
    place = pl.ds(pl.multiple_of(_PIECE * index, _PIECE), _PIECE)
    return jnp.concatenate([pieces[row, place] for row in range(pieces.shape[0])])


def _put(pieces: Any, index: Any, lanes: slice, value: Any) -> None:
    place = pl.ds(pl.multiple_of(_PIECE * index, _PIECE), _PIECE)
    for row in range(pieces.shape[0]):
        pieces[row, place, lanes] = value[_PIECE * row : _PIECE * (row + 1)]


def _each(windows: int, body: Callable[[Sequence[Any]], None]) -> None:
    """`body` of a few windows at a time, so that the chip overlaps them: it reads all before it writes."""

    def step(index: Any, carry: Any) -> Any:
        body([_TOGETHER * index + i for i in range(_TOGETHER)])
        return carry

    lax.fori_loop(0, windows // _TOGETHER, step, 0)
    if rest := list(range(windows - windows % _TOGETHER, windows)):
        body(rest)


def _forward_kernel(window: int, x: Any, bias: Any, *refs: Any) -> None:
    constants, (out, pieces, results) = _Constants(*refs[:6]), refs[6:]
    dtype = x.dtype
    _to_pieces(pieces, x, constants.move, window)

    def attend(indices: Sequence[Any]) -> None:
        found = []
        for cells in [_window(pieces, index) for index in indices]:
            query, key, value = (cells[:, LANES * i : LANES * (i + 1)] for i in range(3))
            query = (query * constants.query_scale[...]).astype(dtype)
            powers = _powers(query, _below(key, constants.key_lanes, dtype), bias[0]).astype(dtype)
            read = product(powers, _below(value, constants.value_lanes, dtype), (1, 0))
            # Lanes of no head have no sum.
            found.append(read / jnp.maximum(product(powers, constants.sums[...], (1, 0)), 1e-30))
        for index, value in zip(indices, found):
            _put(results, index, slice(None), value)

    _each(x.shape[2] // window, attend)
    _to_columns(out, results, constants.move, window)


def _backward_kernel(window: int, x: Any, bias: Any, gradient: Any, *refs: Any) -> None:
    constants, (dx, dbias, pieces, dout, dpieces) = _Constants(*refs[:6]), refs[6:]
    dtype, key_lanes, value_lanes = x.dtype, constants.key_lanes, constants.value_lanes

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        dbias[...] = jnp.zeros(dbias.shape, dbias.dtype)

    _to_pieces(pieces, x, constants.move, window)
    _to_pieces(dout, gradient, constants.move, window)
    heads, rows = value_lanes.shape[0], window * _PIECE
    channels = jnp.max(value_lanes[...], 0, keepdims=True)

    def own(below: Any) -> Any:
        """The rows of a window, from each head those of its channels."""
        return sum(below[_KEYS * i : _KEYS * i + rows] * value_lanes[i : i + 1] for i in range(heads))

    def attend(indices: Sequence[Any]) -> None:
        found = []
        for cells, dread in [(_window(pieces, index), _window(dout, index).astype(dtype)) for index in indices]:
            query, key, value = (cells[:, LANES * i : LANES * (i + 1)] for i in range(3))
            query = (query * constants.query_scale[...]).astype(dtype)
            keys, values = _below(key, key_lanes, dtype), _below(value, value_lanes, dtype)
            powers = _powers(query, keys, bias[0])
            weights = powers / product(powers.astype(dtype), constants.sums_of_keys[...], (1, 0))
            dweights = product(dread, values, (1, 1))
            mean = product((weights * dweights).astype(dtype), constants.sums_of_keys[...], (1, 0))
            dlogits = weights * (dweights - mean)
            rounded = dlogits.astype(dtype)
            dquery = product(rounded, keys, (1, 0)) * (channels * constants.query_scale[...] / _LOG2E)
            dkey = own(product(rounded, query, (0, 0))) / _LOG2E
            found.append((dlogits, dquery, dkey, own(product(weights.astype(dtype), dread, (0, 0)))))
        for index, (_, *parts) in zip(indices, found):
            for i, part in enumerate(parts):
                _put(dpieces, index, slice(LANES * i, LANES * (i + 1)), part)
        dbias[0] += sum(each[0] for each in found)

    _each(x.shape[2] // window, attend)
    _to_columns(dx, dpieces, constants.move, window)


# --- calls -----------------------------------------------------------------------------------------------------------


def _cells(window: int) -> np.ndarray:
    """The row of each cell of a window among its pieces."""
    cells = np.arange(window * window)
    return _PIECE * (cells // window) + cells % window


def _by_group(bias: Float[Array, "heads n n"], layout: Grouping, window: int) -> Float[Array, "groups rows keys"]:
    """The biases in the layout of the logits, to base 2; `_NEVER` for keys that are none."""
    cells = _cells(window)
    whole = jnp.full((layout.heads, window * _PIECE, _KEYS), _NEVER, jnp.float32).at[:, :, cells].set(0.0)
    whole = whole.at[:, cells[:, None], cells].set(bias.astype(jnp.float32) * _LOG2E)
    whole = whole.reshape(layout.groups, layout.together, window * _PIECE, _KEYS)
    return jnp.moveaxis(whole, 1, 2).reshape(layout.groups, window * _PIECE, -1)


def _call(
    body: Callable[..., None], window: int, maps: Sequence[Array], bias: Array, layout: Grouping, results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[int], products: int, interpret: bool,
) -> Any:  # fmt: skip
    """Runs `body` over groups of heads, images and rows of windows. `scratch`: lanes of the pieces that it holds."""
    images, height, width, _ = maps[0].shape
    constants = _constants(layout, window, maps[0].dtype)
    operands = [maps[0], bias, *maps[1:], *constants]

    def block(x: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            shape = (1, window, width, x.shape[3] // layout.groups)
            return pl.BlockSpec(shape, lambda group, image, row: (image, row, 0, group))
        if x.ndim == 3:
            return pl.BlockSpec((1, *x.shape[1:]), lambda group, *_: (group, 0, 0))
        return pl.BlockSpec(x.shape, lambda *_: (0, 0))

    specs = [block(x) for x in [*operands, *results]]
    pieces = [(window, width // window * _PIECE, lanes) for lanes in scratch]
    held = 2 * sum(padded_bytes(spec.block_shape, x.dtype) for spec, x in zip(specs, [*operands, *results]))  # pyright: ignore[reportArgumentType]
    held += sum(padded_bytes(shape, jnp.float32) for shape in pieces)
    logits = images * height * width * window**2 * layout.heads
    return pl.pallas_call(
        partial(body, window),
        grid=(layout.groups, images, height // window),
        in_specs=specs[: len(operands)],
        out_specs=specs[len(operands) :],
        out_shape=list(results),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in pieces],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=held + 8 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * layout.depth,
            bytes_accessed=sum(padded_bytes(x.shape, x.dtype) for x in [*maps, *results]),
            transcendentals=logits,
        ),
        interpret=interpret,
        name=body.__name__.strip("_").replace("_kernel", "_windows"),
    )(*operands)


def window_attention_forward(
    qkv: Float[Array, "B h w L"], bias: Float[Array, "heads n n"], layout: Grouping, window: int, interpret: bool = False
) -> Float[Array, "B h w K"]:  # fmt: skip
    """What the cells read in their windows, in the layout of `Grouping`, in the type of `qkv`. L is groups x 384, K groups x 128.

    `h` and `w` are multiples of `window`. The lanes of `qkv` after a group's channels are added to the logits, see `labelled`. `interpret` runs
    on any platform, slowly.
    """
    result = jax.ShapeDtypeStruct((*qkv.shape[:3], layout.groups * LANES), qkv.dtype)
    given = _by_group(bias, layout, window)
    (read,) = _call(_forward_kernel, window, [qkv], given, layout, [result], (3 * LANES, LANES), 2, interpret)
    return read


def window_attention_backward(
    qkv: Float[Array, "B h w L"], bias: Float[Array, "heads n n"], gradient: Float[Array, "B h w K"], layout: Grouping,
    window: int, interpret: bool = False,
) -> tuple[Float[Array, "B h w L"], Float[Array, "heads n n"]]:  # fmt: skip
    """Gradients of `qkv`, zero in the lanes of labels, and of `bias`; shapes as in `window_attention_forward`."""
    given, cells = _by_group(bias, layout, window), _cells(window)
    results = [
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        jax.ShapeDtypeStruct(given.shape, jnp.float32),
    ]
    maps = [qkv, gradient.astype(qkv.dtype)]
    scratch = (3 * LANES, LANES, 3 * LANES)
    dqkv, dbias = _call(_backward_kernel, window, maps, given, layout, results, scratch, 5, interpret)
    dbias = jnp.moveaxis(dbias.reshape(layout.groups, window * _PIECE, layout.together, _KEYS), 2, 1)
    dbias = dbias.reshape(layout.heads, window * _PIECE, _KEYS)[:, cells[:, None], cells]
    return dqkv, dbias.astype(bias.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def window_attention(
    qkv: Float[Array, "B h w L"], bias: Float[Array, "heads n n"], layout: Grouping, window: int, mesh: Any
) -> Float[Array, "B h w K"]:  # fmt: skip
    """`window_attention_forward` with its gradients; each device of `mesh`, the mesh of the program, takes its own images."""
    return _window_attention(qkv, bias, layout, window, mesh)[0]


def _on_platform(kernel: Callable[..., Any], *arrays: Array) -> Any:
    return lax.platform_dependent(
        *arrays, tpu=partial(kernel, interpret=False), default=partial(kernel, interpret=True)
    )


def _window_attention(qkv: Array, bias: Array, layout: Grouping, window: int, mesh: Any) -> tuple[Array, Any]:
    def run(qkv: Array, bias: Array) -> Array:
        return _on_platform(partial(window_attention_forward, layout=layout, window=window), qkv, bias)

    return save_activation(per_device(run, mesh, (0, None), 0)(qkv, bias)), (qkv, bias)


def _window_gradients(layout: Grouping, window: int, mesh: Any, saved: Any, gradient: Array) -> tuple[Array, Array]:
    def run(qkv: Array, bias: Array, gradient: Array) -> tuple[Array, Array]:
        dqkv, dbias = _on_platform(
            partial(window_attention_backward, layout=layout, window=window), qkv, bias, gradient
        )
        return dqkv, dbias[None]

    # The biases belong to all devices: their gradients are summed.
    dqkv, dbias = per_device(run, mesh, (0, None, 0), (0, 0))(*saved, gradient)
    return dqkv, dbias.sum(0)


window_attention.defvjp(_window_attention, _window_gradients)
