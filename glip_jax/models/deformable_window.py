"""Deformable convolution with bounded offsets as matrix products over windows: a Pallas kernel for TPUs.

TPUs are slow at gathers and fast at matrix products. If no offset exceeds `bound` cells, the outputs of a tile read one window of
the map. Sampling is then the product of the cells of the window with a matrix of hat functions

    mask * max(0, 1 - |row - y|) * max(0, 1 - |column - x|)

which exists in VMEM only. The products with the 3 x 3 kernel follow directly, summed in float32.

All maps and images of a call are one grid of tiles (`deformable_tiles`). The backward pass recomputes the matrices. Tiles run in
order, row by row, so the gradient of a block is accumulated in a ring buffer of block rows in VMEM; it is complete, and written
once, when the tile of the block is done.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from glip_jax.models.deformable_tiles import CELLS, COLUMNS, ROWS, TAPS, Tiling, limits, tiling_of
from glip_jax.models.kernels import LANES, padded_bytes, product

__all__ = ["window_backward", "window_forward"]

# --- the kernels -----------------------------------------------------------------------------------------------------


def _tile_info(tiling: Tiling, table: Any, tile: Any) -> list[Any]:
    """Row and column of a tile, height and width of its map."""
    width = 2 * tiling.rows + 4
    return [table[tile * width + width - k] for k in (4, 3, 2, 1)]


class _Samples:
    """Positions of the samples of a tile in its window: [O, 27], (row, column) of 9 taps, then their masks."""

    def __init__(self, taps: Any, positions: Any, info: list[Any], tiling: Tiling) -> None:
        i, j, height, width = info
        lane = lax.broadcasted_iota(jnp.int32, (1, 3 * TAPS), 1)
        row, mask, shift = lane % 2 == 0, lane >= 2 * TAPS, 1 + tiling.bound
        relative = jnp.clip(taps, *limits(tiling.bound)) + positions
        absolute = relative + jnp.where(row, i * ROWS - shift, j * COLUMNS - shift).astype(jnp.float32)
        inside = (absolute > -1.0) & (absolute < jnp.where(row, height, width).astype(jnp.float32))
        # NaN is not inside; its position must still be a number.
        self._positions = jnp.where(mask, taps, jnp.where(inside, relative, 0.0))
        self._inside = inside.astype(jnp.float32)

    @staticmethod
    def _stacked(columns: Any, first: int, step: int) -> Any:
        return jnp.concatenate([columns[:, k : k + 1] for k in range(first, first + 3 * step, step)])

    def of(self, tap_row: int) -> tuple[Any, Any, Any, Any]:
        """Rows, columns, masks and whether they are inside the map, of the three taps of a row of the kernel: [3 O, 1]."""
        first = 6 * tap_row
        rows, columns = (self._stacked(self._positions, first + axis, 2) for axis in range(2))
        inside = self._stacked(self._inside, first, 2) * self._stacked(self._inside, first + 1, 2)
        return rows, columns, self._stacked(self._positions, 2 * TAPS + 3 * tap_row, 1), inside


class _Matrix:
    """Hat functions of the samples of one row of taps, [3 O, 128] per group of 128 cells of the window."""

    def __init__(self, samples: _Samples, tap_row: int, tiling: Tiling) -> None:
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        row, column = (lane // COLUMNS).astype(jnp.float32), (lane % COLUMNS).astype(jnp.float32)
        y, x, mask, self._inside = samples.of(tap_row)
        y, self._mask = y - float(tiling.first(tap_row)), mask * self._inside
        self._down = [row + float(ROWS * n) - y for n in range(tiling.chunks)]
        self._across = [column + float(COLUMNS * side) - x for side in range(2)]
        self.rows = [jnp.maximum(0.0, 1.0 - jnp.abs(d)) for d in self._down]
        self.columns = [jnp.maximum(0.0, 1.0 - jnp.abs(d)) for d in self._across]

    def of(self, side: int, dtype: Any) -> Any:
        """Sampling matrix of the left (0) or right (1) half of the window, multiplied with the mask: [3 O, 128 chunks]."""
        across = self.columns[side] * self._mask
        return jnp.concatenate([(rows * across).astype(dtype) for rows in self.rows], 1)

    @staticmethod
    def _slope(distance: Any) -> Any:
        """Derivatives of the hat functions by the position; at a cell the right-hand one, as with floor(position)."""
        rising = ((distance > 0.0) & (distance <= 1.0)).astype(jnp.float32)
        return rising - ((distance > -1.0) & (distance <= 0.0)).astype(jnp.float32)

    def gradients(self, left: Any, right: Any) -> tuple[Any, Any, Any]:
        """Gradients [3 O, 1] of rows, columns and masks from those of the halves of the sampling matrix."""
        rows = columns = masks = 0.0
        slopes = [self._slope(d) for d in self._across]
        for n, hat in enumerate(self.rows):
            part = slice(n * LANES, (n + 1) * LANES)
            along = left[:, part] * self.columns[0] + right[:, part] * self.columns[1]
            rows += along * self._slope(self._down[n])
            masks += along * hat
            columns += (left[:, part] * slopes[0] + right[:, part] * slopes[1]) * hat
        rows, columns, masks = (jnp.sum(part, 1, keepdims=True) for part in (rows, columns, masks))
        return rows * self._mask, columns * self._mask, masks * self._inside


def _fill(window: Any, blocks: Sequence[Any]) -> None:
    """Copies the blocks of a window into its halves, [2, 128 rows, C]."""
    for k, block in enumerate(blocks):
        window[k % 2, pl.ds(k // 2 * CELLS, CELLS)] = block[0]


def _part(tiling: Tiling, tap_row: int) -> Any:
    """The cells of a half of the window that a row of taps reaches."""
    return pl.ds(tiling.first(tap_row) * COLUMNS, tiling.chunks * CELLS)


def _forward_kernel(tiling: Tiling, table: Any, *refs: Any) -> None:
    *blocks, taps, positions, kernel, out, window = refs
    outputs = out.shape[1]
    samples = _Samples(taps[0].T, positions[...], _tile_info(tiling, table, pl.program_id(0)), tiling)
    _fill(window, blocks)
    total: Any = jnp.zeros(out.shape[1:], jnp.float32)
    for tap_row in range(3):
        matrix, part = _Matrix(samples, tap_row, tiling), _part(tiling, tap_row)
        halves = [product(matrix.of(side, window.dtype), window[side, part], (1, 0)) for side in range(2)]
        sampled = (halves[0] + halves[1]).astype(window.dtype)
        for k in range(3):
            total += product(sampled[k * outputs : (k + 1) * outputs], kernel[3 * tap_row + k], (1, 0))
    out[0] = total.astype(out.dtype)


def _backward_kernel(tiling: Tiling, table: Any, *refs: Any) -> None:
    *blocks, taps, positions, kernel, gradient, dblock, dtaps, dkernel, window, dwindow, ring, dpositions = refs
    outputs, g, tile = gradient.shape[1], gradient[0], pl.program_id(0)
    info = _tile_info(tiling, table, tile)
    samples = _Samples(taps[0].T, positions[...], info, tiling)

    @pl.when(tile == 0)
    def _() -> None:
        dkernel[...] = jnp.zeros(dkernel.shape, dkernel.dtype)

    _fill(window, blocks)
    dwindow[...] = jnp.zeros(dwindow.shape, dwindow.dtype)
    for tap_row in range(3):
        matrix, part = _Matrix(samples, tap_row, tiling), _part(tiling, tap_row)
        halves = [matrix.of(side, window.dtype) for side in range(2)]
        cells = [window[side, part] for side in range(2)]
        sampled = (product(halves[0], cells[0], (1, 0)) + product(halves[1], cells[1], (1, 0))).astype(window.dtype)
        for k in range(3):
            dkernel[3 * tap_row + k] += product(sampled[k * outputs : (k + 1) * outputs], g, (0, 0))
        dsampled = jnp.concatenate([product(g, kernel[3 * tap_row + k], (1, 1)) for k in range(3)]).astype(window.dtype)
        for side in range(2):
            dwindow[side, part] += product(halves[side], dsampled, (0, 0))
        left, right = (product(dsampled, x, (1, 1)) for x in cells)
        for kind, values in enumerate(matrix.gradients(left, right)):
            for k in range(3):
                tap = 3 * tap_row + k
                column = 2 * tap + kind if kind < 2 else 2 * TAPS + tap
                dpositions[:, column : column + 1] = values[k * outputs : (k + 1) * outputs]
    dtaps[0] = dpositions[...].T
    _sum_blocks(tiling, info, dwindow, ring, dblock)


def _sum_blocks(tiling: Tiling, info: list[Any], dwindow: Any, ring: Any, dblock: Any) -> None:
    """Adds the gradient of a window to its blocks in the ring and outputs the block of the tile, which no later tile changes."""
    i, j = info[:2]
    for below in range(tiling.rows):
        slot = lax.rem(i + below, tiling.rows)
        for side in range(2):
            # The first tile that reaches a block overwrites an older block, or uninitialized memory, in the ring.
            first = ((i == 0) | (below == tiling.rows - 1)) & ((j == 0) | (side == 1))
            old = ring[slot, j + side]
            ring[slot, j + side] = jnp.where(first, 0.0, old) + dwindow[side, pl.ds(below * CELLS, CELLS)]
    dblock[0] = ring[lax.rem(i, tiling.rows), j].astype(dblock.dtype)


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
    sampling = 2 * outputs * 2 * tiling.chunks * CELLS * channels
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


def _block_of_window(tiling: Tiling, which: int, channels: int) -> pl.BlockSpec:
    """Block `which` of the window of a tile."""
    width = 2 * tiling.rows + 4
    return pl.BlockSpec((1, CELLS, channels), lambda tile, table: (table[tile * width + which], 0, 0))


def _whole_array(shape: tuple[int, ...]) -> pl.BlockSpec:
    """The whole array, for every tile."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _operands(
    maps: Sequence[Array], offsets: Sequence[Array], masks: Sequence[Array], kernel: Array, tiling: Tiling
) -> list[tuple[Array, pl.BlockSpec]]:
    """Operands that both kernels read."""
    channels = maps[0].shape[-1]
    # Float32 for any type of the network: at 30 cells, bfloat16 does not resolve a quarter of a cell.
    samples = [
        jnp.concatenate([offset.reshape(*mask.shape[:3], -1).astype(jnp.float32), mask.astype(jnp.float32)], -1)
        for offset, mask in zip(offsets, masks)
    ]
    taps, positions = tiling.columns(samples), jnp.asarray(tiling.positions())
    blocks, kernel = tiling.blocks(maps), kernel.reshape(TAPS, channels, -1).astype(maps[0].dtype)
    operands = [(blocks, _block_of_window(tiling, k, channels)) for k in range(2 * tiling.rows)]
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
    operands = _operands(maps, offsets, masks, kernel, tiling)
    channels, results, dtype = maps[0].shape[-1], kernel.shape[-1], maps[0].dtype
    tile = (tiling.tile[0] * tiling.tile[1], results)
    window = (2, tiling.rows * CELLS, channels)
    flops = _flops(tiling, channels, results, 1, 1)
    shape = ((tiling.tiles, *tile), dtype, _piece_of_tile(tile))
    (out,) = _call(_forward_kernel, tiling, operands, [shape], [(window, dtype)], flops, interpret)
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
    operands = _operands(maps, offsets, masks, kernel, tiling)
    channels, results, dtype = maps[0].shape[-1], kernel.shape[-1], maps[0].dtype
    outputs = tiling.tile[0] * tiling.tile[1]
    operands += [(tiling.pieces([g.astype(dtype) for g in gradients]), _piece_of_tile((outputs, results)))]
    shapes = [
        ((tiling.tiles, CELLS, channels), dtype, _piece_of_tile((CELLS, channels))),
        ((tiling.tiles, 3 * TAPS, outputs), jnp.float32, _piece_of_tile((3 * TAPS, outputs))),
        ((TAPS, channels, results), jnp.float32, _whole_array((TAPS, channels, results))),
    ]
    window = (2, tiling.rows * CELLS, channels)
    across = max(across for _, across in tiling.grids) + 1
    ring = (tiling.rows, across, CELLS, channels)
    scratch = [(window, dtype), (window, jnp.float32), (ring, jnp.float32), ((outputs, 3 * TAPS), jnp.float32)]
    flops = _flops(tiling, channels, results, 3, 2)
    dblocks, dtaps, dkernel = _call(_backward_kernel, tiling, operands, shapes, scratch, flops, interpret)
    dmaps, parts = tiling.from_blocks(dblocks), tiling.from_columns(dtaps)
    doffsets = [x[..., : 2 * TAPS].reshape(*x.shape[:3], TAPS, 2) for x in parts]
    return dmaps, doffsets, [x[..., 2 * TAPS :] for x in parts], dkernel.reshape(kernel.shape)
