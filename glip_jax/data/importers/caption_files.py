"""Captions without boxes, for a teacher to label: each becomes an entry of kind `caption`.

Four layouts: tab-separated lines (CC3M: caption, address; CC12M: address, caption), JSON lines, webdataset tars as
img2dataset writes them (KEY.jpg, KEY.txt, KEY.json), and SBU's release (two parallel text files, or the JSON with
parallel lists). COCO's captions are in `glip_jax.data.formats.coco_captions`.

Nothing is downloaded. Where a file gives an address instead of a file name, `files` says how the pictures were named:
a text with {row} (line, counted from 0; {row:08d} pads it), {name} (last part of the address), {path} (the address'
path with _ for /), {md5} and {sha1} (of the address), e.g. "{row:09d}.jpg".
"""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import tyro
from etils import epath

from glip_jax.data.importers.entry import Entry, Opened, Report, SourceError, image_folder
from glip_jax.data.importers.options import BuildOptions, Place
from glip_jax.data.importers.readers import JsonFile, json_of, numbered, text_of
from glip_jax.io import gcs

__all__ = [
    "CaptionLines",
    "CaptionTsv",
    "Sbu",
    "Webdataset",
    "open_caption_lines",
    "open_caption_tsv",
    "open_sbu",
    "open_webdataset",
]

_PICTURES = ("jpg", "jpeg", "png", "webp")
_TEXT_BYTES = 1_000_000
"""Most bytes of a .txt or .json in a tar that are read."""
_SBU = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")


def open_caption_tsv(
    captions: epath.PathLike, images: epath.PathLike, *, columns: str = "caption,image", files: str = "",
    strict: bool = False,
) -> Opened:  # fmt: skip
    """Caption entries of lines with tabs. `columns`: what the columns are, from the left; "-" is passed over.

    SourceError: a file or folder that is missing, columns without caption and image, `files` that is no pattern.
    """
    names = [name.strip() for name in columns.split(",")]
    if sorted(name for name in names if name != "-") != ["caption", "image"]:
        raise SourceError(f"columns is {columns!r}: expected caption and image once each, others as -: caption,image")
    path, folder, report = _existing(captions), image_folder(images), Report(strict=strict)
    naming = _Naming(files)

    def entries() -> Iterator[Entry]:
        for number, raw in numbered(path):
            where = f"{path.name} line {number}"
            line = text_of(raw, report, "image", where)
            cells = [] if line is None else line.split("\t")
            if line is not None and len(cells) != len(names):
                wanted = f"expected {len(names)} ({columns})"
                report.drop("image: other columns", f"{where} has {len(cells)} columns, {wanted}: {line!r:.60}")
            elif line is not None:
                row = dict(zip(names, cells))
                yield from _entries(number, [row["caption"]], row["image"], naming, path.name, report)

    return Opened(entries(), folder, report, inputs=(path,))


def open_caption_lines(
    captions: epath.PathLike, images: epath.PathLike, *, caption_key: str = "caption", image_key: str = "image",
    files: str = "", strict: bool = False,
) -> Opened:  # fmt: skip
    """Caption entries of JSON lines, objects with a caption (or a list of them: one entry each) and a picture."""
    path, folder, report = _existing(captions), image_folder(images), Report(strict=strict)
    naming = _Naming(files)

    def entries() -> Iterator[Entry]:
        for number, raw in numbered(path):
            if not raw.strip():
                continue
            where = f"{path.name} line {number}"
            item = json_of(raw, report, "image", where)
            if isinstance(item, dict) and caption_key in item and image_key in item:
                texts = item[caption_key] if isinstance(item[caption_key], list) else [item[caption_key]]
                yield from _entries(number, texts, item[image_key], naming, path.name, report)
            elif item is not ...:
                wanted = f"expected an object with {caption_key!r} and {image_key!r}"
                report.drop("image: caption or picture missing", f"{where}, found {item!r:.60}, {wanted}")

    return Opened(entries(), folder, report, inputs=(path,))


