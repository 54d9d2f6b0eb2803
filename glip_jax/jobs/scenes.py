"""The job `scenes`: draws picture scenes and imports them, so that training can start from them.

OUT/detection/    COCO JSON and JPEGs          OUT/shards/detection/   the same as shards
OUT/grounding/    MDETR's JSON and JPEGs       OUT/shards/grounding/
OUT/validation/   COCO JSON and JPEGs of other scenes with the same names, for evaluation
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from glip_jax.data import shards, sources
from glip_jax.data.records import RecordError
from glip_jax.data.scenes import Picture, SceneError, SceneStyle, load_pictures, make_scenes

__all__ = ["Scenes", "main"]

_BUNDLED = Path(__file__).resolve().parents[2] / "gcs" / "sample" / "pictures"
_LICENCE = "pictures: MIT (Microsoft Fluent Emoji, see gcs/sample/pictures/LICENSE); scenes made by glip_jax"


@dataclass(frozen=True)
class Scenes:
    """Draw picture scenes for training and validation; what is finished is left as it is."""

    out: Path
    """Folder to fill."""
    count: int = 2000
    """Training scenes, half of them detection data and half grounding data (the odd one: detection)."""
    validation: int = 100
    """Scenes of the validation set."""
    names: int = 40
    """How many of the training pictures are used; 0: all."""
    size: int = 256
    """Height and width, pixels."""
    seed: int = 0
    pictures: Path = _BUNDLED
    """Folder with pictures and names.json (file -> name, split)."""


def main(argv: Sequence[str]) -> int:
    """Runs `scenes --out=DIR ...`; returns 0, or 2 after one line about what is wrong."""
    job = tyro.cli(Scenes, prog="python -m glip_jax scenes", args=list(argv))
    try:
        make(job, shlex.join(["python", "-m", "glip_jax", "scenes", *argv]))
    except (SceneError, sources.SourceError, shards.ShardError, RecordError, OSError) as error:
        print(f"scenes: {error}", file=sys.stderr)
        return 2
    return 0


def make(job: Scenes, command: str) -> None:
    """Draws and imports what is missing in `job.out`.

    Raises SceneError for settings that give no scenes, or if `job.out` holds scenes of other settings.
    """
    if job.count < 2 or job.validation < 1:
        raise SceneError(f"count is {job.count}, validation {job.validation}: expected at least 2 and 1")
    pictures = load_pictures(str(job.pictures), limit=job.names)
    style = SceneStyle(height=job.size, width=job.size)
    half = job.count // 2
    # Three streams of scenes that no two seeds share.
    _draw(job, "detection", job.count - half, 3 * job.seed, pictures, style)
    _draw(job, "grounding", half, 3 * job.seed + 1, pictures, style)
    _draw(job, "validation", job.validation, 3 * job.seed + 2, pictures, style)
    for kind in ("detection", "grounding"):
        _import(job.out / kind, job.out / "shards" / kind, command)
    print(f"{job.out}: {job.count} training and {job.validation} validation scenes with {len(pictures)} names")


def _draw(job: Scenes, part: str, count: int, seed: int, pictures: Sequence[Picture], style: SceneStyle) -> None:
    folder = job.out / part
    existed = (folder / "annotations.json").exists()
    kind = "grounding" if part == "grounding" else "detection"
    make_scenes(str(folder), kind, count, seed, pictures, style, progress=sys.stderr.isatty())
    if not existed:
        print(f"{folder}: {count} scenes drawn", flush=True)
        # Shards of scenes that were deleted and drawn anew would be of the old ones.
        shutil.rmtree(job.out / "shards" / part, ignore_errors=True)


def _import(folder: Path, out: Path, command: str) -> None:
    if shards.finished(out) is not None:
        return
    annotations, images = folder / "annotations.json", folder / "images"
    opened = sources.mdetr if folder.name == "grounding" else sources.coco
    source = opened(annotations, images)
    manifest = shards.write(
        source.records,
        out,
        name=folder.name,
        names=source.names,
        licence=_LICENCE,
        source=str(annotations),
        command=command,
        drops=lambda: dict(source.report.dropped),
    )
    dropped = sum(manifest.drops.values())
    print(f"{out}: {manifest.records} records, {manifest.boxes} boxes, {dropped} dropped", flush=True)
