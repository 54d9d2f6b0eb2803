"""Files in a bucket (gs://BUCKET/NAME): ranges, whole files, listings and uploads, patient with faults that pass.

`etils.epath` serves where a fault may end the job. What is here serves where it may not: in hours of reading, a storage
answers with 503 and 429, resets connections, sends less than it said, or nothing at all. Each of these costs a pause and
another attempt, for as long as GLIP_JAX_STORAGE_PATIENCE says; then StorageError names the file and the last fault.

    GLIP_JAX_STORAGE_PATIENCE  seconds from the first fault of a request until it is given up; 600
    GLIP_JAX_STORAGE_SILENCE   seconds without a byte after which a connection is taken for dead; 30

What several processes write at once is kept apart by `put`, which makes a file only where there is none, or only in place
of the one that was seen; of all that try, one succeeds, and is told so even if the storage's first answer was lost.

Requests go through google-cloud-storage: it finds Google's credentials, and honours STORAGE_EMULATOR_HOST.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import importlib
import io
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TypeVar

from etils import epath
from tqdm import tqdm

__all__ = [
    "Listed",
    "Stamp",
    "StorageError",
    "address",
    "copy",
    "is_remote",
    "kind",
    "listing",
    "number",
    "opened",
    "pieces",
    "put",
    "read",
    "remove",
    "send",
    "stamp",
    "told",
    "upload",
]

_T = TypeVar("_T")

_PIECE = 1 << 24
"""Bytes of a request for a part of a whole file, so that a fault costs no more than that; a multiple of 256 KiB."""

_PASSES = (408, 425, 429, 500, 502, 503, 504)
"""Codes that Google asks to try again after (cloud.google.com/storage/docs/retry-strategy); 425 is RFC 8470's."""

_UPLOADS = 4
"""Files that are sent at a time."""


class StorageError(OSError):
    """The storage did not answer in time, or refuses; `strerror` says what it said last, `filename` which file."""


def told(error: StorageError) -> str:
    """The error in a line: which file, what happened."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


class Listed(NamedTuple):
    """A file of a listing."""

    bytes: int
    md5: str
    """Hexadecimal; "" where the storage keeps none (composed objects)."""


class Stamp(NamedTuple):
    """A file as it is at one moment."""

    generation: int
    """The storage's number for this very content."""
    updated: float
    """When it was written, in seconds, by the storage's clock."""
    bytes: int


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return address(path).startswith("gs://")


def address(path: epath.PathLike) -> str:
    """The path as text; the slash of gs:// that pathlib takes away is there again, one at the end is not."""
    text = os.fspath(path)
    remote = re.match(r"gs:/+(.*)", text, re.DOTALL)
    return f"gs://{remote[1].rstrip('/')}" if remote else text


def number(name: str, default: float) -> float:
    """The positive number in the environment variable `name`; StorageError for anything else."""
    text = os.environ.get(name, "")
    with contextlib.suppress(ValueError):
        value = float(text) if text else default
        if 0 < value < float("inf"):
            return value
    raise StorageError(errno.EINVAL, f"the environment variable {name} is {text!r}: expected a positive number")


def read(path: epath.PathLike, begin: int = 0, end: int | None = None) -> bytes:
    """The bytes [begin, end) of a file, None: to its end; just as many as asked for.

    Raises FileNotFoundError if it is not there, StorageError if the storage refuses or outlasts the patience.
    """
    place, (bucket, name) = address(path), _parts(path)
    if end is not None and end <= begin:
        return b""

    def attempt() -> bytes:
        # A range has no checksum of its own (records have one inside); of a whole file the client compares the storage's.
        data = _client().bucket(bucket).blob(name).download_as_bytes(
            start=begin or None, end=None if end is None else end - 1, raw_download=True, retry=None,
            checksum="crc32c" if not begin and end is None else None, timeout=_timeout(),
        )  # fmt: skip
        if end is not None and len(data) != end - begin:
            raise ConnectionError(f"{len(data)} bytes came of [{begin}, {end})")
        return data

    return _patiently(place, attempt)


