"""Images of inputs and outputs: boxes with their phrases, contact sheets, curves and histograms."""

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, UInt8
from PIL import Image, ImageDraw, ImageFont

from glip_jax.structures.batch import Batch

__all__ = [
    "Mark", "color", "contact_sheet", "draw_batch", "draw_boxes",
    "draw_counts", "draw_curves", "draw_groups", "draw_histogram", "draw_shares", "hex_color", "phrase_text", "png", "svg_uri",
]  # fmt: skip


class Mark(NamedTuple):
    """A box with its text on an image."""

    box: tuple[float, float, float, float]
    """xyxy, pixels."""
    text: str = ""
    color: tuple[int, int, int] = (230, 30, 60)


def color(index: int) -> tuple[int, int, int]:
    """A color that differs from those of nearby indices: hues a golden angle apart, dark enough for white text.

    White on it has a contrast of at least 3 to 1 (WCAG 2.2's relative luminance), so yellow becomes brown.
    """
    channels = np.array(colorsys.hsv_to_rgb((index * 0.618034) % 1, 0.85, 0.8 if index % 2 else 0.95))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    # Contrast is 1.05 / (luminance + 0.05). Scaling by a power of 1 / 2.4 scales light about linearly.
    channels *= min(1.0, (0.22 / luminance) ** (1 / 2.4))
    red, green, blue = (round(float(channel) * 255) for channel in channels)
    return red, green, blue


def hex_color(index: int) -> str:
    """`color` as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*color(index))


def draw_boxes(image: UInt8[np.ndarray, "H W 3"], marks: Sequence[Mark], scale: float = 1.0) -> Image.Image:
    """Draws `marks` with their text on a copy of `image`, enlarged by `scale`.

    Boxes beyond the image are cut at its edge; a box without an area or with a value that is no number is not drawn.
    Characters that the built-in font lacks appear as its box sign.
    """
    height, width = image.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(image))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    line = max(1, round(min(size) / 200))
    font = ImageFont.load_default(max(9, min(16, round(min(size) / 26))))
    for mark in marks:
        values = np.asarray(mark.box, np.float64) * np.array([size[0] / width, size[1] / height] * 2)
        if not np.isfinite(values).all():
            continue
        values = np.clip(values, 0, [size[0] - 1, size[1] - 1] * 2)
        x1, y1, x2, y2 = (float(value) for value in values)
        if x2 <= x1 or y2 <= y1:
            continue
        pen.rectangle((x1, y1, x2, y2), outline=mark.color, width=line)
        if mark.text:
            _write(pen, size, (x1, y1), " ".join(mark.text.split()), font, mark.color)
    return picture


def _write(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    background: tuple[int, int, int],
) -> None:
    """Text on a plate of its color, above the corner where there is room, else below it; kept inside the image."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    pen.rectangle((x, y, x + width, y + height), fill=background)
    pen.text((x + 2 - left, y + 2 - top), text, fill=(255, 255, 255), font=font)


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, margin: int = 8
) -> Image.Image:
    """Lays pictures out in rows of `columns`, each over its caption, which is broken into lines.

    Raises:
        ValueError: no pictures, or another number of captions.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: expected as many, and at least one")
    font = ImageFont.load_default(12)
    width = max(picture.width for picture in pictures)
    columns = min(columns, len(pictures))
    texts = [_broken(caption, font, width) for caption in captions]
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [max(pictures[i].height + 16 * len(texts[i]) for i in row) + margin for row in rows]
    sheet = Image.new("RGB", (margin + columns * (width + margin), margin + sum(heights)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    y = margin
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            x = margin + column * (width + margin)
            sheet.paste(pictures[index], (x, y))
            for number, text in enumerate(texts[index]):
                pen.text((x, y + pictures[index].height + 1 + 16 * number), text, fill=(20, 20, 20), font=font)
        y += height
    return sheet


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, at most eight, broken at spaces; the last one says what is left out."""
    lines, line = [], ""
    words = text.split()
    for number, word in enumerate(words):
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            line = word
            if len(lines) == 8:
                lines[-1] += f" ... ({len(words) - number} more words)"
                return lines
        else:
            line = longer
    return [*lines, line] if line else lines


