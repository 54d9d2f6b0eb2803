"""Memory of batches that is used again: fresh memory costs as much as resizing a picture into it.

The system gives zeroed pages, and takes them back when an array of tens of megabytes goes. What is lent here comes back
when the last array over it is gone, wherever it went meanwhile: a batch that somebody keeps is never written over.
"""

import ctypes
import mmap
import weakref

import numpy as np
from jaxtyping import UInt8

__all__ = ["Memory"]


class Memory:
    """Lends arrays for pixels. Safe to use from several threads; a copy in another process begins with none."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._size = 0

    def __reduce__(self) -> tuple[type["Memory"], tuple[()]]:
        return Memory, ()

    def lend(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        """An array of `shape` with whatever values are there. Its memory is lent again when no array over it is left.

        All pieces have the size of the largest that was asked for so far, so that a run of many canvases holds no more
        pieces than batches are alive at once.
        """
        size = int(np.prod(shape))
        self._size = max(self._size, size)
        piece = self._piece(size)
        # numpy keeps alive what it got the memory from, also through slices and device arrays that share it.
        lent = (ctypes.c_ubyte * len(piece)).from_buffer(piece)
        weakref.finalize(lent, self._back, piece).atexit = False
        return np.frombuffer(memoryview(lent), np.uint8, size).reshape(shape)

    def _piece(self, size: int) -> mmap.mmap:
        while True:
            try:
                piece = self._free.pop()
            except IndexError:
                piece = mmap.mmap(-1, self._size)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    piece.madvise(mmap.MADV_HUGEPAGE)
                return piece
            if len(piece) >= size:
                return piece

    def _back(self, piece: mmap.mmap) -> None:
        if len(piece) == self._size:
            self._free.append(piece)
