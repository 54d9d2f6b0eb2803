"""JSON files of any size: the objects of a list are read one after the other, so memory does not grow with the file."""

import contextlib
import gzip
import io
import json
import re
import sqlite3
import uuid
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import ijson
from etils import epath
from tqdm import tqdm

from glip_jax.data.importers.entry import Report, SourceError
from glip_jax.io import gcs

__all__ = ["Join", "JsonFile", "integer", "json_of", "need", "numbered", "text", "text_of"]

_BLOCK = 1 << 20

_DEEPEST = 64
"""Brackets that may open one right after the other; the reader's memory grows with the square of the depth."""

_STRING_OR_NUMBER = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?P<closed>"|\\?\Z)|-?(?:NaN|Infinity)', re.DOTALL)
"""A string, of which the end may be missing, or one of Python's numbers."""


class JsonFile:
    """A JSON file that holds lists of objects.

    Python writes NaN and Infinity, which are no JSON: they are read as the texts "NaN", "Infinity" and "-Infinity".
    """

    def __init__(self, path: epath.PathLike) -> None:
        """Looks through the bytes; SourceError if there is no file or it cannot be read."""
        self.path = epath.Path(path)
        if gcs.kind(self.path) != "file":
            raise SourceError(f"the annotation file {self.path} does not exist")
        self._python_numbers = False
        tail = b""
        try:
            with gcs.open_file(self.path) as file:
                while block := file.read(_BLOCK):
                    seen = tail + block
                    self._python_numbers |= b"NaN" in seen or b"Infinity" in seen
                    if b"[" * _DEEPEST in seen or b'{"":' * _DEEPEST in seen:
                        raise SourceError(f"{self.path} is not JSON of a data set (it nests {_DEEPEST} deep and more)")
                    tail = block[-256:]
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read ({error.strerror or error})") from None

    def objects(self, key: str = "", required: bool = True) -> Iterator[dict[str, Any]]:
        """The objects of the list under `key`, or, for "", of the file's own list.

        SourceError if the file is not JSON, there is no such list (only if `required`), or something else is in it.
        """
        count, start = 0, f"{key}.item" if key else "item"
        for count, item in enumerate(self.values(start), 1):
            if not isinstance(item, dict):
                raise SourceError(f"{self.path}: {key or 'item '}[{count - 1}] is {item!r:.40}, expected an object")
            yield item
        if not count:
            self._check_list(key, required)

    def values(self, start: str) -> Iterator[Any]:
        """Values at a place, as ijson names it, whatever they are; SourceError if the file is not JSON."""
        try:
            with gcs.open_file(self.path) as raw:
                size = raw.seek(0, io.SEEK_END)
                raw.seek(0)
                title = f"{self.path.name}: {start.removesuffix('.item')}"
                with tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                    file = _Told(raw, bar)
                    plain = _WithoutPythonNumbers(file) if self._python_numbers else file
                    yield from ijson.items(plain, start, use_float=True, buf_size=_BLOCK)
        except (ijson.JSONError, ValueError, RecursionError, OverflowError) as error:
            if isinstance(error, SourceError):
                raise
            words = error.args[0] if error.args else error
            lines = (words.decode(errors="replace") if isinstance(words, bytes) else str(words)).split("\n")
            reason, near = lines[0].strip(" ."), " ".join(lines[1].split()) if len(lines) > 1 else ""
            found = f", near {near!r:.80}" if near else ""
            raise SourceError(f"{self.path} is not JSON that can be used ({reason}{found}): mend or copy it") from None

    def _check_list(self, key: str, required: bool) -> None:
        """SourceError unless there is a list, empty, where objects were looked for."""
        found = "nothing"
        with gcs.open_file(self.path) as file:
            plain = _WithoutPythonNumbers(file) if self._python_numbers else file
            for place, event, _ in ijson.parse(plain, use_float=True):
                kind = {"start_map": "dict", "start_array": "list"}.get(event, event)
                if not place and event.startswith("start_") and (kind == "dict") != bool(key):
                    wanted = f"an object with {key}" if key else "a list"
                    raise SourceError(f"{self.path} holds a {kind}, expected {wanted}")
                if not place and event in ("string", "number", "null", "boolean"):
                    raise SourceError(f"{self.path} holds a {kind}, expected a data set")
                if place == key and event != "map_key":
                    found = kind
                    break
        if found != "list" and (required or found != "nothing"):
            raise SourceError(f"{self.path}: expected a list under {key!r}, found {found}")


class _Told:
    """A file whose reading a progress bar is told of."""

    def __init__(self, file: IO[bytes], bar: tqdm) -> None:
        self._file, self._bar = file, bar

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._bar.update(len(data))
        return data


class _WithoutPythonNumbers:
    """A file in which NaN and Infinity outside of strings are strings."""

    def __init__(self, file: Any) -> None:
        self._file, self._rest = file, b""

    def read(self, size: int = -1) -> bytes:
        if size == 0:
            return b""
        while True:
            block = self._file.read(max(size, _BLOCK) if size > 0 else -1)
            text = self._rest + block
            if not block:
                self._rest = b""
                return _STRING_OR_NUMBER.sub(_quoted, text)
            # The next block may end the string or the number that the last bytes begin.
            result, done, until = io.BytesIO(), 0, None
            for match in _STRING_OR_NUMBER.finditer(text):
                result.write(text[done : match.start()])
                done = match.start()
                if match["closed"] not in (None, b'"'):
                    until = done
                    break
                result.write(_quoted(match))
                done = match.end()
            until = max(done, len(text) - 16) if until is None else until
            result.write(text[done:until])
            self._rest = text[until:]
            if result.tell():
                return result.getvalue()


