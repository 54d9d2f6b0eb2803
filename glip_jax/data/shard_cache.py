"""Records of shards in a bucket, read one range at a time through sparse files on the local disk.

array_record's reader wants a local file. It is given one of the shard's size of which only the head, the end (its index)
and the records asked for are there; the rest are holes, which take no space. A record is a chunk of the file with
checksums of its own, so whatever is wrong with a range, be it a hole, half a write or a damaged disk, is found by the reader,
and the range is fetched again. A record that fails after a fetch into a file of its own is corrupt where it comes from.

    GLIP_JAX_CACHE     folder for these files, and for folders of shards on their way to a bucket; ~/.cache/glip_jax
    GLIP_JAX_CACHE_GB  what the files may take, in GB (1e9 bytes); 16

Files are named by the sha256 of their shard, so runs, worker processes and sources that read the same shard share one. Where
they take more than allowed, the least recently used go. The limit may be passed for a moment: by some megabytes for each
process, and by files that another process still has open. A pod's hosts have a cache each.
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

_OPEN = 200
"""Files that a process keeps open; each takes two descriptors, and systems allow a process 1,024 without being asked."""

_TOUCHED = 30.0
"""Seconds after which a use is noted again in the file's time, for the choice of what goes."""

_ABANDONED = 3600.0
"""Seconds after which an unfinished file is taken to be of a process that was killed."""


