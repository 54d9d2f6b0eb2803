"""Imports captions without boxes, to be labelled by a teacher: each becomes an entry of kind `caption`.

Four formats: tab-separated lines (CC3M: caption, URL; CC12M: URL, caption), JSON lines, webdataset tars as img2dataset writes
them (KEY.jpg, KEY.txt, KEY.json), and SBU's release (two parallel text files, or the JSON with parallel lists). COCO's
captions are in `glip_jax.data.importers.mdetr`.

Nothing is downloaded. If a file has URLs instead of file names, the pattern `files` gives the names of the downloaded images:
a text with {row} (line, counted from 0; {row:08d} pads it), {name} (last part of the URL), {path} (path of the URL with _
for /), {md5} and {sha1} (of the URL), e.g. "{row:09d}.jpg".
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

from glip_jax.data.importers.coco_json import ImagePaths
from glip_jax.data.importers.entry import Entry, ImportSource, Report, SourceError, image_folder
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import JsonFile, decode_text, numbered_lines, parse_json
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
"""Maximum size in bytes of a .txt or .json in a tar."""
_SBU = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")


def open_caption_tsv(
    captions: epath.PathLike, images: epath.PathLike, *, columns: str = "caption,image", files: str = "",
    strict: bool = False,
) -> ImportSource:  # fmt: skip
    """Opens captions of tab-separated lines. `columns`: meaning of the columns from the left; "-" is ignored.

    Raises SourceError if a file or folder is missing, `columns` lacks caption or image, or `files` is not a valid pattern.
    """
    names = [name.strip() for name in columns.split(",")]
    if sorted(name for name in names if name != "-") != ["caption", "image"]:
        raise SourceError(f"columns is {columns!r}: expected caption and image once each, others as -: caption,image")
    path, folder, report = _existing(captions), image_folder(images), Report(strict=strict)
    naming, paths = _Naming(files), ImagePaths(images)

    def entries() -> Iterator[Entry]:
        for number, raw in numbered_lines(path):
            where = f"{path.name} line {number}"
            line = decode_text(raw, report, "image", where)
            cells = [] if line is None else line.split("\t")
            if line is not None and len(cells) != len(names):
                wanted = f"expected {len(names)} ({columns})"
                report.drop("image: other columns", f"{where} has {len(cells)} columns, {wanted}: {line!r:.60}")
            elif line is not None:
                row = dict(zip(names, cells))
                yield from _entries(number, [row["caption"]], row["image"], naming, paths, path.name, report)

    return ImportSource(entries(), folder, report, inputs=(path,))


def open_caption_lines(
    captions: epath.PathLike, images: epath.PathLike, *, caption_key: str = "caption", image_key: str = "image",
    files: str = "", strict: bool = False,
) -> ImportSource:  # fmt: skip
    """Opens captions of JSON lines: objects with a caption (or a list of captions: one entry each) and an image."""
    path, folder, report = _existing(captions), image_folder(images), Report(strict=strict)
    naming, paths = _Naming(files), ImagePaths(images)

    def entries() -> Iterator[Entry]:
        for number, raw in numbered_lines(path):
            if not raw.strip():
                continue
            where = f"{path.name} line {number}"
            item = parse_json(raw, report, "image", where)
            if isinstance(item, dict) and caption_key in item and image_key in item:
                texts = item[caption_key] if isinstance(item[caption_key], list) else [item[caption_key]]
                yield from _entries(number, texts, item[image_key], naming, paths, path.name, report)
            elif item is not ...:
                wanted = f"expected an object with {caption_key!r} and {image_key!r}"
                report.drop("image: caption or picture missing", f"{where}, found {item!r:.60}, {wanted}")

    return ImportSource(entries(), folder, report, inputs=(path,))


def open_sbu(
    captions: epath.PathLike, images: epath.PathLike, *, files: str = "{name}", strict: bool = False
) -> ImportSource:
    """Opens the SBU captioned photos: the folder of the two text files, or the JSON file with the parallel lists
    `image_urls` and `captions` (sbu-captions-all.json).
    """
    path, folder, report = _existing(captions), image_folder(images), Report(strict=strict)
    naming, paths = _Naming(files), ImagePaths(images)
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
            yield from _entries(number, [caption], address, naming, paths, path.name, report)

    return ImportSource(entries(), folder, report, inputs=inputs)


def open_webdataset(tars: epath.PathLike, *, strict: bool = False) -> ImportSource:
    """Opens captions of a tar, or of the *.tar files of a folder in order of name. Images are read from the tars.

    The caption is KEY.txt, else "caption" in KEY.json. A truncated tar is read as far as possible, and counted.
    """
    path, report = epath.Path(tars), Report(strict=strict)
    if not path.exists():
        raise SourceError(f"{path} does not exist: expected a webdataset tar or a folder of them")
    found = _tars(path)
    if not found:
        raise SourceError(f"{path} has no *.tar: expected the tars that img2dataset writes (unpack .tar.gz first)")

    def entries() -> Iterator[Entry]:
        for tar in found:
            for sample in _samples(tar, report):
                entry = _sample_entry(sample, tar.name, report)
                if entry is not None:
                    yield entry

    return ImportSource(entries(), image_folder(found[0].parent), report, inputs=found)


def _tars(path: epath.Path) -> tuple[epath.Path, ...]:
    return tuple(sorted(path.glob("*.tar"))) if path.is_dir() else (path,)


class _Naming:
    """Converts the file name or URL of an image to the name of the image file."""

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
        """The path below the image folder; "" for a URL if there is no pattern."""
        if not self.files:
            return "" if "://" in image else image
        try:
            path = unquote(urlsplit(image).path)
        except ValueError:  # a URL with an incomplete IPv6 address
            path = image
        data = image.encode(errors="surrogatepass")
        return self.files.format(
            row=row, name=path.rpartition("/")[2], path=path.replace("/", "_"),
            md5=hashlib.md5(data).hexdigest(), sha1=hashlib.sha1(data).hexdigest(),
        )  # fmt: skip


def _entries(
    number: int, captions: Iterable[Any], image: Any, naming: _Naming, paths: ImagePaths, file: str, report: Report
) -> Iterator[Entry]:
    """Yields an entry for each caption of line `number`; values of a wrong type are dropped and counted."""
    where = f"{file} line {number}"
    if not isinstance(image, str) or not image.strip():
        report.drop("image: no picture named", f"{where}, found {image!r:.60}, expected a file name")
        return
    name = naming(image.strip(), number - 1)
    if not name:
        report.drop("image: address without a file", f"{where}, {image!r:.60}: say with --files how files are named")
        return
    name = paths.find(name)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            report.drop("image: caption no text", f"{where}, found {caption!r:.60}, expected text")
            continue
        identity = f"{number}" if not index else f"{number}.{index}"
        yield Entry(id=identity, image=name, kind="caption", caption=caption.strip(), provenance=file, file=name)


def _existing(path: epath.PathLike) -> epath.Path:
    """The path; SourceError if it does not exist."""
    if not gcs.kind(path):
        raise SourceError(f"the annotation file {path} does not exist")
    return epath.Path(path)


def _sbu_texts(path: epath.Path, report: Report) -> Iterator[Any]:
    """Yields lines as text; None, counted, for an invalid one, so that the two files stay aligned."""
    for number, raw in numbered_lines(path):
        yield decode_text(raw, report, "image", f"{path.name} line {number}")


def _paired(addresses: Iterator[Any], captions: Iterator[Any], path: epath.Path) -> Iterator[tuple[Any, Any]]:
    """Yields pairs; SourceError if one file ends before the other, as the pairing is then unknown."""
    number = 0
    while True:
        address, caption = next(addresses, ...), next(captions, ...)
        if address is ... and caption is ...:
            if not number:
                raise SourceError(f"{path}: expected URLs and captions, found none")
            return
        if address is ... or caption is ...:
            short = "addresses" if address is ... else "captions"
            raise SourceError(f"{path}: the {short} end after {number}, the others go on: expected as many of both")
        number += 1
        yield address, caption


class _Sample(NamedTuple):
    """The members of a tar that share a key."""

    key: str
    image: tuple[int, int, str] | None
    """Offset and length of the image's bytes in the tar, and its suffix."""
    text: bytes | None
    about: bytes | None


