"""Padding of a config's canvases, and loss of resolution of images that shrink to fit, for the sizes in annotation files.

    python -m benchmarks.padding --config=configs/glip_tiny.py instances_train2017.json ...

Reads "images" with "height" and "width" from COCO JSON files. Every image is combined with every short side, as over time in training.
`padding` is the fraction of canvas pixels that no image covers; `resolution` is the height of an image relative to its height
without a canvas.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glip_jax.cli.command_line import load_config
from glip_jax.config import DataConfig
from glip_jax.structures.canvas import canvas_size, fit, nearest_aspect, target_size

__all__ = ["Row", "measure", "sizes_of"]


class Row(NamedTuple):
    """Statistics of the canvases of one aspect ratio, or of all."""

    aspect: float
    """Height / width; 0: all."""
    images: int
    canvases: int
    """Compiled shapes."""
    padding: float
    resolution: float
    """Mean over images."""
    min_resolution: float


def sizes_of(path: Path) -> list[tuple[int, int]]:
    """Height and width of every image of an annotation file."""
    return [(image["height"], image["width"]) for image in json.loads(path.read_text())["images"]]


def measure(sizes: Sequence[tuple[int, int]], data: DataConfig, multiple: int = 32) -> list[Row]:
    """One row per aspect ratio with images, then one for all."""
    heights, widths = np.array(sizes).T
    nearest = nearest_aspect(heights, widths, data.aspects)
    rows, covered, whole, ratios, shapes = [], 0, 0, [], set()
    for index, aspect in enumerate(data.aspects):
        resolutions, pixels, area = [], 0, 0
        canvases = {side: canvas_size(side, aspect, data.long_side, multiple) for side in data.short_sides}
        for height, width in zip(heights[nearest == index].tolist(), widths[nearest == index].tolist()):
            for side, canvas in canvases.items():
                h, w = fit(height, width, side, data.long_side, canvas)
                pixels, area = pixels + h * w, area + canvas[0] * canvas[1]
                resolutions.append(h / target_size(height, width, side, data.long_side)[0])
        if resolutions:
            rows.append(
                Row(aspect, int((nearest == index).sum()), len(set(canvases.values())), 1 - pixels / area,
                    float(np.mean(resolutions)), min(resolutions))
            )  # fmt: skip
            covered, whole, ratios = covered + pixels, whole + area, ratios + resolutions
            shapes |= set(canvases.values())
    total = 1 - covered / whole
    return [*rows, Row(0.0, len(sizes), len(shapes), total, float(np.mean(ratios)), min(ratios))]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("annotations", nargs="+", type=Path)
    parser.add_argument("--config", default="")
    parser.add_argument("--aspects", default="", help="height / width, comma-separated, in place of the config's")
    arguments = parser.parse_args()
    config = load_config(arguments.config) if arguments.config else None
    data = config.data if config else DataConfig()
    if arguments.aspects:
        data = dataclasses.replace(data, aspects=tuple(float(part) for part in arguments.aspects.split(",")))
    print("| file | aspect | images | canvases | padding | resolution | minimum |\n|---|---|---|---|---|---|---|")
    for path in arguments.annotations:
        for row in measure(sizes_of(path), data, config.model.input.extent_multiple if config else 32):
            print(
                f"| {path.name} | {row.aspect or 'all'} | {row.images} | {row.canvases} | {row.padding:.1%} | "
                f"{row.resolution:.3f} | {row.min_resolution:.3f} |"
            )


if __name__ == "__main__":
    main()