def phrase_text(tokens: Int32[np.ndarray, " T"], chosen: Bool[np.ndarray, " T"], vocabulary: Sequence[str]) -> str:
    """The chosen tokens as text for display: WordPieces joined, a gap written as '...'.

    Ids beyond the vocabulary appear as [id]. For pictures only: no program reads phrases back from tokens.
    """
    joined, last = "", -1
    for position in np.flatnonzero(chosen).tolist():
        number = int(tokens[position])
        piece = vocabulary[number] if 0 <= number < len(vocabulary) else f"[{number}]"
        if joined and position != last + 1:
            joined += " ... "
            joined += piece
        elif piece.startswith("##") and joined:
            joined += piece[2:]
        else:
            joined += f" {piece}" if joined else piece
        last = position
    return joined


def draw_batch(batch: Batch, vocabulary: Sequence[str], limit: int = 16) -> Image.Image:
    """A sheet of the first `limit` examples of a batch, as the network gets them: pixels, boxes, the text of their tokens.

    The caption below is what the token ids spell. Each example's real area is framed by the sheet's white; what a
    batch masks out as not valid says so.
    """
    images, tokens = np.asarray(batch.image), np.asarray(batch.tokens)
    boxes, box_mask, positive = np.asarray(batch.boxes), np.asarray(batch.box_mask), np.asarray(batch.positive_map)
    valid, sizes, mask = np.asarray(batch.valid), np.asarray(batch.size), np.asarray(batch.token_mask)
    # Canvases of any size become about 320 pixels wide, so that a sheet of four columns fits a screen.
    scale = min(2.0, 320 / images.shape[2])
    pictures, captions = [], []
    for index in range(min(limit, len(images))):
        height, width = (max(1, int(value)) for value in sizes[index])
        marks = [
            Mark(tuple(boxes[index, slot].tolist()), phrase_text(tokens[index], positive[index, slot], vocabulary),
                 color(number))
            for number, slot in enumerate(np.flatnonzero(box_mask[index]))
        ]  # fmt: skip
        pictures.append(draw_boxes(images[index, :height, :width], marks, scale))
        text = mask[index].copy()
        # [CLS] and [SEP] are not part of the caption.
        text[np.flatnonzero(text)[[0, -1]] if text.any() else []] = False
        words = phrase_text(tokens[index], text, vocabulary)
        captions.append(words if valid[index] else f"(masked out) {words}")
    return contact_sheet(pictures, captions)


