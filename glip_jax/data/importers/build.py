"""Builds a folder of shards from a validated annotation file, in several processes; an interrupted build can be resumed.

1. The entries are streamed once into an index, a SQLite file in `.NAME.partial/`, with the hashes of the inputs.
2. Processes write shards from contiguous ranges of the index. Each shard is written under a temporary name and renamed;
   a JSON file beside it describes its content.
3. Columns, report and manifest are merged, and the folder is renamed; a folder in a bucket is uploaded, the manifest last.

After an interruption the same command reuses the existing index and shards if settings and inputs are unchanged. The result
is identical, byte for byte, to that of an uninterrupted build with any number of processes. Changes of image files in between
are not detected. For a folder in a bucket, `.NAME.partial` is in `shard_cache.cache_folder` until everything is uploaded.

Several machines: see `glip_jax.data.importers.shared_build`.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
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

from glip_jax.config import Orientation
from glip_jax.data import shards
from glip_jax.data.importers import published
from glip_jax.data.importers.entry import Entry, ImageFolder, ImportSource, Report, SourceError, pack
from glip_jax.data.importers.losses import refuse_losses, remedy
from glip_jax.data.importers.report import BuildReport, summary
from glip_jax.data.importers.tfds import TfdsImages
from glip_jax.data.importers.workers import BuildError, Job, Task, WorkerError, read_shard_info, run
from glip_jax.data.records import RecordError
from glip_jax.data.shards import Manifest, ShardError
from glip_jax.io import gcs, text_files

__all__ = [
    "BuildPlan", "Index", "build", "build_lock", "excluded_hashes", "file_digest", "merge", "name_output_in_errors", "open_index", "settings_of",
    "tasks_of",
]  # fmt: skip

PER_SHARD = 4096
"""Entries per shard if the number of shards is not given: some hundred megabytes of photographs."""

_CHECK_DISK = "check the disk, then give the same command again"

_WAIT = 10.0
"""Seconds to wait for the workers of a killed build, which exit at their next message."""

_FORMAT = 4
"""Format version of the index and of the files that describe shards."""


@dataclass(frozen=True)
class BuildPlan:
    """Settings of a build; all except `processes` determine the bytes of the result."""

    out: epath.PathLike
    """Output folder."""
    source: str
    """The annotation file, as recorded in the manifest."""
    name: str = ""
    """Default: the name of `out`."""
    licence: str = "unknown"
    command: str = ""
    """The command line of the build, without options that do not affect the result."""
    shards: int | None = None
    """Number of shard files; None: one per 4,096 entries."""
    processes: int = 0
    """Number of worker processes; 0: one per core."""
    strict: bool = False
    """Whether to stop at the first item that would be dropped."""
    allow_drops: bool = False
    """Whether most boxes or images may be dropped for one reason."""
    chosen_drops: tuple[str, ...] = ()
    """Reasons for which they may be dropped anyway."""
    orientation: Orientation = "auto"
    """What boxes refer to in an image with an EXIF orientation: see `image_files.applied_orientation`."""
    exclude: tuple[epath.PathLike, ...] = ()
    """Files with content hashes of images that must not become records: see `excluded_hashes`."""
    published: str = ""
    """Name of the published data set to compare with; default: recognized by the name of the annotation file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings that determine the entries, as JSON."""


class Index(NamedTuple):
    """The entries of a source, in a file, and what else is known of them."""

    path: Path
    count: int
    boxes: int
    names: tuple[str, ...]
    images: Callable[[str], bytes]
    report: Report
    inputs: list[dict[str, Any]]
    """file, bytes, sha256."""
    published: str


def build(plan: BuildPlan, open_source: Callable[[Path], ImportSource]) -> tuple[Manifest, BuildReport]:
    """Builds the folder `plan.out`; returns its manifest and report.

    `open_source` opens the annotation files; its argument is a folder for temporary files. It is not called if an index of
    the same inputs exists. Raises SourceError and ShardError for invalid input (`.NAME.partial` is then removed), and OSError
    or BuildError for failures of the system, of a worker or of the lock (`.NAME.partial` is kept, and the same command resumes
    the build).
    """
    out = shards.writable(plan.out)
    if plan.shards is not None:
        shards.shard_files(plan.shards)
    if plan.processes < 0:
        raise ShardError(f"processes is {plan.processes}: expected at least 1, or 0 for one per core")
    published.find(plan.source, plan.published)  # refuses an unknown name
    excluded, origins = excluded_hashes(plan.exclude)
    partial = out.parent / f".{out.name}.partial"
    try:
        with build_lock(partial, plan.out), name_output_in_errors(plan.out):
            shards.writable(plan.out)  # another build may have completed while this one waited for the lock
            for stale in partial.glob("*.writing"):  # left by a killed build
                stale.unlink()
            settings = settings_of(plan, origins)
            index = open_index(plan, partial, settings, open_source)
            np.save(partial / "excluded.npy", np.array(sorted(excluded), np.uint64))
            tasks = tasks_of(plan, index)
            run(
                Job(partial, index.path, index.images, len(index.names), plan.strict, plan.orientation),
                tasks,
                plan.processes,
            )
            files = [task.file for task in tasks]
            made = merge(plan, partial, index, origins, [read_shard_info(partial, file) for file in files])
            temporary = [
                *(partial / f"{file}.json" for file in files),
                partial / "excluded.npy",
                partial / "lock",
                index.path,
            ]
            shards.publish(partial, plan.out, temporary)
            return made
    except (SourceError, ShardError, RecordError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_index(plan: BuildPlan, partial: Path, settings: str, open_source: Callable[[Path], ImportSource]) -> Index:
    """The index in `partial`, of an interrupted build or made now; SourceError if too much of the source would be lost."""
    index = _existing_index(partial, settings) or _make_index(partial, settings, open_source)
    refuse_losses(index.report, index.count, index.boxes, plan.source, plan.chosen_drops, plan.allow_drops)
    return index


def tasks_of(plan: BuildPlan, index: Index) -> list[Task]:
    """The shards and their ranges of entries."""
    files = shards.shard_files(plan.shards or max(1, -(-index.count // PER_SHARD)))
    bounds = [i * index.count // len(files) for i in range(len(files) + 1)]
    return [Task(file, *bounds[i : i + 2]) for i, file in enumerate(files)]


def excluded_hashes(files: Sequence[epath.PathLike]) -> tuple[frozenset[int], list[dict[str, Any]]]:
    """Reads content hashes (`records.content_hash`); returns them, and for each file its number of hashes and its sha256.

    A file is `columns.npz` or `manifest.json` of a folder of shards, such a folder, or a text file with one hash per line:
    decimal, or the first 16 (or all 64) hexadecimal digits of the SHA-256 of the image file. SourceError for other files.
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
    wanted = "expected manifest.json or columns.npz of a folder of shards, or a text file with one hash per line"
    try:
        folder = path.removesuffix("/manifest.json")
        if folder != path or gcs.kind(path) == "folder":
            return set(shards.Shards(folder).hash.tolist())
        data = gcs.open_file(path).read()
        if path.endswith(".npz"):
            with np.load(io.BytesIO(data)) as columns:
                return set(columns["hash"].tolist())
        found = set()
        for number, line in enumerate(text_files.decoded(data).split(), 1):
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
def build_lock(partial: Path, out: epath.PathLike) -> Iterator[None]:
    """Holds the lock of the build; waits until no process of another, or of a killed, build works in the folder."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("a") as file:
        until = time.monotonic() + _WAIT
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise BuildError(f"{out}: another process is making this folder; wait for it") from None
                time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def name_output_in_errors(out: epath.PathLike) -> Iterator[None]:
    """Makes errors of the system name the output folder instead of the temporary one."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
        raise BuildError(f"{out} cannot be made ({error}): {_CHECK_DISK}") from error
    except WorkerError as error:
        raise BuildError(f"{out}: {error}") from None
    except gcs.StorageError:
        raise
    except OSError as error:
        if error.errno == errno.EIO:
            raise BuildError(f"{out} cannot be made ({error.strerror}): {_CHECK_DISK}") from error
        if error.filename is None or ".partial" in str(error.filename):
            error.filename = str(out)
        raise


