"""Imports objects of Visual Genome: objects.json (boxes with free-form names) and image_data.json (sizes, URLs).

Names are free text of the annotators, lower-cased and with white space normalized; a box gets the first of its names that is
in the vocabulary. Names are not exhaustive in any image, so nothing is known to be absent. Image paths follow the URLs:
VG_100K/ID.jpg and VG_100K_2/ID.jpg, or ID.jpg, below the image folder.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.config.ranges import Count
from glip_jax.data.importers.coco_json import ImagePaths, image_size
from glip_jax.data.importers.entry import Entry, ImportSource, Report, SourceError, from_xywh, image_folder
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import Join, JsonFile, integer_field, require_keys
from glip_jax.io import text_files
from glip_jax.structures.prompts import clean_name

__all__ = ["VisualGenome", "open_visual_genome"]


def open_visual_genome(
    objects: epath.PathLike,
    images: epath.PathLike,
    *,
    image_data: epath.PathLike,
    vocabulary: epath.PathLike | None = None,
    min_boxes: int = 1,
    without_coco: bool = False,
    strict: bool = False,
    scratch: Path | None = None,
) -> ImportSource:
    """Opens Visual Genome; one entry per image of image_data.json.

    `vocabulary`: text file with a name per line and synonyms after commas (as objects_vocab.txt); None: all names with at
    least `min_boxes` boxes, the most frequent first. Boxes with other names are dropped and counted, and so are, with
    `without_coco`, images that are also in COCO. Raises SourceError if a file is not JSON, a key is missing, no name is left,
    or the image folder is missing or empty.
    """
    folder, report = image_folder(images), Report(strict=strict)
    listed, sizes = JsonFile(objects), JsonFile(image_data)
    paths, counts = ImagePaths(images), Counter[str]()

    def image_values() -> Iterator[tuple[int, list[Any]]]:
        for i, item in enumerate(sizes.objects()):
            where = f"{sizes.path}: [{i}]"
            identity = _identity(item, where)
            address = item.get("url")
            parts = address.split("/")[-2:] if isinstance(address, str) and address else [f"{identity}.jpg"]
            size = image_size(item, f"image {identity}", report)
            yield identity, ["/".join(parts), *size, item.get("coco_id") is not None]

    def annotations() -> Iterator[tuple[int, Any, list[Any]]]:
        for i, item in enumerate(listed.objects()):
            where = f"{listed.path}: [{i}]"
            image = _identity(item, where)
            if not isinstance(item.get("objects"), list):
                raise SourceError(f"{where} has objects {item.get('objects')!r:.40}, expected a list")
            for k, thing in enumerate(item["objects"]):
                if not isinstance(thing, dict):
                    raise SourceError(f"{where}.objects[{k}] is {thing!r:.40}, expected an object")
                require_keys(thing, ("x", "y", "w", "h"), f"{where}.objects[{k}]")
                words = [_normalized(name) for name in _texts(thing.get("names", thing.get("name")))]
                key = thing.get("object_id", thing.get("id"))
                counts.update(words[:1])
                yield image, None, [f"{key!r:.40}", [thing[key] for key in "xywh"], words]

    join = Join(scratch)
    join.add_images(image_values())
    join.add_annotations(annotations())
    duplicate = join.duplicate_key("images")
    if duplicate is not None:
        raise SourceError(f"{sizes.path}: the image id {duplicate} occurs twice: ids must be unique")
    for _, image in join.without_image():
        report.drop("box: image not listed", f"image {image}")
    names = _vocabulary(vocabulary, counts, min_boxes, listed.path)
    entries = _entries(join, names, paths, without_coco, listed.path.name, report)
    ordered = list(dict.fromkeys(names.values()))
    inputs = (listed.path, sizes.path, *([] if vocabulary is None else [epath.Path(vocabulary)]))
    return ImportSource(entries, folder, report, tuple(ordered), join.count, inputs, "visual_genome")


def _identity(item: dict[str, Any], where: str) -> int:
    """`image_id`, or `id` as in version 1.0 of the data set."""
    key = "image_id" if "image_id" in item else "id"
    require_keys(item, (key,), where)
    return integer_field(item, key, where, "a number")


def _texts(raw: Any) -> list[str]:
    names = raw if isinstance(raw, list) else [raw]
    return [name for name in names if isinstance(name, str)]


def _normalized(name: str) -> str:
    return " ".join(name.lower().split())


def _vocabulary(file: epath.PathLike | None, counts: Counter[str], min_boxes: int, path: epath.Path) -> dict[str, str]:
    """Maps each name of the annotators to the name that it is imported as."""
    if file is None:
        ordered = sorted((name for name, n in counts.items() if n >= min_boxes), key=lambda name: (-counts[name], name))
        names = {name: name for name in ordered if _promptable(name)}
    else:
        names = {}
        try:
            lines = text_files.decoded(epath.Path(file).read_bytes()).splitlines()
        except (OSError, ValueError) as error:
            raise SourceError(f"--vocabulary {file} cannot be read ({error})") from None
        for number, line in enumerate(lines, 1):
            words = [_normalized(word) for word in line.split(",") if word.strip()]
            if words and not _promptable(words[0]):
                raise SourceError(
                    f"--vocabulary {file} line {number}: {words[0]!r} has no letter or digit to prompt with"
                )
            for word in words:
                names.setdefault(word, words[0])
    if not names:
        raise SourceError(f"{path}: no name is left (vocabulary {file}, at least {min_boxes} boxes)")
    return names


def _promptable(name: str) -> bool:
    return any(character.isalnum() for character in clean_name(name))


def _entries(
    join: Join, names: dict[str, str], paths: ImagePaths, without_coco: bool, provenance: str, report: Report
) -> Iterator[Entry]:
    order = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
    for identity, (file, height, width, in_coco), notes in join:
        if in_coco and without_coco:
            report.drop("image: also in COCO", f"image {identity}")
            report.drop("box: image dropped", f"image {identity}", len(notes))
            continue
        boxes, labels, ids = [], [], []
        for _, (key, raw, words) in notes:
            where = f"object {key} of image {identity}"
            known = next((names[word] for word in words if word in names), None)
            if known is None:
                report.drop("box: name not in the vocabulary", f"{where}, {', '.join(words)!r:.60}")
            elif (box := from_xywh(raw, report, where)) is not None:
                boxes.append(box)
                labels.append(order[known])
                ids.append(key)
        yield Entry(
            id=str(identity), image=paths.find(file), kind="detection", height=height, width=width,
            boxes=tuple(boxes), labels=tuple(labels), ids=tuple(ids), known_absent=(), provenance=provenance,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VisualGenome(BuildOptions):
    """Import the objects of Visual Genome.

    example: python -m glip_jax data visual-genome objects.json --image-data=image_data.json --images=vg
    --min-boxes=50 --without-coco --out=shards/vg
    """

    annotations: tyro.conf.Positional[PathArgument]
    """objects.json."""
    image_data: PathArgument
    """image_data.json: sizes and URLs of the images."""
    images: PathArgument
    """Folder of the images, with VG_100K and VG_100K_2, or with all images in it."""
    vocabulary: PathArgument | None = None
    """Text file with a name per line and synonyms after commas; default: the names in the annotations."""
    min_boxes: Count = 1
    """Without a vocabulary: minimum number of boxes of a name."""
    without_coco: bool = False
    """Exclude images that are also in COCO."""

    @property
    def chosen_drops(self) -> frozenset[str]:
        """The reasons for drops that the options ask for."""
        return frozenset({"box: name not in the vocabulary", "image: also in COCO"})

    @property
    def source(self) -> epath.Path:
        """The annotation file."""
        return self.annotations

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The JSON files and the vocabulary."""
        return (self.annotations, self.image_data, *([] if self.vocabulary is None else [self.vocabulary]))

    def open(self, scratch: Path) -> ImportSource:
        """Opens and validates the annotations."""
        return open_visual_genome(
            self.annotations, self.images, image_data=self.image_data, vocabulary=self.vocabulary,
            min_boxes=self.min_boxes, without_coco=self.without_coco, strict=self.strict, scratch=scratch,
        )  # fmt: skip
