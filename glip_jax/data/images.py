"""From the bytes of an image to its place on a canvas, at the speed of libjpeg-turbo and OpenCV, or exactly as Pillow does it.

Decoding is the same either way (equal pixels). Resizing is not: OpenCV's bilinear filter looks at four pixels also when
it shrinks, where Pillow's averages. Enlarged photographs differ by at most 1 of 255; what is shrunk is first decoded at
1/2, 1/4 or 1/8 where that is not too small, and then differs by less than 0.5 on average. `data.codec="pillow"` is the
original's pixels.
"""

import ctypes
import mmap
import weakref

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from glip_jax.config import Codec
from glip_jax.data.records import Record, decode_image
from glip_jax.structures.canvas import resize

__all__ = ["Memory", "decode", "resize_to_canvas"]

# Examples are made in threads and processes already; OpenCV's own would stand in one another's way.
cv2.setNumThreads(1)

_JPEG = b"\xff\xd8\xff"


def decode(record: Record, codec: Codec, least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a record's image; with `least` (height, width) it may come at 1/2, 1/4 or 1/8, but no smaller.

    EXIF orientation is not regarded. Raises RecordError if the bytes are no readable image of the record's size.
    """
    if codec == "fast" and record.image.startswith(_JPEG):
        try:
            if simplejpeg.decode_jpeg_header(record.image)[:2] == (record.height, record.width):
                height, width = least or (0, 0)
                factor = 2 if least else 1  # other fractions take longer than the whole
                return simplejpeg.decode_jpeg(
                    record.image, "RGB", min_height=height, min_width=width, min_factor=factor
                )
        except ValueError:
            pass  # Pillow knows more kinds, and says what is wrong
    return decode_image(record)


def resize_to_canvas(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    canvas: UInt8[np.ndarray, "H2 W2 3"],
    mirrored: bool,
    codec: Codec,
) -> None:
    """Writes the image, resized to `size` (height, width), into the upper left of `canvas`, `mirrored` left to right; the
    rest becomes zero.

    Into memory that is there already, such as an image's part of its batch: an array of its own and a copy of it would
    take as long as the resize.
    """
    height, width = size
    if height > canvas.shape[0] or width > canvas.shape[1]:
        raise ValueError(
            f"an image of {height} x {width} does not fit on a canvas of {canvas.shape[0]} x {canvas.shape[1]}"
        )
    own = canvas[:height, :width]
    canvas[height:] = 0
    canvas[:height, width:] = 0
    match codec:
        case "fast":
            source = cv2.flip(image, 1) if mirrored else image
            if source.shape == own.shape:
                own[:] = source
            else:
                cv2.resize(source, (width, height), dst=own, interpolation=cv2.INTER_LINEAR)
        case "pillow":
            resized = resize(image, size)
            own[:] = resized[:, ::-1] if mirrored else resized


# Memory of batches that is used again: fresh memory costs as much as resizing a picture into it.
#
# The system gives zeroed pages, and takes them back when an array of tens of megabytes goes. What is lent here comes back
# when the last array over it is gone, wherever it went meanwhile: a batch that somebody keeps is never written over.


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