def settings_of(plan: BuildPlan, origins: list[dict[str, Any]]) -> str:
    """Everything that determines the result besides the content of the inputs, as JSON."""
    fields = asdict(replace(plan, out=str(plan.out))) | {"exclude": origins, "format": _FORMAT}
    del fields["processes"]
    return json.dumps(fields, sort_keys=True, default=str)


def _make_index(partial: Path, settings: str, open_source: Callable[[Path], ImportSource]) -> Index:
    """Streams all entries into `index.sqlite`, after removing the files of a build with other settings."""
    for path in partial.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    scratch = partial / "scratch"
    scratch.mkdir()
    source = open_source(scratch)
    path, writing = partial / "index.sqlite", partial / "index.writing"
    with contextlib.closing(sqlite3.connect(writing, isolation_level=None)) as base:
        base.execute("PRAGMA journal_mode = OFF")
        base.execute("PRAGMA synchronous = OFF")
        base.execute("CREATE TABLE entries (position INTEGER PRIMARY KEY, line TEXT)")
        base.execute("CREATE TABLE meta (value TEXT)")
        base.execute("BEGIN")
        boxes = 0

        def lines() -> Iterator[tuple[str]]:
            nonlocal boxes
            for entry in bar:
                boxes += len(entry.boxes)
                yield (pack(entry),)

        bar: tqdm[Entry] = tqdm(source.entries, "index", source.count, unit="entry", disable=None)
        base.executemany("INSERT INTO entries (line) VALUES (?)", lines())
        (count,) = base.execute("SELECT count(*) FROM entries").fetchone()
        index = Index(
            path,
            count,
            boxes,
            source.names,
            source.images,
            source.report,
            list(map(file_digest, source.inputs)),
            source.expected,
        )
        base.execute("INSERT INTO meta VALUES (?)", (_index_as_json(settings, index),))
        base.execute("COMMIT")
    writing.rename(path)
    shutil.rmtree(scratch)
    return index


