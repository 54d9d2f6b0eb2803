"""Forms of the job `data` for captions whose phrases have boxes, and for the containers of the original GLIP."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from etils import epath

from glip_jax.data.entries import Opened
from glip_jax.data.formats.coco import BoxForm
from glip_jax.data.formats.flickr30k import open_flickr30k
from glip_jax.data.formats.mdetr import folders_of, open_mdetr
from glip_jax.data.formats.tsv import open_tsv
from glip_jax.jobs.build_options import BuildOptions, Place

__all__ = ["Flickr30k", "GroundingForm", "Mdetr", "Tsv"]


@dataclass(frozen=True, kw_only=True)
class Mdetr(BuildOptions):
    """Import captions whose phrases have boxes from an MDETR-form JSON.

    example: python -m glip_jax data mdetr final_flickr_separateGT_train.json --images=flickr30k --out=shards/flickr
    """

    annotations: tyro.conf.Positional[Place]
    """The annotation file."""
    images: Place
    """Folder of the pictures."""
    folders: str = ""
    """Folders below --images by the file's data_source: mixed (GoldG: COCO's in coco/train2014, Visual Genome's and GQA's
    in gqa/images), or coco=train2014,vg=gqa; default: file names are below --images."""
    boxes: BoxForm | None = None
    """What bbox holds; default: xywh, after a look at whether it can be."""

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_mdetr(
            self.annotations, self.images, folders=folders_of(self.folders), boxes=self.boxes, strict=self.strict,
            scratch=scratch,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Flickr30k(BuildOptions):
    """Import Flickr30k Entities as released: a folder with Annotations/*.xml and Sentences/*.txt.

    example: python -m glip_jax data flickr30k flickr30k_entities --split=flickr30k_entities/train.txt --images=flickr30k-images --out=shards/flickr30k
    """

    folder: tyro.conf.Positional[Place]
    """The release's folder."""
    images: Place
    """Folder of the pictures, ID.jpg."""
    split: Place | None = None
    """Text file with an image id a line (train.txt, val.txt, test.txt); default: all."""

    @property
    def source(self) -> epath.Path:
        """The split, or else the folder."""
        return self.split or self.folder

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_flickr30k(self.folder, self.images, split=self.split, strict=self.strict)


@dataclass(frozen=True, kw_only=True)
class Tsv(BuildOptions):
    """Import a container of the original GLIP: X.yaml that names .tsv files beside it, pictures included.

    example: python -m glip_jax data tsv train.yaml --kind=detection --out=shards/objects365
    """

    container: tyro.conf.Positional[Place]
    """The yaml."""
    kind: Literal["detection", "pseudo"]
    """What the labels are: boxes with classes, or captions with a teacher's boxes and scores."""
    oversample: bool = False
    """Repeat what the linelist repeats (class-balanced), instead of each picture once."""

    @property
    def source(self) -> epath.Path:
        """The yaml."""
        return self.container

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_tsv(self.container, kind=self.kind, oversample=self.oversample, strict=self.strict)


GroundingForm = (
    Annotated[Mdetr, tyro.conf.subcommand("mdetr", prefix_name=False)]
    | Annotated[Flickr30k, tyro.conf.subcommand("flickr30k", prefix_name=False)]
    | Annotated[Tsv, tyro.conf.subcommand("tsv", prefix_name=False)]
)
