"""From an opened annotation file to a finished folder of shards, over several processes, resumable.

1. The entries are streamed once into an index, a SQLite file in `.NAME.partial/`, with the hash of the inputs.
2. Processes make shards from contiguous ranges of the index. Each shard is written under a temporary name and renamed;
   a side file says what is in it.
3. Columns, report and manifest are merged, and the folder gets its name; one in a bucket is sent there, the manifest last.

The same command after a kill uses the index and the shards that are there, if settings and inputs are the same; what
comes out is the same, byte for byte, as without the kill and for any number of processes. Pictures that change between
the two are not noticed. For a folder in a bucket, `.NAME.partial` lies in `shard_cache.cache_folder` until all is sent.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from glip_jax.data import shards
from glip_jax.data.importers import published
from glip_jax.data.importers.entry import Entry, Opened, Report, SourceError, pack
from glip_jax.data.importers.report import BuildReport, summary
from glip_jax.data.importers.workers import Job, Task, read_side, run
from glip_jax.data.records import RecordError
from glip_jax.data.shards import Manifest, ShardError
from glip_jax.io import gcs

__all__ = ["Plan", "build", "excluded_hashes"]

PER_SHARD = 4096
"""Entries of a shard where the number of shards is not given: some hundred megabytes of photographs."""

_WAIT = 10.0
"""Seconds to wait for the workers of a killed build, which end at their next message."""

_FORMAT = 2
"""Of index and side files."""


@dataclass(frozen=True)
class Plan:
    """What a build makes and how; everything but `processes` decides the bytes of the result."""

    out: epath.PathLike
    """Folder to make."""
    source: str
    """The annotation file, as the manifest will name it."""
    name: str = ""
    """Default: the name of `out`."""
    licence: str = "unknown"
    command: str = ""
    """The command that makes the folder, without what does not matter to the result."""
    shards: int | None = None
    """Number of files; None: one for each 4,096 entries."""
    processes: int = 0
    """0: one a core."""
    strict: bool = False
    """Stop at the first thing that would be dropped."""
    exclude: tuple[epath.PathLike, ...] = ()
    """Files with content hashes of images that must not become records: see `excluded_hashes`."""
    published: str = ""
    """Name of the published set to compare with; default: as the annotation file's name says."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Whatever else decides the entries, as JSON."""


class _Index(NamedTuple):
    path: Path
    count: int
    names: tuple[str, ...]
    images: Callable[[str], bytes]
    report: Report
    inputs: list[dict[str, Any]]
    """file, bytes, sha256."""
    published: str


