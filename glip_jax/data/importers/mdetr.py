"""Captions in the COCO family's JSON: phrase grounding in MDETR's form, and COCO's captions without boxes.

MDETR's form (GLIP's mixed or GoldG, and Flickr30k files): every item of `images` is one caption with id, file_name,
height, width, caption. `tokens_positive` of an annotation (`tokens`, where present, takes precedence) are character
spans of the caption, end exclusive (glip-reference 4.4). The mixed file names no folders: `data_source` of an image says
which set its picture is of, and `folders` where that lies below the folder of pictures.

COCO's captions (captions_*.json): every annotation is one entry of kind `caption`, several of one picture each by itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.caption_files import CaptionOptions
from glip_jax.data.importers.coco import BoxForm, Meaning, as_xywh, joined
from glip_jax.data.importers.entry import Entry, Opened, Report, SourceError, checked_spans, from_xywh, image_folder
from glip_jax.data.importers.options import BuildOptions, Place
from glip_jax.data.importers.readers import Join, JsonFile, integer, need, text

__all__ = ["CocoCaptions", "MIXED_FOLDERS", "Mdetr", "folders_of", "open_coco_captions", "open_mdetr"]

MIXED_FOLDERS = {"coco": "coco/train2014", "vg": "gqa/images", "gqa": "gqa/images"}
"""Where the original looks for the pictures of its mixed file (glip-reference 4.4): COCO's by themselves, Visual Genome's
and GQA's in one folder."""


def open_mdetr(
    annotations: epath.PathLike, images: epath.PathLike, *, folders: Mapping[str, str] | None = None,
    boxes: BoxForm | None = None, strict: bool = False, scratch: Path | None = None,
) -> Opened:  # fmt: skip
    """Grounding entries, one per item of `images`, in the order of the file.

    `folders`: from `data_source` to a folder below `images`; None: file names are taken as they are. A box without a
    span that covers text is dropped. `boxes`: what bbox holds; None: xywh, after a look at whether it can be. `scratch`: where the temporary file goes. SourceError: no JSON, a missing key, a
    size or file name of a wrong type, ids that stand twice, a folder of pictures that is missing or empty.
    """
    reader, source, report = image_folder(images), JsonFile(annotations), Report(strict=strict)

    def image(item: dict[str, Any], where: str) -> list[Any]:
        need(item, ("caption",), where)
        return [*_picture(item, where, folders), item["caption"]]

    def note(item: dict[str, Any], where: str) -> list[Any]:
        need(item, ("bbox",), where)
        return [item["bbox"], item.get("iscrowd"), item["tokens"] if "tokens" in item else item.get("tokens_positive")]

    join = joined(source, image, note, report, scratch)
    entries = _grounding(join, boxes, source.path, report)
    return Opened(entries, reader, report, count=join.count, inputs=(source.path,))


def open_coco_captions(
    annotations: epath.PathLike, images: epath.PathLike, *, strict: bool = False, scratch: Path | None = None
) -> Opened:
    """Caption entries in the order of the pictures; ids are IMAGE#CAPTION. Faults as for `open_mdetr`."""
    reader, source, report = image_folder(images), JsonFile(annotations), Report(strict=strict)

    def note(item: dict[str, Any], where: str) -> list[Any]:
        need(item, ("caption",), where)
        return [item["caption"]]

    def image(item: dict[str, Any], where: str) -> list[Any]:
        return _picture(item, where, None)

    join = joined(source, image, note, report, scratch, stray="image: of a caption is not listed")
    return Opened(_captions(join, source.path.name, report), reader, report, inputs=(source.path,))


def folders_of(text: str) -> dict[str, str] | None:
    """`folders` of `open_mdetr` from a command line: "mixed" is MIXED_FOLDERS, "coco=train2014,vg=" names each, "" none."""
    if text in ("", "mixed"):
        return MIXED_FOLDERS if text else None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(source and equals for source, equals, _ in pairs):
        raise SourceError(f"--folders={text}: expected mixed, or data_source=folder with commas: coco=train2014,vg=gqa")
    return {source: folder for source, _, folder in pairs}


def _picture(item: dict[str, Any], where: str, folders: Mapping[str, str] | None) -> list[Any]:
    """[file below the folder of pictures, height, width] of an item of `images`."""
    need(item, ("file_name", "height", "width"), where)
    where = f"{where.partition('images[')[0]}image {item['id']!r:.40}"
    name = text(item, "file_name", where, "file name")
    if folders is not None:
        origin = item.get("data_source")
        if not isinstance(origin, str) or origin not in folders:
            known = ", ".join(folders)
            raise SourceError(f"{where} has data_source {origin!r:.40}, expected one of {known}: say its folder")
        name = f"{folders[origin]}/{name}" if folders[origin] else name
    return [name, integer(item, "height", where), integer(item, "width", where)]


def _grounding(join: Join, form: BoxForm | None, path: epath.Path, report: Report) -> Iterator[Entry]:
    meaning = Meaning()
    for identity, (file, height, width, caption), notes in join:
        if not isinstance(caption, str):
            report.drop("image: caption no text", f"image {identity}, found {caption!r:.40}, expected text")
            report.drop("box: image dropped", f"image {identity}", len(notes))
            continue
        boxes, spans, ids = [], [], []
        for key, (xywh, crowd, raw) in notes:
            name = "(no id)" if key is None else str(key)
            where = f"annotation {name} of image {identity}"
            meaning.look(xywh, height, width, where)
            if crowd:
                report.drop("box: crowd", where)
            elif (own := checked_spans(raw, caption, report, where)) and (
                box := from_xywh(as_xywh(xywh) if form == "xyxy" else xywh, report, where)
            ) is not None:
                boxes.append(box)
                spans.append(own)
                ids.append(name)
        yield Entry(
            id=str(identity), image=file, kind="grounding", height=height, width=width, boxes=tuple(boxes),
            caption=caption, spans=tuple(spans), ids=tuple(ids), provenance=path.name,
        )  # fmt: skip
    if form is None:
        meaning.refuse(path)


def _captions(join: Join, provenance: str, report: Report) -> Iterator[Entry]:
    for identity, (file, height, width), notes in join:
        if not notes:
            report.drop("image: without caption", f"image {identity}, {file}")
        for index, (key, (caption,)) in enumerate(notes):
            own = index if key is None else key
            if not isinstance(caption, str):
                report.drop(
                    "image: caption no text", f"caption {own} of image {identity}, found {caption!r:.40}, expected text"
                )
                continue
            yield Entry(
                id=f"{identity}#{own}", image=file, kind="caption", height=height, width=width,
                caption=caption.strip(), provenance=provenance,
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CocoCaptions(CaptionOptions):
    """Import COCO's captions, one record each.

    example: python -m glip_jax data coco-captions captions_train2017.json --images=train2017 --out=shards/coco_captions
    """

    def opened(self, scratch: Path) -> Opened:
        """The entries."""
        return open_coco_captions(self.captions, self.images, strict=self.strict, scratch=scratch)


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
