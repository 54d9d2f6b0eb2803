"""Named pictures with transparency, in several styles: what picture scenes are made of.

A folder of pictures has names.json, code point (hex) -> {"name", "split"}, and per style STYLE/CODE.webp.
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

__all__ = ["COLOURS", "SPLITS", "Picture", "PictureError", "Split", "colour_of", "load_pictures"]

Split = Literal["detection", "grounding", "captions", "unseen"]
"""Which training records may show a name: detection, only grounding, only captions without boxes, none."""
SPLITS: tuple[Split, ...] = get_args(Split)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")


class PictureError(UserError, ValueError):
    """Pictures that are missing or unreadable, or fewer than were asked for."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A named picture."""

    name: str
    split: Split
    style: str
    image: Image.Image
    """RGBA."""

    @cached_property
    def colour(self) -> str:
        """The one of COLOURS that most of the picture has, "" if none is clear; see `colour_of`."""
        return colour_of(np.asarray(self.image.convert("RGBA")))


def load_pictures(
    folder: epath.PathLike,
    styles: Sequence[str] = ("fluent",),
    splits: Sequence[Split] = ("detection",),
    limit: Mapping[str, int] | int = 0,
) -> list[Picture]:
    """Reads the pictures of `splits` in `styles`, sorted by name and, within a name, in the order of `styles`.

    `limit`: how many names of each split are kept (one number, or one a split), evenly spread over names.json, whose
    neighbours are alike, and the same in every style; 0: all.

    Raises:
        PictureError: names.json or a picture of it is missing or unreadable, or has fewer names than `limit`.
    """
    root = epath.Path(folder)
    entries = _listing(root / "names.json")
    chosen: list[tuple[str, str, Split]] = []
    for split in splits:
        of_split = [(str(entry["name"]), code) for code, entry in entries.items() if entry["split"] == split]
        count = limit if isinstance(limit, int) else limit.get(split, 0)
        if count < 0 or not of_split or count > len(of_split):
            raise PictureError(
                f"{root / 'names.json'} has {len(of_split)} names of split {split!r}, {count or 1} were asked for"
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
                there = sorted(p.name for p in root.iterdir() if p.is_dir())
                raise PictureError(
                    f"{file} ({name!r}) is no readable picture ({error}); there are the styles {', '.join(there)}"
                ) from error
    return pictures


def _listing(path: epath.Path) -> dict[str, dict[str, Any]]:
    """What names.json says, checked for form."""
    if not path.exists():
        raise PictureError(f"{path} is not there: expected a folder with names.json and STYLE/CODE.webp")
    try:
        entries = json.loads(path.read_text())
        bad = [code for code, entry in entries.items() if not entry["name"] or entry["split"] not in SPLITS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PictureError(f"{path} cannot be read ({error!r}): expected code -> {{name, split}} as JSON") from error
    if bad:
        raise PictureError(
            f"{path}: {bad[0]} has split {entries[bad[0]]['split']!r}, expected one of {', '.join(SPLITS)}"
        )
    return entries


def colour_of(pixels: UInt8[np.ndarray, "h w 4"]) -> str:
    """The colour that at least three fifths of the opaque pixels have while no other has a quarter; else "".

    Pixels are sorted by hue, saturation and value into COLOURS. Black, white and gray are never the answer: light
    changes them too easily into one another.
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
    # Hues between edges in degrees; between some neighbours lies what people call by either name.
    edges = [14, 20, 36, 42, 62, 78, 165, 195, 248, 262, 308, 318, 342, 348]
    names = np.array(["red", "", "orange", "", "yellow", "", "green", "", "blue", "", "purple", "", "pink", "", "red"])
    found = names[np.searchsorted(edges, hue)]
    # Vivid hues only; dark warm ones are browns, light reds pinks.
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
    shares = sorted(((float((found == name).mean()), name) for name in COLOURS), reverse=True)
    if shares[0][0] >= 0.6 and shares[1][0] <= 0.25 and shares[0][1] not in ("black", "white", "gray"):
        return shares[0][1]
    return ""
