"""Lines of text files, one at a time, plain or gzip: what the formats without one big JSON share."""

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from glip_jax import storage
from glip_jax.data.entries import Report, SourceError

__all__ = ["json_of", "numbered", "text_of"]


def numbered(path: epath.PathLike) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of the file; *.gz is unpacked. SourceError where it cannot be read."""
    file, number = epath.Path(path), 0
    try:
        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(storage.opened(file))
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
