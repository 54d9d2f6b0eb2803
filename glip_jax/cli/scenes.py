"""The job `scenes`: draws synthetic scenes and imports them for training.

OUT/detection/    COCO JSON and JPEGs          OUT/shards/detection/   the same as shards
OUT/grounding/    MDETR's JSON and JPEGs       OUT/shards/grounding/
OUT/captions/     captions without boxes, to be labelled; truth.json is for measuring the labels only
OUT/validation*/  other scenes for evaluation: names and style of the training, the held-out style, names that only
                  grounding or only captions show, names that nothing shows, phrases (MDETR's JSON), absent names: also
                  look-alikes, such as "yellow apple" beside a red one
"""

import logging
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from etils import epath

from glip_jax.cli.command_line import flags
from glip_jax.config.ranges import Count, Limit, Processes, Range
from glip_jax.data import shards
from glip_jax.data.importers.build import BuildPlan, build
from glip_jax.data.importers.coco import open_coco
from glip_jax.data.importers.finished import input_differences, read_report
from glip_jax.data.importers.mdetr import open_mdetr
from glip_jax.data.scenes.draw import SceneError, SceneStyle
from glip_jax.data.scenes.pictures import Picture, Split, load_pictures
from glip_jax.data.scenes.sets import Kind, SceneSet, finished, make_scenes
from glip_jax.distributed import exit_codes
from glip_jax.io.assets import bundled

__all__ = ["Names", "Scenes", "main", "make"]

logger = logging.getLogger(__name__)

_BUNDLED = bundled("gcs/sample/pictures")
_LICENCE = (
    "scenes made by glip_jax; pictures: fluent MIT (Microsoft), noto Apache-2.0 (Google), twemoji CC BY 4.0 "
    "(Twitter, Inc and other contributors), see gcs/sample/pictures/LICENSES.md"
)


@dataclass(frozen=True)
class Names:
    """How many names of each split are used, evenly spread over all there are; 0: all."""

    detection: Limit = 120
    """Names that detection scenes show, and all other training scenes too."""
    grounding: Limit = 40
    """Names that only grounding and caption scenes show."""
    captions: Limit = 40
    """Names that only caption scenes show."""
    unseen: Limit = 40
    """Names that no training scene shows."""


@dataclass(frozen=True)
class Scenes:
    """Draw synthetic scenes for training and validation; what is finished is left as it is."""

    out: Path
    """Folder to fill."""
    count: Annotated[int, Range(2, 1_000_000_000, "scenes")] = 8000
    """Training scenes with boxes, half of them detection data and half grounding data (the odd one: detection)."""
    captions: Limit | None = None
    """Scenes with captions and without boxes; 0: none, default: an eighth of count."""
    validation: Count = 200
    """Scenes of each validation set."""
    names: Names = field(default_factory=Names)
    styles: tuple[str, ...] = ("fluent",)
    """Styles of the pictures that training and most validation scenes show: fluent, noto, twemoji."""
    held_out: str = "noto"
    """Style that only validation_style shows."""
    size: Annotated[int, Range(64, 16384, "pixels")] = 256
    """Height and width, pixels; pictures are a sixth to two fifths of it."""
    seed: Limit = 0
    processes: Processes = 0
    """Processes that draw; 0: one a core. The scenes are the same for any number."""
    pictures: Path = _BUNDLED
    """Folder with names.json (code -> name, split) and STYLE/CODE.webp."""


def main(argv: Sequence[str]) -> int:
    """Runs `scenes --out=DIR ...`. Raises CommandLineError, and what `make` raises."""
    job = flags(argv, Scenes, "scenes", "--out=runs/demo/scenes --count=2000 --names.detection=40")
    make(job, shlex.join(["python", "-m", "glip_jax", "scenes", *argv]))
    return exit_codes.DONE


