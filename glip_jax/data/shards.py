"""Folders of records: ArrayRecord shards, `manifest.json`, and `columns.npz` with what scheduling needs of each record.

A folder is written under a temporary name and renamed when complete; its manifest is what marks it as finished. A
finished folder is never made twice. Opening reads the manifest, the columns and the end of each file (its number of
records), and refuses what does not fit together; `verify` reads everything.
"""

import contextlib
import errno
import hashlib
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
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from glip_jax.data.records import FORMAT, Kind, Record, RecordError, content_hash, decode, encode
from glip_jax.exits import full_disk

__all__ = [
    "KINDS",
    "Manifest",
    "ShardError",
    "ShardWriter",
    "Shards",
    "Written",
    "complete",
    "finished",
    "shard_files",
    "verify",
    "writable",
    "write",
]

KINDS: tuple[Kind, ...] = ("detection", "grounding", "pseudo", "caption")
"""Codes of the column `kind`; new kinds go to the end, older shards stay readable."""

_COLUMNS = ("height", "width", "kind", "hash")
_TYPES = (np.int32, np.int32, np.uint8, np.uint64)


class ShardError(ValueError):
    """A folder of shards that is missing, unfinished or damaged, or cannot be written."""


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of shards and where it came from."""

    name: str
    licence: str
    source: str
    """The annotation file (or whatever the records were made of)."""
    command: str
    """The command that made the folder."""
    names: tuple[str, ...]
    """Category names; `Record.categories` are indices into them."""
    records: int
    boxes: int
    kinds: dict[str, int]
    drops: dict[str, int]
    """What was left out, by reason."""
    shards: tuple[dict[str, Any], ...]
    """Per shard: file, records, bytes, sha256."""
    columns: dict[str, Any]
    """The side file: file, sha256."""
    format: int = FORMAT


def finished(directory: epath.PathLike) -> Manifest | None:
    """The manifest of a finished folder, None where there is none yet; ShardError for one that cannot be read."""
    path = epath.Path(directory) / "manifest.json"
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
        fields.update(names=tuple(fields["names"]), shards=tuple(fields["shards"]))
        manifest = Manifest(**fields)
        for shard in manifest.shards:
            _ = shard["file"], shard["records"] + shard["bytes"], shard["sha256"]
        _ = manifest.columns["file"], manifest.columns["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path} is no manifest of shards ({error}): remove the folder and import again") from None
    if manifest.format != FORMAT:
        raise ShardError(f"{path} has format {manifest.format}, this version reads {FORMAT}: import again")
    return manifest


def writable(directory: epath.PathLike) -> Path:
    """The absolute local path of a folder that can be made; ShardError if it is there already or lies in a bucket."""
    if re.match(r"[a-z0-9]+:/", str(directory)):  # of gs://, a pathlib.Path keeps one slash
        raise ShardError(f"{directory}: shards are written to a local folder; copy the finished folder to the bucket")
    target = epath.Path(directory)
    if target.exists() and not target.is_dir():
        raise ShardError(f"{target} is a file: expected a folder to make")
    if target.exists() and any(target.iterdir()):
        state = "finished" if finished(target) else "not empty, without a manifest"
        raise ShardError(f"{target} is {state}: shards are never made twice; remove it or name another folder")
    return Path(target).absolute()


def shard_files(shards: int) -> list[str]:
    """Names of the files of a folder; ShardError for fewer than one."""
    if shards < 1:
        raise ShardError(f"shards is {shards}: expected at least 1")
    return [f"records-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]


@dataclass(frozen=True)
class Written:
    """What is known of a shard file when it is closed."""

    file: str
    records: int
    bytes: int
    sha256: str
    boxes: int
    labels: dict[int, int]
    """Boxes by category."""
    columns: tuple[list[int], ...]
    """height, width, kind and hash of each record."""


class ShardWriter:
    """One shard file being written. OSError, with the system's words, for what the system refuses."""

    def __init__(self, path: Path, names: int) -> None:
        self._path, self._names, self._boxes = path, names, 0
        self._columns: tuple[list[int], ...] = ([], [], [], [])
        self._labels: Counter[int] = Counter()
        with _system_words(path):
            self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def add(self, record: Record) -> None:
        """Appends a record; ShardError if it has a category beyond the names."""
        beyond = [c for c in record.categories if c >= self._names]
        if beyond:
            raise ShardError(f"record {record.id!r} has category {beyond[0]}, there are {self._names} names")
        with _system_words(self._path):
            self._writer.write(encode(record))
        row = (record.height, record.width, KINDS.index(record.kind), content_hash(record.image))
        for column, value in zip(self._columns, row):
            column.append(value)
        self._labels.update(record.categories)
        self._boxes += len(record.boxes)

    def close(self) -> Written:
        """Ends the file."""
        with _system_words(self._path):
            self._writer.close()
        return Written(
            file=self._path.name, records=len(self._columns[0]), bytes=self._path.stat().st_size,
            sha256=_sha256(self._path), boxes=self._boxes, labels=dict(sorted(self._labels.items())),
            columns=self._columns,
        )  # fmt: skip

    def abandon(self) -> None:
        """Lets go of a file that will not be used."""
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
    """Writes the columns and the manifest of the shards in `partial`; the manifest comes last.

    Raises ShardError if there is no record.
    """
    parts: list[Written] = []
    columns: list[list[np.ndarray]] = [[] for _ in _COLUMNS]
    for part in written:
        for column, values, kind in zip(columns, part.columns, _TYPES):
            column.append(np.array(values, kind))
        parts.append(replace(part, columns=()))
    records = sum(part.records for part in parts)
    if not records:
        raise ShardError(f"nothing to write: no record came out of {source or name}")
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
    """Writes `records` to `shards` files in `directory` and returns the manifest.

    For records that are at hand; annotation files go through `glip_jax.data.build`. Records go to the shards in turn.
    `drops` is asked after the last record. Raises ShardError if the folder exists (finished or not empty), or if there
    is no record, OSError if it cannot be written (a full disk); the folder appears only when everything is in it.
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
        if local.exists():
            local.rmdir()
        partial.rename(local)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


class Shards:
    """Random access to the records of a finished folder. Files are opened at the first read; pickles by path.

    `height`, `width`, `kind` (index into KINDS) and `hash` are arrays with one entry per record, in reading order.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        """Reads manifest and columns; ShardError if the folder is missing, unfinished or does not fit together."""
        self.path = epath.Path(directory)
        if "://" in str(self.path):
            raise ShardError(f"{self.path}: shards are read from local or mounted folders (gcsfuse); name the mount")
        manifest = finished(self.path)
        if manifest is None:
            raise ShardError(f"{self.path} {_nothing(self.path)}")
        self.manifest = manifest
        _check_counts(self.path, manifest)
        with ThreadPoolExecutor(16) as pool:
            for fault in pool.map(lambda shard: _file_fault(self.path, shard), manifest.shards):
                if fault:
                    raise ShardError(f"{fault}: import again, or copy the folder again")
        side = self.path / manifest.columns["file"]
        try:
            with np.load(side) as columns:
                self.height, self.width, self.kind, self.hash = (columns[key] for key in _COLUMNS)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise ShardError(f"{side} cannot be read ({error}): import again, or copy the folder again") from None
        if len(self.height) != manifest.records:
            raise ShardError(
                f"{side} has {len(self.height)} rows, the manifest says {manifest.records} records: import again"
            )
        if _sha256(Path(side)) != manifest.columns["sha256"]:
            raise ShardError(f"{side} is not the file that the manifest names (its sha256 differs): import again")
        self._data = ArrayRecordDataSource(
            [f"{self.path / s['file']}[0:{s['records']}]" for s in manifest.shards if s["records"]]
        )

    def __len__(self) -> int:
        return self.manifest.records

    def read(self, index: int) -> bytes:
        """The bytes of record `index`; RecordError if the file is damaged there."""
        try:
            return self._data[index]
        except RuntimeError as error:  # what array_record raises for a block whose checksum differs
            raise RecordError(f"record {index} of {self.path} cannot be read ({error})") from None

    def __getitem__(self, index: int) -> Record:
        """Record `index`, decoded and validated; RecordError if it is corrupt."""
        return decode(self.read(index), len(self.manifest.names))


