"""Folders of records: ArrayRecord shards, `manifest.json`, and `columns.npz` with size, kind and hash of each record.

A folder is written under a temporary name and renamed when complete; the manifest marks it as finished. A finished folder is
never written again. Opening reads the manifest, the columns and the end of each file (its number of records) and refuses
inconsistent ones; `verify` reads everything.

A folder in a bucket (gs://) is built in a local folder and uploaded when complete, the manifest last. Opening reads manifest and
columns and lists the folder once; records are read one range at a time (`shard_cache`).
"""

import contextlib
import errno
import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from glip_jax.data.manifest import Manifest, ShardError, finished, names_in, opened, read_file, why_unfinished
from glip_jax.data.records import Kind, Record, RecordError, content_hash, decode, encode
from glip_jax.data.shard_cache import RemoteRecords, cache_folder, record_ends
from glip_jax.io import gcs
from glip_jax.io.errors import full_disk

__all__ = [
    "KINDS", "Manifest", "ShardError", "ShardWriter", "Shards", "Written", "check_target", "complete", "differing",
    "files_of", "finished", "publish", "shard_files", "verify", "why_unfinished", "writable", "write",
]  # fmt: skip

KINDS: tuple[Kind, ...] = ("detection", "grounding", "pseudo", "caption")
"""Values of the column `kind`. New kinds are appended, so that existing shards stay readable."""

_COLUMNS = ("height", "width", "kind", "hash", "end")
_TYPES = (np.int32, np.int32, np.uint8, np.uint64, np.uint64)


def writable(directory: epath.PathLike) -> Path:
    """The absolute path at which a folder can be built. Raises ShardError if it exists already.

    For a folder in a bucket this is a local one below `shard_cache.cache_folder`. The bucket may hold files of an interrupted
    upload, but no others.
    """
    place = gcs.address(directory)
    if gcs.kind(place) == "file":
        raise ShardError(f"{place} is a file: expected the name of a new folder")
    existing = names_in(place)
    if existing and (not gcs.is_remote(place) or finished(place) or not all(map(_UPLOADED.fullmatch, existing))):
        state = "finished" if finished(place) else "not empty, without a manifest"
        raise ShardError(f"{place} is {state}: existing shards are never overwritten; remove it or name another folder")
    if gcs.is_remote(place):
        return cache_folder() / "sending" / hashlib.sha256(place.encode()).hexdigest()[:16] / epath.Path(place).name
    return Path(place).absolute()


_UPLOADED = re.compile(r"records-\d{5,}-of-\d{5,}\.array_record|columns\.npz|report\.json")
"""Files of a folder whose upload was interrupted before the manifest."""


def publish(partial: Path, directory: epath.PathLike, exclude: Iterable[Path] = ()) -> None:
    """Renames a complete folder to `directory`, or uploads it there; `exclude`: files in it that do not belong to it.

    The manifest is uploaded last; an interrupted upload continues with the same call. Raises OSError if a file cannot be
    uploaded, and ShardError before the upload if the bucket's folder holds a file that `partial` lacks.
    """
    exclude = set(exclude)
    if not gcs.is_remote(directory):
        for file in exclude:
            file.unlink(missing_ok=True)
        target = Path(directory).absolute()
        if target.exists():
            target.rmdir()
        partial.rename(target)
        return
    files = {file.name: file for file in sorted(partial.iterdir()) if file.is_file() and file not in exclude}
    check_target(directory, files)
    gcs.upload_files(files, directory, last="manifest.json")
    shutil.rmtree(partial)


