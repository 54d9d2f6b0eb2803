"""Image files that users name: listed, measured, read upright, and refused in one line."""

import contextlib
import hashlib
import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from glip_jax import UserError
from glip_jax.io.retry import StorageError

__all__ = ["PIXEL_LIMIT", "ImageFileError", "listed", "measured", "read_stored", "read_upright", "upright"]

PIXEL_LIMIT = 80_000_000
"""Maximum number of pixels of an image; lower than the limit of Pillow, so that this one applies.

Imports drop and count larger images: decoded, each takes more than 240 MB in every reader thread.
"""

_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFileError(UserError, ValueError):
    """An image or a folder of images that is not there or cannot be read."""


def listed(path: epath.Path) -> tuple[list[epath.Path], int]:
    """A file, or the images of a folder in order of their names; and how many files with other endings lie there."""
    if not path.exists():
        raise ImageFileError(f"{path} does not exist: expected an image or a folder of images")
    if not path.is_dir():
        return [path], 0
    files = sorted(child for child in path.iterdir() if not child.is_dir())
    images = [file for file in files if file.suffix.lower() in _ENDINGS]
    if not images:
        raise ImageFileError(f"{path} has no images (of {len(files)} files): expected {', '.join(_ENDINGS)}")
    return images, len(files) - len(images)


def measured(path: epath.Path) -> tuple[int, int, bool]:
    """Height and width as shown, and whether its EXIF orientation rotates or mirrors it, from the header of an image."""
    with _readable(path), path.open("rb") as stream, Image.open(stream) as image:
        width, height = image.size
        orientation = image.getexif().get(0x0112, 1)
    if not width or not height:
        raise ImageFileError(f"{path} has {width} x {height} pixels: it is empty")
    if width * height > PIXEL_LIMIT:
        raise ImageFileError(f"{path} has {width} x {height} pixels, at most {PIXEL_LIMIT:,} are read: make it smaller")
    exif_rotated = orientation in range(2, 9)
    return (width, height, exif_rotated) if exif_rotated and orientation >= 5 else (height, width, exif_rotated)


def read_upright(path: epath.Path) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels, rotated by the EXIF orientation; of several frames the first."""
    with _readable(path), Image.open(io.BytesIO(path.read_bytes())) as image:
        return upright(image)


def upright(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of an image, rotated by its EXIF orientation."""
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def read_stored(path: epath.Path) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
    """RGB pixels as they are stored, to which annotations refer, without EXIF rotation; and the SHA-256 of the file."""
    with _readable(path):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB")), hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[None]:
    """Says in one line what is wrong with an image file, whatever Pillow makes of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, but below the limit that is ours; odd metadata
            yield
    except StorageError:
        raise
    except FileNotFoundError:
        raise ImageFileError(f"{path} does not exist: expected an image") from None
    except Image.DecompressionBombError:
        raise ImageFileError(f"{path} is huge, at most {PIXEL_LIMIT:,} pixels are read: make it smaller") from None
    except UnidentifiedImageError:
        size = path.stat().length
        raise ImageFileError(
            f"{path} is no image that can be read ({size} bytes): expected JPEG, PNG, WebP …"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ImageFileError(
            f"{path} cannot be decoded ({error}): the file is damaged; replace it or leave it out"
        ) from None
