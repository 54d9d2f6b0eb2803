"""Files in a bucket (gs://BUCKET/NAME): ranges, whole files, listings and uploads, patient with faults that pass.

In hours of work a storage answers with 503 and 429, resets connections, sends less than it said, or nothing at all. Each of
these costs a pause and another attempt (`glip_jax.io.retry`), at last StorageError names the file and the last fault. Paths
of `etils.epath` come here too (`glip_jax.io.fsspec_gcs`).

What several processes write at once is kept apart by `put`, which makes a file only where there is none, or only in place
of the one that was seen; of all that try, one succeeds, and is told so even if the storage's first answer was lost.

Requests go through google-cloud-storage: it finds Google's credentials, and honours STORAGE_EMULATOR_HOST.
"""

import base64
import contextlib
import errno
import hashlib
import importlib
import io
import os
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from etils import epath
from tqdm import tqdm

from glip_jax.io.retry import StorageError, number, told, with_retries

__all__ = [
    "Listed",
    "Stamp",
    "StorageError",
    "address",
    "copy",
    "everything",
    "is_remote",
    "kind",
    "level",
    "listing",
    "md5_of",
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

_PIECE = 1 << 24
"""Bytes of a request for a part of a whole file, so that a fault costs no more than that; a multiple of 256 KiB."""

_UPLOADS = 4
"""Files that are sent at a time."""


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

    return with_retries(place, attempt)


def kind(path: epath.PathLike) -> Literal["file", "folder", ""]:
    """What is there, local or remote; "" if nothing is. A folder in a bucket is there if something is in it."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    place, (bucket, name) = address(path), _parts(path, whole=True)

    def attempt() -> Literal["file", "folder", ""]:
        if not name:
            found = _client().list_blobs(bucket, max_results=1, retry=None, timeout=_timeout())
            return "folder" if any(True for _ in found) else ""
        # One request for both: of the names that begin so, this one, or those below it.
        found = _client().list_blobs(
            bucket, prefix=name, delimiter="/", fields="items(name),prefixes,nextPageToken", retry=None,
            timeout=_timeout(),
        )  # fmt: skip
        for page in found.pages:
            if any(blob.name == name for blob in page):
                return "file"
            if f"{name}/" in found.prefixes:
                return "folder"
        return ""

    with contextlib.suppress(FileNotFoundError):
        return with_retries(place, attempt)
    return ""


def pieces(path: epath.PathLike, size: int) -> Iterator[bytes]:
    """A file of `size` bytes in order, some megabytes at a time; raises as `read`."""
    for begin in range(0, size, _PIECE):
        yield read(path, begin, min(begin + _PIECE, size))


def listing(folder: epath.PathLike) -> dict[str, Listed]:
    """The files that lie in a folder, not those in folders below, by name; empty where there is no such folder.

    Raises StorageError as `read`, and for a bucket that is not there.
    """
    return level(folder)[0]


def level(folder: epath.PathLike) -> tuple[dict[str, Listed], list[str]]:
    """`listing`, and the names of the folders in the folder."""
    return _listed(folder, "/")


def everything(folder: epath.PathLike) -> dict[str, Listed]:
    """All files below a folder by their path in it, `a/b.txt`. Raises as `listing`."""
    return _listed(folder, None)[0]


def _listed(folder: epath.PathLike, delimiter: str | None) -> tuple[dict[str, Listed], list[str]]:
    place, (bucket, name) = address(folder), _parts(folder, whole=True)
    prefix = f"{name}/" if name else ""

    def attempt() -> tuple[dict[str, Listed], list[str]]:
        found = _client().list_blobs(
            bucket, prefix=prefix, delimiter=delimiter, fields="items(name,size,md5Hash),prefixes,nextPageToken", retry=None,
            timeout=_timeout(),
        )  # fmt: skip
        files = {
            blob.name.removeprefix(prefix): Listed(int(blob.size), base64.b64decode(blob.md5_hash or "").hex())
            for blob in found
            if blob.name != prefix
        }
        return files, sorted(below.removeprefix(prefix).rstrip("/") for below in found.prefixes)

    try:
        return with_retries(place, attempt)
    except FileNotFoundError:
        why = f"there is no bucket {bucket} (or it may not be listed): make it, or mend the name"
        raise StorageError(errno.ENOENT, why, place) from None


def upload(files: Mapping[str, Path], folder: epath.PathLike, last: str) -> list[str]:
    """Sends local files to a folder, under their names there; `last`, one of the names, after all others.

    A file that is there with the same bytes (size and MD5) is not sent again, so the same call goes on after a kill.
    Each is compared by MD5 as the storage has it. Returns the names of what was sent. Raises as `read`, OSError for what
    cannot be read here.
    """
    there = listing(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    new: list[str] = []

    def compared(name: str) -> int:
        md5 = md5_of(files[name])
        if there.get(name) != Listed(sizes[name], md5):
            _send(files[name], f"{address(folder)}/{name}", md5)
            new.append(name)
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
    return new


def send(local: Path, path: epath.PathLike) -> None:
    """Sends a local file, whatever is there; compared by MD5. Raises as `upload`."""
    _send(local, address(path), md5_of(local))


def md5_of(local: Path) -> str:
    """MD5 of a local file in hexadecimal, as `Listed` has it."""
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

    with_retries(place, attempt)


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

    return with_retries(place, attempt)


def stamp(path: epath.PathLike) -> Stamp:
    """What a file in a bucket is now. Raises as `read`."""
    place, (bucket, name) = address(path), _parts(path)

    def attempt() -> Stamp:
        blob = _client().bucket(bucket).blob(name)
        blob.reload(retry=None, timeout=_timeout())
        return _stamped(blob)

    return with_retries(place, attempt)


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

    with_retries(address(source), attempt)


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

    with_retries(place, attempt)


def opened(path: epath.PathLike, buffer: int = _PIECE // 4) -> IO[bytes]:
    """A file opened for reading, local or remote; of a remote one `buffer` bytes at least are read at a time, as by `read`."""
    if not is_remote(path):
        return Path(path).open("rb")
    return io.BufferedReader(_Ranges(address(path), stamp(path).bytes), buffer)


class _Ranges(io.RawIOBase):
    """A remote file as a stream of ranges."""

    mode = "rb"

    def __init__(self, place: str, size: int) -> None:
        self.name = self._place = place
        self._size, self._at = size, 0

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
