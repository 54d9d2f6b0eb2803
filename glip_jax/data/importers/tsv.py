"""Imports the TSV containers of the original GLIP: X.yaml, which names files X.tsv with X.lineidx beside it.

The yaml has the keys `img` (rows of key and, in the last column, base64 image) and `label` (key, JSON), and optionally `hw`
(key, sizes), `linelist` (numbers of the rows to use, repeated for oversampling), `imageid2idx` (row of each img_id) and
`labelmap` or `jsondict` (names of the classes). X.lineidx has the byte offset of every row; without it the offsets are
determined by reading the rows once.

Detection labels are a list of objects, or {"objects": [...]}, each with `class` and `rect` (xyxy in inclusive pixels); `conf`
is ignored, as in the original's training. Pseudo labels of captions have `caption`, `bboxes`, `scores` and `tokens_positive`:
one list of spans per box (v1), or boxes and scores nested per entity with the entity's spans (v2), where every box of an
entity gets all of its spans. The caller says which of the two kinds a file has (`kind`).

Images are not copied: an entry refers to the bytes of X.tsv to decode. Offsets are in temporary files, so memory does not
grow with the number of rows.
"""

import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import ijson
import numpy as np
import tyro
import yaml
from etils import epath

from glip_jax.data.importers.entry import (
    Box,
    Entry,
    ImageFolder,
    ImportSource,
    Report,
    SourceError,
    as_numbers,
    checked_spans,
)
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.data.importers.readers import numbered_lines, parse_json
from glip_jax.io import gcs, text_files
from glip_jax.io.paths import OutsideError, within

__all__ = ["Rows", "Tsv", "open_tsv"]

_HEAD = 4096
"""Bytes of an image row that are read to find its columns; doubled until they suffice."""


def open_tsv(
    container: epath.PathLike, *, kind: Literal["detection", "pseudo"], oversample: bool = False, strict: bool = False
) -> ImportSource:
    """Opens the container described by the yaml `container`; entries in the order of the rows.

    A row that a `linelist` names several times (class-balanced oversampling) gives one entry, and the repetitions are noted;
    with `oversample` it gives one entry each, with ids `KEY`, `KEY*2`, ... Raises SourceError if a file is missing or
    invalid, or a detection container has no names.
    """
    path, report = epath.Path(container), Report(strict=strict)
    fields = _yaml(path)
    files = _files(path, fields, kind)
    names = _names(files[_label_map(fields)]) if kind == "detection" else ()
    reader = _Container(path, files, kind, {name: index for index, name in enumerate(names)}, report)
    count = len(reader.labels) if "linelist" not in files else None
    return ImportSource(
        reader.entries(oversample), ImageFolder(path.parent), report, names=names, count=count,
        inputs=(path, *(file for key, file in files.items() if key != "img")),
    )  # fmt: skip


def _files(path: epath.Path, fields: dict[str, str], kind: str) -> dict[str, epath.Path]:
    """The files that the yaml names, by key; SourceError if one is missing or not below the folder of the yaml."""
    keys = [key for key in ("img", "label", "hw", "linelist", "imageid2idx") if key in fields]
    if kind == "detection":
        if _label_map(fields) not in fields:
            raise SourceError(f"{path} names no labelmap: expected labelmap: FILE with the names of the classes")
        keys.append(_label_map(fields))
    files = {}
    for key in keys:
        try:
            files[key] = within(path.parent, fields[key])
        except OutsideError as error:
            raise SourceError(f"{path}: {key} names {error}") from None
        if not files[key].is_file():
            raise SourceError(f"{path}: {key} names {fields[key]}, which is not beside it")
    return files


def _label_map(fields: dict[str, str]) -> str:
    return "labelmap" if "labelmap" in fields else "jsondict"


