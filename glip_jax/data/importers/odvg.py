"""Imports ODVG: JSON lines of MM-Grounding-DINO, Open-GroundingDino and LLMDet, with boxes of classes, of phrases, or both.

    {"filename": "1.jpg", "height": 480, "width": 640, "detection": {"instances": [{"bbox": [x1, y1, x2, y2], "label": 0, "category": "dog"}]}}
    {"filename": "2.jpg", "height": 480, "width": 640, "grounding": {"caption": "a dog runs", "regions": [
        {"bbox": [[x1, y1, x2, y2]], "phrase": "a dog", "tokens_positive": [[0, 5]]}]}}

Names of classes are those of the label map, {"0": "dog", ...}, else `category`. A region without `tokens_positive` belongs to
the first place of its phrase in the caption. Other keys, such as LLMDet's conversations, are ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.coco import NamedOptions, detections
from glip_jax.data.importers.coco_folders import read_json
from glip_jax.data.importers.coco_json import read_detections, read_grounding
from glip_jax.data.importers.entry import ImportSource, Report, SourceError, as_numbers, image_folder
from glip_jax.data.importers.mdetr import groundings
from glip_jax.data.importers.options import PathArgument
from glip_jax.data.importers.readers import JsonLists, as_integer, numbered_lines, parse_json, require_file
from glip_jax.data.importers.sources import (
    ANNOTATIONS,
    Source,
    files_with,
    folders_below,
    image_folders,
    one_per_split,
    split_of,
)
from glip_jax.io.formats import recognize

__all__ = ["Odvg", "open_odvg", "read_odvg", "sources"]


def open_odvg(
    annotations: epath.PathLike, images: epath.PathLike, *, label_map: epath.PathLike | None = None,
    rename: Mapping[str, str] | None = None, merge_names: bool = False, strict: bool = False, scratch: Path | None = None,
) -> ImportSource:  # fmt: skip
    """Opens a file of JSON lines; the records with classes come first, then those with phrases.

    `label_map`: JSON of names by number. The file is streamed. Options and errors as for `coco.open_coco`.
    """
    folder, report = image_folder(images), Report(strict=strict)
    lines = _Lines(epath.Path(annotations), None if label_map is None else epath.Path(label_map), report)
    entries, names, count = [], (), 0
    if lines.detection:
        data = read_detections(
            lines.classes(), images, report, rename=rename, merge_names=merge_names, boxes="xyxy", scratch=scratch
        )
        names, count = data.categories.names, data.count
        entries.append(detections(data, report))
    if lines.grounding:
        phrases = read_grounding(lines.phrases(), images, report, boxes="xyxy", scratch=scratch)
        count += phrases.count
        both = bool(lines.detection)  # a line of both kinds gives two records
        found = groundings(phrases, report)
        entries.append((replace(entry, id=f"{entry.id}#caption") for entry in found) if both else found)
    if not entries:
        raise SourceError(f"{annotations} has no line with 'detection' or 'grounding': expected JSON lines of ODVG")
    inputs = (lines.path, *([] if label_map is None else [epath.Path(label_map)]))
    return ImportSource(chain(*entries), folder, report, names, count, inputs)


def read_odvg(file: epath.Path, label_map: epath.Path | None, report: Report) -> dict[str, Any]:
    """The boxes of classes in COCO's form, held in memory; SourceError if the file has none but of phrases."""
    lines = _Lines(file, label_map, report)
    if not lines.detection:
        raise SourceError(
            f"{file} has phrases of captions only, and no boxes of classes: import it with `data odvg`, and train on the shards"
        )
    data = lines.classes()
    coco = {key: list(data.objects(key)) for key in ("images", "annotations", "categories")}
    for note in coco["annotations"]:
        if (corners := as_numbers(note["bbox"], 4)) is not None:
            x1, y1, x2, y2 = corners
            note["bbox"] = [x1, y1, x2 - x1, y2 - y1]
    return coco