def shard_files(shards: int) -> list[str]:
    """File names of `shards` shards. Raises ShardError for less than one."""
    if shards < 1:
        raise ShardError(f"shards is {shards}: expected at least 1")
    return [f"records-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]


@dataclass(frozen=True)
class Written:
    """Summary of a shard file that was written."""

    file: str
    records: int
    bytes: int
    sha256: str
    boxes: int
    labels: dict[int, int]
    """Boxes by category."""
    columns: tuple[list[int], ...]
    """height, width, kind and hash of each record, and the offset of its end in the file."""


class ShardWriter:
    """Writes one shard file. Errors of the system are raised as OSError."""

    def __init__(self, path: Path, names: int) -> None:
        self._path, self._names, self._boxes = path, names, 0
        self._columns: tuple[list[int], ...] = ([], [], [], [], [])
        self._labels: Counter[int] = Counter()
        with _as_os_error(path):
            self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def add(self, record: Record) -> None:
        """Appends a record. Raises ShardError if a category is not an index of the names."""
        beyond = [c for c in record.categories if c >= self._names]
        if beyond:
            raise ShardError(f"record {record.id!r} has category {beyond[0]}, there are {self._names} names")
        with _as_os_error(self._path):
            self._writer.write(encode(record))
        row = (record.height, record.width, KINDS.index(record.kind), content_hash(record.image))
        for column, value in zip(self._columns[:-1], row):
            column.append(value)
        self._labels.update(record.categories)
        self._boxes += len(record.boxes)

    def close(self) -> Written:
        """Completes the file."""
        with _as_os_error(self._path):
            self._writer.close()
        return Written(
            file=self._path.name, records=len(self._columns[0]), bytes=self._path.stat().st_size,
            sha256=_sha256(self._path), boxes=self._boxes, labels=dict(sorted(self._labels.items())),
            columns=(*self._columns[:-1], record_ends(self._path, len(self._columns[0]))),
        )  # fmt: skip

    def abandon(self) -> None:
        """Closes a file that is discarded."""
        with contextlib.suppress(RuntimeError):
            self._writer.close()


def complete(
    partial: Path,
    written: Iterable[Written],
    *,
    name: str,
    names: Sequence[str],
    licence: str,
    source: str,
    command: str,
    drops: dict[str, int],
) -> Manifest:
    """Writes columns and manifest, the manifest last, for the shard files in `partial`.

    Raises ShardError if they hold no record.
    """
    parts: list[Written] = []
    columns: list[list[np.ndarray]] = [[] for _ in _COLUMNS]
    for part in written:
        for column, values, kind in zip(columns, part.columns, _TYPES):
            column.append(np.array(values, kind))
        parts.append(replace(part, columns=()))
    records = sum(part.records for part in parts)
    if not records:
        raise ShardError(f"nothing to write: {source or name} has no records")
    joined = {key: np.concatenate(column) for key, column in zip(_COLUMNS, columns)}
    np.savez(partial / "columns.npz", allow_pickle=False, **joined)
    manifest = Manifest(
        name=name, licence=licence, source=source, command=command, names=tuple(names), records=records,
        boxes=sum(part.boxes for part in parts),
        kinds={KINDS[code]: int(n) for code, n in zip(*np.unique(joined["kind"], return_counts=True))},
        drops=dict(drops),
        shards=tuple(
            {"file": part.file, "records": part.records, "bytes": part.bytes, "sha256": part.sha256} for part in parts
        ),
        columns={"file": "columns.npz", "sha256": _sha256(partial / "columns.npz")},
    )  # fmt: skip
    (partial / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1, ensure_ascii=False))
    return manifest


def write(
    records: Iterable[Record],
    directory: epath.PathLike,
    *,
    name: str,
    names: Sequence[str] = (),
    licence: str = "unknown",
    source: str = "",
    command: str = "",
    shards: int = 1,
    drops: Callable[[], dict[str, int]] = dict,
) -> Manifest:
    """Writes `records` round robin to `shards` files in `directory` and returns the manifest.

    Annotation files are imported by `glip_jax.data.importers.build` instead. `drops` is called after the last record. The folder
    appears when it is complete. Raises ShardError if the folder exists and is not empty, or if there is no record, and OSError
    if it cannot be written (full disk).
    """
    local = writable(directory)
    files = shard_files(shards)
    partial = local.parent / f".{local.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        writers = [ShardWriter(partial / file, len(names)) for file in files]
        try:
            for index, record in enumerate(records):
                writers[index % shards].add(record)
            written = [writer.close() for writer in writers]
        except BaseException:
            for writer in writers:
                writer.abandon()
            raise
        manifest = complete(
            partial, written, name=name, names=names, licence=licence, source=source, command=command, drops=drops()
        )
        publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