class Rows:
    """Random access to the rows of a .tsv file by their offsets, which are kept on disk.

    Raises SourceError if X.lineidx does not match X.tsv: an offset is not a number, not above the previous one, or beyond
    the end of the file.
    """

    def __init__(self, path: epath.Path) -> None:
        self.path = path
        self._file = gcs.open_file(path)
        self._size = self._file.seek(0, 2)
        index = path.with_suffix(".lineidx")
        with tempfile.TemporaryFile() as offsets:
            part: list[int] = []
            for offset in self._indexed_offsets(index) if index.is_file() else self._scanned_offsets():
                part.append(offset)
                if len(part) == 65_536:
                    np.asarray(part, np.int64).tofile(offsets)
                    part = []
            np.asarray([*part, self._size], np.int64).tofile(offsets)
            offsets.flush()
            self._offsets = np.memmap(offsets, np.int64, "r")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def cells(self, row: int) -> list[bytes]:
        """All columns of a row."""
        begin, end = self._bounds(row)
        return self._line(begin, end, row).split(b"\t")

    def last_cell(self, row: int) -> tuple[bytes, int, int]:
        """The first column, and the first byte and length of the last column, which is not read completely."""
        begin, end = self._bounds(row)
        tabs, size = self._tabs, _HEAD
        while (head := self._line(begin, min(begin + size, end), row)).count(b"\t") < tabs and begin + size < end:
            size *= 2
        cells = head.split(b"\t", tabs)
        length = end - begin - sum(len(cell) + 1 for cell in cells[:-1])
        return cells[0][:200], end - length, length

    @cached_property
    def _tabs(self) -> int:
        """Number of tabs of the first row, which all rows should have."""
        return len(self.cells(0)) - 1

    def _bounds(self, row: int) -> tuple[int, int]:
        """First byte and end of a row, without the line end."""
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        if begin and self._part(begin - 1, begin) != b"\n":
            self._raise_mismatch(row)
        tail = self._part(max(begin, end - 2), end)
        return begin, end - (len(tail) - len(tail.rstrip(b"\r\n")))

    def _line(self, begin: int, end: int, row: int) -> bytes:
        data = self._part(begin, end)
        if b"\n" in data:
            self._raise_mismatch(row)
        return data

    def _part(self, begin: int, end: int) -> bytes:
        self._file.seek(begin)
        return self._file.read(end - begin)

    def _raise_mismatch(self, row: int) -> NoReturn:
        raise SourceError(
            f"{self.path.with_suffix('.lineidx')}, line {row + 1} and the one after do not bound a row of "
            f"{self.path.name}: it belongs to another file; remove it, it is not required"
        )

    def _indexed_offsets(self, index: epath.Path) -> Iterator[int]:
        last = -1
        for number, raw in numbered_lines(index):
            if not (0 < len(raw) < 19 and raw.isdigit()) or not last < int(raw) < max(self._size, 1):
                raise SourceError(
                    f"{index} line {number}: found {raw[:30]!r}, expected the byte where row {number} of "
                    f"{self.path.name} begins, above {last} and below {self._size}: remove the file, it is not required"
                )
            if last == -1 and int(raw) != 0:
                raise SourceError(f"{index} begins with {int(raw)}, expected 0: it belongs to another file; remove it")
            last = int(raw)
            yield last

    def _scanned_offsets(self) -> Iterator[int]:
        with gcs.open_file(self.path) as file:
            offset = 0
            for line in file:
                yield offset
                offset += len(line)