def _quoted(match: re.Match[bytes]) -> bytes:
    return match[0] if match[0].startswith(b'"') else b'"' + match[0] + b'"'


def need(item: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """SourceError if the object lacks one of the keys."""
    missing = [key for key in keys if key not in item]
    if missing:
        raise SourceError(f"{where} lacks {', '.join(missing)}")


def integer(item: dict[str, Any], key: str, where: str, wanted: str = "pixels as an integer") -> int:
    """The integer under the key; 640.0 is one. SourceError for other things."""
    value = item[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SourceError(f"{where} has {key} {value!r:.40}, expected {wanted}")
    return value


def text(item: dict[str, Any], key: str, where: str, what: str) -> str:
    """The text under the key; SourceError if it is none or empty."""
    value = item[key]
    if not isinstance(value, str) or not value:
        raise SourceError(f"{where} has the {what} {value!r:.40}, expected text")
    return value


# Joins what annotation files keep apart: images here, their annotations there, in any order and of any number.
#
# Both go into a temporary SQLite file, and come out image by image, in the order of the file. Memory does not grow.


Key = int | str


class Join:
    """Images by key and notes that name one. Values are whatever JSON can say, kept as short lists."""

    def __init__(self, scratch: Path | None = None) -> None:
        """`scratch`: folder for the file; None: where the system keeps temporary files."""
        self._base = sqlite3.connect(
            "" if scratch is None else scratch / f"join-{uuid.uuid4().hex}.sqlite", isolation_level=None
        )
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE images (place INTEGER PRIMARY KEY, key, value TEXT)",
            "CREATE TABLE notes (place INTEGER PRIMARY KEY, image, key, value TEXT)",
        ):
            self._base.execute(statement)

    def add_images(self, rows: Iterable[tuple[Key, list[Any]]]) -> None:
        """Adds (key, value) of each image."""
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT INTO images (key, value) VALUES (?, ?)", ((_key(key), json.dumps(value)) for key, value in rows)
        )
        self._base.execute("COMMIT")
        self._base.execute("CREATE INDEX IF NOT EXISTS by_key ON images (key)")

    def add_notes(self, rows: Iterable[tuple[Key, Key | None, list[Any]]]) -> None:
        """Adds (image's key, own key or None, value) of each note."""
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT INTO notes (image, key, value) VALUES (?, ?, ?)",
            ((_key(image), None if key is None else _key(key), json.dumps(value)) for image, key, value in rows),
        )
        self._base.execute("COMMIT")
        self._base.execute("CREATE INDEX IF NOT EXISTS by_image ON notes (image)")

    def images_of_notes(self) -> None:
        """Adds an image, without a value, for each key that notes name, in the order in which they first do."""
        self._base.execute(
            "INSERT INTO images (key, value) SELECT image, '[]' FROM notes GROUP BY image ORDER BY min(place)"
        )
        self._base.execute("CREATE INDEX IF NOT EXISTS by_key ON images (key)")

    @property
    def count(self) -> int:
        """Images."""
        return self._base.execute("SELECT count(*) FROM images").fetchone()[0]

    def twice(self, table: str) -> Any:
        """A key that stands twice in `images` or `notes`; None if there is none."""
        assert table in ("images", "notes")
        question = (
            f"SELECT key FROM {table} WHERE key IS NOT NULL GROUP BY key HAVING count(*) > 1 ORDER BY place LIMIT 1"
        )
        row = self._base.execute(question).fetchone()
        return None if row is None else row[0]

    def strays(self) -> Iterator[tuple[Any, Any]]:
        """(note's key, image's key) of notes whose image is not there."""
        yield from self._base.execute(
            "SELECT key, image FROM notes WHERE NOT EXISTS (SELECT 1 FROM images WHERE images.key = notes.image) "
            "ORDER BY place"
        )

    def __iter__(self) -> Iterator[tuple[Any, list[Any], list[tuple[Any, list[Any]]]]]:
        """Per image, in the order they were added: key, value, and (key, value) of its notes in theirs."""
        notes = self._base.cursor()
        for key, value in self._base.execute("SELECT key, value FROM images ORDER BY place"):
            found = notes.execute("SELECT key, value FROM notes WHERE image = ? ORDER BY place", (key,))
            yield key, json.loads(value), [(note, json.loads(line)) for note, line in found]


def _key(key: Key) -> Key:
    """As SQLite keeps it: integers beyond its 64 bits become texts, halves of surrogate pairs their escapes."""
    if isinstance(key, str):
        return key.encode(errors="backslashreplace").decode()
    return key if -(2**63) <= key < 2**63 else f"integer {key}"


# Lines of text files, one at a time, plain or gzip: what the formats without one big JSON share.


def numbered(path: epath.PathLike) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of the file; *.gz is unpacked. SourceError where it cannot be read."""
    file, number = epath.Path(path), 0
    try:
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(gcs.open_file(file))
            if file.suffix == ".gz":
                lines = stack.enter_context(gzip.open(lines))
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} cannot be unpacked after line {number} ({error}): copy it again") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(f"{path} cannot be read ({reason}): expected a file of text lines") from None


def text_of(raw: bytes, report: Report, thing: str, where: str) -> str | None:
    """The line as text, without a byte order mark; None, counted as a drop of `thing`, where it is no UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.drop(f"{thing}: not UTF-8", f"{where}, byte {error.start}")
        return None


def json_of(raw: bytes, report: Report, thing: str, where: str) -> Any:
    """The JSON value of a line or cell; ... (no value of JSON), counted as a drop of `thing`, where it is none."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # no UTF-8 is a ValueError too
        report.drop(f"{thing}: no JSON", f"{where}, {error!s:.60}, found {raw[:40]!r}")
        return ...
