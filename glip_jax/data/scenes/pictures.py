"""Named pictures with transparency in several styles, from which synthetic scenes are composed.

A folder of pictures has names.json, code point (hex) -> {"name", "split"}, and STYLE/CODE.webp for each style.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from glip_jax import UserError
from glip_jax.io.text_files import decoded

__all__ = ["COLORS", "SPLITS", "Picture", "PictureError", "Split", "color_of", "load_pictures"]

Split = Literal["detection", "grounding", "captions", "unseen"]
"""Records in which a name may occur: detection, only grounding, only captions without boxes, none (unseen)."""
SPLITS: tuple[Split, ...] = get_args(Split)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")


class PictureError(UserError, ValueError):
    """Pictures are missing or unreadable, or fewer than requested."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A named picture."""

    name: str
    split: Split
    style: str
    image: Image.Image
    """RGBA."""

    @cached_property
    def color(self) -> str:
        """The dominant color of the picture, one of COLORS, or ""; see `color_of`."""
        return color_of(np.asarray(self.image.convert("RGBA")))


def load_pictures(
    folder: epath.PathLike,
    styles: Sequence[str] = ("fluent",),
    splits: Sequence[Split] = ("detection",),
    limit: Mapping[str, int] | int = 0,
) -> list[Picture]:
    """Reads the pictures of `splits` in `styles`, sorted by name and, within a name, in the order of `styles`.

    `limit`: number of names per split (one number, or one for each split), evenly spaced in names.json, where neighbors are
    similar, and the same in every style; 0: all.

    Raises:
        PictureError: names.json or one of its pictures is missing or unreadable, or there are fewer names than `limit`.
    """
    root = epath.Path(folder)
    entries = _listing(root / "names.json")
    chosen: list[tuple[str, str, Split]] = []
    for split in splits:
        of_split = [(str(entry["name"]), code) for code, entry in entries.items() if entry["split"] == split]
        count = limit if isinstance(limit, int) else limit.get(split, 0)
        if count < 0 or not of_split or count > len(of_split):
            raise PictureError(
                f"{root / 'names.json'} has {len(of_split)} names of split {split!r}, expected {count or 1}"
            )
        kept = [i * len(of_split) // count for i in range(count)] if count else range(len(of_split))
        chosen.extend((*of_split[i], split) for i in kept)
    pictures = []
    for name, code, split in sorted(chosen):
        for style in styles:
            file = root / style / f"{code}.webp"
            try:
                with file.open("rb") as stream, Image.open(stream) as image:
                    pictures.append(Picture(name, split, style, image.convert("RGBA")))
            except (OSError, ValueError) as error:
                available = sorted(p.name for p in root.iterdir() if p.is_dir())
                raise PictureError(
                    f"{file} ({name!r}) is not a readable picture ({error}); available styles: {', '.join(available)}"
                ) from error
    return pictures


def _listing(path: epath.Path) -> dict[str, dict[str, Any]]:
    """The validated content of names.json."""
    if not path.exists():
        raise PictureError(f"{path} does not exist: expected a folder with names.json and STYLE/CODE.webp")
    try:
        entries = json.loads(decoded(path.read_bytes()))
        bad = [code for code, entry in entries.items() if not entry["name"] or entry["split"] not in SPLITS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PictureError(f"{path} cannot be read ({error!r}): expected code -> {{name, split}} as JSON") from error
    if bad:
        raise PictureError(
            f"{path}: {bad[0]} has split {entries[bad[0]]['split']!r}, expected one of {', '.join(SPLITS)}"
        )
    return entries


def color_of(pixels: UInt8[np.ndarray, "h w 4"]) -> str:
    """The color of at least 60 % of the opaque pixels if no other color has more than 25 %; else "".

    Pixels are classified into COLORS by hue, saturation and value. Black, white and gray are never returned, because lighting
    changes them into one another.
    """
    opaque = pixels[pixels[..., 3] > 200][:, :3].astype(np.float32) / 255
    if not len(opaque):
        return ""
    value, low = opaque.max(1), opaque.min(1)
    spread = np.maximum(value - low, 1e-6)
    red, green, blue = opaque.T
    hue = np.where(
        value == red, (green - blue) / spread % 6, np.where(value == green, (blue - red) / spread + 2, (red - green) / spread + 4)
    ) * 60  # fmt: skip
    saturation = spread / np.maximum(value, 1e-6)
    # Boundaries of hues in degrees; hues between some neighbors are ambiguous and have no name.
    edges = [14, 20, 36, 42, 62, 78, 165, 195, 248, 262, 308, 318, 342, 348]
    names = np.array(["red", "", "orange", "", "yellow", "", "green", "", "blue", "", "purple", "", "pink", "", "red"])
    found = names[np.searchsorted(edges, hue)]
    # Only vivid hues keep their name; dark warm hues are brown, light reds pink.
    warm = (hue < 42) | (hue > 340)
    found = np.where(warm & ((value < 0.8) | (saturation < 0.6)), "", found)
    found = np.where((found == "yellow") & ((value < 0.7) | (saturation < 0.45)), "", found)
    found = np.where((hue >= 62) & (hue <= 308) & (saturation < 0.35), "", found)
    found = np.where((hue > 5) & (hue < 42) & (value < 0.68) & (saturation > 0.3), "brown", found)
    found = np.where(
        ((hue < 12) | (hue > 318)) & (value > 0.85) & (saturation > 0.2) & (saturation < 0.5), "pink", found
    )
    gray = saturation < 0.15
    found = np.where(gray, np.where(value > 0.85, "white", "gray"), found)
    found = np.where(value < 0.32, "black", found)
    shares = sorted(((float((found == name).mean()), name) for name in COLORS), reverse=True)
    if shares[0][0] >= 0.6 and shares[1][0] <= 0.25 and shares[0][1] not in ("black", "white", "gray"):
        return shares[0][1]
    return ""
