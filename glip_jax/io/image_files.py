"""Images of files: found, measured, decoded to RGB pixels, and refused by a reason. The only place that calls Pillow's decoders.

Every job decodes with `decode`: imports, training (whose fast codec gives the same pixels), evaluation, labelling,
prediction, reports and the Detector.

    8 bits a channel            as they are; gray, palette, CMYK and other color modes are converted to RGB
    16 bits of gray             divided by the largest value of the smallest of 8, 10, 12, 14 and 16 bits that holds them
    32 bits or floating point   from the lowest to the highest finite value of the image
    transparency                over white
    several frames              the first

`decode` returns the pixels as they are stored. `turn` applies an EXIF orientation, `applied_orientation` says whether that is
what annotations refer to. The processor of exported folders (weights/portable/processing_glip.py) has the same rules.
"""

import contextlib
import ctypes
import hashlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from glip_jax import UserError
from glip_jax.config import Orientation
from glip_jax.io.formats import recognize_bytes
from glip_jax.io.retry import StorageError

__all__ = [
    "ENDINGS", "ORIENTATION_UNKNOWN", "PIXEL_LIMIT", "Decoded", "ImageFileError", "applied_orientation", "decode", "listed", "measured",
    "read_annotated", "read_upright", "turn", "upright",
]  # fmt: skip

PIXEL_LIMIT = 80_000_000
"""Maximum number of pixels of an image; lower than the limit of Pillow, so that this one applies.

Imports drop and count larger images: decoded, each takes more than 240 MB in every reader thread.
"""

TURNED = "image: turned upright by its EXIF orientation"
STORED = "image: EXIF orientation not applied, as its listed size is that of the stored pixels"
ORIENTATION_UNKNOWN = (
    "image: EXIF orientation not applied, as no listed size says what boxes refer to (set orientation)"
)

ENDINGS = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Endings of what a folder lists as images. HEIC is not read: it is listed to be named with that reason."""

_HEAD = 512
"""Bytes that tell what a file is."""


class ImageFileError(UserError, ValueError):
    """An image or a folder of images that is not there or cannot be read."""

    def __init__(self, reason: str, path: Any = "", kind: str = "bad") -> None:
        """`reason`: what is wrong, as a predicate of the file; `path`: the file, which the message begins with; `kind`: "empty",
        "large" or "bad".
        """
        super().__init__(f"{path} {reason}" if path else reason)
        self.reason, self.kind = reason, kind


class Decoded(NamedTuple):
    """A decoded image."""

    pixels: UInt8[np.ndarray, "H W 3"]
    """RGB, as stored."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 where the file has none that can be read."""
    notes: tuple[str, ...] = ()
    """What a report should say of the conversion, as `Report.note` takes it."""


def decode(data: bytes) -> Decoded:
    """The pixels of an image file. Raises ImageFileError for whatever cannot be decoded."""
    with _own_words(data[:_HEAD], len(data)), Image.open(io.BytesIO(data)) as image:
        return _converted(image, data)