def build(plan: Plan, opened: Callable[[Path], Opened]) -> tuple[Manifest, BuildReport]:
    """Makes the folder `plan.out`; returns its manifest and what there is to say about it.

    `opened` opens the annotation files; it is given a folder for temporary files and is not called where an index of
    the same inputs is there. Raises SourceError and ShardError for input that gives no folder (then nothing is left),
    OSError for what the system refuses (then `.NAME.partial` is left, with which the same command goes on).
    """
    out = shards.writable(plan.out)
    if plan.shards is not None:
        shards.shard_files(plan.shards)
    if plan.processes < 0:
        raise ShardError(f"processes is {plan.processes}: expected at least 1, or 0 for one a core")
    known = published.find(plan.source, plan.published)
    excluded, origins = excluded_hashes(plan.exclude)
    partial = out.parent / f".{out.name}.partial"
    try:
        with _alone(partial, plan.out), _named(plan.out):
            shards.writable(plan.out)  # another build may have finished while this one waited
            for stale in partial.glob("*.writing"):  # what a killed build was at
                stale.unlink()
            settings = _settings(plan, origins)
            index = _index_there(partial, settings) or _make_index(partial, settings, opened)
            if known is None and index.published:
                known = published.find(plan.source, index.published)
            np.save(partial / "excluded.npy", np.array(sorted(excluded), np.uint64))
            files = shards.shard_files(plan.shards or max(1, -(-index.count // PER_SHARD)))
            bounds = [i * index.count // len(files) for i in range(len(files) + 1)]
            job = Job(partial, index.path, index.images, len(index.names), plan.strict)
            tasks = [Task(file, *bounds[i : i + 2]) for i, file in enumerate(files)]
            run(job, tasks, plan.processes)
            return _merge(plan, partial, index, files, origins, known)
    except (SourceError, ShardError, RecordError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def excluded_hashes(files: Sequence[epath.PathLike]) -> tuple[frozenset[int], list[dict[str, Any]]]:
    """Content hashes (`records.content_hash`) in the files, and each file with its number of hashes and its sha256.

    A file is `columns.npz` or `manifest.json` of a folder of shards, such a folder, or a text with one hash a line:
    decimal, or the first 16 (or all 64) hexadecimal digits of the SHA-256 of the image file. SourceError for others.
    """
    hashes: set[int] = set()
    origins = []
    for file in files:
        found = _hashes_in(gcs.address(file))
        hashes.update(found)
        digest = hashlib.sha256(np.array(sorted(found), np.uint64).tobytes()).hexdigest()
        origins.append({"file": str(file), "hashes": len(found), "sha256": digest})
    return frozenset(hashes), origins


def _hashes_in(path: str) -> set[int]:
    wanted = "expected manifest.json or columns.npz of a folder of shards, or a text with one hash a line"
    try:
        folder = path.removesuffix("/manifest.json")
        if folder != path or gcs.kind(path) == "folder":
            return set(shards.Shards(folder).hash.tolist())
        data = gcs.open_file(path).read()
        if path.endswith(".npz"):
            with np.load(io.BytesIO(data)) as columns:
                return set(columns["hash"].tolist())
        found = set()
        for number, line in enumerate(data.decode().split(), 1):
            digits = line.lower().removeprefix("0x")
            is_hex = len(digits) in (16, 64) and set(digits) <= set("0123456789abcdef")
            if not is_hex and not digits.isdecimal():
                raise SourceError(f"--exclude={path}: word {number} is {line!r:.40}; {wanted}")
            found.add(int(digits[:16], 16) if is_hex else int(digits))
        if any(value >= 2**64 for value in found):
            raise SourceError(f"--exclude={path}: has {max(found)}, which is more than 64 bits; {wanted}")
        return found
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, SourceError | ShardError | gcs.StorageError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SourceError(f"--exclude={path} cannot be read ({reason}); {wanted}") from None


@contextlib.contextmanager
def _alone(partial: Path, out: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a build while none of its processes, or of a killed one's, is at work in the folder."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("a") as file:
        until = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    why = "another process is making this folder; wait for it"
                    raise ChildProcessError(errno.EBUSY, why, str(out)) from None
                time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def _named(out: epath.PathLike) -> Iterator[None]:
    """What the system refuses, with the name of the folder that was asked for."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR"))
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code) if full else str(error), str(out)) from error
    except gcs.StorageError:
        raise
    except OSError as error:
        if error.filename is None or ".partial" in str(error.filename):
            error.filename = str(out)
        raise


def _settings(plan: Plan, origins: list[dict[str, Any]]) -> str:
    """All that decides the result, beside the inputs' bytes."""
    fields = asdict(replace(plan, out=str(plan.out))) | {"exclude": origins, "format": _FORMAT}
    del fields["processes"]
    return json.dumps(fields, sort_keys=True, default=str)


def _make_index(partial: Path, settings: str, opened: Callable[[Path], Opened]) -> _Index:
    """Streams all entries into `index.sqlite`; what a build with other settings left goes."""
    for path in partial.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    scratch = partial / "scratch"
    scratch.mkdir()
    source = opened(scratch)
    path, writing = partial / "index.sqlite", partial / "index.writing"
    with contextlib.closing(sqlite3.connect(writing, isolation_level=None)) as base:
        base.execute("PRAGMA journal_mode = OFF")
        base.execute("PRAGMA synchronous = OFF")
        base.execute("CREATE TABLE entries (place INTEGER PRIMARY KEY, line TEXT)")
        base.execute("CREATE TABLE meta (value BLOB)")
        base.execute("BEGIN")
        bar: tqdm[Entry] = tqdm(source.entries, "index", source.count, unit="entry", disable=None)
        base.executemany("INSERT INTO entries (line) VALUES (?)", ((pack(entry),) for entry in bar))
        (count,) = base.execute("SELECT count(*) FROM entries").fetchone()
        index = _Index(
            path, count, source.names, source.images, source.report, list(map(_digest, source.inputs)), source.expected
        )
        base.execute("INSERT INTO meta VALUES (?)", (pickle.dumps((settings, index)),))
        base.execute("COMMIT")
    writing.rename(path)
    shutil.rmtree(scratch)
    return index


def _index_there(partial: Path, settings: str) -> _Index | None:
    """The index of an earlier attempt, if it is of the same settings and the same inputs."""
    path = partial / "index.sqlite"
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as base:
            (value,) = base.execute("SELECT value FROM meta").fetchone()
        saved, index = pickle.loads(value)
        if saved != settings or any(_digest(epath.Path(item["file"])) != item for item in index.inputs):
            return None
    except (sqlite3.Error, pickle.UnpicklingError, OSError, TypeError, ValueError, AttributeError, ImportError):
        return None
    return index._replace(path=path)


def _digest(path: epath.Path) -> dict[str, Any]:
    """A file, its size and its sha256; of a folder both are of all files in it, by name."""
    if path.is_dir():
        files = sorted(path.iterdir(), key=lambda file: file.name)
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(_digest, files))
        named = "".join(f"{file.name} {part['sha256']}\n" for file, part in zip(files, parts))
        size = sum(part["bytes"] for part in parts)
        return {"file": str(path), "bytes": size, "sha256": hashlib.sha256(named.encode()).hexdigest()}
    with gcs.open_file(path) as file:
        digest, size = hashlib.sha256(), 0
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"file": str(path), "bytes": size, "sha256": digest.hexdigest()}


def _merge(
    plan: Plan,
    partial: Path,
    index: _Index,
    files: list[str],
    origins: list[dict[str, Any]],
    known: published.Published | None,
) -> tuple[Manifest, BuildReport]:
    """Joins what the shards' side files say, writes report and manifest, and gives the folder its name."""
    report, labels = Report(), Counter[int]()
    report.merge(index.report)

    def written() -> Iterator[shards.Written]:
        for file in files:
            part, found = read_side(partial, file)
            report.merge(found)
            labels.update(part.labels)
            yield part

    sides = list(written())
    if not any(part.records for part in sides):
        reasons = ", ".join(f"{reason} {n} (first: {report.first[reason]})" for reason, n in report.dropped.items())
        raise ShardError(
            f"nothing to write to {plan.out}: no record came out of {plan.source}"
            + (f"; dropped: {reasons}" if reasons else "")
        )
    manifest = shards.complete(
        partial, sides, name=plan.name or epath.Path(plan.out).absolute().name, names=index.names, source=plan.source, command=plan.command,
        licence=known.licence if known is not None and plan.licence == "unknown" else plan.licence,
        drops=dict(sorted(report.dropped.items())),
    )  # fmt: skip
    with np.load(partial / manifest.columns["file"]) as columns:
        hashes = columns["hash"]
    told = summary(manifest, report, labels, hashes, index.inputs, origins, known)
    (partial / "report.json").write_text(json.dumps(asdict(told), indent=1, ensure_ascii=False))
    beside = [*(partial / f"{file}.json" for file in files), partial / "excluded.npy", partial / "lock", index.path]
    shards.publish(partial, plan.out, beside)
    return manifest, told
