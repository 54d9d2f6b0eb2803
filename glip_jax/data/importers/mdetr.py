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
from glip_jax.data.importers.coco import BoxFormat, BoxFormatCheck, as_xywh, joined
from glip_jax.data.importers.entry import (
    Entry,
    ImportSource,
    Report,
    SourceError,
    checked_spans,
    from_xywh,
    image_folder,
)
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import Join, JsonFile, integer_field, require_keys, text_field

__all__ = ["CocoCaptions", "MIXED_FOLDERS", "Mdetr", "folders_of", "open_coco_captions", "open_mdetr"]

MIXED_FOLDERS = {"coco": "coco/train2014", "vg": "gqa/images", "gqa": "gqa/images"}
"""Image folders of the mixed file as in the original GLIP: one for COCO, one for Visual Genome and GQA together."""


def open_mdetr(
    annotations: epath.PathLike, images: epath.PathLike, *, folders: Mapping[str, str] | None = None,
    boxes: BoxFormat | None = None, strict: bool = False, scratch: Path | None = None,
) -> ImportSource:  # fmt: skip
    """Opens a grounding file in MDETR's format; one entry per item of `images`, in the order of the file.

    `folders`: from `data_source` to a folder below `images`; None: file names are used unchanged. `boxes`: format of `bbox`;
    None: xywh, checked for plausibility. `scratch`: folder for a temporary file. Boxes without a span that covers text are
    dropped. Raises SourceError if the file is not JSON, a key is missing, a size or file name has a wrong type, ids are
    duplicated, or the image folder is missing or empty.
    """
    reader, source, report = image_folder(images), JsonFile(annotations), Report(strict=strict)

    def image(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("caption",), where)
        return [*_image_values(item, where, folders), item["caption"]]

    def annotation(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("bbox",), where)
        return [item["bbox"], item.get("iscrowd"), item["tokens"] if "tokens" in item else item.get("tokens_positive")]

    join = joined(source, image, annotation, report, scratch)
    entries = _grounding(join, boxes, source.path, report)
    return ImportSource(entries, reader, report, count=join.count, inputs=(source.path,))


def open_coco_captions(
    annotations: epath.PathLike, images: epath.PathLike, *, strict: bool = False, scratch: Path | None = None
) -> ImportSource:
    """Opens COCO's captions; entries in the order of the images, with ids IMAGE#CAPTION. Errors as for `open_mdetr`."""
    reader, source, report = image_folder(images), JsonFile(annotations), Report(strict=strict)

    def annotation(item: dict[str, Any], where: str) -> list[Any]:
        require_keys(item, ("caption",), where)
        return [item["caption"]]

    def image(item: dict[str, Any], where: str) -> list[Any]:
        return _image_values(item, where, None)

    join = joined(source, image, annotation, report, scratch, stray="image: of a caption is not listed")
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


def _image_values(item: dict[str, Any], where: str, folders: Mapping[str, str] | None) -> list[Any]:
    """[path below the image folder, height, width] of an item of `images`."""
    require_keys(item, ("file_name", "height", "width"), where)
    where = f"{where.partition('images[')[0]}image {item['id']!r:.40}"
    name = text_field(item, "file_name", where, "file name")
    if folders is not None:
        origin = item.get("data_source")
        if not isinstance(origin, str) or origin not in folders:
            known = ", ".join(folders)
            raise SourceError(f"{where} has data_source {origin!r:.40}, expected one of {known}: set its folder")
        name = f"{folders[origin]}/{name}" if folders[origin] else name
    return [name, integer_field(item, "height", where), integer_field(item, "width", where)]


def _grounding(join: Join, box_format: BoxFormat | None, path: epath.Path, report: Report) -> Iterator[Entry]:
    format_check = BoxFormatCheck()
    for identity, (file, height, width, caption), notes in join:
        if not isinstance(caption, str):
            report.drop("image: caption no text", f"image {identity}, found {caption!r:.40}, expected text")
            report.drop("box: image dropped", f"image {identity}", len(notes))
            continue
        boxes, spans, ids = [], [], []
        for key, (xywh, crowd, raw) in notes:
            name = "(no id)" if key is None else str(key)
            where = f"annotation {name} of image {identity}"
            format_check.add(xywh, height, width, where)
            if crowd:
                report.drop("box: crowd", where)
            elif (box_spans := checked_spans(raw, caption, report, where)) and (
                box := from_xywh(as_xywh(xywh) if box_format == "xyxy" else xywh, report, where)
            ) is not None:
                boxes.append(box)
                spans.append(box_spans)
                ids.append(name)
        yield Entry(
            id=str(identity), image=file, kind="grounding", height=height, width=width, boxes=tuple(boxes),
            caption=caption, spans=tuple(spans), ids=tuple(ids), provenance=path.name,
        )  # fmt: skip
    if box_format is None:
        format_check.raise_if_wrong(path)


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
                caption=caption.strip(), provenance=provenance,
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
            self.annotations, self.images, folders=folders_of(self.folders), boxes=self.boxes, strict=self.strict,
            scratch=scratch,
        )  # fmt: skip