def upright(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of an image of Pillow, rotated by its EXIF orientation. Raises ImageFileError as `decode`."""
    with _own_words(b"", 0):
        found = _converted(image)
    return turn(found.pixels, found.orientation)


def read_upright(path: epath.Path) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
    """RGB pixels of a file, rotated by its EXIF orientation, and the notes on it. Raises ImageFileError."""
    found = _of_file(path)[0]
    return turn(found.pixels, found.orientation), found.notes


def read_annotated(
    path: epath.Path, listed_size: tuple[int | None, int | None], rule: Orientation, boxes: bool = True
) -> tuple[UInt8[np.ndarray, "H W 3"], str, tuple[str, ...]]:
    """RGB pixels that annotations refer to, the SHA-256 of the file, and the notes on it; see `applied_orientation`."""
    found, digest = _of_file(path)
    orientation, note = applied_orientation(found, listed_size, rule, boxes)
    return turn(found.pixels, orientation), digest, (*found.notes, *([note] if note else []))


def turn(pixels: UInt8[np.ndarray, "H W 3"], orientation: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Stored pixels as an EXIF orientation shows them; 1 returns them unchanged."""
    match orientation:
        case 2:
            pixels = pixels[:, ::-1]
        case 3:
            pixels = pixels[::-1, ::-1]
        case 4:
            pixels = pixels[::-1]
        case 5:
            pixels = pixels.transpose(1, 0, 2)
        case 6:
            pixels = np.rot90(pixels, -1)
        case 7:
            pixels = pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            pixels = np.rot90(pixels)
    return np.ascontiguousarray(pixels)


def applied_orientation(
    image: Decoded, listed_size: tuple[int | None, int | None], rule: Orientation, boxes: bool = True
) -> tuple[int, str]:
    """The EXIF orientation to apply for the pixels that annotations refer to (1: none), and a note on that; "" for none.

    `listed_size`: (height, width) in the annotations, None where they list none. `boxes`: whether there are any; without them
    an image is upright unless its listed size says otherwise. `rule` "auto" takes what the listed size fits; where it fits both
    or there is none, the stored pixels, as in the original.
    """
    stored = image.pixels.shape[:2]
    if image.orientation == 1:
        return 1, ""
    if rule == "stored":
        return 1, ""
    shown = stored[::-1] if image.orientation >= 5 else stored
    told = None not in listed_size and shown != stored
    if rule == "upright" or (told and listed_size == shown) or not (told or boxes):
        return image.orientation, TURNED
    return 1, STORED if told and listed_size == stored else ORIENTATION_UNKNOWN


def listed(path: epath.Path) -> tuple[list[epath.Path], int]:
    """A file, or the images of a folder in order of their names; and how many other files lie there.

    Files that macOS writes beside others (`._NAME`) are no images, whatever their endings.
    """
    if not path.exists():
        raise ImageFileError("does not exist: expected an image or a folder of images", path)
    if not path.is_dir():
        return [path], 0
    files = sorted(child for child in path.iterdir() if not child.is_dir())
    images = [file for file in files if file.suffix.lower() in ENDINGS and not file.name.startswith("._")]
    if not images:
        raise ImageFileError(f"has no images (of {len(files)} files): expected {', '.join(ENDINGS)}", path)
    return images, len(files) - len(images)


def measured(path: epath.Path) -> tuple[int, int, bool]:
    """Height and width as shown, and whether its EXIF orientation rotates or mirrors it, from the header of an image."""
    with _naming(path), path.open("rb") as stream:
        head = stream.read(_HEAD)
        stream.seek(0)
        with _own_words(head, path.stat().length), Image.open(stream) as image:
            _check_size(image)
            width, height = image.size
            orientation = _orientation(image)
    return (width, height, True) if orientation >= 5 else (height, width, orientation > 1)


def _of_file(path: epath.Path) -> tuple[Decoded, str]:
    """A decoded file and its SHA-256."""
    with _naming(path):
        data = path.read_bytes()
        return decode(data), hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Adds the file to what is said of it."""
    try:
        yield
    except ImageFileError as error:
        raise ImageFileError(error.reason, path, error.kind) from None
    except StorageError:
        raise
    except FileNotFoundError:
        raise ImageFileError("does not exist: expected an image", path) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ImageFileError(f"cannot be read ({getattr(error, 'strerror', None) or error})", path) from None


@contextlib.contextmanager
def _own_words(head: bytes, size: int) -> Iterator[None]:
    """Raises ImageFileError for whatever a decoder raises: RuntimeError (AVIF), NotImplementedError (DDS), struct.error ...

    The texts of libraries hold memory addresses and paths, and differ between versions, so none is passed on.
    """
    _keep_quiet()
    try:
        yield
    except ImageFileError:
        raise
    except Image.DecompressionBombError:
        raise ImageFileError(f"is huge, {_AT_MOST}", kind="large") from None
    except Exception as error:
        if isinstance(error, UnidentifiedImageError) and not head.startswith(_IMAGES):
            reason = f"is no image that can be read ({size} bytes): {_what(head)}"
            raise ImageFileError(reason, kind="bad" if size else "empty") from None
        cut = isinstance(error, EOFError) or re.search("truncated|unexpected end|not enough", str(error).lower())
        whose = f"its {size} bytes" if size else "its data"
        state = "end before the image does" if cut else "are damaged"
        raise ImageFileError(f"cannot be decoded: {whose} {state}; replace it or leave it out") from None


_AT_MOST = f"at most {PIXEL_LIMIT:,} pixels are read: make it smaller"
_QUIET = ("ignore", None, Warning, re.compile(r"PIL(\.|$)"), 0)
logging.getLogger("PIL").setLevel(logging.CRITICAL)
for _setter in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):  # libtiff writes to stderr itself
    with contextlib.suppress(AttributeError, OSError):  # a Pillow without it
        getattr(ctypes.CDLL(Image.core.__file__), _setter)(None)


def _keep_quiet() -> None:
    """Ignores warnings that modules of Pillow raise: of odd metadata, and of sizes below the limit that is ours.

    For the whole process, as `warnings.catch_warnings` does not work in threads.
    """
    if not warnings.filters or warnings.filters[0] != _QUIET:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)


def _converted(image: Image.Image, data: bytes = b"") -> Decoded:
    """RGB pixels as stored, the orientation, and notes."""
    _check_size(image)
    image.load()
    notes: list[str] = []
    scaled = image.mode in ("I", "F") or image.mode.startswith("I;16")
    if scaled:
        pixels = np.repeat(_scaled(image, notes)[..., None], 3, 2)
    else:
        if _bits(image, data) > 8:
            notes.append("image: 16 bits a channel, of which the upper 8 are used")
        pixels = np.array(_opaque(image, notes))
    orientation = _orientation(image)
    if orientation == 1 and image.info.get("exif") and not _exif(image):
        notes.append("image: EXIF cannot be read, so its orientation is not known")
    with contextlib.suppress(Exception):  # a damaged later frame
        if getattr(image, "n_frames", 1) > 1:
            notes.append("image: several frames, of which the first is read")
    return Decoded(pixels, orientation, tuple(notes))


def _check_size(image: Image.Image) -> None:
    """Refuses images without pixels, with too many, and formats whose decoder is another program."""
    width, height = image.size
    if image.format in ("EPS", "WMF"):
        raise ImageFileError(f"is no image that can be read: {image.format} is a drawing, save it as PNG")
    if not width or not height:
        raise ImageFileError(f"has {width} x {height} pixels: it is empty", kind="empty")
    if width * height > PIXEL_LIMIT:
        raise ImageFileError(f"is huge: {width} x {height} pixels, {_AT_MOST}", kind="large")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 if it has none or one that cannot be read."""
    if image.format == "TIFF":  # Pillow turns these itself, size included
        return 1
    value = _exif(image).get(0x0112, 1)
    return int(value) if value in range(2, 9) else 1


def _exif(image: Image.Image) -> Mapping[int, Any]:
    """EXIF tags; none where the metadata beside sound pixels are damaged."""
    try:
        return image.getexif()
    except Exception:
        return {}


def _scaled(image: Image.Image, notes: list[str]) -> UInt8[np.ndarray, "H W"]:
    """Gray of more than 8 bits, scaled to 8; see the table of the module."""
    values: Shaped[np.ndarray, "H W"] = np.asarray(image)
    finite = np.isfinite(values)
    known = values if finite.all() else values[finite]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if image.mode != "F" and low >= 0 and high < 2**16:
        bits = next(bits for bits in (8, 10, 12, 14, 16) if high < 2**bits)
        scaled = np.rint(np.arange(2**bits) * (255 / (2**bits - 1))).astype(np.uint8)[values]
        notes.append(f"image: gray of 16 bits, of which {bits} are used, scaled to 8")
    else:
        shares = (np.where(finite, values, low).astype(np.float64) - low) / (high - low if high > low else 1.0)
        scaled = np.rint(255 * shares).astype(np.uint8)
        notes.append("image: gray of 32 bits or floating point, scaled from its lowest to its highest value")
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        scaled[values == see_through] = 255
    return scaled


def _opaque(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image in RGB; where it is transparent, over white, as what lies under transparent pixels is not meant to be seen."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    full = image.convert("RGBA")
    if np.asarray(full)[..., 3].min() == 255:
        return full.convert("RGB")
    notes.append("image: transparent parts, shown over white")
    return Image.alpha_composite(Image.new("RGBA", full.size, "white"), full).convert("RGB")


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel in the file, where its header says so; else 8."""
    if data.startswith(b"\x89PNG"):
        return data[24]
    tags = getattr(image, "tag_v2", None)
    found = tags.get(258, 8) if image.format == "TIFF" and tags is not None else 8
    return max(found) if isinstance(found, tuple) else found


_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"/annex/objects/", "a git-annex pointer: fetch the files with `git annex get`"),
    (b"\x00\x05\x16\x07", "a file that macOS writes beside others (AppleDouble)"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL: convert it to JPEG or PNG"),
    (b"\xff\x0a", "JPEG XL: convert it to JPEG or PNG"),
    (b"%!PS", "PostScript"),
    (b"\x93NUMPY", "a NumPy array: save it as PNG"),
)
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")
"""Beginnings of images, of which one that Pillow does not know is damaged."""
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif")


def _what(head: bytes) -> str:
    """What a file is that is no image, by what it begins with."""
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in (b"avif", b"avis"):
            return "damaged AVIF, or this Pillow reads none"
        return "HEIC: convert it to JPEG (phones have a setting for that)" if brand in _HEIC else "a video"
    if head[128:132] == b"DICM":
        return "DICOM: save it as PNG"
    for beginning, what in _BEGINNINGS:
        if head.startswith(beginning):
            return what
    if not head.strip(b"\x00"):
        return "zero bytes alone, as a broken download or a full disk leaves"
    if found := recognize_bytes(head):
        return found.mended
    text = head.decode("utf-8-sig", "replace").lstrip()
    if re.match(r"<(\?xml|svg)", text, re.IGNORECASE):
        return "SVG, a drawing: save it as PNG" if "<svg" in text.lower() else "XML"
    if text[:40].replace("\n", " ").isprintable() and "\ufffd" not in text[:40]:
        return f"a text, {text[:40]!r}"
    return f"no known format, it begins with the bytes {head[:8].hex(' ')}"