def cache_folder() -> Path:
    """Where local copies of what is in buckets lie: GLIP_JAX_CACHE, or glip_jax in the user's folder of caches."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GLIP_JAX_CACHE") or user / "glip_jax").absolute()


def record_ends(path: Path, records: int) -> list[int]:
    """Per record of a closed file with one record a chunk (group_size:1), the offset behind it; bytes.

    By Riegeli's file format (github.com/google/riegeli, doc/riegeli_records_file_format.md): each 65,536 bytes begin with a
    block header of 24, in the midst of a chunk too; a chunk begins with a header of 40, in it the size of its data, its
    type and its number of records. Raises OSError (EBADMSG) if what comes first is not `records` chunks of one record.
    """
    ends: list[int] = []
    with path.open("rb", buffering=4096) as file:
        at = HEAD
        while len(ends) < records:
            header, place = b"", at
            while len(header) < 40 and place < at + 128:
                place += 0 if place % _BLOCK else _BLOCK_HEADER
                file.seek(place)
                header += file.read(min(40 - len(header), _BLOCK - place % _BLOCK))
                place = file.tell()
            if len(header) < 40 or header[24:25] != b"r" or int.from_bytes(header[25:32], "little") != 1:
                raise OSError(errno.EBADMSG, f"has no record {len(ends)} in a chunk of its own at byte {at}", str(path))
            (size,) = struct.unpack("<Q", header[8:16])
            at = _behind(place, size)
            ends.append(at)
    return ends


def _behind(place: int, size: int) -> int:
    """Where `size` bytes of data end that begin at `place`, with the headers of the blocks that begin among them."""
    while size:
        place += 0 if place % _BLOCK else _BLOCK_HEADER
        step = min(size, _BLOCK - place % _BLOCK)
        place, size = place + step, size - step
    return place


class RemoteRecords:
    """Random access to the records of a remote folder of shards, for threads and processes. Pickles; opens nothing then.

    Without `ends` (folders written before there was that column) a shard is fetched whole, and its sha256 compared, at
    the first use of one of its records; the disk then has to hold what is used between two sweeps of the cache.
    """

    def __init__(
        self, folder: epath.PathLike, shards: Sequence[dict[str, Any]], ends: UInt64[np.ndarray, "records"] | None
    ) -> None:
        """`shards` as the manifest has them; `ends`: per record, the offset in its file behind its chunk."""
        self._folder = gcs.address(folder)
        self._shards = [shard for shard in shards if shard["records"]]
        self._firsts = [0, *np.cumsum([shard["records"] for shard in self._shards]).tolist()]
        self._ends = ends
        self._start()

    def _start(self) -> None:
        self._lock = threading.RLock()
        self._open: OrderedDict[int, _Sparse] = OrderedDict()
        self._unswept = 0

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_lock", "_open", "_unswept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def read(self, index: int) -> bytes:
        """The bytes of record `index`.

        Raises RecordError if they are corrupt in the bucket, OSError (`storage.StorageError`) if they cannot be fetched
        or the disk is full: that is no fault of the record, and must not be taken for one.
        """
        which = bisect.bisect_right(self._firsts, index) - 1
        position = index - self._firsts[which]
        begin, end = self._range(which, index)
        for fresh in (False, True):
            with contextlib.suppress(_DamagedError):
                return self._through_cache(which, position, begin, end, fresh)
        # Now in a file that nobody else writes or removes: what fails here is what lies in the bucket.
        cache = cache_folder() / "shards"
        cache.mkdir(parents=True, exist_ok=True)
        with _disk(cache), tempfile.NamedTemporaryFile(dir=cache, suffix=".making") as file:
            try:
                with self._filled(which, Path(file.name)) as own:
                    own.put(begin, self._fetch(which, begin, end))
                    return own.read(position)
            except _DamagedError as error:
                raise RecordError(f"record {index} of {self._folder} cannot be read ({error})") from None

    def _range(self, which: int, index: int) -> tuple[int, int]:
        """Where a record lies in its shard; of a shard that is fetched whole, nowhere."""
        if self._ends is None:
            return 0, 0
        return int(self._ends[index - 1]) if index > self._firsts[which] else HEAD, int(self._ends[index])

    def _place(self, which: int) -> str:
        return f"{self._folder}/{self._shards[which]['file']}"

    def _fetch(self, which: int, begin: int, end: int) -> bytes:
        return gcs.read(self._place(which), begin, end)

    def _through_cache(self, which: int, position: int, begin: int, end: int, fresh: bool) -> bytes:
        """The record by the shared file, its range fetched first if `fresh`; _DamagedError if it is not there, or damaged."""
        file = self._file(which, fresh and self._ends is None)
        if fresh:
            data = self._fetch(which, begin, end)
            with _disk(file.path):
                file.put(begin, data)
            self._sweep(len(data))
        return file.read(position)

    def _file(self, which: int, anew: bool) -> "_Sparse":
        """The shared file of a shard, opened; made where it is missing, was removed by a sweep, or `anew`."""
        shard = self._shards[which]
        with self._lock:
            file = self._open.get(which)
            if file is not None and not anew and file.whole(shard["bytes"]):
                self._open.move_to_end(which)
                file.touch()
                return file
            self._open.pop(which, None)
        kind = "whole" if self._ends is None else "sparse"
        path = cache_folder() / "shards" / f"{shard['sha256'][:40]}.{kind}"
        file = None if anew else _existing(path, shard["bytes"])
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
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
        return file

    @contextlib.contextmanager
    def _filled(self, which: int, path: Path) -> Iterator["_Sparse"]:
        """A new file with the head and the end of a shard, or all of it."""
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
                for piece in gcs.read_chunks(self._place(which), shard["bytes"]):
                    digest.update(piece)
                    made.write(piece)
                if digest.hexdigest() != shard["sha256"]:
                    raise gcs.StorageError(
                        errno.EBADMSG, f"its sha256 is {digest.hexdigest()}, the manifest says {shard['sha256']}: copy the "
                        "folder again", self._place(which),
                    )  # fmt: skip
        own = _Sparse(path)
        found = own.records()
        if found != last - first:
            raise gcs.StorageError(
                errno.EBADMSG, f"the manifest says {last - first} records, found "
                f"{'no readable end' if found is None else f'{found} records'}: copy the folder again",
                self._place(which),
            )  # fmt: skip
        yield own

    def _sweep(self, written: int) -> None:
        """Keeps the cache within its bound; looks only after some bytes more were written."""
        bound = int(gcs.environment_number("GLIP_JAX_CACHE_GB", 16.0) * 1e9)
        with self._lock:
            self._unswept += written
            if self._unswept <= min(bound // 16, 1 << 26):
                return
            self._unswept = 0
            for which, file in list(self._open.items()):  # what others removed takes space until it is closed here too
                if not file.linked():
                    del self._open[which]
        _sweep(cache_folder() / "shards", bound)


class _DamagedError(Exception):
    """A local copy does not hold what the reader expects."""


class _Sparse:
    """A local file that holds parts of a shard, and array_record's reader of it. Closes with the last reference."""

    def __init__(self, path: Path) -> None:
        """Opens a file that is there."""
        self.path = path
        self._file = path.open("r+b", buffering=0)
        self._touched = 0.0
        try:
            # As grain's own source opens it: no reading ahead, which would meet holes.
            self._reader = ArrayRecordReader(
                str(path), options="readahead_buffer_size:0,", file_reader_buffer_size=32768
            )
        except RuntimeError as error:
            raise _DamagedError(str(error)) from None

    def records(self) -> int | None:
        """Their number by the index at the end; None if that cannot be read."""
        return self._reader.num_records() if self._reader.ok() else None

    def linked(self) -> bool:
        """Whether the file still has its name."""
        return os.fstat(self._file.fileno()).st_nlink > 0

    def whole(self, size: int) -> bool:
        """Whether it is there in full length. array_record takes what lies beyond the end for empty records."""
        found = os.fstat(self._file.fileno())
        return found.st_nlink > 0 and found.st_size == size

    def touch(self) -> None:
        """Notes the use, now and then."""
        if time.monotonic() - self._touched > _TOUCHED:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self._file.fileno())

    def put(self, begin: int, data: bytes) -> None:
        """Writes a range. Who reads it meanwhile sees a wrong checksum, and fetches it as well."""
        part = memoryview(data)
        while part:
            written = os.pwrite(self._file.fileno(), part, begin)
            begin, part = begin + written, part[written:]

    def read(self, position: int) -> bytes:
        """A record; _DamagedError if it is not there or its checksum differs."""
        try:
            (value,) = self._reader.read([position])
        except RuntimeError as error:
            raise _DamagedError(str(error)) from None
        if not value:
            raise _DamagedError("nothing was read")
        return value


def _existing(path: Path, size: int) -> _Sparse | None:
    """A file of the cache, opened; None if there is none, or none that can be used."""
    try:
        file = _Sparse(path)
    except (FileNotFoundError, _DamagedError):
        return None
    return file if file.whole(size) and file.records() is not None else None


def _sweep(folder: Path, bound: int) -> None:
    """Removes the least recently used files, down to four fifths of the bound, if they take more than it."""
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another process is at it
        found = []
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                state = entry.stat()
                if not entry.name.endswith(".making"):
                    found.append((state.st_mtime, state.st_blocks * 512, entry.path))
                elif time.time() - state.st_mtime > _ABANDONED:
                    os.unlink(entry.path)
        taken = sum(size for _, size, _ in found)
        if taken <= bound:
            return
        for _, size, path in sorted(found):
            if taken <= bound * 4 // 5:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            taken -= size


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[None]:
    """A full disk, with what to do about it."""
    try:
        yield
    except gcs.StorageError:
        raise
    except OSError as error:
        if full_disk(error):
            why = f"{full_disk(error)} in the cache of shards: name a larger place in GLIP_JAX_CACHE, or a lower GLIP_JAX_CACHE_GB"
            raise OSError(error.errno, why, str(place)) from error
        raise
