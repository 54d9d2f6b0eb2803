"""Visual Genome's objects: objects.json (boxes with free names) and image_data.json (sizes, addresses).

Names are whatever annotators wrote: lower-cased, white space joined; a box has the first of its names that the
vocabulary knows. No name is exhaustive in any image, so nothing is known to be absent. Pictures are where the address
says: VG_100K/ID.jpg and VG_100K_2/ID.jpg, or ID.jpg, below the folder of pictures.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from etils import epath

from glip_jax.data.importers.coco import Places
from glip_jax.data.importers.entry import Entry, Opened, Report, SourceError, from_xywh, image_folder
from glip_jax.data.importers.options import BuildOptions, Place
from glip_jax.data.importers.readers import Join, JsonFile, integer, need
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
) -> Opened:
    """Detection entries, one per image of image_data.json.

    `vocabulary`: a text with a name a line, further words for it after commas (as in objects_vocab.txt); None: all names
    with at least `min_boxes` boxes, the most frequent first. Boxes of other names are dropped and counted, and so are,
    with `without_coco`, images that are COCO's too. SourceError: no JSON, a missing key, no name left, no pictures.
    """
    folder, report = image_folder(images), Report(strict=strict)
    listed, sizes = JsonFile(objects), JsonFile(image_data)
    places, counts = Places(folder), Counter[str]()

    def pictures() -> Iterator[tuple[int, list[Any]]]:
        for i, item in enumerate(sizes.objects()):
            where = f"{sizes.path}: [{i}]"
            identity = _identity(item, where)
            need(item, ("width", "height"), where)
            address = item.get("url")
            parts = address.split("/")[-2:] if isinstance(address, str) and address else [f"{identity}.jpg"]
            size = [integer(item, side, where) for side in ("height", "width")]
            yield identity, ["/".join(parts), *size, item.get("coco_id") is not None]

    def notes() -> Iterator[tuple[int, Any, list[Any]]]:
        for i, item in enumerate(listed.objects()):
            where = f"{listed.path}: [{i}]"
            image = _identity(item, where)
            if not isinstance(item.get("objects"), list):
                raise SourceError(f"{where} has objects {item.get('objects')!r:.40}, expected a list")
            for k, thing in enumerate(item["objects"]):
                if not isinstance(thing, dict):
                    raise SourceError(f"{where}.objects[{k}] is {thing!r:.40}, expected an object")
                need(thing, ("x", "y", "w", "h"), f"{where}.objects[{k}]")
                words = [_joined(name) for name in _texts(thing.get("names", thing.get("name")))]
                own = thing.get("object_id", thing.get("id"))
                counts.update(words[:1])
                yield image, None, [f"{own!r:.40}", [thing[key] for key in "xywh"], words]

    join = Join(scratch)
    join.add_images(pictures())
    join.add_notes(notes())
    twice = join.twice("images")
    if twice is not None:
        raise SourceError(f"{sizes.path}: the image {twice} stands twice: ids must be unique")
    for _, image in join.strays():
        report.drop("box: image not listed", f"image {image}")
    names = _vocabulary(vocabulary, counts, min_boxes, listed.path)
    entries = _entries(join, names, places, without_coco, listed.path.name, report)
    ordered = list(dict.fromkeys(names.values()))
    inputs = (listed.path, sizes.path, *([] if vocabulary is None else [epath.Path(vocabulary)]))
    return Opened(entries, folder, report, tuple(ordered), join.count, inputs, "visual_genome")


def _identity(item: dict[str, Any], where: str) -> int:
    """`image_id`, or `id` as in the first version."""
    key = "image_id" if "image_id" in item else "id"
    need(item, (key,), where)
    return integer(item, key, where, "a number")


def _texts(raw: Any) -> list[str]:
    names = raw if isinstance(raw, list) else [raw]
    return [name for name in names if isinstance(name, str)]


def _joined(name: str) -> str:
    return " ".join(name.lower().split())


def _vocabulary(file: epath.PathLike | None, counts: Counter[str], min_boxes: int, path: epath.Path) -> dict[str, str]:
    """From a word of the annotators to the name it stands for."""
    if file is None:
        ordered = sorted((name for name, n in counts.items() if n >= min_boxes), key=lambda name: (-counts[name], name))
        names = {name: name for name in ordered if _promptable(name)}
    else:
        names = {}
        try:
            lines = epath.Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"--vocabulary {file} cannot be read ({error})") from None
        for number, line in enumerate(lines, 1):
            words = [_joined(word) for word in line.split(",") if word.strip()]
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
    join: Join, names: dict[str, str], places: Places, without_coco: bool, provenance: str, report: Report
) -> Iterator[Entry]:
    order = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}
    for identity, (file, height, width, in_coco), notes in join:
        if in_coco and without_coco:
            report.drop("image: also in COCO", f"image {identity}")
            report.drop("box: image dropped", f"image {identity}", len(notes))
            continue
        boxes, labels, ids = [], [], []
        for _, (own, raw, words) in notes:
            where = f"object {own} of image {identity}"
            known = next((names[word] for word in words if word in names), None)
            if known is None:
                report.drop("box: name not in the vocabulary", f"{where}, {', '.join(words)!r:.60}")
            elif (box := from_xywh(raw, report, where)) is not None:
                boxes.append(box)
                labels.append(order[known])
                ids.append(own)
        yield Entry(
            id=str(identity), image=places.find(file), kind="detection", height=height, width=width,
            boxes=tuple(boxes), labels=tuple(labels), ids=tuple(ids), known_absent=(), provenance=provenance,
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
