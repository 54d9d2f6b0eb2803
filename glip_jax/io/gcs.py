"""Files in a bucket (gs://BUCKET/NAME): ranges, whole files, listings and uploads, with retries of transient errors.

In hours of work a storage answers with 503 and 429, resets connections, sends fewer bytes than announced, or none at all.
Each of these costs a pause and another attempt (`glip_jax.io.retry`); in the end StorageError names the file and the last
error. Paths of `etils.epath` come here too (`glip_jax.io.fsspec_gcs`).

`put` is atomic among processes: it creates a file only if none exists, or replaces only the version that was read. Of all
callers one succeeds, and learns so even if the first response of the storage was lost.

Requests go through google-cloud-storage, which finds Google's credentials and honours STORAGE_EMULATOR_HOST.
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

from glip_jax.io.paths import checked
from glip_jax.io.retry import StorageError, describe, environment_number, timeout, with_retries

__all__ = [
    "FileInfo",
    "FileStat",
    "StorageError",
    "address",
    "copy",
    "list_recursive",
    "is_remote",
    "kind",
    "list_folder",
    "list_files",
    "md5_of",
    "environment_number",
    "open_file",
    "read_chunks",
    "put",
    "read",
    "remove",
    "upload_file",
    "stat",
    "describe",
    "upload_files",
]

_CHUNK = 1 << 24
"""Bytes of one request for a part of a file, so that an error costs no more than that; a multiple of 256 KiB."""

_UPLOADS = 4
"""Files that are uploaded at the same time."""


class FileInfo(NamedTuple):
    """A file in a listing."""

    bytes: int
    md5: str
    """Hexadecimal; "" where the storage keeps none (composed objects)."""


class FileStat(NamedTuple):
    """One version of a file."""

    generation: int
    """The number that the storage gives to this version."""
    updated: float
    """Time of writing in seconds, by the clock of the storage."""
    bytes: int


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return address(path).startswith("gs://")


def address(path: epath.PathLike) -> str:
    """The path as text, with the second slash of gs:// that pathlib removes, and without a slash at the end.

    Raises PathError for paths of other kinds than local and gs://.
    """
    text = checked(path)
    remote = re.match(r"gs:/+(.*)", text, re.DOTALL)
    return f"gs://{remote[1].rstrip('/')}" if remote else text


def read(path: epath.PathLike, begin: int = 0, end: int | None = None) -> bytes:
    """The bytes [begin, end) of a file, None: to its end. Never fewer than asked for.

    Raises FileNotFoundError if it does not exist, StorageError if the storage refuses or retries did not help.
    """
    place, (bucket, name) = address(path), _parts(path)
    if end is not None and end <= begin:
        return b""

    def attempt() -> bytes:
        # The client compares the checksum of a whole file; a range has none (records have one inside).
        data = _client().bucket(bucket).blob(name).download_as_bytes(
            start=begin or None, end=None if end is None else end - 1, raw_download=True, retry=None,
            checksum="crc32c" if not begin and end is None else None, timeout=_timeout(),
        )  # fmt: skip
        if end is not None and len(data) != end - begin:
            raise ConnectionError(f"{len(data)} bytes arrived of [{begin}, {end})")
        return data

    return with_retries(place, attempt)


def kind(path: epath.PathLike) -> Literal["file", "folder", ""]:
    """What a path is, local or remote; "" if it does not exist. A folder in a bucket exists if a file is below it."""
    if not is_remote(path):
        return "folder" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    place, (bucket, name) = address(path), _parts(path, whole=True)

    def attempt() -> Literal["file", "folder", ""]:
        if not name:
            found = _client().list_blobs(bucket, max_results=1, retry=None, timeout=_timeout())
            return "folder" if any(True for _ in found) else ""
        # One request for both: of the names with this prefix, this one, or those below it.
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


def read_chunks(path: epath.PathLike, size: int) -> Iterator[bytes]:
    """Yields a file of `size` bytes in order, some megabytes at a time; raises as `read`."""
    for begin in range(0, size, _CHUNK):
        yield read(path, begin, min(begin + _CHUNK, size))


def list_files(folder: epath.PathLike) -> dict[str, FileInfo]:
    """The files in a folder, without those in folders below, by name; empty if there is no such folder.

    Raises StorageError as `read`, and for a bucket that does not exist.
    """
    return list_folder(folder)[0]


def list_folder(folder: epath.PathLike) -> tuple[dict[str, FileInfo], list[str]]:
    """`list_files`, and the names of the folders in this folder."""
    return _listed(folder, "/")


def list_recursive(folder: epath.PathLike) -> dict[str, FileInfo]:
    """All files below a folder by their relative path, `a/b.txt`. Raises as `list_files`."""
    return _listed(folder, None)[0]


def _listed(folder: epath.PathLike, delimiter: str | None) -> tuple[dict[str, FileInfo], list[str]]:
    place, (bucket, name) = address(folder), _parts(folder, whole=True)
    prefix = f"{name}/" if name else ""

    def attempt() -> tuple[dict[str, FileInfo], list[str]]:
        found = _client().list_blobs(
            bucket, prefix=prefix, delimiter=delimiter, fields="items(name,size,md5Hash),prefixes,nextPageToken", retry=None,
            timeout=_timeout(),
        )  # fmt: skip
        files = {
            blob.name.removeprefix(prefix): FileInfo(int(blob.size), base64.b64decode(blob.md5_hash or "").hex())
            for blob in found
            if blob.name != prefix
        }
        return files, sorted(below.removeprefix(prefix).rstrip("/") for below in found.prefixes)

    try:
        return with_retries(place, attempt)
    except FileNotFoundError:
        reason = f"there is no bucket {bucket} (or it may not be listed): create it, or correct the name"
        raise StorageError(errno.ENOENT, reason, place) from None


def upload_files(files: Mapping[str, Path], folder: epath.PathLike, last: str) -> list[str]:
    """Uploads local files to a folder under the given names; `last`, one of the names, after all others.

    A file that exists there with the same size and MD5 is not uploaded again, so the same call resumes after a kill. The
    MD5 that the storage reports is compared for each file. Returns the names of the uploaded files. Raises as `read`,
    OSError for local files that cannot be read.
    """
    remote = list_files(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    uploaded: list[str] = []

    def compared(name: str) -> int:
        md5 = md5_of(files[name])
        if remote.get(name) != FileInfo(sizes[name], md5):
            _upload(files[name], f"{address(folder)}/{name}", md5)
            uploaded.append(name)
        return sizes[name]

    with tqdm(desc="upload", total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar:
        with ThreadPoolExecutor(_UPLOADS) as pool:
            futures = [pool.submit(compared, name) for name in files if name != last]
            try:
                for future in futures:
                    bar.update(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        bar.update(compared(last))
    return uploaded


def upload_file(local: Path, path: epath.PathLike) -> None:
    """Uploads a local file, over an existing one too; compared by MD5. Raises as `upload_files`."""
    _upload(local, address(path), md5_of(local))


def md5_of(local: Path) -> str:
    """MD5 of a local file in hexadecimal, as `FileInfo` has it."""
    with local.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _upload(local: Path, place: str, md5: str) -> None:
    bucket, name = _parts(place)

    def attempt() -> None:
        blob = _client().bucket(bucket).blob(name, chunk_size=_CHUNK)
        blob.upload_from_filename(str(local), checksum="md5", retry=None, timeout=_timeout())
        found = base64.b64decode(blob.md5_hash or "").hex()
        if found != md5:
            raise ConnectionError(f"the storage has a file of MD5 {found or '(none)'}, {md5} was uploaded")

    with_retries(place, attempt)


def put(path: epath.PathLike, data: bytes, over: int | None = None) -> FileStat | None:
    """Writes a file atomically; returns None if the condition does not hold, and then nothing is written.

    `over`: 0: only if no file exists; the generation of a `FileStat`: only in place of that version; None: unconditionally.
    Raises StorageError as `read`, FileNotFoundError for a bucket that does not exist.
    """
    place, (bucket, name) = address(path), _parts(path)
    # A response may be lost after the file was written; the next attempt then meets the file of this one, and must not
    # take it for that of another process. Contents may be equal, so each call adds a token to the metadata.
    token = uuid.uuid4().hex

    def attempt() -> FileStat | None:
        blob = _client().bucket(bucket).blob(name)
        blob.metadata = {"put": token}
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
                if getattr(error, "code", None) == 404:  # so the bucket does not exist
                    raise
                raise ConnectionError("the file that stood in its place was removed") from None
            if (blob.metadata or {}).get("put") != token:
                return None
        return _stat_of(blob)

    return with_retries(place, attempt)


def stat(path: epath.PathLike) -> FileStat:
    """The current version of a file in a bucket. Raises as `read`."""
    place, (bucket, name) = address(path), _parts(path)

    def attempt() -> FileStat:
        blob = _client().bucket(bucket).blob(name)
        blob.reload(retry=None, timeout=_timeout())
        return _stat_of(blob)

    return with_retries(place, attempt)


def _stat_of(blob: Any) -> FileStat:
    return FileStat(int(blob.generation), blob.updated.timestamp(), int(blob.size))


def copy(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copies a file within buckets, inside the storage. Raises as `read`."""
    (bucket, name), (to, target_name) = _parts(source), _parts(target)

    def attempt() -> None:
        old = _client().bucket(bucket).blob(name)
        new, token = _client().bucket(to).blob(target_name), None
        while True:  # a large file may take the storage several requests
            token, _, _ = new.rewrite(old, token=token, retry=None, timeout=_timeout())
            if token is None:
                return

    with_retries(address(source), attempt)


