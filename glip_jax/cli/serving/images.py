"""Images that clients send: bytes to pixels, with every limit checked before anything large is made.

Nothing is opened by a name that a client gives, except below one folder (`within`), and no address is fetched.
"""

import base64
import binascii
import io
import re
import urllib.parse
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from glip_jax.io.image_files import ENDINGS, PIXEL_LIMIT, ImageFileError, decode, turn

__all__ = ["data_of_address", "data_of_file", "pixels_of", "within"]

_NPY = b"\x93NUMPY"


def pixels_of(data: bytes) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
    """RGB pixels of an image file, upright, or of a NumPy file (.npy) of uint8[H W 3], and notes on how it was read.

    Raises ImageFileError: no image, damaged, or more than `PIXEL_LIMIT` pixels, which is checked in the header.
    """
    if data.startswith(_NPY):
        return _array(data), ()
    found = decode(data)
    return turn(found.pixels, found.orientation), found.notes


def _array(data: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The array of a .npy file; objects, which could run code, are never read."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(stream)
        size = len(data) - stream.tell()
        if kind != np.uint8 or len(shape) != 3 or shape[2] != 3:
            raise ImageFileError(f"is an array {kind}{list(shape)}: expected uint8[H W 3], RGB")
        if shape[0] * shape[1] > PIXEL_LIMIT:
            raise ImageFileError(
                f"is huge: {shape[1]} x {shape[0]} pixels, at most {PIXEL_LIMIT:,} are read", kind="large"
            )
        # A header may promise more than there is, and numpy would make room for it first.
        if not shape[0] or not shape[1] or shape[0] * shape[1] * 3 != size:
            raise ImageFileError(f"is an array of {list(shape)} with {size} bytes of values: it is cut, or empty")
        return np.ascontiguousarray(np.load(io.BytesIO(data), allow_pickle=False))
    except ImageFileError:
        raise
    except Exception:  # whatever numpy's parser raises for a header that somebody made up
        raise ImageFileError("is no array that can be read: its .npy header is damaged") from None


def data_of_address(address: str) -> bytes | None:
    """The bytes of a data: address (base64); None for an address of another kind. Raises ImageFileError for a damaged one."""
    if not address.startswith("data:"):
        return None
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageFileError("is a data: address without base64: expected data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ImageFileError("is a data: address whose base64 is damaged") from None


def within(folder: str, address: str) -> Path:
    """The file below `folder` that an address of Label Studio names: /data/local-files/?d=PATH, /data/PATH, or a relative path.

    Raises ImageFileError for an address of another host, a path that leaves the folder, also by a link, and a file that is not there or does not end
    as images do: what is said of a file that is no image tells how it begins, and Label Studio's folder has its secrets in a text.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", address):
        raise ImageFileError(
            "is an address of another host or storage, which is never fetched: expected data:image/...;base64,... or a file below --label-studio-files"
        )
    if not folder:
        raise ImageFileError(
            "is a path, and this server reads no files: start it with --label-studio-files=DIR, or send data:image/...;base64,..."
        )
    parts = urllib.parse.urlsplit(address)
    asked = (
        urllib.parse.parse_qs(parts.query).get("d", [""])[0]
        if parts.path.startswith("/data/local-files")
        else urllib.parse.unquote(parts.path)
    )
    asked = asked.removeprefix("/data/").lstrip("/")
    root = Path(folder).resolve()
    try:
        place = (root / asked).resolve()
        found = place.is_relative_to(root) and place.suffix.lower() in (*ENDINGS, ".npy") and place.is_file()
    except (OSError, ValueError):  # a null character, a name that is too long
        found = False
    if not found:
        raise ImageFileError("names no file below the folder of --label-studio-files that ends as images do")
    return place


def data_of_file(place: Path, most: int) -> bytes:
    """The bytes of a file. Raises ImageFileError for one that cannot be read, or has more than `most`."""
    try:
        with place.open("rb") as stream:
            data = stream.read(most + 1)
    except OSError as error:
        raise ImageFileError(f"cannot be read ({error.strerror})") from None
    if len(data) > most:
        raise ImageFileError(f"has more than {most:,} bytes, the most that is read: see --max-megabytes", kind="large")
    return data