def kind(path: epath.PathLike) -> Literal["file", "folder", ""]:
    """What is there, local or remote; "" if nothing is. A folder in a bucket is there if something is in it."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    place, (bucket, name) = address(path), _parts(path, whole=True)
    if name:
        with contextlib.suppress(FileNotFoundError):
            stamp(place)
            return "file"
    prefix = f"{name}/" if name else ""

    def attempt() -> bool:
        return any(
            True for _ in _client().list_blobs(bucket, prefix=prefix, max_results=1, retry=None, timeout=_timeout())
        )

    with contextlib.suppress(FileNotFoundError):
        return "folder" if _patiently(place, attempt) else ""
    return ""


def pieces(path: epath.PathLike, size: int) -> Iterator[bytes]:
    """A file of `size` bytes in order, some megabytes at a time; raises as `read`."""
    for begin in range(0, size, _PIECE):
        yield read(path, begin, min(begin + _PIECE, size))


def listing(folder: epath.PathLike) -> dict[str, Listed]:
    """The files that lie in a folder, not those in folders below, by name; empty where there is no such folder.

    Raises StorageError as `read`, and for a bucket that is not there.
    """
    place, (bucket, name) = address(folder), _parts(folder, whole=True)
    prefix = f"{name}/" if name else ""

    def attempt() -> dict[str, Listed]:
        found = _client().list_blobs(
            bucket, prefix=prefix, delimiter="/", fields="items(name,size,md5Hash),nextPageToken", retry=None,
            timeout=_timeout(),
        )  # fmt: skip
        return {
            blob.name.removeprefix(prefix): Listed(int(blob.size), base64.b64decode(blob.md5_hash or "").hex())
            for blob in found
            if blob.name != prefix
        }

    try:
        return _patiently(place, attempt)
    except FileNotFoundError:
        why = f"there is no bucket {bucket} (or it may not be listed): make it, or mend the name"
        raise StorageError(errno.ENOENT, why, place) from None


def upload(files: Mapping[str, Path], folder: epath.PathLike, last: str) -> None:
    """Sends local files to a folder, under their names there; `last`, one of the names, after all others.

    A file that is there with the same bytes (size and MD5) is not sent again, so the same call goes on after a kill.
    Each is compared by MD5 as the storage has it. Raises as `read`, OSError for what cannot be read here.
    """
    there = listing(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}

    def compared(name: str) -> int:
        md5 = _md5(files[name])
        if there.get(name) != Listed(sizes[name], md5):
            _send(files[name], f"{address(folder)}/{name}", md5)
        return sizes[name]

    with tqdm(desc="upload", total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar:
        with ThreadPoolExecutor(_UPLOADS) as pool:
            sent = [pool.submit(compared, name) for name in files if name != last]
            try:
                for one in sent:
                    bar.update(one.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        bar.update(compared(last))


def send(local: Path, path: epath.PathLike) -> None:
    """Sends a local file, whatever is there; compared by MD5. Raises as `upload`."""
    _send(local, address(path), _md5(local))


def _md5(local: Path) -> str:
    with local.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _send(local: Path, place: str, md5: str) -> None:
    bucket, name = _parts(place)

    def attempt() -> None:
        blob = _client().bucket(bucket).blob(name, chunk_size=_PIECE)
        blob.upload_from_filename(str(local), checksum="md5", retry=None, timeout=_timeout())
        found = base64.b64decode(blob.md5_hash or "").hex()
        if found != md5:
            raise ConnectionError(f"the storage has a file of MD5 {found or '(none)'}, {md5} was sent")

    _patiently(place, attempt)


def put(path: epath.PathLike, data: bytes, over: int | None = None) -> Stamp | None:
    """Writes a file in one step; None where the condition fails, and then nothing is written.

    `over`: 0: only where there is no file; the generation of a `Stamp`: only in place of that; None: whatever is there.
    Raises StorageError as `read`, FileNotFoundError for a bucket that is not there.
    """
    place, (bucket, name) = address(path), _parts(path)
    # An answer may be lost after the file was made; the next attempt then meets the file of the one before, and must
    # not take it for another process's. Contents may be equal, so each call leaves a word of its own beside them.
    word = uuid.uuid4().hex

    def attempt() -> Stamp | None:
        blob = _client().bucket(bucket).blob(name)
        blob.metadata = {"put": word}
        try:
            blob.upload_from_string(data, checksum="md5", if_generation_match=over, retry=None, timeout=_timeout())
        except Exception as error:
            if over is None or getattr(error, "code", None) not in (404, 412):
                raise
            try:
                blob.reload(retry=None, timeout=_timeout())
            except Exception as missing:
                if getattr(missing, "code", None) != 404:
                    raise
                if over:
                    return None
                if getattr(error, "code", None) == 404:  # so it is the bucket that is not there
                    raise
                raise ConnectionError("the file that was in the way is gone") from None
            if (blob.metadata or {}).get("put") != word:
                return None
        return _stamped(blob)

    return _patiently(place, attempt)


def stamp(path: epath.PathLike) -> Stamp:
    """What a file in a bucket is now. Raises as `read`."""
    place, (bucket, name) = address(path), _parts(path)

    def attempt() -> Stamp:
        blob = _client().bucket(bucket).blob(name)
        blob.reload(retry=None, timeout=_timeout())
        return _stamped(blob)

    return _patiently(place, attempt)


def _stamped(blob: Any) -> Stamp:
    return Stamp(int(blob.generation), blob.updated.timestamp(), int(blob.size))


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a file within buckets, inside the storage. Raises as `read`."""
    (bucket, name), (to, target_name) = _parts(source), _parts(target)

    def attempt() -> None:
        here = _client().bucket(bucket).blob(name)
        there, token = _client().bucket(to).blob(target_name), None
        while True:  # a large file may take the storage several steps
            token, _, _ = there.rewrite(here, token=token, retry=None, timeout=_timeout())
            if token is None:
                return

    _patiently(address(source), attempt)