class _Container:
    """The open files of a container."""

    def __init__(
        self, path: epath.Path, files: dict[str, epath.Path], kind: Literal["detection", "pseudo"],
        index: dict[str, int], report: Report,
    ) -> None:  # fmt: skip
        self.path, self.files, self.kind, self.index, self.report = path, files, kind, index, report
        self.images, self.labels = Rows(files["img"]), Rows(files["label"])
        self.sizes = Rows(files["hw"]) if "hw" in files else None
        self.row_of = _RowOfId(files["imageid2idx"]) if "imageid2idx" in files else None
        if not len(self.labels):
            raise SourceError(f"{files['label']} is empty: expected rows of key and JSON")
        if self.row_of is None and len(self.images) != len(self.labels):
            raise SourceError(
                f"{path}: {files['img'].name} has {len(self.images)} rows and {files['label'].name} "
                f"{len(self.labels)}: expected as many of both"
            )
        if self.sizes is not None and len(self.sizes) != len(self.images):
            raise SourceError(
                f"{path}: {files['hw'].name} has {len(self.sizes)} rows and {files['img'].name} "
                f"{len(self.images)}: expected as many of both"
            )

    def entries(self, oversample: bool) -> Iterator[Entry]:
        if "linelist" not in self.files:
            for row in range(len(self.labels)):
                yield from self._entry(row)
            return
        rows = _line_list(self.files["linelist"], len(self.labels), self.report)
        repeated = 0
        for row in np.flatnonzero(rows).tolist():
            times = int(rows[row])
            repeated += times - 1
            for entry in self._entry(row):
                yield entry
                for again in range(2, times + 1 if oversample else 2):
                    yield replace(entry, id=f"{entry.id}*{again}")
        name = self.files["linelist"].name
        self.report.note(
            "row: mentioned again in the linelist", f"{name}: {repeated} mentions"
            f"{'' if oversample else ' left out (the original repeats such images; oversample does)'}", repeated,
        )  # fmt: skip

    def _entry(self, row: int) -> Iterator[Entry]:
        """Yields the entry of a row, or nothing, counted, if it is dropped."""
        where = f"{self.files['label'].name} row {row}"
        cells = self.labels.cells(row)
        if len(cells) < 2:
            self.report.drop("image: row without label", f"{where} has {len(cells)} columns, expected key and JSON")
            return
        label = parse_json(cells[-1], self.report, "image", where)
        if label is ...:
            return
        image_row = row if self.row_of is None else self._row_of(label, where)
        if image_row is None:
            return
        key, begin, length = self.images.last_cell(image_row)
        name = key.decode(errors="backslashreplace") or str(image_row)
        if self.row_of is None and key != cells[0][:200]:
            self.report.drop(
                "image: keys differ",
                f"{where} has {cells[0][:40]!r}, {self.files['img'].name} row {image_row} {key[:40]!r}",
            )
            return
        image = f"{self.files['img'].relative_to(self.path.parent)}#{begin}+{length};base64"
        size = (
            (None, None) if self.sizes is None else _size(self.sizes.cells(image_row), f"row {image_row}", self.report)
        )
        make = self._detection if self.kind == "detection" else self._pseudo
        entry = make(label, name, image, size, where)
        if entry is not None:
            yield entry

    def _row_of(self, label: Any, where: str) -> int | None:
        """The row of the image that a label refers to by `img_id`."""
        identity = label.get("img_id") if isinstance(label, dict) else None
        row = None if self.row_of is None or not isinstance(identity, str | int) else self.row_of.get(str(identity))
        if row is None or not 0 <= row < len(self.images):
            name = self.files["imageid2idx"].name
            self.report.drop("image: id not listed", f"{where}, img_id {identity!r:.60}, {name} says row {row}")
            return None
        return row

    def _detection(
        self, label: Any, name: str, image: str, size: tuple[int | None, int | None], where: str
    ) -> Entry | None:
        objects = label.get("objects") if isinstance(label, dict) else label
        if not isinstance(objects, list):
            self.report.drop(
                "image: label without objects", f"{where}, found {type(objects).__name__}, expected a list of objects"
            )
            return None
        boxes, labels, ids = [], [], []
        for number, item in enumerate(objects):
            description = f"{where}, object {number}"
            if not isinstance(item, dict) or "class" not in item or "rect" not in item:
                self.report.drop("box: class or rect missing", f"{description}, found {item!r:.60}")
            elif not isinstance(item["class"], str) or item["class"] not in self.index:
                self.report.drop("box: category not listed", f"{description}, class {item['class']!r:.60}")
            elif (box := _four(item["rect"], self.report, description)) is not None:
                boxes.append(box)
                labels.append(self.index[item["class"]])
                ids.append(f"object {number}")
        return Entry(
            id=name, image=image, kind="detection", height=size[0], width=size[1], boxes=tuple(boxes),
            labels=tuple(labels), ids=tuple(ids), provenance=self.files["label"].name,
        )  # fmt: skip

    def _pseudo(
        self, label: Any, name: str, image: str, size: tuple[int | None, int | None], where: str
    ) -> Entry | None:
        lists = ("bboxes", "scores", "tokens_positive")
        if not isinstance(label, dict) or not isinstance(label.get("caption"), str):
            self.report.drop("image: label without caption", f"{where}, found {label!r:.60}, expected a caption")
            return None
        missing = [key for key in lists if not isinstance(label.get(key), list)]
        counts = {len(label[key]) for key in lists if key not in missing}
        if missing or len(counts) != 1:
            found = f"no list under {missing[0]}" if missing else f"{', '.join(str(len(label[key])) for key in lists)}"
            self.report.drop("image: label lists differ", f"{where}, found {found}, expected as many of {lists}")
            return None
        caption, boxes, scores, spans, ids = label["caption"], [], [], [], []
        for number, parts in enumerate(zip(*(label[key] for key in lists))):
            description = f"{where}, box {number}"
            for box, score in _flat(parts[0], parts[1], self.report, description):
                four, one = _four(box, self.report, description), as_numbers([score], 1)
                if one is None:
                    self.report.drop("box: score is no number", f"{description}, found {score!r:.40}")
                elif four is not None and (box_spans := checked_spans(parts[2], caption, self.report, description)):
                    boxes.append(four)
                    scores.append(one[0])
                    spans.append(box_spans)
                    ids.append(str(number))
        listed = (label.get("img_h"), label.get("img_w"))
        if self.sizes is None and type(listed[0]) is int and type(listed[1]) is int:
            size = listed
        return Entry(
            id=name, image=image, kind="pseudo", height=size[0], width=size[1], boxes=tuple(boxes), caption=caption,
            spans=tuple(spans), scores=tuple(scores), ids=tuple(ids), provenance=self.files["label"].name, image_id=name,
        )  # fmt: skip


