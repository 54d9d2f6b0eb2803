"""Records of shards in a bucket, read one range at a time through sparse files on the local disk.

The reader of array_record needs a local file. It gets a sparse file of the size of the shard that holds only the head, the end
(the index) and the requested records; holes take no disk space. Each record is a chunk with its own checksum, so the reader
detects a wrong range (a hole, a partial write, a damaged disk), and the range is fetched again. A record that fails after it was
fetched into a private file is corrupt in the bucket.

    GLIP_JAX_CACHE     folder of these files, and of folders that are being uploaded; default ~/.cache/glip_jax
    GLIP_JAX_CACHE_GB  maximum size of the files, GB (1e9 bytes); default 16

Files are named by the SHA-256 of their shard, so runs, worker processes and sources that read the same shard share one. Above the
maximum, the least recently used files are removed. The maximum may be exceeded temporarily: by some megabytes per process, and
by removed files that another process still has open. Each host of a pod has its own cache.
"""

import bisect
import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from jaxtyping import UInt64

from glip_jax.data.records import RecordError
from glip_jax.io import gcs
from glip_jax.io.errors import full_disk

__all__ = ["RemoteRecords", "cache_folder", "record_ends"]

HEAD = 64
"""Bytes before the first record: the block header and the signature of a Riegeli file."""

_BLOCK, _BLOCK_HEADER = 65536, 24

_OPEN_FILES = 200
"""Files that a process keeps open. Each takes two descriptors; the usual limit of a process is 1,024."""

_TOUCH_INTERVAL = 30.0
"""Interval at which the use of a file is recorded in its modification time, seconds."""

_ABANDONED = 3600.0
"""Age at which an unfinished file is considered abandoned by a killed process, seconds."""