def open_sbu(
    captions: epath.PathLike, images: epath.PathLike, *, files: str = "{name}", strict: bool = False
) -> Opened:
    """Caption entries of the SBU captioned photos: the folder of the two text files, or the JSON with parallel lists
    `image_urls` and `captions` (sbu-captions-all.json).
    """
    path, folder, report = _existing(captions), image_folder(images), Report(strict=strict)
    naming = _Naming(files)
    if path.is_dir():
        inputs = tuple(path / name for name in _SBU)
        for file in inputs:
            if not file.is_file():
                raise SourceError(f"{path} has no {file.name}: expected SBU's {_SBU[0]} and {_SBU[1]}")
        pairs = _paired(_sbu_texts(inputs[0], report), _sbu_texts(inputs[1], report), path)
    else:
        inputs = (path,)
        lists = JsonFile(path)
        pairs = _paired(lists.values("image_urls.item"), lists.values("captions.item"), path)

    def entries() -> Iterator[Entry]:
        for number, (address, caption) in enumerate(pairs, 1):
            yield from _entries(number, [caption], address, naming, path.name, report)

    return Opened(entries(), folder, report, inputs=inputs)


def open_webdataset(tars: epath.PathLike, *, strict: bool = False) -> Opened:
    """Caption entries of a tar, or of the *.tar of a folder in order of name. Pictures stay where they are in the tars.

    The caption is KEY.txt, or else "caption" in KEY.json. A tar that breaks off is read up to there, and counted.
    """
    path, report = epath.Path(tars), Report(strict=strict)
    if not path.exists():
        raise SourceError(f"{path} does not exist: expected a webdataset tar or a folder of them")
    found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not found:
        raise SourceError(f"{path} has no *.tar: expected the tars that img2dataset writes (unpack .tar.gz first)")

    def entries() -> Iterator[Entry]:
        for tar in found:
            for sample in _samples(tar, report):
                entry = _sample_entry(sample, tar.name, report)
                if entry is not None:
                    yield entry

    return Opened(entries(), image_folder(found[0].parent), report, inputs=tuple(found))


class _Naming:
    """From what a file says of a picture to its file name."""

    def __init__(self, files: str) -> None:
        self.files = files
        try:
            self("http://example.org/a/b.jpg", 0)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise SourceError(
                f"files is {files!r} ({type(error).__name__}: {error}): expected a text with {{row}}, {{row:08d}}, "
                "{name}, {path}, {md5} or {sha1}"
            ) from None

    def __call__(self, image: str, row: int) -> str:
        """The file below the folder of pictures; "" for an address without a pattern for it."""
        if not self.files:
            return "" if "://" in image else image
        try:
            path = unquote(urlsplit(image).path)
        except ValueError:  # an address with half an IPv6 in it
            path = image
        data = image.encode(errors="surrogatepass")
        return self.files.format(
            row=row, name=path.rpartition("/")[2], path=path.replace("/", "_"),
            md5=hashlib.md5(data).hexdigest(), sha1=hashlib.sha1(data).hexdigest(),
        )  # fmt: skip


def _entries(
    number: int, captions: Iterable[Any], image: Any, naming: _Naming, file: str, report: Report
) -> Iterator[Entry]:
    """An entry for each caption of line `number`, whatever types the file has for them."""
    where = f"{file} line {number}"
    if not isinstance(image, str) or not image.strip():
        report.drop("image: no picture named", f"{where}, found {image!r:.60}, expected a file name")
        return
    name = naming(image.strip(), number - 1)
    if not name:
        report.drop("image: address without a file", f"{where}, {image!r:.60}: say with --files how files are named")
        return
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            report.drop("image: caption no text", f"{where}, found {caption!r:.60}, expected text")
            continue
        identity = f"{number}" if not index else f"{number}.{index}"
        yield Entry(id=identity, image=name, kind="caption", caption=caption.strip(), provenance=file)


def _existing(path: epath.PathLike) -> epath.Path:
    """The path; SourceError if nothing is there."""
    if not gcs.kind(path):
        raise SourceError(f"the annotation file {path} does not exist")
    return epath.Path(path)


def _sbu_texts(path: epath.Path, report: Report) -> Iterator[Any]:
    """Lines as text; None, counted, for one that is none, so that the two files stay side by side."""
    for number, raw in numbered(path):
        yield text_of(raw, report, "image", f"{path.name} line {number}")


