"""Tiling of maps, offsets and outputs for the windowed deformable convolution (`deformable_window`).

Maps are divided into blocks of 8 x 16 cells, or of 8 x 8 where the bound of the offsets is at most `NARROW_BOUND`, shifted by 1 + the bound.
A tile has 8 x 16 outputs at stride 1 and 4 x 8 at stride 2. It consists of as many parts as a block is narrower than 16 cells: one or two.
The part of block (i, j) reads the blocks (i ... i + rows - 1, j ... j + 1): the block itself and its neighbors below and to the right. All
maps and images of a convolution form one sequence of tiles, whose parts are adjacent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = ["COLUMNS", "GROUP", "MAX_BOUND", "ROWS", "TAPS", "Tiling", "limits", "tiling_of"]

ROWS, COLUMNS = 8, 16
"""Cells of the map below a tile."""
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

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of outputs in a tile."""
        return ROWS // self.stride, COLUMNS // self.stride

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of cells in a block."""
        return ROWS, COLUMNS // self.parts

    @property
    def parts(self) -> int:
        """Parts of a tile, each with a window of its own."""
        return 2 if self.bound <= NARROW_BOUND else 1

    @property
    def sides(self) -> int:
        """Groups of 16 columns next to each other in a window, which is two blocks wide."""
        return 2 // self.parts

    @property
    def rows(self) -> int:
        """Rows of blocks in a window: 8 cells of the tile, two more for the 3 x 3 kernel, and the bound on both sides."""
        return -(-(ROWS + 2 + 2 * self.bound) // ROWS)

    @property
    def chunks(self) -> int:
        """Groups of 8 window rows that one row of taps can reach."""
        return -(-(ROWS + 2 * self.bound) // ROWS)

    def first(self, tap_row: int) -> int:
        """The first window row of those groups; 0 with parts, whose windows have no other rows."""
        return min(tap_row, ROWS * (self.rows - self.chunks))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(down, across) tiles of each map, enough for all cells of the map and all outputs."""
        (down, across), shift = self.tile, 1 + self.bound
        return tuple(
            (max(-(-(h + shift) // ROWS), -(-oh // down)), max(-(-(w + shift) // COLUMNS), -(-ow // across)))
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

    def columns(self, samples: Sequence[Float[Array, "B _ _ K"]]) -> Float[Array, "T K S"]:
        """Values of few channels per output, by tile: channels as rows, outputs as columns, which fill the lanes of a TPU."""
        return _stacked([self._cut(x, grid, self._part, 0, True) for x, grid in zip(samples, self.grids)])

    def from_columns(self, columns: Float[Array, "T K S"]) -> list[Float[Array, "B _ _ K"]]:
        """Inverse of `columns`."""
        return self._joined(columns, self._part, 0, self.outputs)

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

    def positions(self) -> Float[np.ndarray, "S 27"]:
        """Per output of a tile: (row, column) of its nine taps in the window of its part, without offsets, then nine zeros."""
        (down, across), tap = self._part, np.arange(TAPS)
        row, column = np.divmod(np.arange(down * across)[:, None], across)
        rows, columns = (x * self.stride + self.bound for x in (row, column))
        positions = np.stack([rows + tap // 3, columns + tap % 3], -1).reshape(down * across, -1)
        return np.tile(np.pad(positions, ((0, 0), (0, TAPS))), (self.parts, 1)).astype(np.float32)


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
    return Tiling(maps[0].shape[0], stride, bound, inputs, outputs)