def _samples(path: epath.Path, report: Report) -> Iterator[_Sample]:
    """Yields the samples of a tar in order; an error of the tar is counted and ends the iteration."""
    try:
        with gcs.open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _grouped(tar, size)
                # tarfile treats a damaged header after the first as the end; a real end is two blocks of zeros.
                end = tar.offset
                file.seek(end)
                rest = file.read(tarfile.BLOCKSIZE)
                if len(rest) < tarfile.BLOCKSIZE or any(rest):
                    report.drop("tar: breaks off", f"{path.name} after byte {end} of {size}, without an end mark")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
        report.drop("tar: cannot be read", f"{path.name}: {error!s:.80}; expected an uncompressed tar")


def _grouped(tar: tarfile.TarFile, size: int) -> Iterator[_Sample]:
    """Groups consecutive members with the same name up to the first dot, as webdataset does."""
    key, sample = None, {}
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # otherwise tarfile keeps every member in memory
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
            sample["image"] = (member.offset_data, member.size, suffix)
        elif suffix in ("txt", "json") and member.size <= _TEXT_BYTES:
            data = tar.extractfile(member)
            sample[suffix] = b"" if data is None else data.read()
    if key is not None:
        yield _sample(key, sample)


def _sample(key: str, parts: dict[str, Any]) -> _Sample:
    return _Sample(key, parts.get("image"), parts.get("txt"), parts.get("json"))


