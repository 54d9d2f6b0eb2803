"""Imports Flickr30k Entities in its released format: `Annotations/ID.xml`, `Sentences/ID.txt`, and split lists of ids.

Each sentence becomes one grounding record. Its markup `[/EN#CHAIN/TYPE words]` marks the phrases; the caption is the sentence
without markup, and spans are characters of the caption, end exclusive. A box of the XML belongs to all chains in its `<name>`
elements, so a phrase may have several boxes and a box several phrases; every (phrase, box) pair is a box of the record (the
"separate ground truth" of MDETR's files, on which GLIP is trained). Chain 0 is "not visual" and remains plain text. Other
phrases without a box (scenes, objects without annotation) are unlabelled phrases of the record, and counted.

The release counts pixels from 1; as in its own reader, 1 is subtracted from all four coordinates.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import tyro
from defusedxml.ElementTree import fromstring
from etils import epath

from glip_jax.data.importers.entry import Box, Entry, ImportSource, Report, SourceError, image_folder
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import decode_text, numbered_lines

__all__ = ["Flickr30k", "open_flickr30k", "plain_sentence"]

_MARKUP = re.compile(r"\[/EN#(\w+)((?:/[\w-]+)+)\s([^\[\]]*)\]")
_BROKEN = re.compile(r"(\[/|/EN#).*")
_XML_BYTES = 4_000_000
"""Maximum size in bytes of the XML of an image, hundreds of times that of the release."""


def open_flickr30k(
    release: epath.PathLike, images: epath.PathLike, *, split: epath.PathLike | None = None, strict: bool = False
) -> ImportSource:
    """Opens the folder `release` (with Annotations/ and Sentences/); entries in the order of the split list.

    `split`: text file with an image id per line (train.txt, val.txt, test.txt of the release); None: all sentence files, by
    name. Raises SourceError if a folder or list is missing or empty.
    """
    folder_of_images = image_folder(images)
    release = epath.Path(release)
    sentences, annotations = release / "Sentences", release / "Annotations"
    for folder in (sentences, annotations):
        if not folder.is_dir():
            raise SourceError(
                f"{release}: expected the release of Flickr30k Entities with {folder.name}/, found no such folder"
            )
    if split is None:
        ids = sorted(path.stem for path in sentences.glob("*.txt"))
        if not ids:
            raise SourceError(f"{sentences} has no ID.txt: expected a text file of sentences for each image")
    else:
        ids = [line for _, raw in numbered_lines(split) if (line := raw.decode(errors="replace").strip())]
        if not ids:
            raise SourceError(f"{split} lists nothing: expected one image id per line, as in the release's train.txt")
    report = Report(strict=strict)
    return ImportSource(_entries(release, ids, report), folder_of_images, report, inputs=_inputs(release, split))


def _inputs(release: epath.Path, split: epath.PathLike | None) -> tuple[epath.Path, ...]:
    return (*([] if split is None else [epath.Path(split)]), release / "Sentences", release / "Annotations")


def plain_sentence(sentence: str) -> tuple[str, list[tuple[str, tuple[int, int]]]]:
    """The sentence without its markup, and (chain id, character span) of each phrase in order.

    "[/EN#1/people Two people] talk ." gives ("Two people talk .", [("1", (0, 10))]). Raises ValueError for incomplete
    markup.
    """
    text, phrases, position = "", [], 0
    for found in _MARKUP.finditer(sentence):
        text += sentence[position : found.start()]
        words = found[3].strip()
        phrases.append((found[1], (len(text), len(text) + len(words))))
        text, position = text + words, found.end()
    text += sentence[position:]
    if rest := _BROKEN.search(text):
        raise ValueError(f"{rest[0]!r:.40}")
    return text, phrases


def _entries(release: epath.Path, ids: list[str], report: Report) -> Iterator[Entry]:
    seen: set[str] = set()
    for identity in ids:
        source = release / "Sentences" / f"{identity}.txt"
        where = f"image {identity}"
        if identity in seen:
            report.drop("image: listed twice", where)
            continue
        seen.add(identity)
        if not _is_file_name(identity) or not source.is_file():
            report.drop("image: no sentence file", f"{where}, {source.name!r:.60}")
            continue
        read = _boxes(release / "Annotations" / f"{identity}.xml", where, report)
        if read is None:
            continue
        size, by_chain = read
        number = 0
        for number, raw in enumerate((raw for _, raw in numbered_lines(source) if raw.strip()), 1):
            sentence = decode_text(raw, report, "image", f"{where}, sentence {number}")
            if sentence is None:
                continue
            entry = _entry(identity, number, sentence.strip(), size, by_chain, report)
            if entry is not None:
                yield entry
        if not number:
            report.drop("image: no sentence", f"{where}, {source.name} is empty, expected a sentence a line")


def _entry(
    identity: str, number: int, sentence: str, size: tuple[int | None, int | None],
    by_chain: dict[str, list[tuple[str, Box]]], report: Report,
) -> Entry | None:  # fmt: skip
    """The entry of sentence `number` (from 1); None, counted, if it is dropped."""
    where = f"image {identity}, sentence {number}"
    try:
        caption, phrases = plain_sentence(sentence)
    except ValueError as error:
        report.drop("image: sentence with broken markup", f"{where}, found {error}, expected [/EN#CHAIN/TYPE words]")
        return None
    boxes, spans, ids, without_box, not_visual = [], [], [], [], 0
    for chain, (begin, end) in phrases:
        if not caption[begin:end].strip():
            report.drop("phrase: no words", f"{where}, chain {chain}")
            continue
        found = by_chain.get(chain, [])
        if chain == "0":
            not_visual += 1
            continue
        if not found:
            without_box.append(((begin, end),))
        for name, box in found:
            boxes.append(box)
            spans.append(((begin, end),))
            ids.append(f"{name} for chain {chain}")
    if not boxes:
        report.drop("image: sentence without a box", where)
        return None
    report.note("phrase: without a box, kept as unknown", where, len(without_box))
    report.note("phrase: not visual, kept as text", where, not_visual)
    return Entry(
        id=f"{identity}#{number}", image=f"{identity}.jpg", kind="grounding", height=size[0], width=size[1],
        boxes=tuple(boxes), caption=caption, spans=tuple(spans), ids=tuple(ids), unknown=tuple(without_box),
        provenance="Flickr30k Entities",
    )  # fmt: skip


def _is_file_name(identity: str) -> bool:
    """Whether the id is a valid file name without path separators."""
    return "/" not in identity and "\0" not in identity and identity not in (".", "..") and len(identity) < 200


def _boxes(
    path: epath.Path, where: str, report: Report
) -> tuple[tuple[int | None, int | None], dict[str, list[tuple[str, Box]]]] | None:
    """(height, width), and for each chain its boxes with the number of the object; None, counted, if the file is invalid."""
    try:
        data = path.read_bytes()
    except OSError as error:
        report.drop("image: no annotation file", f"{where}, {path.name}: {error.strerror or error}")
        return None
    if len(data) > _XML_BYTES:
        report.drop("image: annotation file too large", f"{where}, {path.name} has {len(data):,} bytes")
        return None
    try:
        root = fromstring(data)
    except (ParseError, ValueError, LookupError) as error:  # defusedxml raises ValueError for forbidden content
        report.drop("image: annotation file is no XML", f"{where}, {path.name}: {error!s:.60}")
        return None
    by_chain: dict[str, list[tuple[str, Box]]] = defaultdict(list)
    for index, item in enumerate(root.iter("object")):
        box = _box(item, f"{where}, object {index}", report)
        for name in {(name.text or "").strip(): None for name in item.iter("name")} if box else ():
            by_chain[name].append((f"object {index}", box))  # pyright: ignore[reportArgumentType]
    size = root.find("size")
    height, width = (None if size is None else _pixels(size.findtext(side)) for side in ("height", "width"))
    return (height, width), by_chain


def _pixels(text: str | None) -> int | None:
    """A side in pixels; None if the text is not a positive integer."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0 else None


