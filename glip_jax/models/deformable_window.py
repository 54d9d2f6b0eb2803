"""Deformable convolution with bounded offsets as matrix products over windows: a Pallas kernel for TPUs.

TPUs are slow at gathers and fast at matrix products. If no offset exceeds `bound` cells, the outputs of a part of a tile read one window of
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

from glip_jax.models.deformable_tiles import COLUMNS, GROUP, ROWS, TAPS, Tiling, limits, tiling_of
from glip_jax.models.kernels import LANES, padded_bytes, product

__all__ = ["window_backward", "window_forward"]

# --- the kernels -----------------------------------------------------------------------------------------------------


def _tile_info(tiling: Tiling, table: Any, tile: Any) -> list[Any]:
    """Row and column of a tile, height and width of its map."""
    width = len(tiling.window) + 4
    return [table[tile * width + width - k] for k in (4, 3, 2, 1)]


class _Samples:
    """Positions of the samples of a tile in the windows of its parts: [O, 27], (row, column) of 9 taps, then their masks."""

    def __init__(self, taps: Any, positions: Any, info: list[Any], tiling: Tiling) -> None:
        i, j, height, width = info
        lane = lax.broadcasted_iota(jnp.int32, (1, 3 * TAPS), 1)
        row, mask, shift = lane % 2 == 0, lane >= 2 * TAPS, 1 + tiling.bound
        relative = jnp.clip(taps, *limits(tiling.bound)) + positions
        self._outputs = taps.shape[0] // tiling.parts
        part = lax.broadcasted_iota(jnp.int32, (taps.shape[0], 1), 0) // self._outputs
        column = j * COLUMNS + part * tiling.block[1] - shift
        absolute = relative + jnp.where(row, i * ROWS - shift, column).astype(jnp.float32)
        inside = (absolute > -1.0) & (absolute < jnp.where(row, height, width).astype(jnp.float32))
        # NaN is not inside; its position must still be a number.
        self._positions = jnp.where(mask, taps, jnp.where(inside, relative, 0.0))
        self._inside = inside.astype(jnp.float32)

    def of(self, taps: Sequence[int], part: int) -> tuple[Any, Any, Any, Any]:
        """Rows, columns, masks and whether they are inside the map, of some taps, for a part: [taps O, 1]."""
        own = slice(part * self._outputs, (part + 1) * self._outputs)

        def stacked(values: Any, columns: Sequence[int]) -> Any:
            return jnp.concatenate([values[own, k : k + 1] for k in columns])

        down, across, masks = ([first + step * tap for tap in taps] for first, step in ((0, 2), (1, 2), (2 * TAPS, 1)))
        inside = stacked(self._inside, down) * stacked(self._inside, across)
        return (*(stacked(self._positions, columns) for columns in (down, across, masks)), inside)


class _Matrix:
    """Hat functions of the samples of some taps and one part, [taps O, 128] per group of 128 cells of the window."""

    def __init__(self, samples: _Samples, taps: Sequence[int], part: int, tiling: Tiling) -> None:
        lane, width = lax.broadcasted_iota(jnp.int32, (1, LANES), 1), tiling.block[1]
        # A group is one block of 16 columns, or two of 8 one after the other.
        inner = lane % (ROWS * width)
        row, column = inner // width, lane // (ROWS * width) * width + inner % width
        y, x, mask, self._inside = samples.of(taps, part)
        y, self._mask = y - float(tiling.first(taps[0] // 3)), mask * self._inside
        self._down = [row.astype(jnp.float32) + float(ROWS * n) - y for n in range(tiling.chunks)]
        self._across = [column.astype(jnp.float32) + float(COLUMNS * side) - x for side in range(tiling.sides)]
        self.rows = [jnp.maximum(0.0, 1.0 - jnp.abs(d)) for d in self._down]
        self.columns = [jnp.maximum(0.0, 1.0 - jnp.abs(d)) for d in self._across]

    def of(self, side: int, dtype: Any) -> Any:
        """Sampling matrix of a side of the window, multiplied with the mask: [taps O, 128 chunks]."""
        across = self.columns[side] * self._mask
        return jnp.concatenate([(rows * across).astype(dtype) for rows in self.rows], 1)

    @staticmethod
    def _slope(distance: Any) -> Any:
        """Derivatives of the hat functions by the position; at a cell the right-hand one, as with floor(position)."""
        rising = ((distance > 0.0) & (distance <= 1.0)).astype(jnp.float32)
        return rising - ((distance > -1.0) & (distance <= 0.0)).astype(jnp.float32)

    def gradients(self, sides: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Gradients [taps O, 1] of rows, columns and masks from those of the sides of the sampling matrix."""
        rows = columns = masks = 0.0
        slopes = [self._slope(d) for d in self._across]
        for n, hat in enumerate(self.rows):
            group = [x[:, n * LANES : (n + 1) * LANES] for x in sides]
            along = sum(x * column for x, column in zip(group, self.columns))
            rows += along * self._slope(self._down[n])
            masks += along * hat
            columns += sum(x * slope for x, slope in zip(group, slopes)) * hat
        rows, columns, masks = (jnp.sum(x, 1, keepdims=True) for x in (rows, columns, masks))
        return rows * self._mask, columns * self._mask, masks * self._inside