def _sample_entry(sample: _Sample, tar: str, report: Report) -> Entry | None:
    """The entry of a sample; None, counted, if it is dropped."""
    where = f"{tar}, {sample.key}"
    if sample.image is None:
        report.drop("image: no picture in the tar", f"{where}, expected one of .{', .'.join(_PICTURES)}")
        return None
    if sample.text is not None:
        caption = decode_text(sample.text, report, "image", f"{where}.txt")
    elif sample.about is not None:
        about = parse_json(sample.about, report, "image", f"{where}.json")
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
    offset, length, suffix = sample.image
    return Entry(
        id=sample.key, image=f"{tar}#{offset}+{length}", kind="caption", caption=caption.strip(), provenance=tar,
        file=f"{sample.key}.{suffix}",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(BuildOptions):
    """Options of an import from a file (or folder) of captions and an image folder."""

    captions: tyro.conf.Positional[PathArgument]
    """The file of captions; *.gz is decompressed."""
    images: PathArgument
    """Folder of the images."""

    @property
    def source(self) -> epath.Path:
        """The file or folder of captions."""
        return self.captions

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The file of captions."""
        return (self.captions,)


@dataclass(frozen=True, kw_only=True)
class CaptionTsv(CaptionOptions):
    """Import captions of tab-separated lines, the format of CC3M and CC12M.

    example: python -m glip_jax data caption-tsv cc12m.tsv --columns=image,caption --files={row:08d}.jpg --images=cc12m --out=shards/cc12m
    """

    columns: str = "caption,image"
    """Meaning of the columns from the left; "-" for an unused one. CC3M: caption,image; CC12M: image,caption."""
    files: str = ""
    """If the image column is a URL: name of the image file, with {row} (line from 0), {name} (last part of the URL), {path}
    (with _ for /), {md5}, {sha1}, e.g. {row:08d}.jpg."""

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_caption_tsv(
            self.captions, self.images, columns=self.columns, files=self.files, strict=self.strict
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CaptionLines(CaptionOptions):
    """Import captions of JSON lines, one object per line.

    example: python -m glip_jax data caption-lines captions.jsonl --images=pictures --out=shards/captions
    """

    caption_key: str = "caption"
    """Key of the caption, or of a list of captions: one record each."""
    image_key: str = "image"
    """Key of the path below --images, or of the URL."""
    files: str = ""
    """If that is a URL: name of the image file, see `data caption-tsv --help`."""

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_caption_lines(
            self.captions, self.images, caption_key=self.caption_key, image_key=self.image_key, files=self.files,
            strict=self.strict,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sbu(CaptionOptions):
    """Import the SBU captioned photos from the folder of the two text files, or from the JSON with parallel lists.

    example: python -m glip_jax data sbu sbu-captions-all.json --images=sbu --out=shards/sbu
    """

    files: str = "{name}"
    """Name of the image files, see `data caption-tsv --help`; with SBU's download.m: m{path}."""

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The JSON file, or the two text files."""
        return tuple(self.captions / name for name in _SBU) if self.captions.is_dir() else (self.captions,)

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_sbu(self.captions, self.images, files=self.files, strict=self.strict)


@dataclass(frozen=True, kw_only=True)
class Webdataset(BuildOptions):
    """Import images and captions of webdataset tars, as img2dataset writes them.

    example: python -m glip_jax data webdataset cc3m --out=shards/cc3m
    """

    tars: tyro.conf.Positional[PathArgument]
    """A tar file, or a folder of tar files."""

    @property
    def source(self) -> epath.Path:
        """The tar or folder."""
        return self.tars

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The tars."""
        return _tars(self.tars)

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_webdataset(self.tars, strict=self.strict)