def draw_curves(
    curves: Mapping[str, tuple[Sequence[int | float], Sequence[float]]],
    label: str = "loss",
    format: Literal["png", "svg"] = "png",
    across: str = "step",
) -> bytes:
    """A picture of the named curves (values along `across`, values), one panel, values that are no numbers left as gaps.

    Raises:
        ValueError: no curve has a point.
    """
    # The object interface leaves pyplot's global state, and any display, alone.
    import matplotlib
    from matplotlib.figure import Figure

    if not any(len(steps) for steps, _ in curves.values()):
        raise ValueError("there is nothing to draw: no curve has a point")
    # The same curves give the same bytes: no random ids, no date.
    with matplotlib.rc_context({"svg.hashsalt": "glip_jax", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(5.6, 3.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for index, (name, (steps, values)) in enumerate(curves.items()):
            shade = tuple(channel / 255 for channel in color(index * 2))
            axes.plot(steps, values, label=name, color=shade, linewidth=1.6, marker="o" if len(steps) < 12 else "",
                      markersize=3.5)  # fmt: skip
        axes.set_xlabel(across)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        if set(curves) != {label}:
            axes.legend(fontsize=7.5, frameon=False)
        stream = io.BytesIO()
        figure.savefig(stream, format=format, metadata={"Date": None} if format == "svg" else None)
    return stream.getvalue()


def draw_groups(
    panels: Mapping[str, Mapping[str, Sequence[float]]], columns: int = 4, format: Literal["png", "svg"] = "png"
) -> bytes:
    """A picture of the values of named groups: a panel each with a dot for every value and a line at each mean.

    Groups stand side by side in the same colors in all panels; each panel has its own scale.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"svg.hashsalt": "glip_jax", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(2.6 * min(columns, len(panels)), 2.2 * rows), dpi=150, layout="constrained")
        for place, (title, groups) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, min(columns, len(panels)), place + 1)
            for index, values in enumerate(groups.values()):
                shade = tuple(channel / 255 for channel in color(index * 2))
                # Beside one another, so that equal values do not hide.
                across = index + 0.1 * (np.arange(len(values)) - (len(values) - 1) / 2)
                axes.plot(across, values, "o", color=shade, markersize=4.5, alpha=0.8, markeredgewidth=0)
                axes.hlines(float(np.mean(values)), index - 0.3, index + 0.3, color=shade, linewidth=1.6)
            axes.set_xticks(range(len(groups)), list(groups))
            axes.set_xlim(-0.6, len(groups) - 0.4)
            axes.margins(y=0.15)
            if min(min(values) for values in groups.values()) >= 0:
                axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
            axes.set_title(title, fontsize=9)
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        stream = io.BytesIO()
        figure.savefig(stream, format=format, metadata={"Date": None} if format == "svg" else None)
    return stream.getvalue()


def draw_histogram(
    series: Mapping[str, Sequence[float]], edges: Sequence[float], label: str, logarithmic: bool = False
) -> bytes:
    """A picture (SVG) of how the values of each named series spread over the bins between `edges`: shares in per cent.

    Values beyond the edges stand in the outer bins, so that each series adds up to 100; an empty series is not drawn.
    """
    bins = np.asarray(edges, np.float64)
    counts = {
        name: np.histogram(np.clip(np.asarray(values, np.float64), bins[0], bins[-1]), bins)[0].tolist()
        for name, values in series.items()
    }
    return draw_counts(counts, edges, label, logarithmic)


def draw_counts(
    series: Mapping[str, Sequence[int]],
    edges: Sequence[float],
    label: str,
    logarithmic: bool = False,
    mark: float | None = None,
) -> bytes:
    """A picture (SVG) of each named series of counts, one a bin between `edges`, as shares of its sum in per cent.

    `mark`: a value at which a dashed line stands. A series that sums to nothing is not drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure

    bins = np.asarray(edges, np.float64)
    with matplotlib.rc_context({"svg.hashsalt": "glip_jax", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, counts) in enumerate(series.items()):
            if not sum(counts):
                continue
            shares = 100 * np.asarray(counts, np.float64) / sum(counts)
            shade = tuple(channel / 255 for channel in color(index * 2))
            axes.stairs(shares, bins, label=name, color=shade, linewidth=1.4)
            axes.stairs(shares, bins, fill=True, color=shade, alpha=0.15)
        if mark is not None:
            axes.axvline(mark, color="#1d2430", linewidth=0.9, linestyle="--")
        if logarithmic:
            axes.set_xscale("log", base=2)
            low, high = round(np.log2(bins[0])), round(np.log2(bins[-1]))
            powers = range(low, high + 1, max(1, (high - low) // 5))
            axes.set_xticks([2.0**p for p in powers], [f"1/{2**-p}" if p < 0 else f"{2**p}" for p in powers])
            axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylabel("%")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        if len(series) > 1:
            axes.legend(fontsize=7.5, frameon=False)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def draw_shares(shares: Mapping[str, float], label: str) -> bytes:
    """A picture (SVG) of named shares in per cent: a bar each with its number, in the given order from the top."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "glip_jax", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(5.6, 0.6 + 0.22 * len(shares)), layout="constrained")
        axes = figure.add_subplot()
        shades = [tuple(channel / 255 for channel in color(index * 2)) for index in range(len(shares))]
        bars = axes.barh(list(shares), list(shares.values()), color=shades, height=0.7)
        axes.bar_label(bars, [f"{value:.1f}" for value in shares.values()], padding=3, fontsize=7.5)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.tick_params(axis="y", labelsize=7.5, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.margins(x=0.1)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


def svg_uri(data: bytes) -> str:
    """An SVG picture as a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(data).decode()


def png(picture: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