def remove(path: epath.PathLike, generation: int | None = None) -> None:
    """Removes a file, or only that `generation` of it; none there is no fault. Raises StorageError as `read`."""
    place, (bucket, name) = address(path), _parts(path)

    def attempt() -> None:
        try:
            blob = _client().bucket(bucket).blob(name)
            blob.delete(if_generation_match=generation, retry=None, timeout=_timeout())
        except Exception as error:
            if getattr(error, "code", None) not in (404, 412):
                raise

    _patiently(place, attempt)


def opened(path: epath.PathLike, buffer: int = _PIECE // 4) -> IO[bytes]:
    """A file opened for reading, local or remote; of a remote one `buffer` bytes at least are read at a time, as by `read`."""
    if not is_remote(path):
        return Path(path).open("rb")
    return io.BufferedReader(_Ranges(address(path), stamp(path).bytes), buffer)


class _Ranges(io.RawIOBase):
    """A remote file as a stream of ranges."""

    mode = "rb"

    def __init__(self, place: str, size: int) -> None:
        self._place, self._size, self._at = place, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = read(self._place, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _parts(path: epath.PathLike, whole: bool = False) -> tuple[str, str]:
    """Bucket, and name in it; `whole`: it may be empty."""
    place = address(path)
    bucket, _, name = place.removeprefix("gs://").partition("/")
    if not place.startswith("gs://") or not bucket or not (name or whole):
        raise StorageError(errno.EINVAL, "is no place in a bucket: expected gs://BUCKET/NAME", place)
    return bucket, name


def _timeout() -> tuple[float, float]:
    """Seconds to connect in and seconds between two bytes."""
    silence = number("GLIP_JAX_STORAGE_SILENCE", 30.0)
    return silence, silence


_clients = threading.local()
"""A session of requests is one thread's; a process that was forked must not go on with its parent's connections."""


def _client() -> Any:
    key = (os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"))
    if getattr(_clients, "key", None) != key:
        try:
            module = importlib.import_module("google.cloud.storage")
        except ImportError as error:
            raise StorageError(
                errno.ENOPKG, f"gs:// needs google-cloud-storage ({error}): pip install -r requirements.txt"
            ) from None
        _clients.key, _clients.client = key, module.Client(project=None)  # of the bucket, whose name is enough
    return _clients.client


def _patiently(place: str, attempt: Callable[[], _T]) -> _T:
    """What an attempt returns, the first that succeeds."""
    pause, attempts, until = 0.1, 0, 0.0
    while True:
        attempts += 1
        try:
            return attempt()
        except StorageError:
            raise
        except Exception as error:
            _refused(error, place)
            now = time.monotonic()
            until = until or now + number("GLIP_JAX_STORAGE_PATIENCE", 600.0)
            if now + pause > until:
                raise StorageError(
                    errno.ETIMEDOUT,
                    f"the storage failed {attempts} times in a row, then patience ended (last: {_said(error)}); give the "
                    "same command again when it answers, or raise GLIP_JAX_STORAGE_PATIENCE (seconds)",
                    place,
                ) from error
        time.sleep(pause * random.uniform(0.5, 1))  # spreads hosts in time, decides nothing
        pause = min(pause * 2, 30.0)


def _refused(error: Exception, place: str) -> None:
    """Raises what another attempt would not mend."""
    code = getattr(error, "code", None)
    kinds = {kind.__module__.partition(".")[0] + "." + kind.__name__ for kind in type(error).__mro__}
    if code == 404:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None
    if code in (401, 403):
        raise StorageError(errno.EACCES, f"the storage refuses ({_said(error)}): check account and bucket", place)
    if "google.DefaultCredentialsError" in kinds:
        why = (
            "no credentials of Google were found: `gcloud auth application-default login`, or a machine with an account"
        )
        raise StorageError(errno.EACCES, why, place) from error
    passing = (ConnectionError, TimeoutError, http.client.HTTPException)
    if isinstance(error, passing) or code in _PASSES or kinds & _PASSING:
        return
    if isinstance(code, int) or isinstance(error, OSError) or "google.GoogleAPIError" in kinds:
        raise StorageError(getattr(error, "errno", None) or errno.EIO, _said(error), place) from error
    raise error


_PASSING = {
    "google.DataCorruption",  # the bytes are not those of the storage's checksum
    "google.RetryError",
    "google.TransportError",  # on the way to the server of tokens
    "google.RefreshError",
    "requests.RequestException",
    "urllib3.HTTPError",
}
"""Families of errors, by package and name, that say that something broke on the way."""


def _said(error: BaseException) -> str:
    """An error of a library in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
