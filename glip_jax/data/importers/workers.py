"""Worker processes that write shards from ranges of a build's index. They do not import JAX, and exit with their parent."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import sqlite3
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from glip_jax import UserError
from glip_jax.config import Orientation
from glip_jax.data.importers.entry import Report, make_record, unpack
from glip_jax.data.shards import ShardWriter, Written
from glip_jax.io.cores import available_cores
from glip_jax.io.processes import end_with_parent

__all__ = [
    "BuildError",
    "Job",
    "Task",
    "WorkerError",
    "lines_of",
    "read_shard_info",
    "run",
    "shard_info",
    "write_shard",
]

_ENTRIES_PER_PROCESS = 200
"""Minimum number of entries per process; fewer take less time than the start of a process."""

_MESSAGE_INTERVAL = 0.3
"""Minimum seconds between two messages of a worker."""


class WorkerError(RuntimeError):
    """A worker process ended before its work was done."""


class BuildError(UserError, RuntimeError):
    """A build was refused or lost a worker; its intermediate files are kept, and the same command resumes it."""


@dataclass(frozen=True)
class Job:
    """Settings that all shards of a build share."""

    folder: Path
    index: Path
    """SQLite file with the table entries(position, line); positions from 1."""
    images: Callable[[str], bytes]
    names: int
    strict: bool
    orientation: Orientation


class Task(NamedTuple):
    """A shard and its range of entries."""

    file: str
    begin: int
    """First entry, counted from 0."""
    end: int
    """Index after the last entry."""


def run(
    job: Job, tasks: Sequence[Task], processes: int, finished: Callable[[str], object] = lambda _: None
) -> None:  # fmt: skip
    """Writes the shards that do not exist yet; an error of a worker is raised here.

    `processes` 0: one per core, limited by the numbers of shards and entries. With one process, the work is done in the calling process.
    `finished` is called in this process with the file of each shard that exists, or that has been written.
    """
    missing = [task for task in tasks if not _is_complete(job.folder, task.file)]
    for task in tasks:
        if task not in missing:
            finished(task.file)
    total, todo = (sum(task.end - task.begin for task in some) for some in (tasks, missing))
    processes = min(processes or min(available_cores(), max(1, todo // _ENTRIES_PER_PROCESS)), max(1, len(missing)))
    with tqdm(desc="records", total=total, initial=total - todo, unit="record", disable=None) as bar:
        if processes == 1:
            excluded = _excluded(job)
            for task in missing:
                write_shard(job, task.file, lines_of(job.index, task), excluded, bar.update)
                finished(task.file)
        else:
            _run_workers(job, missing, processes, bar, finished)


def read_shard_info(folder: Path, file: str) -> tuple[Written, Report]:
    """Reads the description of a shard."""
    return shard_info(json.loads((folder / f"{file}.json").read_text()))


def shard_info(fields: dict[str, Any]) -> tuple[Written, Report]:
    """The description of a shard, of JSON."""
    written = fields["written"]
    written["labels"] = {int(label): count for label, count in written["labels"].items()}
    written["columns"] = tuple(written["columns"])
    report = fields["report"]
    kept, dropped, noted = (Counter[str](report[key]) for key in ("kept", "dropped", "noted"))
    return Written(**written), Report(kept, dropped, report["first"], noted)


def _is_complete(folder: Path, file: str) -> bool:
    """Whether a shard is complete: its description is written last."""
    if not (folder / f"{file}.json").exists() or not (folder / file).exists():
        return False
    return (folder / file).stat().st_size == read_shard_info(folder, file)[0].bytes


def _excluded(job: Job) -> frozenset[int]:
    return frozenset(np.load(job.folder / "excluded.npy").tolist())


def lines_of(index: Path, task: Task) -> Iterator[str]:
    """The packed entries of a task."""
    with contextlib.closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as base:
        query = "SELECT line FROM entries WHERE position > ? AND position <= ? ORDER BY position"
        for (line,) in base.execute(query, (task.begin, task.end)):
            yield line


def write_shard(
    job: Job, file: str, lines: Iterable[str], excluded: frozenset[int], progress: Callable[[int], Any]
) -> None:
    """Writes one shard of packed entries, and its description; `progress` is called for each entry."""
    path, report = job.folder / file, Report(strict=job.strict)
    writing = job.folder / f"{file}.{os.getpid()}.writing"
    writer = ShardWriter(writing, job.names)
    try:
        for line in lines:
            record = make_record(unpack(line), job.images, report, excluded, job.orientation)
            if record is not None:
                writer.add(record)
            progress(1)
        written = asdict(writer.close()) | {"file": file}
    except BaseException:
        writer.abandon()
        writing.unlink(missing_ok=True)
        raise
    writing.rename(path)
    description = job.folder / f"{file}.json.{os.getpid()}.writing"
    description.write_text(json.dumps({"written": written, "report": vars(report)}))
    description.rename(job.folder / f"{file}.json")


def _run_workers(
    job: Job, tasks: Sequence[Task], processes: int, bar: tqdm, finished: Callable[[str], object]
) -> None:  # fmt: skip
    """Distributes the shards over new processes, and receives their messages."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    try:
        for i in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_worker, args=(job, tasks[i::processes], sender), daemon=True)
            worker.start()
            sender.close()
            workers[receiver] = worker
        listening = dict(workers)
        while listening:
            for receiver in wait(list(listening)):
                assert isinstance(receiver, Connection)
                try:
                    message = receiver.recv()
                except EOFError:
                    listening.pop(receiver).join()
                    code = workers[receiver].exitcode
                    if code:
                        raise WorkerError(
                            f"a worker ended with code {code} (killed, or out of memory: set fewer "
                            "--processes); the same command resumes the build"
                        ) from None
                    continue
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, str):
                    finished(message)
                else:
                    bar.update(message)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _worker(job: Job, tasks: Sequence[Task], parent: Connection) -> None:
    """Runs a worker."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its workers
    with _progress_messages(parent) as progress, (job.folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            excluded = _excluded(job)
            for task in tasks:
                write_shard(job, task.file, lines_of(job.index, task), excluded, progress)
                parent.send(task.file)
        except BrokenPipeError:
            return
        except Exception as error:
            with contextlib.suppress(BrokenPipeError):
                parent.send(_picklable(error))


@contextlib.contextmanager
def _progress_messages(parent: Connection) -> Iterator[Callable[[int], None]]:
    """Yields a function that counts entries and sends the count to the parent at intervals."""
    count, last = 0, time.monotonic()

    def progress(number: int) -> None:
        nonlocal count, last
        count += number
        if time.monotonic() - last > _MESSAGE_INTERVAL:
            parent.send(count)
            count, last = 0, time.monotonic()

    yield progress
    with contextlib.suppress(BrokenPipeError):
        parent.send(count)
    parent.close()


def _picklable(error: Exception) -> Exception:
    """A picklable copy of an error: those of this package and of the system as they are, others with their traceback as text."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    if type(error).__module__.startswith("glip_jax"):
        return type(error)(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))