def make(job: Scenes, command: str) -> None:
    """Draws and imports what is missing in `job.out`.

    Raises PictureError or SceneError for settings that give no scenes, or if `job.out` holds scenes of other settings;
    all sets are looked at before the first is drawn.
    """
    sets = _sets(job)
    existing = {part: finished(job.out / part, scenes) for part, scenes in sets.items()}
    for part, scenes in sets.items():
        if not existing[part]:
            # Shards of scenes that were deleted and are drawn anew would be of the old ones.
            shutil.rmtree(job.out / "shards" / part, ignore_errors=True)
            make_scenes(job.out / part, scenes, job.processes, progress=sys.stderr.isatty())
            logger.info(f"{job.out / part}: {scenes.count} scenes of {len(scenes.names)} names")
        if part in ("detection", "grounding"):
            _import(job.out / part, job.out / "shards" / part, command, job.processes)
    validation = sum(part.startswith("validation") for part in sets)
    captions = sets["captions"].count if "captions" in sets else 0
    logger.info(
        f"{job.out}: {job.count} training scenes with boxes, {captions} with captions only, "
        f"{validation} sets of {job.validation} for validation"
    )


def _sets(job: Scenes) -> dict[str, SceneSet]:
    """What is drawn, by folder; SceneError or PictureError for settings that give no scenes."""
    captions = job.count // 8 if job.captions is None else job.captions
    if job.count < 2 or job.validation < 1 or captions < 0:
        raise SceneError(
            f"count is {job.count}, validation {job.validation}, captions {captions}: expected at least 2, 1 and 0"
        )
    if not job.styles or job.held_out in job.styles or len(set(job.styles)) < len(job.styles):
        raise SceneError(
            f"styles are {', '.join(job.styles) or 'none'}, the held-out one is {job.held_out}: "
            "expected at least one, all different, and another to hold out"
        )
    if job.size < 64:
        raise SceneError(f"size is {job.size}: expected at least 64 pixels")

    def pictures(*splits: Split, styles: tuple[str, ...] = job.styles) -> list[Picture]:
        return load_pictures(job.pictures, styles, splits, asdict(job.names))

    style = SceneStyle(height=job.size, width=job.size, sides=(job.size * 40 / 256, job.size * 110 / 256))
    detection, both = pictures("detection"), pictures("detection", "grounding")
    half = job.count // 2
    plans: dict[str, tuple[Kind, int, list[Picture]]] = {
        "detection": ("detection", job.count - half, detection),
        "grounding": ("grounding", half, both),
        "captions": ("captions", captions, pictures("detection", "grounding", "captions")),
        "validation": ("detection", job.validation, detection),
        "validation_style": ("detection", job.validation, pictures("detection", styles=(job.held_out,))),
        "validation_grounding_names": ("detection", job.validation, pictures("grounding")),
        "validation_caption_names": ("detection", job.validation, pictures("captions")),
        "validation_unseen": ("detection", job.validation, pictures("unseen")),
        "validation_phrases": ("grounding", job.validation, both),
        "validation_absent": ("detection", job.validation, detection),
    }
    # Streams of scenes that no two sets and seeds share.
    return {
        part: SceneSet(
            kind,
            count,
            16 * job.seed + stream,
            shown,
            style,
            # Not of training scenes: their importer would draw negatives from these names alone.
            known_absent=part.startswith("validation"),
            look_alikes=part == "validation_absent",
        )
        for stream, (part, (kind, count, shown)) in enumerate(plans.items())
        if count
    }


def _import(folder: Path, out: Path, command: str, processes: int) -> None:
    annotations, images = folder / "annotations.json", folder / "images"
    if shards.finished(out) is not None:
        if lines := input_differences((epath.Path(annotations),), read_report(out)):
            raise SceneError(
                f"{out} is finished, of other scenes ({'; '.join(lines)}): remove that folder to make it again"
            )
        return
    opened = open_mdetr if folder.name == "grounding" else open_coco
    plan = BuildPlan(
        out, str(annotations), name=folder.name, licence=_LICENCE, command=command, shards=1, processes=processes
    )
    manifest, _ = build(plan, lambda scratch: opened(annotations, images, scratch=scratch))
    dropped = sum(manifest.drops.values())
    logger.info(f"{out}: {manifest.records} records, {manifest.boxes} boxes, {dropped} dropped")
