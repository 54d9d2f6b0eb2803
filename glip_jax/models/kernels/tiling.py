"""Tiling of maps, offsets and outputs for the windowed deformable convolution (`kernels.deformable`).

Maps are divided into blocks of 8 x 16 cells, or of 8 x 8 at stride 1 with offsets of at most `NARROW_BOUND`, shifted by 1 + the bound.
A tile has 8 x 16 outputs at stride 1 and 4 x 32 at stride 2: 128, the lanes of a register. Its parts are as wide as a block. The part above
block (i, j) reads the blocks (i ... i + rows - 1, j ... j + 1): the block itself and its neighbors below and to the right. All maps and
images of a convolution form one sequence of tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from glip_jax.models.kernels.blocks import LANES, has_small_memory

__all__ = ["COLUMNS", "GROUP", "LANES", "MAX_BOUND", "ROWS", "TAPS", "Tiling", "limits", "tiling_of"]

ROWS, COLUMNS = 8, 16
"""Rows of a block, and columns of a wide one."""
GROUP = ROWS * COLUMNS
"""Cells of a group: 8 rows of 16 columns of a window. In bfloat16, 16 cells fill the sublanes of a register, 128 its lanes."""
TAPS = 9

MAX_BOUND = 7
"""With a larger bound, a window would exceed the next block to the right."""
NARROW_BOUND = 3
"""Up to this bound a window of 16 columns holds what 8 columns of outputs read: 8 + 2 of the 3 x 3 kernel + 2 x 3."""


def limits(bound: int) -> tuple[float, float]:
    """Minimum and maximum offset in cells.

    At the bound itself a sample would lie on a cell, where its gradient is discontinuous and depends on rounding. Slightly below,
    it is that of the last two cells within the bound. 1/256 of a cell is exact in float32 on maps of any size.
    """
    return 1 / 256 - bound, bound - 1 / 256


@dataclass(frozen=True)
class Tiling:
    """Tiling of one convolution. `maps` and `outputs`: (height, width) of each input map and of its output, cells."""

    images: int
    stride: int
    bound: int
    maps: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]
    width: int
    """Columns of cells below a tile."""

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of outputs in a tile."""
        return ROWS // self.stride, self.width // self.stride

    @property
    def narrow(self) -> bool:
        """Whether blocks have 8 columns; at stride 2 a part would have too few outputs."""
        return self.bound <= NARROW_BOUND and self.stride == 1

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of cells in a block."""
        return ROWS, COLUMNS // 2 if self.narrow else COLUMNS

    @property
    def parts(self) -> int:
        """Parts of a tile, each with a window of its own."""
        return self.width // self.block[1]

    @property
    def sides(self) -> int:
        """Groups of 16 columns next to each other in a window, which is two blocks wide."""
        return 1 if self.narrow else 2

    @property
    def rows(self) -> int:
        """Rows of blocks in a window: 8 cells of the tile, two more for the 3 x 3 kernel, and the bound on both sides."""
        return -(-(ROWS + 2 + 2 * self.bound) // ROWS)

    @property
    def chunks(self) -> int:
        """Groups of 8 window rows that one row of taps can reach."""
        return -(-(ROWS + 2 * self.bound) // ROWS)

    def first(self, tap_row: int) -> int:
        """The first window row of those groups."""
        return min(tap_row, ROWS * (self.rows - self.chunks))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(down, across) tiles of each map, enough for all cells of the map and all outputs."""
        (down, across), shift = self.tile, 1 + self.bound
        return tuple(
            (max(-(-(h + shift) // ROWS), -(-oh // down)), max(-(-(w + shift) // self.width), -(-ow // across)))
            for (h, w), (oh, ow) in zip(self.maps, self.outputs)
        )

    @property
    def tiles(self) -> int:
        """Number of tiles of all maps and images; there are as many blocks as parts of tiles."""
        return self.images * sum(down * across for down, across in self.grids)

    @property
    def window(self) -> list[tuple[int, int]]:
        """(row, column) of the blocks that a tile reads, relative to its first one."""
        return [(row, column) for row in range(self.rows) for column in range(self.parts + 1)]

    def table(self) -> Int[np.ndarray, "T columns"]:
        """Per tile: indices of the blocks of its window, its row and column, height and width of its map.

        Blocks below or to the right of a map have the index after the last, which is a block of zeros.
        """
        lines, first, zeros = [], 0, self.parts * self.tiles
        for (down, across), size in zip(self.grids, self.maps):
            width = self.parts * across
            for _ in range(self.images):
                for i, j in np.ndindex(down, across):
                    blocks = [(i + row, self.parts * j + column) for row, column in self.window]
                    window = [first + r * width + c if r < down and c < width else zeros for r, c in blocks]
                    lines.append([*window, i, j, *size])
                first += down * width
        return np.array(lines, np.int32)

    def blocks(self, maps: Sequence[Float[Array, "B _ _ C"]]) -> Float[Array, "N S C"]:
        """All maps as blocks of cells, followed by a block of zeros."""
        cells = self.block[0] * self.block[1]
        parts = [
            self._cut(x, grid, self.block, 1 + self.bound).reshape(-1, cells, x.shape[-1])
            for x, grid in zip(maps, self.grids)
        ]
        return _stacked([*parts, jnp.zeros((1, *parts[0].shape[1:]), parts[0].dtype)])

    def from_blocks(self, blocks: Float[Array, "N S C"]) -> list[Float[Array, "B _ _ C"]]:
        """Inverse of `blocks`, without the block of zeros."""
        tiles = blocks.reshape(self.tiles, -1, blocks.shape[-1])
        return self._joined(tiles.swapaxes(1, 2), self.block, 1 + self.bound, self.maps)

    @property
    def _part(self) -> tuple[int, int]:
        """(rows, columns) of outputs in a part of a tile."""
        return self.tile[0], self.tile[1] // self.parts

    def pieces(self, outputs: Sequence[Float[Array, "B _ _ O"]]) -> Float[Array, "T S O"]:
        """Values of outputs, by tile; part by part."""
        return _stacked([self._cut(x, grid, self._part, 0) for x, grid in zip(outputs, self.grids)])

    def from_pieces(self, pieces: Float[Array, "T S O"]) -> list[Float[Array, "B _ _ O"]]:
        """Inverse of `pieces`."""
        return self._joined(pieces.swapaxes(1, 2), self._part, 0, self.outputs)

    @property
    def groups(self) -> list[range]:
        """Taps whose samples for a part fill the 128 lanes of a register; they reach the same cells."""
        count = min(LANES // math.prod(self._part), TAPS if self.rows == self.chunks else 3)
        return [range(tap, min(tap + count, TAPS)) for tap in range(0, TAPS, count)]

    def lanes(self, part: int, group: int) -> slice:
        """Where the samples of a group of taps are in the arrays of `columns`."""
        first = (part * len(self.groups) + group) * LANES
        return slice(first, first + LANES)

    def columns(self, samples: Sequence[Float[Array, "B _ _ K 9"]]) -> Float[Array, "T K lanes"]:
        """Values of the taps, by tile: outputs in lanes, one after the other for the taps of a group, and groups for the parts."""
        count, kinds, size = len(self.groups[0]), samples[0].shape[-2], math.prod(self._part)
        spare = len(self.groups) * count - TAPS
        flat = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 0), (0, spare))).reshape(*x.shape[:3], -1) for x in samples]
        x = _stacked([self._cut(x, grid, self._part, 0, True) for x, grid in zip(flat, self.grids)])
        x = x.reshape(self.tiles, kinds, len(self.groups), count, self.parts, size).transpose(0, 1, 4, 2, 3, 5)
        x = x.reshape(self.tiles, kinds, self.parts, len(self.groups), count * size)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 0), (0, LANES - count * size)))
        return x.reshape(self.tiles, kinds, -1)

    def from_columns(self, columns: Float[Array, "T K lanes"]) -> list[Float[Array, "B _ _ K 9"]]:
        """Inverse of `columns`."""
        count, kinds, size = len(self.groups[0]), columns.shape[1], math.prod(self._part)
        x = columns.reshape(self.tiles, kinds, self.parts, len(self.groups), LANES)[..., : count * size]
        x = x.reshape(self.tiles, kinds, self.parts, len(self.groups), count, size).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(self.tiles, kinds, -1, self.parts * size)[:, :, :TAPS].reshape(self.tiles, kinds * TAPS, -1)
        joined = self._joined(x, self._part, 0, self.outputs)
        return [x.reshape(*x.shape[:3], kinds, TAPS) for x in joined]

    def _cut(
        self, x: Float[Array, "B h w C"], grid: tuple[int, int], size: tuple[int, int], shift: int, transposed: bool = False
    ) -> Float[Array, "T _ _"]:  # fmt: skip
        """A map as pieces [S C] (`transposed`: [C S]) in a `grid` of tiles, after padding by `shift` zero cells at the top and the left.

        `size`: of a part of a piece.
        """
        (down, across), (rows, columns), parts = grid, size, self.parts
        after = (down * rows - shift - x.shape[1], across * parts * columns - shift - x.shape[2])
        x = jnp.pad(x, ((0, 0), (shift, after[0]), (shift, after[1]), (0, 0)))
        x = x.reshape(-1, down, rows, across, parts, columns, x.shape[3])
        if transposed:
            return x.transpose(0, 1, 3, 6, 4, 2, 5).reshape(-1, x.shape[-1], parts * rows * columns)
        return x.transpose(0, 1, 3, 4, 2, 5, 6).reshape(-1, parts * rows * columns, x.shape[-1])

    def _joined(
        self, pieces: Float[Array, "T C S"], size: tuple[int, int], shift: int, shapes: Sequence[tuple[int, int]]
    ) -> list[Float[Array, "B _ _ C"]]:
        """Inverse of transposed `_cut` for all maps, of `shapes`."""
        (rows, columns), maps, begin = size, [], 0
        for (down, across), (height, width) in zip(self.grids, shapes):
            end = begin + self.images * down * across
            x = pieces[begin:end].reshape(-1, down, across, pieces.shape[1], self.parts, rows, columns)
            x = x.transpose(0, 1, 5, 2, 4, 6, 3).reshape(
                -1, down * rows, across * self.parts * columns, pieces.shape[1]
            )
            maps.append(x[:, shift : shift + height, shift : shift + width])
            begin = end
        return maps

    def positions(self) -> Float[np.ndarray, "2 lanes"]:
        """(row, column) of the samples in the window of their part, without offsets, in the order of `columns`."""
        (down, across), found = self._part, np.zeros((2, self.parts, len(self.groups), LANES), np.float32)
        row, column = np.divmod(np.arange(down * across), across)
        for group, taps in enumerate(self.groups):
            for k, tap in enumerate(taps):
                own = found[:, :, group, k * down * across : (k + 1) * down * across]
                own[:] = (np.stack([row, column]) * self.stride + self.bound + [[tap // 3], [tap % 3]])[:, None]
        return found.reshape(2, -1)


def _stacked(parts: Sequence[Float[Array, "_ S C"]]) -> Float[Array, "_ S C"]:
    """Concatenation, built from the end: maps get smaller, and XLA copies the whole result for each part that it inserts."""
    whole = parts[-1]
    for part in reversed(parts[:-1]):
        whole = lax.optimization_barrier(jnp.concatenate([part, whole]))
    return whole


def tiling_of(maps: Sequence[Array], masks: Sequence[Array], stride: int, bound: int) -> Tiling:
    """The tiling of a convolution of `maps` with one mask each. Raises ValueError for an unsupported stride or bound."""
    if stride not in (1, 2) or not 1 <= bound <= MAX_BOUND:
        raise ValueError(
            f"windowed convolution with stride {stride} and bound {bound}: expected stride 1 or 2 and a bound of 1 to "
            f"{MAX_BOUND} cells; use the implementation 'gather' for others"
        )
    inputs, outputs = (tuple((x.shape[1], x.shape[2]) for x in arrays) for arrays in (maps, masks))
    # At stride 2 four times as many cells have 128 outputs; the gradients of their windows do not fit into the memory of a v4.
    width = COLUMNS * stride * (1 if has_small_memory() else stride)
    return Tiling(maps[0].shape[0], stride, bound, inputs, outputs, width)
