"""Imports captions in COCO-like JSON: phrase grounding in MDETR's format, and COCO's captions without boxes.

MDETR's format (the mixed (GoldG) and Flickr30k files of GLIP): every item of `images` is a caption with id, file_name,
height, width and caption. `tokens_positive` of an annotation (`tokens`, if present, takes precedence) are character spans of
the caption, end exclusive. The mixed file has no folders: `data_source` of an image names its data set, and `folders` maps
that to a folder below the image folder.

COCO's captions (captions_*.json): every annotation becomes one entry of kind `caption`, also if an image has several.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.caption_files import CaptionOptions
from glip_jax.data.importers.coco_json import BoxFormat, Crowds, GroundingFile, ImagePaths, joined, read_grounding
from glip_jax.data.importers.entry import Entry, ImportSource, Report, SourceError, from_xywh, image_folder
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import Join, JsonFile, require_keys

__all__ = ["CocoCaptions", "MIXED_FOLDERS", "Mdetr", "folders_of", "groundings", "open_coco_captions", "open_mdetr"]

MIXED_FOLDERS = {"coco": "coco/train2014", "vg": "gqa/images", "gqa": "gqa/images"}
"""Image folders of the mixed file as in the original GLIP: one for COCO, one for Visual Genome and GQA together."""


def open_mdetr(
    annotations: epath.PathLike, images: epath.PathLike, *, folders: Mapping[str, str] | None = None,
    boxes: BoxFormat | None = None, crowds: Crowds | None = None, strict: bool = False, scratch: Path | None = None,
) -> ImportSource:  # fmt: skip
    """Opens a grounding file in MDETR's format; one entry per item of `images`, in the order of the file.

    `folders`: from `data_source` to a folder below `images`; None: file names are used unchanged. `boxes`: format of `bbox`;
    None: xywh, checked for plausibility. `crowds`: as for `open_coco`. `scratch`: folder for a temporary file. Boxes without a
    span that covers text are dropped. Raises SourceError if the file is not JSON, a key is missing, a file name has a wrong
    type, ids are duplicated, or the image folder is missing or empty.
    """
    reader, report = image_folder(images), Report(strict=strict)
    data = read_grounding(annotations, images, report, folders=folders, boxes=boxes, crowds=crowds, scratch=scratch)
    return ImportSource(groundings(data, report), reader, report, count=data.count, inputs=(data.path,))


def open_coco_captions(
    annotations: epath.PathLike, images: epath.PathLike, *, strict: bool = False, scratch: Path | None = None
) -> ImportSource:
    """Opens COCO's captions; entries in the order of the images, with ids IMAGE#CAPTION. Errors as for `open_mdetr`."""
    reader, source, report = image_folder(images), JsonFile(annotations), Report(strict=strict)

    def annotation(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("caption",), where)
        return [item["caption"]]

    join = joined(
        source, ImagePaths(images), lambda *_: [], annotation, report, scratch, "image: of a caption is not listed"
    )
    return ImportSource(_captions(join, source.path.name, report), reader, report, inputs=(source.path,))


def folders_of(text: str) -> dict[str, str] | None:
    """Parses --folders: "mixed" is MIXED_FOLDERS, "coco=train2014,vg=" names each folder, "" is None."""
    if text in ("", "mixed"):
        return MIXED_FOLDERS if text else None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(source and equals for source, equals, _ in pairs):
        raise SourceError(
            f"--folders={text}: expected mixed, or data_source=folder pairs with commas: coco=train2014,vg=gqa"
        )
    return {source: folder for source, _, folder in pairs}


def groundings(data: GroundingFile, report: Report) -> Iterator[Entry]:
    """Yields one entry per caption."""
    for item in data.captions:
        boxes, spans, ids = [], [], []
        for phrase in item.boxes:
            where = f"annotation {phrase.key} of image {item.id}"
            if phrase.crowd:
                report.drop("box: crowd", f"{where}; --crowds=keep takes them as single objects")
            elif (box := from_xywh(phrase.xywh, report, where)) is not None:
                boxes.append(box)
                spans.append(phrase.spans)
                ids.append(phrase.key)
        yield Entry(
            id=str(item.id), image=item.file, kind="grounding", height=item.height, width=item.width, boxes=tuple(boxes),
            caption=item.caption, spans=tuple(spans), ids=tuple(ids), provenance=data.path.name,
        )  # fmt: skip


def _captions(join: Join, provenance: str, report: Report) -> Iterator[Entry]:
    for identity, (file, height, width), notes in join:
        if not notes:
            report.drop("image: without caption", f"image {identity}, {file}")
        for index, (key, (caption,)) in enumerate(notes):
            caption_id = index if key is None else key
            if not isinstance(caption, str):
                report.drop(
                    "image: caption no text",
                    f"caption {caption_id} of image {identity}, found {caption!r:.40}, expected text",
                )
                continue
            yield Entry(
                id=f"{identity}#{caption_id}", image=file, kind="caption", height=height, width=width,
                caption=caption.strip(), provenance=provenance, file=file, image_id=str(identity),
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CocoCaptions(CaptionOptions):
    """Import COCO's captions, one record per caption.

    example: python -m glip_jax data coco-captions captions_train2017.json --images=train2017 --out=shards/coco_captions
    """

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_coco_captions(self.captions, self.images, strict=self.strict, scratch=scratch)


@dataclass(frozen=True, kw_only=True)
class Mdetr(BuildOptions):
    """Import captions whose phrases have boxes from a JSON file in MDETR's format.

    example: python -m glip_jax data mdetr final_flickr_separateGT_train.json --images=flickr30k --out=shards/flickr
    """

    annotations: tyro.conf.Positional[PathArgument]
    """The annotation file."""
    images: PathArgument
    """Folder of the images."""
    folders: str = ""
    """Folders below --images by data_source: mixed (GoldG: coco/train2014 for COCO, gqa/images for Visual Genome and GQA), or
    coco=train2014,vg=gqa; default: file names are relative to --images."""
    boxes: BoxFormat | None = None
    """Format of bbox; default: xywh, checked for plausibility."""
    crowds: Crowds | None = None
    """Boxes with iscrowd 1: see `data coco --help`."""

    @property
    def chosen_drops(self) -> frozenset[str]:
        """The reasons for drops that the options ask for."""
        return frozenset({"box: crowd"} if self.crowds == "drop" else ())

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The annotation file."""
        return (self.annotations,)

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_mdetr(
            self.annotations, self.images, folders=folders_of(self.folders), boxes=self.boxes, crowds=self.crowds,
            strict=self.strict, scratch=scratch,
        )  # fmt: skip