def _box(item: Element, where: str, report: Report) -> Box | None:
    """The object's box in pixels from 0; None if it has none (a scene), or, counted, an invalid one."""
    bndbox = item.find("bndbox")
    if bndbox is None:
        return None
    texts = [(bndbox.findtext(side) or "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x1, y1, x2, y2 = (float(text) - 1 for text in texts)
    except ValueError:
        report.drop("box: not four numbers", f"{where}, found {texts!r:.60}, expected xmin, ymin, xmax, ymax")
        return None
    report.note("box: begins before pixel 1, cut there", f"{where}, {texts!r:.60}", min(x1, y1) < 0)
    return x1, y1, x2, y2


@dataclass(frozen=True, kw_only=True)
class Flickr30k(BuildOptions):
    """Import Flickr30k Entities in its released format: a folder with Annotations/*.xml and Sentences/*.txt.

    example: python -m glip_jax data flickr30k flickr30k_entities --split=flickr30k_entities/train.txt --images=flickr30k-images --out=shards/flickr30k
    """

    folder: tyro.conf.Positional[PathArgument]
    """Folder of the release."""
    images: PathArgument
    """Folder of the images, ID.jpg."""
    split: PathArgument | None = None
    """Text file with an image id per line (train.txt, val.txt, test.txt); default: all images."""

    @property
    def source(self) -> epath.Path:
        """The split list, if given, else the folder."""
        return self.split or self.folder

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The split list, if given, and the folders of sentences and boxes."""
        return _inputs(self.folder, self.split)

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_flickr30k(self.folder, self.images, split=self.split, strict=self.strict)