def verify(directory: epath.PathLike) -> Literal[True]:
    """Compares every file with the hash in the manifest; ShardError names the first that differs."""
    path = epath.Path(directory)
    manifest = finished(path)
    if manifest is None:
        raise ShardError(f"{path} {_nothing(path)}")
    for entry in (*manifest.shards, manifest.columns):
        found = _sha256(Path(path / entry["file"]))
        if found != entry["sha256"]:
            raise ShardError(f"{path / entry['file']}: sha256 is {found}, the manifest says {entry['sha256']}")
    return True


@contextlib.contextmanager
def _system_words(path: Path) -> Iterator[None]:
    """array_record's own kind of error, for whatever the system refused, as OSError."""
    try:
        yield
    except RuntimeError as error:
        code = errno.ENOSPC if full_disk(error) else errno.EIO
        raise OSError(code, full_disk(error) or str(error).splitlines()[0], str(path)) from error


def _nothing(path: epath.Path) -> str:
    """Why there is no manifest."""
    if not path.exists():
        found = "does not exist"
    elif not path.is_dir():
        found = "is a file"
    else:
        found = "has no manifest.json" if any(path.iterdir()) else "is empty"
    return f"{found}: expected a folder of shards, there are no finished shards here"


def _check_counts(path: epath.Path, manifest: Manifest) -> None:
    """Raises ShardError if the manifest contradicts itself."""
    parts = {"shards": sum(shard["records"] for shard in manifest.shards), "kinds": sum(manifest.kinds.values())}
    for name, count in parts.items():
        if count != manifest.records:
            raise ShardError(
                f"{path / 'manifest.json'} says {manifest.records} records, but its {name} add up to {count}: "
                "import again, or copy the folder again"
            )


def _file_fault(path: epath.Path, shard: dict[str, Any]) -> str:
    """What of a shard's file is not as the manifest says; "" if nothing."""
    file = path / shard["file"]
    try:
        size = file.stat().length
    except OSError as error:
        return f"{file}: the manifest says {shard['bytes']} bytes, found nothing ({error.strerror})"
    if size != shard["bytes"]:
        short = "it is truncated" if size < shard["bytes"] else "it is another file"
        return f"{file}: the manifest says {shard['bytes']} bytes, found {size} ({short})"
    reader = ArrayRecordReader(str(file))
    found = reader.num_records() if reader.ok() else None
    with contextlib.suppress(RuntimeError):  # what made it not ok, once more
        reader.close()
    if found != shard["records"]:
        found = "no readable end" if found is None else f"{found} records"
        return f"{file}: the manifest says {shard['records']} records, found {found}"
    return ""


def _sha256(path: Path) -> str:
    """Of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