def _places(tiling: Tiling, column: int) -> list[tuple[int, int]]:
    """Where the windows of a tile hold a column of blocks: (index of the window's side, first cell of its group)."""
    if tiling.parts == 1:
        return [(column, 0)]
    return [(part, (column - part) * GROUP // 2) for part in range(tiling.parts) if 0 <= column - part <= 1]


def _fill(window: Any, blocks: Sequence[Any], tiling: Tiling) -> None:
    """Copies the blocks of a tile into the windows of its parts, [parts x sides, 128 rows, C]."""
    for (row, column), block in zip(tiling.window, blocks, strict=True):
        for side, first in _places(tiling, column):
            window[side, pl.ds(row * GROUP + first, block.shape[1])] = block[0]


def _reached(tiling: Tiling, count: int = 3) -> list[tuple[range, Any]]:
    """`count` taps each that reach the same cells of a window's sides, and these cells."""
    size = tiling.chunks * GROUP
    return [(range(k, k + count), pl.ds(tiling.first(k // 3) * COLUMNS, size)) for k in range(0, TAPS, count)]


def _by_tap(parts: Sequence[Any], taps: range) -> list[Any]:
    """Rows of each tap, [O, C], from those of the parts, [taps O, C]."""
    outputs = parts[0].shape[0] // len(taps)
    return [jnp.concatenate([x[k * outputs : (k + 1) * outputs] for x in parts]) for k in range(len(taps))]


def _forward_kernel(tiling: Tiling, table: Any, *refs: Any) -> None:
    *blocks, taps, positions, kernel, out, window = refs
    samples = _Samples(taps[0].T, positions[...], _tile_info(tiling, table, pl.program_id(0)), tiling)
    _fill(window, blocks, tiling)
    total: Any = jnp.zeros(out.shape[1:], jnp.float32)
    for group, cells in _reached(tiling):
        sampled, sides = [], range(tiling.sides)
        for part in range(tiling.parts):
            matrix = _Matrix(samples, group, part, tiling)
            read = [product(matrix.of(side, window.dtype), window[part + side, cells], (1, 0)) for side in sides]
            sampled.append(sum(read[1:], start=read[0]).astype(window.dtype))
        for tap, values in zip(group, _by_tap(sampled, group)):
            total += product(values, kernel[tap], (1, 0))
    out[0] = total.astype(out.dtype)


def _backward_kernel(tiling: Tiling, table: Any, *refs: Any) -> None:
    *blocks, taps, positions, kernel, gradient, dblock, dtaps, dkernel, window, dwindow, ring, dpositions = refs
    g, tile = gradient[0], pl.program_id(0)
    outputs = g.shape[0] // tiling.parts
    info = _tile_info(tiling, table, tile)
    samples = _Samples(taps[0].T, positions[...], info, tiling)

    @pl.when(tile == 0)
    def _() -> None:
        dkernel[...] = jnp.zeros(dkernel.shape, dkernel.dtype)

    _fill(window, blocks, tiling)
    dwindow[...] = jnp.zeros(dwindow.shape, dwindow.dtype)
    # Where all rows of taps reach the same cells, they are one product each; the forward pass would spill its registers.
    for group, reached in _reached(tiling, TAPS if tiling.rows == tiling.chunks else 3):
        sampled, dsampled = [], [product(g, kernel[tap], (1, 1)).astype(window.dtype) for tap in group]
        for part in range(tiling.parts):
            matrix, own = _Matrix(samples, group, part, tiling), slice(part * outputs, (part + 1) * outputs)
            hats = [matrix.of(side, window.dtype) for side in range(tiling.sides)]
            cells = [window[part + side, reached] for side in range(tiling.sides)]
            read = [product(hat, x, (1, 0)) for hat, x in zip(hats, cells)]
            sampled.append(sum(read[1:], start=read[0]).astype(window.dtype))
            dread = jnp.concatenate([x[own] for x in dsampled])
            for side, hat in enumerate(hats):
                dwindow[part + side, reached] += product(hat, dread, (0, 0))
            for kind, values in enumerate(matrix.gradients([product(dread, x, (1, 1)) for x in cells])):
                for k, tap in enumerate(group):
                    column = 2 * tap + kind if kind < 2 else 2 * TAPS + tap
                    dpositions[own, column : column + 1] = values[k * outputs : (k + 1) * outputs]
        for tap, values in zip(group, _by_tap(sampled, group)):
            dkernel[tap] += product(values, g, (0, 0))
    dtaps[0] = dpositions[...].T
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
        ring[slot, place] = jnp.where(first, 0.0, ring[slot, place]) + sum(new[1:], start=new[0])
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
    operands = _operands(maps, offsets, masks, kernel, tiling)
    channels, results, dtype = maps[0].shape[-1], kernel.shape[-1], maps[0].dtype
    tile = (tiling.tile[0] * tiling.tile[1], results)
    window = (2, tiling.rows * GROUP, channels)
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
    cells, parts = tiling.block[0] * tiling.block[1], tiling.parts
    blocks = pl.BlockSpec((parts, cells, channels), lambda tile, _: (tile, 0, 0))
    shapes = [
        ((parts * tiling.tiles, cells, channels), dtype, blocks),
        ((tiling.tiles, 3 * TAPS, outputs), jnp.float32, _piece_of_tile((3 * TAPS, outputs))),
        ((TAPS, channels, results), jnp.float32, _whole_array((TAPS, channels, results))),
    ]
    window = (2, tiling.rows * GROUP, channels)
    across = parts * max(across for _, across in tiling.grids) + 1
    ring = (tiling.rows, across, cells, channels)
    scratch = [(window, dtype), (window, jnp.float32), (ring, jnp.float32), ((outputs, 3 * TAPS), jnp.float32)]
    flops = _flops(tiling, channels, results, 3, 2)
    dblocks, dtaps, dkernel = _call(_backward_kernel, tiling, operands, shapes, scratch, flops, interpret)
    dmaps, parts = tiling.from_blocks(dblocks), tiling.from_columns(dtaps)
    doffsets = [x[..., : 2 * TAPS].reshape(*x.shape[:3], TAPS, 2) for x in parts]
    return dmaps, doffsets, [x[..., 2 * TAPS :] for x in parts], dkernel.reshape(kernel.shape)
