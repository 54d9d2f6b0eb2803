"""JSON files of any size: the objects of a list are read one after the other, so memory does not grow with the file."""

import io
import re
from collections.abc import Iterator
from typing import IO, Any

import ijson
from etils import epath
from tqdm import tqdm

from glip_jax import storage
from glip_jax.data.entries import SourceError

__all__ = ["JsonFile", "integer", "need", "text"]

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
        if storage.kind(self.path) != "file":
            raise SourceError(f"the annotation file {self.path} does not exist")
        self._python_numbers = False
        tail = b""
        try:
            with storage.opened(self.path) as file:
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
            with storage.opened(self.path) as raw:
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
        with storage.opened(self.path) as file:
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