def _paired(addresses: Iterator[Any], captions: Iterator[Any], path: epath.Path) -> Iterator[tuple[Any, Any]]:
    """Both in step; SourceError where one ends before the other: then nobody knows which belong together."""
    number = 0
    while True:
        address, caption = next(addresses, ...), next(captions, ...)
        if address is ... and caption is ...:
            if not number:
                raise SourceError(f"{path}: expected addresses and captions, found none")
            return
        if address is ... or caption is ...:
            short = "addresses" if address is ... else "captions"
            raise SourceError(f"{path}: the {short} end after {number}, the others go on: expected as many of both")
        number += 1
        yield address, caption


class _Sample(NamedTuple):
    """The members of a tar that share a key."""

    key: str
    picture: tuple[int, int] | None
    """(offset, length) of the picture's bytes in the tar."""
    text: bytes | None
    about: bytes | None


def _samples(path: epath.Path, report: Report) -> Iterator[_Sample]:
    """Samples of a tar in order; what makes it unreadable is counted once, and ends it."""
    try:
        with gcs.open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _grouped(tar, size)
                # tarfile takes a damaged header after the first for the end: the end is two blocks of zeros.
                end = tar.offset
                file.seek(end)
                rest = file.read(tarfile.BLOCKSIZE)
                if len(rest) < tarfile.BLOCKSIZE or any(rest):
                    report.drop("tar: breaks off", f"{path.name} after byte {end} of {size}, without an end mark")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
        report.drop("tar: cannot be read", f"{path.name}: {error!s:.80}; expected an uncompressed tar")


def _grouped(tar: tarfile.TarFile, size: int) -> Iterator[_Sample]:
    """Neighbours with the same name up to the first dot, as webdataset groups them."""
    key, sample = None, {}
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else it remembers every one
        if not member.isreg():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        stem = f"{folder}/{stem}" if folder else stem
        if stem != key:
            if key is not None:
                yield _sample(key, sample)
            key, sample = stem, {}
        if member.size < 0 or member.offset_data + member.size > size:
            raise tarfile.ReadError(f"{member.name} of {member.size} bytes ends after the file")
        suffix = suffix.lower()
        if suffix in _PICTURES:
            sample["picture"] = (member.offset_data, member.size)
        elif suffix in ("txt", "json") and member.size <= _TEXT_BYTES:
            data = tar.extractfile(member)
            sample[suffix] = b"" if data is None else data.read()
    if key is not None:
        yield _sample(key, sample)


def _sample(key: str, parts: dict[str, Any]) -> _Sample:
    return _Sample(key, parts.get("picture"), parts.get("txt"), parts.get("json"))


def _sample_entry(sample: _Sample, tar: str, report: Report) -> Entry | None:
    """The entry of a sample, or None, counted."""
    where = f"{tar}, {sample.key}"
    if sample.picture is None:
        report.drop("image: no picture in the tar", f"{where}, expected one of .{', .'.join(_PICTURES)}")
        return None
    if sample.text is not None:
        caption = text_of(sample.text, report, "image", f"{where}.txt")
    elif sample.about is not None:
        about = json_of(sample.about, report, "image", f"{where}.json")
        caption = about.get("caption") if isinstance(about, dict) else None
        if about is not ... and not isinstance(caption, str):
            report.drop(
                "image: caption no text", f"{where}.json, found {caption!r:.60}, expected a text under 'caption'"
            )
    else:
        report.drop("image: caption no text", f"{where}, expected {sample.key}.txt or .json")
        return None
    if not isinstance(caption, str):
        return None
    offset, length = sample.picture
    image = f"{tar}#{offset}+{length}"
    return Entry(id=sample.key, image=image, kind="caption", caption=caption.strip(), provenance=tar)


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(BuildOptions):
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
class CaptionTsv(CaptionOptions):
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
class CaptionLines(CaptionOptions):
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
class Sbu(CaptionOptions):
    """Import the SBU captioned photos: the folder with their two text files, or the JSON with parallel lists.

    example: python -m glip_jax data sbu sbu-captions-all.json --images=sbu --out=shards/sbu
    """

    files: str = "{name}"
    """How the pictures were named, see `data caption-tsv --help`; the owner's download.m: m{path}."""

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_sbu(self.captions, self.images, files=self.files, strict=self.strict)


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
