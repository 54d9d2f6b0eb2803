"""Deformable convolution with bounded offsets as matrix products over windows: a Pallas kernel for TPUs.

TPUs are slow at gathers and fast at matrix products. If no offset exceeds `bound` cells, the outputs of a part of a tile read one window of
the map. Sampling is then the product of the cells of the window with a matrix of hat functions

    mask * max(0, 1 - |row - y|) * max(0, 1 - |column - x|)

which exists in VMEM only. The products with the 3 x 3 kernel follow directly, summed in float32.

All maps and images of a call are one grid of tiles (`tiling`). The backward pass recomputes the matrices. Tiles run in
order, row by row, so the gradient of a block is accumulated in a ring buffer of block rows in VMEM; it is complete, and written
once, when the tile of the block is done.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from glip_jax.models.kernels.blocks import LANES, padded_bytes, product
from glip_jax.models.kernels.tiling import COLUMNS, GROUP, ROWS, TAPS, Tiling, limits, tiling_of

__all__ = ["window_backward", "window_forward"]

# --- the kernels -----------------------------------------------------------------------------------------------------


def _tile_info(tiling: Tiling, table: Any, tile: Any) -> list[Any]:
    """Row and column of a tile, height and width of its map."""
    width = len(tiling.window) + 4
    return [table[tile * width + width - k] for k in (4, 3, 2, 1)]


class _Samples(NamedTuple):
    """Samples of one group of taps and one part of a tile, [8, 128]: all sublanes are equal."""

    row: Any
    """Position in the window."""
    column: Any
    mask: Any
    """Zero outside of the map."""
    inside: Any


def _samples(taps: Any, positions: Any, info: list[Any], tiling: Tiling) -> Callable[[int, int], _Samples]:
    """The samples of (part, group)."""
    i, j, height, width = info

    def axis(kind: int, first: Any, end: Any) -> tuple[Any, Any]:
        """Positions in the window, and whether they are inside the map, along rows (0) or columns (1)."""
        relative = jnp.clip(taps[0, kind : kind + 1], *limits(tiling.bound)) + positions[kind : kind + 1]
        absolute = relative + first.astype(jnp.float32)
        inside = (absolute > -1.0) & (absolute < end.astype(jnp.float32))
        # NaN is not inside; its position must still be a number.
        return jnp.where(inside, relative, 0.0), inside.astype(jnp.float32)

    lane, shift = lax.broadcasted_iota(jnp.int32, (1, positions.shape[1]), 1), 1 + tiling.bound
    part = lane // (positions.shape[1] // tiling.parts)
    rows, inside = axis(0, i * ROWS - shift, height)
    columns, inside_columns = axis(1, j * tiling.width + part * tiling.block[1] - shift, width)
    inside *= inside_columns
    values = (rows, columns, taps[0, 2:3] * inside, inside)

    def of(part: int, group: int) -> _Samples:
        lanes = tiling.lanes(part, group)
        return _Samples(*(jnp.broadcast_to(x[:, lanes], (8, LANES)) for x in values))

    return of


def _sum(terms: Sequence[Any]) -> Any:
    return sum(terms[1:], start=terms[0])


def _slope(distance: Any) -> Any:
    """Derivatives of the hat functions by the position; at a cell the right-hand one, as with floor(position)."""
    rising = ((distance > 0.0) & (distance <= 1.0)).astype(jnp.float32)
    return rising - ((distance > -1.0) & (distance <= 0.0)).astype(jnp.float32)


class _Hats:
    """Hat functions of the samples of a group on the cells of a side of a window: products of one of rows and one of columns.

    Cells are in sublanes, 8 of a row, and leading dimensions, samples in lanes. So rows and columns have few values each.
    """

    def __init__(self, samples: _Samples, tiling: Tiling, tap: int, side: int) -> None:
        def number(shape: tuple[int, ...], axis: int) -> Any:
            return lax.broadcasted_iota(jnp.int32, (*shape, 8, LANES), axis)

        if tiling.narrow:  # two blocks of 8 x 8 side by side, above others
            rows = number((tiling.chunks, 1, ROWS), 0) * ROWS + number((tiling.chunks, 1, ROWS), 2)
            columns = number((1, 2, 1), 1) * 8 + number((1, 2, 1), 3)
        else:  # rows of 16 cells
            rows = number((tiling.chunks * ROWS, 1), 0)
            columns = number((1, 2), 1) * 8 + number((1, 2), 2)
        self._samples, self._all = samples, (0, 1, 2, 3) if tiling.narrow else (0, 1, 2)
        self._down = (rows + tiling.first(tap // 3)).astype(jnp.float32) - samples.row
        self._across = (columns + COLUMNS * side).astype(jnp.float32) - samples.column
        self._rows = jnp.maximum(0.0, 1.0 - jnp.abs(self._down))
        self._columns = jnp.maximum(0.0, 1.0 - jnp.abs(self._across))

    def matrix(self, dtype: Any) -> Any:
        """The sampling matrix, multiplied with the mask: [cells, 128 samples]."""
        return (self._rows * (self._columns * self._samples.mask)).reshape(-1, LANES).astype(dtype)

    def gradients(self, matrix: Any) -> list[Any]:
        """Gradients [1, 128] of rows, columns and masks from that of the matrix."""
        by_cell = matrix.reshape(*self._rows.shape[:1], 2, *self._rows.shape[2:])
        along = by_cell * self._columns
        found = (along * _slope(self._down), by_cell * _slope(self._across) * self._rows, along * self._rows)
        rows, columns, masks = (jnp.sum(x, self._all, keepdims=True).reshape(1, LANES) for x in found)
        mask, inside = self._samples.mask[:1], self._samples.inside[:1]
        return [rows * mask, columns * mask, masks * inside]


def _places(tiling: Tiling, column: int) -> list[tuple[int, int]]:
    """Where the windows of a tile hold a column of blocks: (index of the window's side, first cell of its group)."""
    found = [(part, column - part) for part in range(tiling.parts) if 0 <= column - part <= 1]
    return [(part, side * GROUP // 2) if tiling.narrow else (2 * part + side, 0) for part, side in found]


def _fill(window: Any, blocks: Sequence[Any], tiling: Tiling) -> None:
    """Copies the blocks of a tile into the windows of its parts, [parts x sides, 128 rows, C]."""
    for (row, column), block in zip(tiling.window, blocks, strict=True):
        for side, first in _places(tiling, column):
            window[side, pl.ds(row * GROUP + first, block.shape[1])] = block[0]


def _reached(tiling: Tiling, tap: int) -> Any:
    """The cells of a side of a window that a group of taps reaches, which begins with `tap`."""
    return pl.ds(tiling.first(tap // 3) * COLUMNS, tiling.chunks * GROUP)


def _of_part(values: Any, part: int, size: int) -> Any:
    """The columns of a part in an array of all outputs of a tile."""
    return values[:, part * size : (part + 1) * size]


class _Sampler:
    """Samples the windows of a tile by groups of taps."""

    def __init__(self, tiling: Tiling, samples: Callable[[int, int], _Samples], window: Any, sampled: Any) -> None:
        self._tiling, self._samples, self._window, self._sampled = tiling, samples, window, sampled
        self._transposed: dict[tuple[int, int], Any] = {}

    def _cells(self, side: int, tap: int) -> Any:
        """The cells of a side that a group reaches, [C, cells]; transposed once for all groups that reach the same."""
        key = (side, self._tiling.first(tap // 3))
        if key not in self._transposed:
            self._transposed[key] = self._window[side, _reached(self._tiling, tap)].T
        return self._transposed[key]

    def sample(self, part: int, group: int) -> tuple[list[_Hats], list[Any]]:
        """Writes the samples of a group of taps for a part to `sampled` [9, C, outputs]. Returns hat functions and matrices of its sides."""
        tiling, sampled = self._tiling, self._sampled
        taps, size = tiling.groups[group], sampled.shape[2] // tiling.parts
        hats = [_Hats(self._samples(part, group), tiling, taps[0], side) for side in range(tiling.sides)]
        matrices = [each.matrix(sampled.dtype) for each in hats]
        read = [product(self._cells(part * tiling.sides + side, taps[0]), x, (1, 0)) for side, x in enumerate(matrices)]
        total = _sum(read).astype(sampled.dtype)
        for k, tap in enumerate(taps):
            sampled[tap, :, part * size : (part + 1) * size] = total[:, k * size : (k + 1) * size]
        return hats, matrices


def _forward_kernel(tiling: Tiling, table: Any, *refs: Any) -> None:
    *blocks, taps, positions, kernel, out, window, sampled = refs
    samples = _samples(taps, positions, _tile_info(tiling, table, pl.program_id(0)), tiling)
    _fill(window, blocks, tiling)
    sampler = _Sampler(tiling, samples, window, sampled)
    for part, group in itertools.product(range(tiling.parts), range(len(tiling.groups))):
        sampler.sample(part, group)
    parts = [product(kernel[tap], sampled[tap], (1, 0)) for tap in range(TAPS)]
    out[0] = _sum(parts).T.astype(out.dtype)


def _backward_kernel(tiling: Tiling, table: Any, *refs: Any) -> None:
    *blocks, taps, positions, kernel, gradient, dblock, dtaps, dkernel, window, dwindow, ring, sampled, dsampled = refs
    g, tile = gradient[0], pl.program_id(0)
    size = g.shape[0] // tiling.parts
    info = _tile_info(tiling, table, tile)
    samples = _samples(taps, positions, info, tiling)

    @pl.when(tile == 0)
    def _() -> None:
        dkernel[...] = jnp.zeros(dkernel.shape, dkernel.dtype)

    _fill(window, blocks, tiling)
    dwindow[...] = jnp.zeros(dwindow.shape, dwindow.dtype)
    transposed = g.T
    for tap in range(TAPS):
        dsampled[tap] = product(kernel[tap], transposed, (1, 0)).astype(dsampled.dtype)
    sampler = _Sampler(tiling, samples, window, sampled)
    for part, (group, own) in itertools.product(range(tiling.parts), enumerate(tiling.groups)):
        hats, matrices = sampler.sample(part, group)
        dread = [_of_part(dsampled[tap], part, size) for tap in own]
        if len(own) * size < LANES:
            dread.append(jnp.zeros((dsampled.shape[1], LANES - len(own) * size), dsampled.dtype))
        dread, cells, kinds = jnp.concatenate(dread, 1), _reached(tiling, own[0]), []
        for side, (hat, matrix) in enumerate(zip(hats, matrices)):
            own_side = part * tiling.sides + side
            dwindow[own_side, cells] += product(matrix, dread, (1, 1))
            kinds.append(hat.gradients(product(window[own_side, cells], dread, (1, 0))))
        dtaps[0, :, tiling.lanes(part, group)] = jnp.concatenate([_sum(x) for x in zip(*kinds)])
    for tap in range(TAPS):
        dkernel[tap] += product(sampled[tap], g, (1, 0))
    _sum_blocks(tiling, info, dwindow, ring, dblock)


def _sum_blocks(tiling: Tiling, info: list[Any], dwindow: Any, ring: Any, dblock: Any) -> None:
    """Adds the gradients of the windows to their blocks in the ring and outputs the blocks of the tile, which no later tile changes."""
    i, j = info[:2]
    cells = dblock.shape[1]
    for below, column in tiling.window:
        slot, place = lax.rem(i + below, tiling.rows), tiling.parts * j + column
        # The first tile that reaches a block overwrites an older block, or uninitialized memory, in the ring.
        first = ((i == 0) | (below == tiling.rows - 1)) & ((j == 0) | (column > 0))
        new = [dwindow[side, pl.ds(below * GROUP + begin, cells)] for side, begin in _places(tiling, column)]
        ring[slot, place] = jnp.where(first, 0.0, ring[slot, place]) + _sum(new)
    for part in range(tiling.parts):
        dblock[part] = ring[lax.rem(i, tiling.rows), tiling.parts * j + part].astype(dblock.dtype)


# --- calls -----------------------------------------------------------------------------------------------------------


def _traffic(table: Int[np.ndarray, "T columns"], specs: Sequence[pl.BlockSpec], dtypes: Sequence[Any]) -> int:
    """Bytes that the grid copies between HBM and VMEM: each block of an operand whose index differs from the previous one."""
    flat, total = table.reshape(-1), 0
    for spec, dtype in zip(specs, dtypes, strict=True):
        assert spec.index_map is not None
        assert spec.block_shape is not None
        visited = [tuple(int(i) for i in spec.index_map(t, flat)) for t in range(len(table))]
        copies = 1 + sum(now != before for before, now in zip(visited, visited[1:]))
        total += copies * padded_bytes([int(side) for side in spec.block_shape], dtype)  # pyright: ignore[reportArgumentType]
    return total


def _flops(tiling: Tiling, channels: int, results: int, samplings: int, products: int) -> int:
    """FLOPs of `samplings` products with the sampling matrix and `products` products with the kernel."""
    outputs = tiling.tile[0] * tiling.tile[1]
    sampling = 2 * outputs * tiling.sides * tiling.chunks * GROUP * channels
    return tiling.tiles * TAPS * (samplings * sampling + products * 2 * outputs * channels * results)


def _call(
    body: Callable[..., None],
    tiling: Tiling,
    operands: Sequence[tuple[Array, pl.BlockSpec]],
    results: Sequence[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: Sequence[tuple[tuple[int, ...], Any]],
    flops: int,
    interpret: bool,
) -> Sequence[Array]:
    """Runs `body` over the tiles in order."""
    table = tiling.table()
    specs = [spec for _, spec in operands] + [spec for *_, spec in results]
    dtypes = [array.dtype for array, _ in operands] + [dtype for _, dtype, _ in results]
    blocks = sum(padded_bytes(spec.block_shape, dtype) for spec, dtype in zip(specs, dtypes))  # pyright: ignore[reportArgumentType]
    scratch_bytes = sum(padded_bytes(shape, dtype) for shape, dtype in scratch)
    # Blocks are double-buffered; intermediate results of the products take the rest.
    limit = 2 * blocks + scratch_bytes + 16 * 2**20
    return pl.pallas_call(
        partial(body, tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiling.tiles,),
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for *_, spec in results],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=limit),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=_traffic(table, specs, dtypes), transcendentals=0),
        interpret=interpret,
        name=body.__name__.strip("_").replace("_kernel", "_windows"),
    )(jnp.asarray(table.reshape(-1)), *(array for array, _ in operands))


def _piece_of_tile(shape: Sequence[int]) -> pl.BlockSpec:
    """The piece of a tile in an array of pieces of `shape`."""
    return pl.BlockSpec((1, *shape), lambda tile, _: (tile, 0, 0))


def _block_of_window(tiling: Tiling, which: int, shape: Sequence[int]) -> pl.BlockSpec:
    """Block `which` of the window of a tile, in an array of blocks of `shape`."""
    width = len(tiling.window) + 4
    return pl.BlockSpec((1, *shape), lambda tile, table: (table[tile * width + which], 0, 0))


def _whole_array(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The whole array, for every tile, so that one buffer is enough."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape), pipeline_mode=pl.Buffered(1))


def _operands(
    maps: Sequence[Array], offsets: Sequence[Array], masks: Sequence[Array], kernel: Array, tiling: Tiling
) -> list[tuple[Array, pl.BlockSpec]]:
    """Operands that both kernels read. `kernel`: a matrix per tap."""
    # Float32 for any type of the network: at 30 cells, bfloat16 does not resolve a quarter of a cell.
    samples = [
        jnp.concatenate([offset.astype(jnp.float32).swapaxes(3, 4), mask.astype(jnp.float32)[..., None, :]], 3)
        for offset, mask in zip(offsets, masks)
    ]
    taps, positions = tiling.columns(samples), jnp.asarray(tiling.positions())
    blocks, kernel = tiling.blocks(maps), kernel.astype(maps[0].dtype)
    operands = [(blocks, _block_of_window(tiling, k, blocks.shape[1:])) for k in range(len(tiling.window))]
    return operands + [
        (taps, _piece_of_tile(taps.shape[1:])),
        (positions, _whole_array(positions.shape)),
        (kernel, _whole_array(kernel.shape)),
    ]


def window_forward(
    maps: Sequence[Float[Array, "B _ _ C"]],
    offsets: Sequence[Float[Array, "B _ _ 9 2"]],
    masks: Sequence[Float[Array, "B _ _ 9"]],
    kernel: Float[Array, "3 3 C O"],
    stride: int,
    bound: int,
    interpret: bool = False,
) -> list[Float[Array, "B _ _ O"]]:
    """Convolutions of several maps with one kernel, without bias, in the type of the maps.

    Offsets in cells are clamped to `bound`. `interpret` runs on any platform, slowly. Raises ValueError for an unsupported stride
    or bound.
    """
    tiling = tiling_of(maps, masks, stride, bound)
    channels, results, dtype = maps[0].shape[-1], kernel.shape[-1], maps[0].dtype
    by_tap = kernel.reshape(TAPS, channels, results).swapaxes(1, 2)
    operands = _operands(maps, offsets, masks, by_tap, tiling)
    tile = (tiling.tile[0] * tiling.tile[1], results)
    window = (tiling.parts * tiling.sides, tiling.rows * GROUP, channels)
    flops = _flops(tiling, channels, results, 1, 1)
    shape = ((tiling.tiles, *tile), dtype, _piece_of_tile(tile))
    scratch = [(window, dtype), ((TAPS, channels, tile[0]), dtype)]
    (out,) = _call(_forward_kernel, tiling, operands, [shape], scratch, flops, interpret)
    return tiling.from_pieces(out)


def window_backward(
    maps: Sequence[Float[Array, "B _ _ C"]],
    offsets: Sequence[Float[Array, "B _ _ 9 2"]],
    masks: Sequence[Float[Array, "B _ _ 9"]],
    kernel: Float[Array, "3 3 C O"],
    gradients: Sequence[Float[Array, "B _ _ O"]],
    stride: int,
    bound: int,
    interpret: bool = False,
) -> tuple[
    list[Float[Array, "B _ _ C"]],
    list[Float[Array, "B _ _ 9 2"]],
    list[Float[Array, "B _ _ 9"]],
    Float[Array, "3 3 C O"],
]:
    """Gradients of maps (in their type), offsets, masks and kernel (float32) from those of the results of `window_forward`.

    The gradient of a clamped offset is that of the sample at the bound.
    """
    tiling = tiling_of(maps, masks, stride, bound)
    channels, results, dtype = maps[0].shape[-1], kernel.shape[-1], maps[0].dtype
    operands = _operands(maps, offsets, masks, kernel.reshape(TAPS, channels, results), tiling)
    outputs = tiling.tile[0] * tiling.tile[1]
    operands += [(tiling.pieces([g.astype(dtype) for g in gradients]), _piece_of_tile((outputs, results)))]
    cells, parts, lanes = tiling.block[0] * tiling.block[1], tiling.parts, tiling.positions().shape[1]
    blocks = pl.BlockSpec((parts, cells, channels), lambda tile, _: (tile, 0, 0))
    shapes = [
        ((parts * tiling.tiles, cells, channels), dtype, blocks),
        ((tiling.tiles, 3, lanes), jnp.float32, _piece_of_tile((3, lanes))),
        ((TAPS, channels, results), jnp.float32, _whole_array((TAPS, channels, results))),
    ]
    window = (tiling.parts * tiling.sides, tiling.rows * GROUP, channels)
    across = parts * max(across for _, across in tiling.grids) + 1
    ring = (tiling.rows, across, cells, channels)
    by_tap = (TAPS, channels, outputs)
    scratch = [(window, dtype), (window, jnp.float32), (ring, jnp.float32), (by_tap, dtype), (by_tap, dtype)]
    flops = _flops(tiling, channels, results, 3, 2)
    dblocks, dtaps, dkernel = _call(_backward_kernel, tiling, operands, shapes, scratch, flops, interpret)
    dmaps, parts = tiling.from_blocks(dblocks), tiling.from_columns(dtaps)
    doffsets = [x[..., :2, :].swapaxes(3, 4) for x in parts]
    return dmaps, doffsets, [x[..., 2, :] for x in parts], dkernel.reshape(kernel.shape)
