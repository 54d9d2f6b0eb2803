"""Readers that the formats share: streamed JSON files, joins of images and annotations, and lines of text files.

Memory does not grow with the size of a file. `JsonFile` yields the objects of a list one at a time. `Join` groups annotations
by image in a temporary SQLite file. `numbered_lines` iterates over the lines of a plain or gzip file.
"""

import contextlib
import gzip
import io
import json
import re
import sqlite3
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ijson
from etils import epath
from tqdm import tqdm

from glip_jax.data.importers.entry import Report, SourceError
from glip_jax.io import gcs, text_files
from glip_jax.io.formats import explain

__all__ = [
    "Join",
    "JsonFile",
    "JsonLists",
    "as_integer",
    "identity",
    "integer_field",
    "other_forms",
    "parse_json",
    "require_file",
    "require_keys",
    "numbered_lines",
    "text_field",
    "decode_text",
]

_BLOCK = 1 << 20

_MAX_DEPTH = 64
"""Maximum number of consecutive opening brackets; the memory of the parser grows with the square of the depth."""

_STRING_OR_NUMBER = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?P<closed>"|\\?\Z)|-?(?:NaN|Infinity)', re.DOTALL)
"""A string, possibly without its end, or NaN or Infinity as Python writes them."""


_INTEGER_TEXT = re.compile(r"\s*[-+]?[0-9]{1,18}(\.0*)?\s*")


def require_file(path: epath.Path, what: str = "annotation file") -> None:
    """Raises SourceError if the path does not exist, or is a folder, with what lies there."""
    kind = gcs.kind(path)
    if kind == "folder":
        found = explain(path)
        raise SourceError(f"the {what} {path} is a folder, expected a file{f'; it {found}' if found else ''}")
    if not kind:
        raise SourceError(f"the {what} {path} does not exist")