class Shards:
    """Random access to the records of a finished folder. Files are opened at the first read.

    `height`, `width` (pixels), `kind` (index into KINDS) and `hash` are arrays with one entry per record.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        """Reads manifest and columns. Raises ShardError if the folder is missing, unfinished or inconsistent, OSError
        (`gcs.StorageError`) if the bucket does not answer.
        """
        place = gcs.address(directory)
        self.path = epath.Path(place)
        self.manifest = manifest = opened(place)
        columns = _columns(f"{place}/{manifest.columns['file']}", manifest)
        self.height, self.width, self.kind, self.hash = (columns[key] for key in _COLUMNS[:-1])
        self._data = (
            RemoteRecords(place, manifest.shards, columns.get(_COLUMNS[-1]))
            if gcs.is_remote(place)
            else _LocalRecords([f"{self.path / s['file']}[0:{s['records']}]" for s in manifest.shards if s["records"]])
        )

    def __len__(self) -> int:
        return self.manifest.records

    def read(self, index: int) -> bytes:
        """The bytes of record `index`. Raises RecordError if the file is damaged there, OSError if the bucket does not answer."""
        try:
            return self._data.read(index)
        except RuntimeError as error:  # array_record: the checksum of the block differs
            raise RecordError(f"record {index} of {self.path} cannot be read ({error})") from None

    def __getitem__(self, index: int) -> Record:
        """Record `index`, decoded and validated. Raises RecordError if it is corrupt."""
        return decode(self.read(index), len(self.manifest.names))


class _LocalRecords(ArrayRecordDataSource):
    """Local files with the interface of `RemoteRecords`."""

    def read(self, index: int) -> bytes:
        return self[index]


def verify(directory: epath.PathLike) -> Literal[True]:
    """Compares the SHA-256 of every file with the manifest. Raises ShardError for the first that differs."""
    for fault in differing(directory):
        raise ShardError(fault)
    return True


def differing(directory: epath.PathLike, read: Callable[[int], object] = lambda _: None) -> Iterator[str]:
    """One message per file that is missing or whose SHA-256 differs from the manifest. `read` is called with the bytes read.

    Raises ShardError for a folder without a manifest, OSError (`gcs.StorageError`) if the bucket does not answer.
    """
    place = gcs.address(directory)
    manifest = finished(place)
    if manifest is None:
        raise ShardError(f"{place} {why_unfinished(place)}")
    remote = gcs.list_files(place) if gcs.is_remote(place) else {}

    def fault(entry: dict[str, Any]) -> str:
        path = f"{place}/{entry['file']}"
        try:
            found = _sha256(path, remote[entry["file"]].bytes if gcs.is_remote(place) else 0)
        except (FileNotFoundError, KeyError):
            return f"{path} is missing, the manifest names it: copy the folder again"
        read(entry.get("bytes", 0))
        return "" if found == entry["sha256"] else f"{path}: sha256 is {found}, the manifest says {entry['sha256']}"

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        yield from filter(None, pool.map(fault, (*manifest.shards, manifest.columns)))


_HASHING_THREADS = 4
"""Files that are hashed at the same time."""


def files_of(directory: epath.PathLike) -> dict[str, Path]:
    """The files of a finished local folder by name: shards, columns, manifest, and the report if there is one."""
    manifest = finished(directory)
    if manifest is None:
        raise ShardError(f"{directory} {why_unfinished(str(directory))}")
    names = [*(shard["file"] for shard in manifest.shards), manifest.columns["file"], "manifest.json"]
    return {name: Path(directory) / name for name in (*names, "report.json") if (Path(directory) / name).exists()}


def check_target(directory: epath.PathLike, files: Iterable[str]) -> None:
    """Raises ShardError if a bucket's folder holds a file that is not among `files`."""
    foreign = sorted(set(gcs.list_files(directory)) - set(files))
    if foreign:
        raise ShardError(
            f"{gcs.address(directory)} holds {len(foreign)} files of another build ({foreign[0]}): remove them, then repeat the "
            "command"
        )


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Converts the RuntimeError that array_record raises for errors of the system to OSError."""
    try:
        yield
    except RuntimeError as error:
        code = errno.ENOSPC if full_disk(error) else errno.EIO
        raise OSError(code, full_disk(error) or str(error).splitlines()[0], str(path)) from error


def _columns(side: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The columns, checked against the manifest. Folders of earlier versions lack `end`."""
    try:
        data = read_file(side)
        with np.load(io.BytesIO(data)) as stored:
            columns = {key: stored[key] for key in _COLUMNS if key in stored or key != _COLUMNS[-1]}
    except gcs.StorageError:
        raise
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ShardError(f"{side} cannot be read ({error}): import again, or copy the folder again") from None
    rows = {len(column) for column in columns.values()}
    if rows != {manifest.records}:
        rows = " or ".join(map(str, sorted(rows)))
        raise ShardError(f"{side} has {rows} rows, the manifest says {manifest.records} records: import again")
    if hashlib.sha256(data).hexdigest() != manifest.columns["sha256"]:
        raise ShardError(f"{side} differs from the manifest (its sha256 is another): import again")
    return columns


def _sha256(path: epath.PathLike, size: int = 0) -> str:
    """SHA-256 of a file, read in pieces; `size`: bytes of a remote one."""
    if gcs.is_remote(path):
        digest = hashlib.sha256()
        for piece in gcs.read_chunks(path, size):
            digest.update(piece)
        return digest.hexdigest()
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