def remove(path: epath.PathLike, generation: int | None = None) -> None:
    """Removes a file, or only this `generation` of it; a file that does not exist is no error. Raises StorageError as `read`."""
    place, (bucket, name) = address(path), _parts(path)

    def attempt() -> None:
        try:
            blob = _client().bucket(bucket).blob(name)
            blob.delete(if_generation_match=generation, retry=None, timeout=_timeout())
        except Exception as error:
            if getattr(error, "code", None) not in (404, 412):
                raise

    with_retries(place, attempt)


def open_file(path: epath.PathLike, buffer: int = _CHUNK // 4) -> IO[bytes]:
    """Opens a file for reading, local or remote; of a remote one at least `buffer` bytes are read at a time, as by `read`."""
    if not is_remote(path):
        return Path(path).open("rb")
    return io.BufferedReader(_Ranges(address(path), stat(path).bytes), buffer)


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
    """Bucket, and name in it; `whole`: the name may be empty."""
    place = address(path)
    bucket, _, name = place.removeprefix("gs://").partition("/")
    if not place.startswith("gs://") or not bucket or not (name or whole):
        raise StorageError(errno.EINVAL, "is no path in a bucket: expected gs://BUCKET/NAME", place)
    return bucket, name


def _timeout() -> tuple[float, float]:
    """Seconds to connect, and seconds between two bytes."""
    return timeout(), timeout()


_clients = threading.local()
"""One client per thread; a forked process must not use the connections of its parent."""


def _client() -> Any:
    key = (os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"))
    if getattr(_clients, "key", None) != key:
        try:
            module = importlib.import_module("google.cloud.storage")
        except ImportError as error:
            raise StorageError(
                errno.ENOPKG, f"gs:// needs google-cloud-storage ({error}): pip install -r requirements.txt"
            ) from None
        _clients.key, _clients.client = key, module.Client(project=None)  # a bucket is found by its name alone
    return _clients.client