def _yaml(path: epath.Path) -> dict[str, str]:
    """The texts of the yaml object, which must have `img` and `label`."""
    try:
        fields = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): expected the container's yaml") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{path} is not valid yaml ({reason:.80})") from None
    if not isinstance(fields, dict) or not all(isinstance(fields.get(key), str) for key in ("img", "label")):
        raise SourceError(f"{path}: expected `img: FILE.tsv` and `label: FILE.tsv`, found {fields!r:.60}")
    wrong = [key for key in ("hw", "linelist", "imageid2idx", "labelmap", "jsondict") if key in fields]
    wrong = [key for key in wrong if fields[key] is not None and not isinstance(fields[key], str)]
    if wrong:
        raise SourceError(f"{path}: {wrong[0]} is {fields[wrong[0]]!r:.40}, expected the name of a file")
    fields = {key: value for key, value in fields.items() if isinstance(value, str)}
    escaped = [key for key, value in fields.items() if "\0" in value]
    if escaped:
        raise SourceError(f"{path}: {escaped[0]} has a null character, expected the name of a file")
    return fields


def _names(path: epath.Path) -> tuple[str, ...]:
    """Class names in the order of their numbers, from a JSON {"label_to_idx": {...}} or {...}, or a .tsv numbered from 1.

    Number 0 is the background, and is omitted.
    """
    if path.suffix == ".tsv":
        listed = [line.partition(b"\t")[0] for _, line in numbered_lines(path) if line.strip()]
        try:
            names = {name.decode(): index for index, name in enumerate(listed, 1)}
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not UTF-8 ({error})") from None
        if len(names) != len(listed):
            twice = next(name.decode() for name, times in Counter(listed).items() if times > 1)
            raise SourceError(f"{path} has the name {twice!r} twice: names must be unique")
    else:
        try:
            names = json.loads(text_files.decoded(path.read_bytes()))
        except (OSError, ValueError, RecursionError) as error:
            raise SourceError(f"the label map {path} cannot be read as JSON ({error!s:.80})") from None
        names = names.get("label_to_idx", names) if isinstance(names, dict) else names
        if not isinstance(names, dict) or not all(type(index) is int for index in names.values()):
            raise SourceError(f"{path}: expected an object from name to number, found {names!r:.60}")
        if len(set(names.values())) != len(names):
            raise SourceError(f"{path} gives two names the same number: numbers must be unique")
    kept = tuple(name for name, index in sorted(names.items(), key=lambda item: item[1]) if index != 0)
    if not kept:
        raise SourceError(f"{path} has no name besides the background")
    return kept


