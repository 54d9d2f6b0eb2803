"""Forms of the job `data` for captions without boxes, which a teacher labels (job `label`) before they train anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from glip_jax.data.entries import Opened
from glip_jax.data.formats.captions import open_caption_lines, open_caption_tsv, open_sbu, open_webdataset
from glip_jax.data.formats.mdetr import open_coco_captions
from glip_jax.jobs.build_options import BuildOptions, Place

__all__ = ["CaptionForm", "CaptionLines", "CaptionTsv", "CocoCaptions", "Sbu", "Webdataset"]


@dataclass(frozen=True, kw_only=True)
class _Captions(BuildOptions):
    """A file (or folder) of captions, and pictures."""

    captions: tyro.conf.Positional[Place]
    """The file of captions; *.gz is unpacked."""
    images: Place
    """Folder of the pictures."""

    @property
    def source(self) -> epath.Path:
        """The file of captions."""
        return self.captions


@dataclass(frozen=True, kw_only=True)
class CaptionTsv(_Captions):
    """Import captions of lines with tabs, as CC3M and CC12M have them.

    example: python -m glip_jax data caption-tsv cc12m.tsv --columns=image,caption --files={row:08d}.jpg --images=cc12m --out=shards/cc12m
    """

    columns: str = "caption,image"
    """What the columns are, from the left; "-" for one that is not used. CC3M: caption,image; CC12M: image,caption."""
    files: str = ""
    """Where the image column is an address: how its picture was named, with {row} (line from 0), {name} (last part of the
    address), {path} (with _ for /), {md5}, {sha1}, e.g. {row:08d}.jpg."""

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_caption_tsv(
            self.captions, self.images, columns=self.columns, files=self.files, strict=self.strict
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CaptionLines(_Captions):
    """Import captions of JSON lines, one object each.

    example: python -m glip_jax data caption-lines captions.jsonl --images=pictures --out=shards/captions
    """

    caption_key: str = "caption"
    """The object's text, or list of texts: a record for each."""
    image_key: str = "image"
    """The object's file below --images, or address."""
    files: str = ""
    """Where that is an address: how its picture was named, see `data caption-tsv --help`."""

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_caption_lines(
            self.captions, self.images, caption_key=self.caption_key, image_key=self.image_key, files=self.files,
            strict=self.strict,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sbu(_Captions):
    """Import the SBU captioned photos: the folder with their two text files, or the JSON with parallel lists.

    example: python -m glip_jax data sbu sbu-captions-all.json --images=sbu --out=shards/sbu
    """

    files: str = "{name}"
    """How the pictures were named, see `data caption-tsv --help`; the owner's download.m: m{path}."""

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_sbu(self.captions, self.images, files=self.files, strict=self.strict)


@dataclass(frozen=True, kw_only=True)
class CocoCaptions(_Captions):
    """Import COCO's captions, one record each.

    example: python -m glip_jax data coco-captions captions_train2017.json --images=train2017 --out=shards/coco_captions
    """

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_coco_captions(self.captions, self.images, strict=self.strict, scratch=scratch)


@dataclass(frozen=True, kw_only=True)
class Webdataset(BuildOptions):
    """Import pictures and captions of webdataset tars, as img2dataset writes them.

    example: python -m glip_jax data webdataset cc3m --out=shards/cc3m
    """

    tars: tyro.conf.Positional[Place]
    """A tar, or a folder of them."""

    @property
    def source(self) -> epath.Path:
        """The tar or folder."""
        return self.tars

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_webdataset(self.tars, strict=self.strict)


CaptionForm = (
    Annotated[CaptionTsv, tyro.conf.subcommand("caption-tsv", prefix_name=False)]
    | Annotated[CaptionLines, tyro.conf.subcommand("caption-lines", prefix_name=False)]
    | Annotated[Sbu, tyro.conf.subcommand("sbu", prefix_name=False)]
    | Annotated[CocoCaptions, tyro.conf.subcommand("coco-captions", prefix_name=False)]
    | Annotated[Webdataset, tyro.conf.subcommand("webdataset", prefix_name=False)]
)