class _Lines:
    """A file of ODVG; scanned once for its names and kinds, then streamed for each list."""

    def __init__(self, path: epath.Path, label_map: epath.Path | None, report: Report) -> None:
        require_file(path)
        self.path = path
        self.detection = self.grounding = 0
        self._map = {} if label_map is None else _label_map(label_map)
        seen: dict[str, None] = {}
        for _, item in self._items(report):
            for instance in self._instances(item) or ():
                if not self._map and isinstance(category := instance.get("category"), str):
                    seen.setdefault(category)
            self.detection += self._instances(item) is not None
            self.grounding += self._caption(item) is not None
        self._names = self._map or dict(enumerate(sorted(seen)))
        self._numbers = {name: number for number, name in self._names.items()}

    def _items(self, report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in numbered_lines(self.path):
            if not line.strip():
                continue
            where = f"{self.path.name} line {number}"
            item = parse_json(line, report, "image", where)
            if isinstance(item, dict) and isinstance(item.get("filename", item.get("file_name")), str):
                yield number, item
            elif item is not ...:
                report.drop("image: line without a filename", where)

    @staticmethod
    def _instances(item: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        detection = item.get("detection")
        if not isinstance(detection, dict):
            return None
        instances = detection.get("instances")
        # The reader counts what is no object: it has no box.
        return [one if isinstance(one, dict) else {} for one in instances] if isinstance(instances, list) else []

    @staticmethod
    def _caption(item: Mapping[str, Any]) -> dict[str, Any] | None:
        grounding = item.get("grounding")
        return grounding if isinstance(grounding, dict) and isinstance(grounding.get("caption"), str) else None

    @staticmethod
    def _image(number: int, item: Mapping[str, Any]) -> dict[str, Any]:
        size = {side: item.get(side) for side in ("height", "width")}
        return {"id": number, "file_name": item.get("filename", item.get("file_name")), **size}

    def classes(self) -> JsonLists:
        """The lines with `detection` in COCO's form; `bbox` holds corners, ids are numbers of lines."""

        def images() -> Iterator[dict[str, Any]]:
            return (self._image(n, item) for n, item in self._items(Report()) if self._instances(item) is not None)

        def annotations() -> Iterator[dict[str, Any]]:
            count = 0
            for number, item in self._items(Report()):
                for instance in self._instances(item) or ():
                    count += 1
                    yield {
                        "id": count,
                        "image_id": number,
                        "bbox": instance.get("bbox"),
                        "category_id": self._class(instance),
                    }

        def categories() -> Iterator[dict[str, Any]]:
            return ({"id": number, "name": name} for number, name in self._names.items())

        return JsonLists(self.path, {"images": images, "annotations": annotations, "categories": categories})

    def _class(self, instance: Mapping[str, Any]) -> Any:
        """The number of a class: `label` with a label map, else that of the name."""
        if self._map:
            return instance.get("label", self._numbers.get(str(instance.get("category"))))
        return self._numbers.get(str(instance.get("category")), f"{instance.get('category')!r:.40}")

    def phrases(self) -> JsonLists:
        """The lines with `grounding` in MDETR's form; `bbox` holds corners."""

        def images() -> Iterator[dict[str, Any]]:
            for number, item in self._items(Report()):
                if (grounding := self._caption(item)) is not None:
                    yield {**self._image(number, item), "caption": grounding["caption"]}

        def annotations() -> Iterator[dict[str, Any]]:
            count = 0
            for number, item in self._items(Report()):
                grounding = self._caption(item) or {}
                regions = grounding.get("regions")
                for given in regions if isinstance(regions, list) else ():
                    region = given if isinstance(given, dict) else {}
                    for box in _region_boxes(region):
                        count += 1
                        spans = _spans(region, grounding["caption"])
                        yield {"id": count, "image_id": number, "bbox": box, "tokens_positive": spans}

        return JsonLists(self.path, {"images": images, "annotations": annotations})


def _region_boxes(region: Mapping[str, Any]) -> list[Any]:
    """The boxes of a region: one, or a list of them."""
    raw = region.get("bbox")
    return raw if isinstance(raw, list) and raw and all(isinstance(box, list) for box in raw) else [raw]


def _spans(region: Mapping[str, Any], caption: str) -> Any:
    """`tokens_positive` of a region, else the first place of its phrase in the caption, without case; None if it is not there."""
    spans = region.get("tokens_positive")
    if spans is not None:
        return [spans] if isinstance(spans, list) and all(isinstance(value, int) for value in spans) else spans
    phrase = region.get("phrase")
    if not isinstance(phrase, str) or not phrase.strip():
        return None
    begin = caption.lower().find(phrase.strip().lower())
    return None if begin < 0 else [[begin, begin + len(phrase.strip())]]


def _label_map(file: epath.Path) -> dict[int, str]:
    """Names by number; SourceError for anything but {"0": "dog", ...}."""
    require_file(file, "label map")
    data = read_json(file)
    items = data.items() if isinstance(data, dict) else ()
    names = {as_integer(key): name for key, name in items}
    if not names or None in names or not all(isinstance(name, str) for name in names.values()):
        raise SourceError(f'{file}: expected names by number, {{"0": "dog", "1": "cat"}}')
    return {number: str(name) for number, name in names.items() if number is not None}


def sources(folder: epath.Path) -> list[Source]:
    """The files of ODVG in a folder, by the splits that their names say, with the label map beside them."""
    found = []
    for place in (folder, *(below for below in folders_below(folder) if below.name.lower() in ANNOTATIONS)):
        files = files_with(place, ".jsonl", ".json")
        maps = [file for file in files if "label_map" in file.name.lower()]
        for file in files:
            form = None if file in maps else recognize(file)
            if form is not None and form.reader == "odvg":
                found.append(_source(file, next(iter(maps), None), folder))
    if any(source.split for source in found):
        found = [source for source in found if source.split]
    return one_per_split(found, folder)


def _source(file: epath.Path, label_map: epath.Path | None, folder: epath.Path) -> Source:
    split = split_of(file.stem)
    images = image_folders(file, split, folder)
    return Source(split, file, images, lambda report: read_odvg(file, label_map, report))


@dataclass(frozen=True, kw_only=True)
class Odvg(NamedOptions):
    """Import ODVG's JSON lines: boxes of classes, boxes of phrases, or both.

    example: python -m glip_jax data odvg o365v1_train_od.json --label-map=o365v1_label_map.json --images=train
    --out=shards/o365
    """

    annotations: tyro.conf.Positional[PathArgument]
    """The file of JSON lines."""
    images: PathArgument
    """Folder of the images."""
    label_map: PathArgument | None = None
    """JSON of class names by number; default: `category` of each box."""

    @property
    def source(self) -> epath.Path:
        """The file of JSON lines."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The file of JSON lines and the label map."""
        return (self.annotations, *([] if self.label_map is None else [self.label_map]))

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_odvg(self.annotations, self.images, label_map=self.label_map, **self.naming(scratch))