def _line_list(path: epath.Path, rows: int, report: Report) -> np.ndarray:
    """How often the list names each row."""
    times = np.zeros(rows, np.uint32)
    for number, raw in numbered_lines(path):
        text = raw.strip()
        if not text:
            continue
        if not (text.isdigit() and len(text) < 19 and int(text) < rows):
            report.drop("row: not there", f"{path.name} line {number}, found {text[:30]!r}, there are {rows} rows")
        else:
            times[int(text)] += 1
    return times


class _RowOfId:
    """Row of each img_id, from a JSON object of rows by id; kept in a temporary file."""

    def __init__(self, path: epath.Path) -> None:
        self._rows = sqlite3.connect("")
        self._rows.execute("create table rows (id text primary key, row integer) without rowid")
        try:
            with gcs.open_file(path) as file:
                file.seek(len(begin := file.read(4)) - len(text_files.without_mark(begin)))
                for identity, row in ijson.kvitems(file, "", use_float=True):
                    if type(row) is not int or not 0 <= row < 2**60:
                        raise SourceError(f"{path}: {identity!r:.60} is {row!r:.40}, expected the number of a row")
                    name = identity.encode(errors="surrogatepass")
                    self._rows.execute("insert or replace into rows values (?, ?)", (name, row))
        except (ijson.JSONError, ValueError, RecursionError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{path} cannot be read as JSON ({error!s:.80})") from None

    def get(self, identity: str) -> int | None:
        name = identity.encode(errors="surrogatepass")
        found = self._rows.execute("select row from rows where id = ?", (name,)).fetchone()
        return None if found is None else found[0]


def _size(cells: list[bytes], where: str, report: Report) -> tuple[int | None, int | None]:
    """Height and width of a row of hw.tsv: JSON ({"height", "width"}, or a list with such an object) or "h w"."""
    raw = cells[-1].strip()
    parts = raw.split()
    if len(parts) == 2 and all(part.isdigit() and len(part) < 10 for part in parts):
        return int(parts[0]), int(parts[1])
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    value = value[0] if isinstance(value, list) and value else value
    sides = [value.get(side) for side in ("height", "width")] if isinstance(value, dict) else [None]
    if not all(type(side) is int for side in sides):
        report.note("image: size unreadable, taken from the picture", f"hw {where}, found {raw[:40]!r}")
        return None, None
    return sides[0], sides[1]


def _four(raw: Any, report: Report, where: str) -> Box | None:
    """Four numbers, unchanged; None, counted, for other values."""
    values = as_numbers(raw, 4)
    if values is None:
        report.drop("box: not four numbers", f"{where}, found {raw!r:.60}, expected [x1, y1, x2, y2]")
        return None
    return values[0], values[1], values[2], values[3]


def _flat(boxes: Any, scores: Any, report: Report, where: str) -> Iterator[tuple[Any, Any]]:
    """Yields (box, score): one of each in v1, from lists of both for an entity in v2."""
    nested = isinstance(boxes, list) and all(isinstance(box, list) for box in boxes) and isinstance(scores, list)
    if not nested:
        yield boxes, scores
    elif len(boxes) != len(scores):
        report.drop(
            "box: boxes and scores of an entity differ", f"{where}, {len(boxes)} and {len(scores)}",
            max(len(boxes), len(scores)),
        )  # fmt: skip
    else:
        yield from zip(boxes, scores)


@dataclass(frozen=True, kw_only=True)
class Tsv(BuildOptions):
    """Import a TSV container of the original GLIP: X.yaml, which names .tsv files beside it, images included.

    example: python -m glip_jax data tsv train.yaml --kind=detection --out=shards/objects365
    """

    container: tyro.conf.Positional[PathArgument]
    """The yaml file."""
    kind: Literal["detection", "pseudo"]
    """Kind of labels: boxes with classes, or captions with a teacher's boxes and scores."""
    oversample: bool = False
    """Repeat images as the linelist does (class-balanced), instead of importing each once."""

    @property
    def source(self) -> epath.Path:
        """The yaml file."""
        return self.container

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The yaml file and what it names, but not the images."""
        files = _files(self.container, _yaml(self.container), self.kind)
        return (self.container, *(file for key, file in files.items() if key != "img"))

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_tsv(self.container, kind=self.kind, oversample=self.oversample, strict=self.strict)
