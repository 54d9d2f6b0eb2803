"""Forms of the job `data` for detection sets: boxes with category names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from glip_jax.data.entries import Opened, SourceError
from glip_jax.data.formats.coco import BoxForm, open_coco, open_odinw
from glip_jax.jobs.build_options import BuildOptions

__all__ = ["Coco", "DetectionForm", "Lvis", "Objects365", "Odinw", "rename_map"]


@dataclass(frozen=True, kw_only=True)
class Coco(BuildOptions):
    """Import boxes with category names from a COCO JSON: all that a detection set of your own needs.

    example: python -m glip_jax data coco instances_train2017.json --images=train2017 --out=shards/coco
    """

    annotations: tyro.conf.Positional[Path]
    """The annotation file."""
    images: Path
    """Folder of the pictures."""
    names: Path | None = None
    """JSON object with prompt text for category names, e.g. {"RBC": "red blood cell"}."""
    boxes: BoxForm | None = None
    """What bbox holds; default: xywh, after a look at whether it can be."""

    @property
    def source(self) -> Path:
        """The annotation file."""
        return self.annotations

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_coco(
            self.annotations, self.images, rename=rename_map(self.names), boxes=self.boxes, strict=self.strict,
            scratch=scratch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lvis(Coco):
    """Import LVIS: COCO's form, with names known to be absent and names that are not exhaustively boxed.

    example: python -m glip_jax data lvis lvis_v1_train.json --images=coco --out=shards/lvis
    """


@dataclass(frozen=True, kw_only=True)
class Objects365(Coco):
    """Import Objects365, v1 or v2, in its owner's JSON.

    example: python -m glip_jax data objects365 zhiyuan_objv2_train.json --images=objects365/train --out=shards/o365
    """


@dataclass(frozen=True, kw_only=True)
class Odinw(BuildOptions):
    """Import a folder of ODinW or Roboflow: pictures with an annotation file beside them.

    example: python -m glip_jax data odinw Aquarium/train --out=shards/aquarium
    """

    folder: tyro.conf.Positional[Path]
    """Folder with the pictures and annotations_without_background.json or _annotations.coco.json."""
    names: Path | None = None
    """JSON object with prompt text for category names, e.g. {"puffin": "puffin with an orange beak"}."""

    @property
    def source(self) -> Path:
        """The folder."""
        return self.folder

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_odinw(self.folder, rename=rename_map(self.names), strict=self.strict, scratch=scratch)


def rename_map(path: Path | None) -> dict[str, str] | None:
    """A JSON object of texts; SourceError for anything else."""
    if path is None:
        return None
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"--names {path} cannot be read as JSON ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise SourceError(f"--names {path}: expected an object of texts, name in the file -> text in the prompt")
    return names


DetectionForm = (
    Annotated[Coco, tyro.conf.subcommand("coco", prefix_name=False)]
    | Annotated[Lvis, tyro.conf.subcommand("lvis", prefix_name=False)]
    | Annotated[Objects365, tyro.conf.subcommand("objects365", prefix_name=False)]
    | Annotated[Odinw, tyro.conf.subcommand("odinw", prefix_name=False)]
)