def cache_folder() -> Path:
    """Folder of local copies of remote files: GLIP_JAX_CACHE, or glip_jax in the cache folder of the user."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GLIP_JAX_CACHE") or user / "glip_jax").absolute()


def record_ends(path: Path, records: int) -> list[int]:
    """Per record of a complete file with one record per chunk (group_size:1): offset of its end, bytes.

    Follows Riegeli's file format (github.com/google/riegeli, doc/riegeli_records_file_format.md): each 65,536 bytes begin with
    a block header of 24 bytes, also inside of a chunk. A chunk begins with a header of 40 bytes, which holds the size of its
    data, its type and its number of records. Raises OSError (EBADMSG) if the file does not begin with `records` chunks of one
    record.
    """
    ends: list[int] = []
    with path.open("rb", buffering=4096) as file:
        at = HEAD
        while len(ends) < records:
            header, position = b"", at
            while len(header) < 40 and position < at + 128:
                position += 0 if position % _BLOCK else _BLOCK_HEADER
                file.seek(position)
                header += file.read(min(40 - len(header), _BLOCK - position % _BLOCK))
                position = file.tell()
            if len(header) < 40 or header[24:25] != b"r" or int.from_bytes(header[25:32], "little") != 1:
                raise OSError(errno.EBADMSG, f"has no record {len(ends)} in a chunk of its own at byte {at}", str(path))
            (size,) = struct.unpack("<Q", header[8:16])
            at = _end_of(position, size)
            ends.append(at)
    return ends


def _end_of(position: int, size: int) -> int:
    """Offset of the end of `size` bytes of data that begin at `position`, block headers among them included."""
    while size:
        position += 0 if position % _BLOCK else _BLOCK_HEADER
        step = min(size, _BLOCK - position % _BLOCK)
        position, size = position + step, size - step
    return position


class RemoteRecords:
    """Random access to the records of a remote folder of shards. Thread-safe; pickles without open files.

    Without `ends` (folders of earlier versions lack this column), a shard is downloaded whole and its SHA-256 compared when one
    of its records is first used; the disk then must hold all shards used between two sweeps of the cache.
    """

    def __init__(
        self, folder: epath.PathLike, shards: Sequence[dict[str, Any]], ends: UInt64[np.ndarray, " records"] | None
    ) -> None:
        """`shards`: as in the manifest; `ends`: per record the offset of the end of its chunk in its file."""
        self._folder = gcs.address(folder)
        self._shards = [shard for shard in shards if shard["records"]]
        self._firsts = [0, *np.cumsum([shard["records"] for shard in self._shards]).tolist()]
        self._ends = ends
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._open: OrderedDict[int, _SparseFile] = OrderedDict()
        self._unswept = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_lock", "_open", "_unswept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def read(self, index: int) -> bytes:
        """The bytes of record `index`.

        Raises RecordError if they are corrupt in the bucket, OSError (`gcs.StorageError`) if they cannot be fetched or the disk
        is full, which does not make the record corrupt.
        """
        which = bisect.bisect_right(self._firsts, index) - 1
        position = index - self._firsts[which]
        begin, end = self._range(which, index)
        for fresh in (False, True):
            with contextlib.suppress(_DamagedError):
                return self._through_cache(which, position, begin, end, fresh)
        # Once more in a private file that no other process writes or removes: if this fails, the bucket's data are corrupt.
        cache = cache_folder() / "shards"
        cache.mkdir(parents=True, exist_ok=True)
        with _disk(cache), tempfile.NamedTemporaryFile(dir=cache, suffix=".making") as file:
            try:
                with self._filled(which, Path(file.name)) as private:
                    private.put(begin, self._fetch(which, begin, end))
                    return private.read(position)
            except _DamagedError as error:
                raise RecordError(f"record {index} of {self._folder} cannot be read ({error})") from None

    def _range(self, which: int, index: int) -> tuple[int, int]:
        """Byte range of a record in its shard; empty for a shard that is downloaded whole."""
        if self._ends is None:
            return 0, 0
        return int(self._ends[index - 1]) if index > self._firsts[which] else HEAD, int(self._ends[index])

    def _address(self, which: int) -> str:
        return f"{self._folder}/{self._shards[which]['file']}"

    def _fetch(self, which: int, begin: int, end: int) -> bytes:
        return gcs.read(self._address(which), begin, end)

    def _through_cache(self, which: int, position: int, begin: int, end: int, fresh: bool) -> bytes:
        """The record from the shared file, after fetching its range if `fresh`. Raises _DamagedError if it is missing or damaged."""
        file = self._file(which, fresh and self._ends is None)
        if fresh:
            data = self._fetch(which, begin, end)
            with _disk(file.path):
                file.put(begin, data)
            self._sweep(len(data))
        return file.read(position)

    def _file(self, which: int, renew: bool) -> "_SparseFile":
        """The open shared file of a shard; created if it is missing, was removed by a sweep, or if `renew`."""
        shard = self._shards[which]
        with self._lock:
            file = self._open.get(which)
            if file is not None and not renew and file.whole(shard["bytes"]):
                self._open.move_to_end(which)
                file.touch()
                return file
            self._open.pop(which, None)
        kind = "whole" if self._ends is None else "sparse"
        path = cache_folder() / "shards" / f"{shard['sha256'][:40]}.{kind}"
        file = None if renew else _existing(path, shard["bytes"])
        if file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            making = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.making")
            try:
                with _disk(path), self._filled(which, making):
                    making.replace(path)
            finally:
                making.unlink(missing_ok=True)
            self._sweep(shard["bytes"] if self._ends is None else HEAD)
            file = _existing(path, shard["bytes"])
            if file is None:
                raise _DamagedError("its local copy was removed")
        with self._lock:
            self._open[which] = file
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return file

    @contextlib.contextmanager
    def _filled(self, which: int, path: Path) -> Iterator["_SparseFile"]:
        """A new file with head and end of a shard, or with all of it."""
        shard, first, last = self._shards[which], self._firsts[which], self._firsts[which + 1]
        with path.open("w+b") as made:
            made.truncate(shard["bytes"])
            if self._ends is not None:
                end = int(self._ends[last - 1])
                made.write(self._fetch(which, 0, HEAD))
                made.seek(end)
                made.write(self._fetch(which, end, shard["bytes"]))
            else:
                digest = hashlib.sha256()
                for piece in gcs.read_chunks(self._address(which), shard["bytes"]):
                    digest.update(piece)
                    made.write(piece)
                if digest.hexdigest() != shard["sha256"]:
                    raise gcs.StorageError(
                        errno.EBADMSG, f"its sha256 is {digest.hexdigest()}, the manifest says {shard['sha256']}: copy the "
                        "folder again", self._address(which),
                    )  # fmt: skip
        file = _SparseFile(path)
        found = file.records()
        if found != last - first:
            raise gcs.StorageError(
                errno.EBADMSG, f"the manifest says {last - first} records, found "
                f"{'no readable end' if found is None else f'{found} records'}: copy the folder again",
                self._address(which),
            )  # fmt: skip
        yield file

    def _sweep(self, written: int) -> None:
        """Limits the size of the cache; checks only after enough bytes were written since the last time."""
        bound = int(gcs.environment_number("GLIP_JAX_CACHE_GB", 16.0) * 1e9)
        with self._lock:
            self._unswept += written
            if self._unswept <= min(bound // 16, 1 << 26):
                return
            self._unswept = 0
            for which, file in list(self._open.items()):  # removed files take space until they are closed
                if not file.linked():
                    del self._open[which]
        _sweep(cache_folder() / "shards", bound)


class _DamagedError(Exception):
    """A local copy does not hold what the reader expects."""


class _SparseFile:
    """A local file with parts of a shard and the array_record reader on it. Closed when the last reference is deleted."""

    def __init__(self, path: Path) -> None:
        """Opens an existing file. Raises _DamagedError if the reader cannot."""
        self.path = path
        self._file = path.open("r+b", buffering=0)
        self._touched = 0.0
        try:
            # As in Grain's own data source: no read-ahead, which would read holes.
            self._reader = ArrayRecordReader(
                str(path), options="readahead_buffer_size:0,", file_reader_buffer_size=32768
            )
        except RuntimeError as error:
            raise _DamagedError(str(error)) from None

    def records(self) -> int | None:
        """Number of records from the index at the end; None if it cannot be read."""
        return self._reader.num_records() if self._reader.ok() else None

    def linked(self) -> bool:
        """Whether the file is still in the cache folder."""
        return os.fstat(self._file.fileno()).st_nlink > 0

    def whole(self, size: int) -> bool:
        """Whether the file is in the cache folder at full length. array_record reads records beyond its end as empty."""
        found = os.fstat(self._file.fileno())
        return found.st_nlink > 0 and found.st_size == size

    def touch(self) -> None:
        """Records the use of the file, at intervals."""
        if time.monotonic() - self._touched > _TOUCH_INTERVAL:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())

    def put(self, begin: int, data: bytes) -> None:
        """Writes a range. A concurrent reader sees a wrong checksum and fetches the range itself."""
        part = memoryview(data)
        while part:
            written = os.pwrite(self._file.fileno(), part, begin)
            begin, part = begin + written, part[written:]

    def read(self, position: int) -> bytes:
        """A record. Raises _DamagedError if it is missing or its checksum differs."""
        try:
            (value,) = self._reader.read([position])
        except RuntimeError as error:
            raise _DamagedError(str(error)) from None
        if not value:
            raise _DamagedError("nothing was read")
        return value


def _existing(path: Path, size: int) -> _SparseFile | None:
    """An open file of the cache; None if it does not exist or is damaged."""
    try:
        file = _SparseFile(path)
    except (FileNotFoundError, _DamagedError):
        return None
    return file if file.whole(size) and file.records() is not None else None


def _sweep(folder: Path, bound: int) -> None:
    """If the files exceed `bound` bytes, removes the least recently used ones, down to four fifths of it."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another process sweeps
        files = []
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                state = entry.stat()
                if not entry.name.endswith(".making"):
                    files.append((state.st_mtime, state.st_blocks * 512, entry.path))
                elif time.time() - state.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
        used = sum(size for _, size, _ in files)
        if used <= bound:
            return
        for _, size, path in sorted(files):
            if used <= bound * 4 // 5:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Adds to the error of a full disk what to do about it."""
    try:
        yield
    except gcs.StorageError:
        raise
    except OSError as error:
        if full_disk(error):
            why = f"{full_disk(error)} in the cache of shards: set GLIP_JAX_CACHE to a folder with more space, or lower GLIP_JAX_CACHE_GB"
            raise OSError(error.errno, why, str(path)) from error
        raise
