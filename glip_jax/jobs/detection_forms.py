"""Forms of the job `data` for detection sets: boxes with category names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from glip_jax import storage
from glip_jax.data.entries import Opened, SourceError
from glip_jax.data.formats.coco import BoxForm, open_coco, open_odinw
from glip_jax.data.formats.openimages import open_openimages
from glip_jax.data.formats.tfds_sets import open_tfds
from glip_jax.data.formats.visual_genome import open_visual_genome
from glip_jax.jobs.build_options import BuildOptions, Place

__all__ = ["Coco", "DetectionForm", "Lvis", "Objects365", "Odinw", "Openimages", "Tfds", "VisualGenome", "rename_map"]


@dataclass(frozen=True, kw_only=True)
class Coco(BuildOptions):
    """Import boxes with category names from a COCO JSON: all that a detection set of your own needs.

    example: python -m glip_jax data coco instances_train2017.json --images=train2017 --out=shards/coco
    """

    annotations: tyro.conf.Positional[Place]
    """The annotation file."""
    images: Place
    """Folder of the pictures."""
    names: Place | None = None
    """JSON object with prompt text for category names, e.g. {"RBC": "red blood cell"}."""
    boxes: BoxForm | None = None
    """What bbox holds; default: xywh, after a look at whether it can be."""

    @property
    def source(self) -> epath.Path:
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

    folder: tyro.conf.Positional[Place]
    """Folder with the pictures and annotations_without_background.json or _annotations.coco.json."""
    names: Place | None = None
    """JSON object with prompt text for category names, e.g. {"puffin": "puffin with an orange beak"}."""

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_odinw(self.folder, rename=rename_map(self.names), strict=self.strict, scratch=scratch)


@dataclass(frozen=True, kw_only=True)
class Openimages(BuildOptions):
    """Import OpenImages' boxes: CSV files as their owner publishes them.

    example: python -m glip_jax data openimages oidv6-train-annotations-bbox.csv --images=train
    --classes=class-descriptions-boxable.csv --hierarchy=bbox_labels_600_hierarchy.json
    --labels=train-annotations-human-imagelabels-boxable.csv --out=shards/openimages
    """

    annotations: tyro.conf.Positional[Place]
    """The CSV of boxes."""
    images: Place
    """Folder of the pictures, ImageID.jpg."""
    classes: Place
    """The CSV of machine ids and names."""
    hierarchy: Place | None = None
    """The JSON of names below names: what is absent is so with all below it."""
    labels: Place | None = None
    """The CSV of verified labels of whole images: which names are known to be absent."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_openimages(
            self.annotations, self.images, classes=self.classes, hierarchy=self.hierarchy, labels=self.labels,
            strict=self.strict, scratch=scratch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisualGenome(BuildOptions):
    """Import Visual Genome's objects.

    example: python -m glip_jax data visual-genome objects.json --image-data=image_data.json --images=vg
    --min-boxes=50 --without-coco --out=shards/vg
    """

    annotations: tyro.conf.Positional[Place]
    """objects.json."""
    image_data: Place
    """image_data.json: sizes and addresses of the pictures."""
    images: Place
    """Folder of the pictures, with VG_100K and VG_100K_2, or all in it."""
    vocabulary: Place | None = None
    """Text with a name a line, further words for it after commas; default: the annotators' names."""
    min_boxes: int = 1
    """Without a vocabulary: boxes that a name must have."""
    without_coco: bool = False
    """Leave out the images that are COCO's too."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_visual_genome(
            self.annotations, self.images, image_data=self.image_data, vocabulary=self.vocabulary,
            min_boxes=self.min_boxes, without_coco=self.without_coco, strict=self.strict, scratch=scratch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tfds(BuildOptions):
    """Import a detection set that TensorFlow Datasets has prepared as array_record; TensorFlow is not needed.

    example: python -m glip_jax data tfds tensorflow_datasets/voc/2007/5.0.0 --split=train --out=shards/voc
    """

    folder: tyro.conf.Positional[Place]
    """Folder with features.json."""
    split: str = "train"

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_tfds(self.folder, self.split, strict=self.strict)


def rename_map(path: epath.Path | None) -> dict[str, str] | None:
    """A JSON object of texts; SourceError for anything else."""
    if path is None:
        return None
    try:
        names = json.loads(storage.opened(path).read())
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
    | Annotated[Openimages, tyro.conf.subcommand("openimages", prefix_name=False)]
    | Annotated[VisualGenome, tyro.conf.subcommand("visual-genome", prefix_name=False)]
    | Annotated[Tfds, tyro.conf.subcommand("tfds", prefix_name=False)]
)
