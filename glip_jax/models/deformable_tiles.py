"""Tiling of maps, offsets and outputs for the windowed deformable convolution (`deformable_window`).

Maps are divided into blocks of 8 x 16 cells, shifted by 1 + the bound of the offsets, so that the output tile of block (i, j)
reads the blocks (i ... i + rows - 1, j ... j + 1): the block itself and its neighbors below and to the right. A tile has 8 x 16
outputs at stride 1 and 4 x 8 at stride 2. All maps and images of a convolution form one sequence of tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = ["CELLS", "MAX_BOUND", "TAPS", "Tiling", "limits", "tiling_of"]

ROWS, COLUMNS = 8, 16
"""Size of a block in cells. In bfloat16, 16 cells fill the sublanes of a register, 128 its lanes."""
CELLS = ROWS * COLUMNS
TAPS = 9

MAX_BOUND = 7
"""With a larger bound, a window would exceed the next block to the right."""


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
            (max(-(-(h + shift) // ROWS), -(-oh // down)), max(-(-(w + shift) // COLUMNS), -(-ow // across)))
            for (h, w), (oh, ow) in zip(self.maps, self.outputs)
        )

    @property
    def tiles(self) -> int:
        """Number of tiles of all maps and images, which is the number of blocks."""
        return self.images * sum(down * across for down, across in self.grids)

    def table(self) -> Int[np.ndarray, "T columns"]:
        """Per tile: indices of the blocks of its window (left and right of each row), its row and column, height and width of its map.

        Blocks below or to the right of a map have index `tiles`, which is a block of zeros.
        """
        lines, first = [], 0
        for (down, across), size in zip(self.grids, self.maps):
            for _ in range(self.images):
                for i, j in np.ndindex(down, across):
                    window = [
                        first + r * across + c if r < down and c < across else self.tiles
                        for r in range(i, i + self.rows)
                        for c in (j, j + 1)
                    ]
                    lines.append([*window, i, j, *size])
                first += down * across
        return np.array(lines, np.int32)

    def blocks(self, maps: Sequence[Float[Array, "B _ _ C"]]) -> Float[Array, "N S C"]:
        """All maps as blocks of 8 x 16 cells, followed by a block of zeros."""
        parts = [_cut(x, grid, (ROWS, COLUMNS), 1 + self.bound) for x, grid in zip(maps, self.grids)]
        return _stacked([*parts, jnp.zeros((1, *parts[0].shape[1:]), parts[0].dtype)])

    def from_blocks(self, blocks: Float[Array, "T S C"]) -> list[Float[Array, "B _ _ C"]]:
        """Inverse of `blocks`, without the block of zeros."""
        return self._joined(blocks.swapaxes(1, 2), (ROWS, COLUMNS), 1 + self.bound, self.maps)

    def pieces(self, outputs: Sequence[Float[Array, "B _ _ O"]]) -> Float[Array, "T S O"]:
        """Values of outputs, by tile."""
        return _stacked([_cut(x, grid, self.tile, 0) for x, grid in zip(outputs, self.grids)])

    def from_pieces(self, pieces: Float[Array, "T S O"]) -> list[Float[Array, "B _ _ O"]]:
        """Inverse of `pieces`."""
        return self._joined(pieces.swapaxes(1, 2), self.tile, 0, self.outputs)

    def columns(self, samples: Sequence[Float[Array, "B _ _ K"]]) -> Float[Array, "T K S"]:
        """Values of few channels per output, by tile: channels as rows, outputs as columns, which fill the lanes of a TPU."""
        return _stacked([_cut(x, grid, self.tile, 0, True) for x, grid in zip(samples, self.grids)])

    def from_columns(self, columns: Float[Array, "T K S"]) -> list[Float[Array, "B _ _ K"]]:
        """Inverse of `columns`."""
        return self._joined(columns, self.tile, 0, self.outputs)

    def _joined(
        self, pieces: Float[Array, "T C S"], size: tuple[int, int], shift: int, shapes: Sequence[tuple[int, int]]
    ) -> list[Float[Array, "B _ _ C"]]:
        """Inverse of `_cut` for all maps, of `shapes`."""
        (rows, columns), maps, begin = size, [], 0
        for (down, across), (height, width) in zip(self.grids, shapes):
            end = begin + self.images * down * across
            x = pieces[begin:end].reshape(-1, down, across, pieces.shape[1], rows, columns)
            x = x.transpose(0, 1, 4, 2, 5, 3).reshape(-1, down * rows, across * columns, pieces.shape[1])
            maps.append(x[:, shift : shift + height, shift : shift + width])
            begin = end
        return maps

    def positions(self) -> Float[np.ndarray, "S 27"]:
        """Per output of a tile: (row, column) of its nine taps in the window, without offsets, then nine zeros."""
        (down, across), tap = self.tile, np.arange(TAPS)
        row, column = np.divmod(np.arange(down * across)[:, None], across)
        rows, columns = (x * self.stride + self.bound for x in (row, column))
        positions = np.stack([rows + tap // 3, columns + tap % 3], -1).reshape(down * across, -1)
        return np.pad(positions, ((0, 0), (0, TAPS))).astype(np.float32)


def _cut(
    x: Float[Array, "B h w C"], grid: tuple[int, int], size: tuple[int, int], shift: int, transposed: bool = False
) -> Float[Array, "T _ _"]:
    """A map as pieces [S C] (`transposed`: [C S]) of `size`, in a `grid`, after padding by `shift` zero cells at the top and the left."""
    (down, across), (rows, columns) = grid, size
    after = (down * rows - shift - x.shape[1], across * columns - shift - x.shape[2])
    x = jnp.pad(x, ((0, 0), (shift, after[0]), (shift, after[1]), (0, 0)))
    x = x.reshape(-1, down, rows, across, columns, x.shape[3])
    if transposed:
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, x.shape[-1], rows * columns)
    return x.swapaxes(2, 3).reshape(-1, rows * columns, x.shape[-1])


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
