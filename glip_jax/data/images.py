"""Images of batches: decoding, resizing onto a canvas, and reuse of the memory that holds them.

`data.codec="fast"` uses libjpeg-turbo and OpenCV, `"pillow"` gives the pixels of the original code. Both decode to equal pixels,
but resize differently: when shrinking, Pillow's bilinear filter averages, while OpenCV's reads four pixels. The fast codec
therefore decodes an image that is shrunk at 1/2, 1/4 or 1/8 first, if that is not smaller than the target. Its pixels differ by
at most 1 of 255 for enlarged photographs and by less than 0.5 on average for shrunk ones.

`BufferPool` reuses the memory of batches: the system zeroes new pages and takes back the memory of large arrays when they are
freed, so a new array costs as much time as resizing an image into it.
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
from glip_jax.io.image_files import turn
from glip_jax.structures.canvas import resize

__all__ = ["BufferPool", "decode", "resize_to_canvas"]

# Examples are made in several threads or processes; threads of OpenCV itself would compete with them.
cv2.setNumThreads(1)

_JPEG = b"\xff\xd8\xff"


def decode(record: Record, codec: Codec, min_size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels that the boxes of a record refer to: as stored, unless the record has an orientation.

    With `min_size` (height, width) in pixels, the image may be decoded at 1/2, 1/4 or 1/8 of its size, but not smaller than
    that. Raises RecordError if the bytes are not a readable image of the size that the record states.
    """
    if codec == "fast" and record.image.startswith(_JPEG):
        try:
            order = -1 if record.orientation >= 5 else 1  # height and width change places
            height, width, colors, _ = simplejpeg.decode_jpeg_header(record.image)
            # Of CMYK this library rounds otherwise than Pillow, with which all other jobs decode.
            if (height, width)[::order] == (record.height, record.width) and colors not in ("CMYK", "YCCK"):
                height, width = (min_size or (0, 0))[::order]
                factor = 2 if min_size else 1  # other fractions take longer than full size
                pixels = simplejpeg.decode_jpeg(
                    record.image, "RGB", min_height=height, min_width=width, min_factor=factor
                )
                return turn(pixels, record.orientation)
        except ValueError:
            pass  # Pillow reads more variants, and its error says what is wrong
    return decode_image(record)


def resize_to_canvas(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    canvas: UInt8[np.ndarray, "H2 W2 3"],
    mirrored: bool,
    codec: Codec,
) -> None:
    """Resizes an image to `size` (height, width) into the upper left corner of `canvas`; the rest becomes zero.

    `mirrored`: the image is flipped horizontally. Writes into existing memory, such as the slice of a batch, because a copy
    of the result would take as long as the resize. Raises ValueError if `size` does not fit on the canvas.
    """
    height, width = size
    if height > canvas.shape[0] or width > canvas.shape[1]:
        raise ValueError(
            f"an image of {height} x {width} does not fit on a canvas of {canvas.shape[0]} x {canvas.shape[1]}"
        )
    target = canvas[:height, :width]
    canvas[height:] = 0
    canvas[:height, width:] = 0
    match codec:
        case "fast":
            source = cv2.flip(image, 1) if mirrored else image
            if source.shape == target.shape:
                target[:] = source
            else:
                cv2.resize(source, (width, height), dst=target, interpolation=cv2.INTER_LINEAR)
        case "pillow":
            resized = resize(image, size)
            target[:] = resized[:, ::-1] if mirrored else resized


class BufferPool:
    """A pool of memory for uint8 arrays. Thread-safe; a pickled copy starts empty.

    A buffer returns to the pool when the last array that views it is deleted, also one on a device that shares it. So a batch
    that is still referenced is never overwritten.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._size = 0

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        return BufferPool, ()

    def acquire(self, shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
        """An uninitialized array of `shape`.

        All buffers have the size of the largest request so far, so a run with many canvases holds no more buffers than
        batches that are alive at the same time.
        """
        size = int(np.prod(shape))
        self._size = max(self._size, size)
        buffer = self._buffer(size)
        # numpy arrays, slices of them and device arrays that share the memory keep `owner` alive.
        owner = (ctypes.c_ubyte * len(buffer)).from_buffer(buffer)
        weakref.finalize(owner, self._release, buffer).atexit = False
        return np.frombuffer(memoryview(owner), np.uint8, size).reshape(shape)

    def _buffer(self, size: int) -> mmap.mmap:
        """A free buffer of at least `size` bytes, or a new one; smaller ones are discarded."""
        while True:
            try:
                buffer = self._free.pop()
            except IndexError:
                buffer = mmap.mmap(-1, self._size)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    buffer.madvise(mmap.MADV_HUGEPAGE)
                return buffer
            if len(buffer) >= size:
                return buffer

    def _release(self, buffer: mmap.mmap) -> None:
        if len(buffer) == self._size:
            self._free.append(buffer)
