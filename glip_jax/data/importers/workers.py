"""Processes that make shards from ranges of a build's index. They know no jax and end when their parent does."""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from glip_jax.data.importers.entry import Report, finish, unpack
from glip_jax.data.shards import ShardWriter, Written

__all__ = ["Job", "Task", "read_side", "run"]

_WORTH_A_PROCESS = 200
"""Entries that take longer to finish than a process takes to start."""

_TELLS = 0.3
"""Seconds between two messages of a worker."""


@dataclass(frozen=True)
class Job:
    """What all shards of a build share."""

    folder: Path
    index: Path
    """SQLite: entries(place, line), places from 1."""
    images: Callable[[str], bytes]
    names: int
    strict: bool


class Task(NamedTuple):
    """A shard, and which entries go into it."""

    file: str
    begin: int
    """First entry, counted from 0."""
    end: int
    """Behind the last."""


def run(job: Job, tasks: Sequence[Task], processes: int) -> None:
    """Makes the shards that are not there yet; what a worker raises is raised here.

    `processes` 0: as many as there are cores, shards, and entries worth it. One works in this process.
    """
    missing = [task for task in tasks if not _there(job.folder, task.file)]
    total, todo = tasks[-1].end, sum(task.end - task.begin for task in missing)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes or min(cores, max(1, todo // _WORTH_A_PROCESS)), max(1, len(missing)))
    with tqdm(desc="records", total=total, initial=total - todo, unit="record", disable=None) as bar:
        if processes == 1:
            excluded = _excluded(job)
            for task in missing:
                _make(job, task, excluded, bar.update)
        else:
            _over_processes(job, missing, processes, bar)


def read_side(folder: Path, file: str) -> tuple[Written, Report]:
    """What the side file of a shard says."""
    fields = json.loads((folder / f"{file}.json").read_text())
    written = fields["written"]
    written["labels"] = {int(label): count for label, count in written["labels"].items()}
    written["columns"] = tuple(written["columns"])
    told = fields["report"]
    kept, dropped, noted = (Counter[str](told[key]) for key in ("kept", "dropped", "noted"))
    return Written(**written), Report(kept, dropped, told["first"], noted)


def _there(folder: Path, file: str) -> bool:
    """Whether a shard is complete: its side file is written last."""
    if not (folder / f"{file}.json").exists() or not (folder / file).exists():
        return False
    return (folder / file).stat().st_size == read_side(folder, file)[0].bytes


def _excluded(job: Job) -> frozenset[int]:
    return frozenset(np.load(job.folder / "excluded.npy").tolist())


def _make(job: Job, task: Task, excluded: frozenset[int], made: Callable[[int], Any]) -> None:
    """One shard; `made` is told of each entry that is done."""
    path, report = job.folder / task.file, Report(strict=job.strict)
    writing = job.folder / f"{task.file}.{os.getpid()}.writing"
    writer = ShardWriter(writing, job.names)
    try:
        with contextlib.closing(sqlite3.connect(f"file:{job.index}?mode=ro", uri=True)) as base:
            question = "SELECT line FROM entries WHERE place > ? AND place <= ? ORDER BY place"
            for (line,) in base.execute(question, (task.begin, task.end)):
                record = finish(unpack(line), job.images, report, excluded)
                if record is not None:
                    writer.add(record)
                made(1)
        written = asdict(writer.close()) | {"file": task.file}
    except BaseException:
        writer.abandon()
        writing.unlink(missing_ok=True)
        raise
    writing.rename(path)
    side = job.folder / f"{task.file}.json.{os.getpid()}.writing"
    side.write_text(json.dumps({"written": written, "report": vars(report)}))
    side.rename(job.folder / f"{task.file}.json")


def _over_processes(job: Job, tasks: Sequence[Task], processes: int, bar: tqdm) -> None:
    """Deals the shards to new processes and listens to them."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    try:
        for i in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(job, tasks[i::processes], theirs), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
        listening = dict(workers)
        while listening:
            for ours in wait(list(listening)):
                assert isinstance(ours, Connection)
                try:
                    message = ours.recv()
                except EOFError:
                    listening.pop(ours).join()
                    code = workers[ours].exitcode
                    if code:
                        why = f"a worker ended with code {code} (killed, or out of memory: fewer --processes)"
                        raise ChildProcessError(None, why, str(job.folder)) from None
                    continue
                if isinstance(message, BaseException):
                    raise message
                bar.update(message)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _work(job: Job, tasks: Sequence[Task], parent: Connection) -> None:
    """A worker's life. A parent that is no more ends it at its next message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    with _telling(parent) as made, (job.folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        try:
            excluded = _excluded(job)
            for task in tasks:
                _make(job, task, excluded, made)
        except BrokenPipeError:
            return
        except Exception as error:
            with contextlib.suppress(BrokenPipeError):
                parent.send(_plain(error))


@contextlib.contextmanager
def _telling(parent: Connection) -> Iterator[Callable[[int], None]]:
    """Messages with the number of entries done since the last, not too many."""
    count, last = 0, time.monotonic()

    def made(number: int) -> None:
        nonlocal count, last
        count += number
        if time.monotonic() - last > _TELLS:
            parent.send(count)
            count, last = 0, time.monotonic()

    yield made
    with contextlib.suppress(BrokenPipeError):
        parent.send(count)
    parent.close()


def _plain(error: Exception) -> Exception:
    """An error that can travel: our own and the system's as they are, others with their traceback as text."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror or str(error), error.filename)
    if type(error).__module__.startswith("glip_jax"):
        return type(error)(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))