class JsonFile:
    """A JSON file with lists of objects, read as a stream.

    NaN and Infinity, which Python writes but JSON does not have, are read as the texts "NaN", "Infinity" and "-Infinity". A
    byte order mark is skipped.
    """

    def __init__(self, path: epath.PathLike) -> None:
        """Scans the file once; SourceError if it does not exist, cannot be read or is nested too deeply."""
        self.path = epath.Path(path)
        require_file(self.path)
        self._python_numbers, self._begin = False, 0
        tail = b""
        try:
            with gcs.open_file(self.path) as file:
                begin = file.read(4)
                if problem := text_files.encoding_problem(begin):
                    raise SourceError(f"{self.path} {problem}")
                self._begin = len(begin) - len(text_files.without_mark(begin))
                file.seek(self._begin)
                while block := file.read(_BLOCK):
                    seen = tail + block
                    self._python_numbers |= b"NaN" in seen or b"Infinity" in seen
                    if b"[" * _MAX_DEPTH in seen or b'{"":' * _MAX_DEPTH in seen:
                        raise SourceError(
                            f"{self.path} is not the JSON file of a data set (it nests {_MAX_DEPTH} deep or more)"
                        )
                    tail = block[-256:]
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read ({error.strerror or error})") from None

    def objects(self, key: str = "", required: bool = True) -> Iterator[dict[str, Any]]:
        """Yields the objects of the list under `key`; "": the file itself is the list.

        Raises SourceError if the file is not JSON, the list is missing (only if `required`), or an item is not an object.
        """
        count, start = 0, f"{key}.item" if key else "item"
        for count, item in enumerate(self.values(start), 1):
            if not isinstance(item, dict):
                raise SourceError(f"{self.path}: {key or 'item '}[{count - 1}] is {item!r:.40}, expected an object")
            yield item
        if not count:
            self._check_list(key, required)

    def values(self, start: str) -> Iterator[Any]:
        """Yields the values under an ijson prefix, of any type; SourceError if the file is not JSON."""
        try:
            with gcs.open_file(self.path) as raw:
                size = raw.seek(0, io.SEEK_END)
                raw.seek(self._begin)
                title = f"{self.path.name}: {start.removesuffix('.item')}"
                with tqdm(desc=title, total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                    file = _ProgressFile(raw, bar)
                    plain = _WithoutPythonNumbers(file) if self._python_numbers else file
                    yield from ijson.items(plain, start, use_float=True, buf_size=_BLOCK)
        except (ijson.JSONError, ValueError, RecursionError, OverflowError) as error:
            if isinstance(error, SourceError):
                raise
            message = error.args[0] if error.args else error
            lines = (message.decode(errors="replace") if isinstance(message, bytes) else str(message)).split("\n")
            # A file that ends too early is damaged, whatever its format.
            if "premature EOF" not in lines[0] and (found := explain(self.path)):
                raise SourceError(f"{self.path} {found}") from None
            reason, near = lines[0].strip(" ."), " ".join(lines[1].split()) if len(lines) > 1 else ""
            found = f", near {near!r:.80}" if near else ""
            raise SourceError(
                f"{self.path} is not JSON that can be used ({reason}{found}): repair it or copy it again"
            ) from None

    def _check_list(self, key: str, required: bool) -> None:
        """Raises SourceError unless the list under `key` exists (and is empty)."""
        found = "nothing"
        with gcs.open_file(self.path) as file:
            file.seek(self._begin)
            plain = _WithoutPythonNumbers(file) if self._python_numbers else file
            for prefix, event, _ in ijson.parse(plain, use_float=True):
                kind = {"start_map": "dict", "start_array": "list"}.get(event, event)
                if not prefix and event.startswith("start_") and (kind == "dict") != bool(key):
                    wanted = f"an object with {key}" if key else "a list"
                    raise SourceError(f"{self.path} holds a {kind}, expected {wanted}{self._explained()}")
                if not prefix and event in ("string", "number", "null", "boolean"):
                    raise SourceError(f"{self.path} holds a {kind}, expected a data set")
                if prefix == key and event != "map_key":
                    found = kind
                    break
        if found != "list" and (required or found != "nothing"):
            raise SourceError(f"{self.path}: expected a list under {key!r}, found {found}{self._explained()}")

    def _explained(self) -> str:
        """What the file is, where it is of a known format, as the end of a message."""
        found = explain(self.path)
        return f"; it {found}" if found else ""


class JsonLists(JsonFile):
    """Lists of objects that a reader of another format made in the form of a JSON file."""

    def __init__(self, path: epath.PathLike, lists: Mapping[str, Callable[[], Iterable[dict[str, Any]]]]) -> None:
        """`path`: what they were made of, for messages; `lists`: makes the objects of each list anew."""
        self.path, self._lists = epath.Path(path), lists

    def objects(self, key: str = "", required: bool = True) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        """Yields the objects of a list."""
        yield from self._lists[key]()


class _ProgressFile:
    """A file that updates a progress bar while it is read."""

    def __init__(self, file: IO[bytes], bar: tqdm) -> None:
        self._file, self._bar = file, bar

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._bar.update(len(data))
        return data


class _WithoutPythonNumbers:
    """A file in which NaN and Infinity outside of strings are replaced by strings."""

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
            # The last bytes may begin a string or number that continues in the next block.
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


def require_keys(item: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raises SourceError if the object lacks one of the keys."""
    missing = [key for key in keys if key not in item]
    if missing:
        raise SourceError(f"{where} lacks {', '.join(missing)}")


def integer_field(item: dict[str, Any], key: str, where: str, wanted: str = "pixels as an integer") -> int:
    """The integer under the key, 640.0 included; SourceError for other values. `wanted`: the expectation in the message."""
    value = item[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SourceError(f"{where} has {key} {value!r:.40}, expected {wanted}")
    return value


def as_integer(value: Any) -> int | None:
    """The integer that a value states: 640, 640.0, "640" or "640.0"; None for any other value."""
    if isinstance(value, str) and _INTEGER_TEXT.fullmatch(value):
        value = int(value.partition(".")[0])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if isinstance(value, bool) or not isinstance(value, int) else value


def identity(item: dict[str, Any], key: str, where: str) -> "Key":
    """The id under the key: an integer (1.0 included) or a text; SourceError for other values."""
    value = item[key]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SourceError(f"{where} has the {key} {value!r:.40}, expected a number or text")
    return value


def other_forms(key: Any) -> "list[Key]":
    """What an id may be written as elsewhere: 1 for "1", "1" for 1."""
    number = as_integer(key)
    if number is None:
        return []
    return [number] if isinstance(key, str) else [str(number)]


def text_field(item: dict[str, Any], key: str, where: str, what: str) -> str:
    """The text under the key; SourceError if it is not a text or empty. `what`: its name in the message."""
    value = item[key]
    if not isinstance(value, str) or not value:
        raise SourceError(f"{where} has the {what} {value!r:.40}, expected text")
    return value


Key = int | str
"""Id of an image or annotation."""


class Join:
    """Groups annotations by image, in a temporary SQLite file, for files that list both in any order.

    Values are short lists of JSON values.
    """

    def __init__(self, scratch: Path | None = None) -> None:
        """`scratch`: folder for the SQLite file; None: the temporary folder of the system."""
        self._base = sqlite3.connect(
            "" if scratch is None else scratch / f"join-{uuid.uuid4().hex}.sqlite", isolation_level=None
        )
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "CREATE TABLE images (position INTEGER PRIMARY KEY, key, value TEXT)",
            "CREATE TABLE annotations (position INTEGER PRIMARY KEY, image, key, value TEXT)",
        ):
            self._base.execute(statement)

    def add_images(self, rows: Iterable[tuple[Key, list[Any]]]) -> None:
        """Adds images as (key, value)."""
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT INTO images (key, value) VALUES (?, ?)", ((_key(key), json.dumps(value)) for key, value in rows)
        )
        self._base.execute("COMMIT")
        self._base.execute("CREATE INDEX IF NOT EXISTS by_key ON images (key)")

    def add_annotations(self, rows: Iterable[tuple[Key, Key | None, list[Any]]]) -> None:
        """Adds annotations as (key of the image, key or None, value)."""
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT INTO annotations (image, key, value) VALUES (?, ?, ?)",
            ((_key(image), None if key is None else _key(key), json.dumps(value)) for image, key, value in rows),
        )
        self._base.execute("COMMIT")
        self._base.execute("CREATE INDEX IF NOT EXISTS by_image ON annotations (image)")

    def add_images_of_annotations(self) -> None:
        """Adds an image with an empty value for each image key of the annotations, in order of first occurrence."""
        self._base.execute(
            "INSERT INTO images (key, value) SELECT image, '[]' FROM annotations GROUP BY image ORDER BY min(position)"
        )
        self._base.execute("CREATE INDEX IF NOT EXISTS by_key ON images (key)")

    @property
    def count(self) -> int:
        """Number of images."""
        return self._base.execute("SELECT count(*) FROM images").fetchone()[0]

    def duplicate_key(self, table: str) -> Any:
        """The first key that occurs twice in the table `images` or `annotations`; None if there is none."""
        assert table in ("images", "annotations")
        query = (
            f"SELECT key FROM {table} WHERE key IS NOT NULL GROUP BY key HAVING count(*) > 1 ORDER BY position LIMIT 1"
        )
        row = self._base.execute(query).fetchone()
        return None if row is None else row[0]

    def match_other_forms(self) -> list[tuple[Any, int]]:
        """Lets annotations of an image that is not listed refer to the listed one of the same number: "1" and 1.

        Returns (key, number of annotations) of each key that was replaced.
        """
        query = (
            "SELECT image, count(*) FROM annotations WHERE NOT EXISTS "
            "(SELECT 1 FROM images WHERE images.key = annotations.image) GROUP BY image ORDER BY min(position)"
        )
        replaced = []
        for image, count in self._base.execute(query).fetchall():
            for form in map(_key, other_forms(image)):
                if self._base.execute("SELECT 1 FROM images WHERE key = ?", (form,)).fetchone():
                    self._base.execute("UPDATE annotations SET image = ? WHERE image = ?", (form, image))
                    replaced.append((image, count))
        return replaced

    def without_image(self) -> Iterator[tuple[Any, Any]]:
        """Yields (key, key of the image) of annotations whose image does not exist."""
        yield from self._base.execute(
            "SELECT key, image FROM annotations WHERE NOT EXISTS (SELECT 1 FROM images WHERE images.key = annotations.image) "
            "ORDER BY position"
        )

    def __iter__(self) -> Iterator[tuple[Any, list[Any], list[tuple[Any, list[Any]]]]]:
        """Yields (key, value, [(key, value) of each annotation]) for each image; both in the order in which they were added."""
        annotations = self._base.cursor()
        for key, value in self._base.execute("SELECT key, value FROM images ORDER BY position"):
            rows = annotations.execute("SELECT key, value FROM annotations WHERE image = ? ORDER BY position", (key,))
            yield key, json.loads(value), [(annotation, json.loads(line)) for annotation, line in rows]


def _key(key: Key) -> Key:
    """The key as SQLite can store it: integers beyond 64 bits become texts, lone surrogates are escaped."""
    if isinstance(key, str):
        return key.encode(errors="backslashreplace").decode()
    return key if -(2**63) <= key < 2**63 else f"integer {key}"


def numbered_lines(path: epath.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line without line end) of a file; *.gz is decompressed. SourceError if it cannot be read."""
    file, number = epath.Path(path), 0
    try:
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(gcs.open_file(file))
            if file.suffix == ".gz":
                lines = stack.enter_context(gzip.open(lines))
            for number, line in enumerate(lines, 1):
                if number == 1:
                    if problem := text_files.encoding_problem(line[:4]):
                        raise SourceError(f"{path} {problem}")
                    line = text_files.without_mark(line)
                yield number, line.rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path} cannot be unpacked after line {number} ({error}): copy it again") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(f"{path} cannot be read ({reason}): expected a file of text lines") from None


def decode_text(raw: bytes, report: Report, thing: str, where: str) -> str | None:
    """The line as text, without a byte order mark; None, counted as a drop of `thing`, if it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.drop(f"{thing}: not UTF-8", f"{where}, byte {error.start}")
        return None


def parse_json(raw: bytes, report: Report, thing: str, where: str) -> Any:
    """The JSON value of a line or cell; Ellipsis, counted as a drop of `thing`, if it is not JSON."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        report.drop(f"{thing}: no JSON", f"{where}, {error!s:.60}, found {raw[:40]!r}")
        return ...