def _existing_index(partial: Path, settings: str) -> Index | None:
    """The index of an interrupted build, if it has the same settings and inputs."""
    path = partial / "index.sqlite"
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as base:
            (value,) = base.execute("SELECT value FROM meta").fetchone()
        saved, index = _index_of_json(path, value)
        if saved != settings or any(file_digest(epath.Path(item["file"])) != item for item in index.inputs):
            return None
    except (sqlite3.Error, OSError, TypeError, ValueError, KeyError):
        return None
    return index


def _index_as_json(settings: str, index: Index) -> str:
    """What the index holds beside its entries. JSON, because others may write into the folder, and a pickle runs code."""
    match index.images:
        case ImageFolder() | TfdsImages():
            images = {key: str(value) for key, value in asdict(index.images).items()}
        case _:  # a reader of the caller's own: such a build begins anew
            images = None
    fields = {"settings": settings, "count": index.count, "boxes": index.boxes, "names": index.names, "images": images}
    fields |= {"report": vars(index.report), "inputs": index.inputs, "published": index.published}
    return json.dumps(fields)


def _index_of_json(path: Path, text: str) -> tuple[str, Index]:
    """Settings and index as `_index_as_json` wrote them; ValueError, KeyError or TypeError for anything else."""
    fields = json.loads(text)
    images, report = fields["images"], fields["report"]
    reader = TfdsImages(**images) if "key" in images else ImageFolder(**images | {"path": epath.Path(images["path"])})
    counts = {key: Counter[str](report.pop(key)) for key in ("kept", "dropped", "noted")}
    return fields["settings"], Index(
        path, fields["count"], fields["boxes"], tuple(fields["names"]), reader, Report(**counts, **report), fields["inputs"], fields["published"],
    )  # fmt: skip


def file_digest(path: epath.Path) -> dict[str, Any]:
    """Path, size and sha256 of a file; for a folder, of all files in it in order of name."""
    if path.is_dir():
        files = sorted(path.iterdir(), key=lambda file: file.name)
        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(file_digest, files))
        named = "".join(f"{file.name} {part['sha256']}\n" for file, part in zip(files, parts))
        size = sum(part["bytes"] for part in parts)
        return {"file": str(path), "bytes": size, "sha256": hashlib.sha256(named.encode()).hexdigest()}
    with gcs.open_file(path) as file:
        digest, size = hashlib.sha256(), 0
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"file": str(path), "bytes": size, "sha256": digest.hexdigest()}


def merge(
    plan: BuildPlan, partial: Path, index: Index, origins: list[dict[str, Any]], described: Sequence[tuple[shards.Written, Report]]
) -> tuple[Manifest, BuildReport]:  # fmt: skip
    """Merges the descriptions of the shards, in order, and writes columns, report and manifest into `partial`.

    Raises ShardError if there is no record, SourceError if too much was lost.
    """
    report, labels = Report(), Counter[int]()
    report.merge(index.report)
    for part, found in described:
        report.merge(found)
        labels.update(part.labels)
    parts = [part for part, _ in described]
    known = published.find(plan.source, plan.published)
    if known is None and index.published:
        known = published.find(plan.source, index.published)
    if not any(part.records for part in parts):
        reasons = ", ".join(f"{reason} {n} (first: {report.first[reason]})" for reason, n in report.dropped.items())
        raise ShardError(
            f"nothing to write to {plan.out}: no record came out of {plan.source}"
            + (f"; dropped: {reasons}{next(filter(None, map(remedy, report.dropped)), '')}" if reasons else "")
        )
    records, boxes = (sum(getattr(part, what) for part in parts) for what in ("records", "boxes"))
    refuse_losses(report, records, boxes, plan.source, plan.chosen_drops, plan.allow_drops)
    manifest = shards.complete(
        partial, parts, name=plan.name or epath.Path(plan.out).absolute().name, names=index.names, source=plan.source, command=plan.command,
        licence=known.licence if known is not None and plan.licence == "unknown" else plan.licence,
        drops=dict(sorted(report.dropped.items())),
    )  # fmt: skip
    with np.load(partial / manifest.columns["file"]) as columns:
        hashes = columns["hash"]
    build_report = summary(manifest, report, labels, hashes, index.inputs, origins, known, plan.settings)
    (partial / "report.json").write_text(json.dumps(asdict(build_report), indent=1, ensure_ascii=False))
    return manifest, build_report
