"""A work queue in a folder: processes on any hosts share the shards of a labelling job through the folder they write.

    OUT/.partial/plan.json            settings of the job, written by the first process; others with other settings are refused
    OUT/.partial/TASK.claim           the process that works on a task; its modification time is a heartbeat
    OUT/.partial/TASK.OWNER.writing   a result that is being written
    OUT/.partial/TASK.json            the task is done: names the result that counts, and holds its statistics
    OUT/TASK                          that result
    OUT/manifest.json                 the job is done; `.partial` is removed, plan.json first

OUT is a folder of a file system or gs://; `work_store` implements the operations for both.

Claims only avoid duplicate work: a claim whose heartbeat is older than the lease, or whose process is known to be dead, is
taken over, and in a rare race two processes do the same task. The atomic creation of TASK.json decides: the process that
creates it has done the task, and the result of any other process is removed. The same holds for manifest.json.

A process that was suspended until after the job was completed would find no TASK.json and could create one again. A process
that has created a TASK.json therefore checks that plan.json is still the one it joined, and removes its TASK.json otherwise.
plan.json is removed first, so while it exists nothing else has been removed.
"""

import contextlib
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from glip_jax import UserError
from glip_jax.io import gcs
from glip_jax.io.claims import LEASE, Claim, died, holder
from glip_jax.labeling.work_store import WORK, open_store

__all__ = ["LEASE", "TaskError", "WorkQueue", "differences", "sweep"]


class TaskError(UserError, ValueError):
    """The output folder cannot be used for this job."""


class WorkQueue:
    """The tasks of one folder, as seen by one process."""

    def __init__(
        self, out: epath.PathLike, names: Sequence[str], settings: Mapping[str, Any], lease: float = LEASE
    ) -> None:
        """Joins the work in `out`, or starts it.

        `names`: the files to create; `settings`: everything that determines their content, as JSON. Raises TaskError if
        the folder holds something else or work with other settings (the message lists the differences), and OSError for
        failures of the file system or the storage.
        """
        self.names, self.lease = tuple(names), lease
        self._store = open_store(out)
        self._owner = uuid.uuid4().hex[:12]
        self._claim_text = holder(self._owner)
        if gcs.kind(out) == "file":
            raise TaskError(f"{self._store.address} is a file: expected a folder to create")
        if self._store.files() and not self._store.work() and not self.finished:
            raise TaskError(f"{self._store.address} is not empty, without a manifest: remove it or name another folder")
        self._store.prepare(self._owner)
        self._plan = self._join({"tasks": list(self.names), **settings})
        self._seen: set[str] = set()
        self._refresh()

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return self._store.has("manifest.json")

    @property
    def seen(self) -> frozenset[str]:
        """The tasks that were done when this process last checked."""
        return frozenset(self._seen)

    def done(self, name: str) -> bool:
        """Whether a task is done."""
        if name not in self._seen and (self._store.has(f"{WORK}/{name}.json") or self.finished):
            self._seen.add(name)
        return name in self._seen

    def claim_tasks(self, on_wait: Callable[[], Any] = lambda: None) -> Generator[str, None, None]:
        """Yields tasks that this process has claimed, until all tasks are done by any process.

        A task that was not published before the next one is requested may be yielded again. Waits for the tasks of other
        processes and takes them over if a process dies; `on_wait` is called periodically while waiting.
        """
        while not self.finished:
            waiting = False
            self._refresh()
            for name in self.names:
                if name in self._seen:
                    continue
                with self.claim(name) as claimed:
                    if not claimed:
                        waiting = True
                    elif not self.done(name):
                        yield name
                        self._refresh()
            if not waiting and all(map(self.done, self.names)):
                return
            if waiting:
                on_wait()
                time.sleep(min(5.0, self.lease / 5))

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claims `name` for the duration of the context; False if a live process holds it or the folder is finished."""
        if not self._try_claim(name):
            yield False
            return
        stop = threading.Event()
        heartbeat = threading.Thread(target=self._heartbeat, args=(_claim_name(name), stop), daemon=True)
        heartbeat.start()
        try:
            yield True
        finally:
            stop.set()
            heartbeat.join()
            self.writing(name).unlink(missing_ok=True)
            self._store.release(_claim_name(name), self._claim_text)

    def writing(self, name: str) -> Path:
        """The local file for the result of a task; it is removed when the claim ends."""
        return self._store.local(f"{name}.{self._owner}.writing")

    def publish(self, name: str, info: Mapping[str, Any]) -> bool:
        """Makes the file `writing` the result of a task, with `info` (JSON); False if another process was first."""
        result, entry = f"{name}.{self._owner}.result", f"{WORK}/{name}.json"
        if self.done(name):
            self.writing(name).unlink(missing_ok=True)
            return False
        self._store.put(self.writing(name), f"{WORK}/{result}")
        first = self._store.create(entry, json.dumps({"result": result, **info}, ensure_ascii=False))
        if first and not self._plan_unchanged():
            self._store.remove(entry)
            first = False
        if not first:
            self._store.remove(f"{WORK}/{result}")
            return False
        self._rename_result(name, result)
        return True

    def result_info(self, name: str) -> dict[str, Any]:
        """The `info` of a task that is done; also completes the renaming of its result if necessary."""
        info = json.loads(self._store.read(f"{WORK}/{name}.json"))
        self._rename_result(name, info.pop("result"))
        return info

    def put(self, local: Path, name: str) -> None:
        """Moves a local file into the folder, under `name`."""
        self._store.put(local, name)

    def finish(self, manifest: str) -> bool:
        """Writes manifest.json; False if another process was first."""
        return self._store.create("manifest.json", manifest)

    def scratch(self, name: str) -> Path:
        """An empty local folder for what this process creates under the claim `name`."""
        folder = self._store.local(f"{name}.{self._owner}.scratch")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def abandon(self) -> None:
        """Removes everything, for a job without a result."""
        for name in self.names:
            self._store.remove(name)
        self.clear()
        self._store.remove_folder()

    def clear(self) -> None:
        """Removes the work folder."""
        self._store.clear()

    def _refresh(self) -> None:
        """Updates the set of tasks that are done, with one request."""
        existing = self._store.work()
        self._seen.update(name for name in self.names if f"{name}.json" in existing)
        if "plan.json" not in existing and self.finished:
            self._seen.update(self.names)

    def _rename_result(self, name: str, result: str) -> None:
        """Renames the result to its final name; does nothing if another process has done so."""
        self._store.rename(f"{WORK}/{result}", name)

    def _join(self, plan: Mapping[str, Any]) -> str:
        """The text of the plan that all processes share; TaskError if it differs from `plan`."""
        wanted = json.loads(json.dumps(plan))
        # The writer's name distinguishes this plan from one that is created after the job was completed or abandoned.
        text = json.dumps({**wanted, "begun_by": self._owner}, indent=1, sort_keys=True, ensure_ascii=False)
        while True:
            if self._store.create(f"{WORK}/plan.json", text):
                return text
            with contextlib.suppress(FileNotFoundError):  # the job was completed in between
                text = self._store.read(f"{WORK}/plan.json")
                break
        existing = json.loads(text)
        if lines := differences({k: v for k, v in existing.items() if k != "begun_by"}, wanted):
            raise TaskError(
                f"{self._store.address} was begun with other settings (existing -> given: {lines}): give the existing "
                "ones, name another folder, or remove this one"
            )
        return text

    def _plan_unchanged(self) -> bool:
        """Whether plan.json is still the one that this process joined."""
        with contextlib.suppress(FileNotFoundError):
            return self._store.read(f"{WORK}/plan.json") == self._plan
        return False

    def _try_claim(self, name: str) -> bool:
        """Creates the claim, or takes over an abandoned one."""
        try:
            # Read first: a bucket allows many more reads than writes of one object.
            claim = self._store.read_claim(_claim_name(name))
        except FileNotFoundError:
            try:
                return self._store.create(_claim_name(name), self._claim_text)
            except FileNotFoundError:
                if self.finished:  # then the work folder was removed
                    return False
                raise
        try:
            return self._is_abandoned(name, claim) and self._store.take_over(_claim_name(name), self._claim_text, claim)
        except FileNotFoundError:
            return False  # released in between; the next round sees it

    def _is_abandoned(self, name: str, claim: Claim) -> bool:
        """Whether the process of a claim is dead or its lease has expired; removes the file that a dead process wrote."""
        gone, owner = died(claim.text)
        if not gone and claim.age < self.lease:
            return False
        if gone and owner:  # a suspended process may resume and continue
            self._store.remove(f"{WORK}/{name}.{owner}.writing")
        return True

    def _heartbeat(self, claim: str, stop: threading.Event) -> None:
        while not stop.wait(self.lease / 6):
            with contextlib.suppress(OSError):
                self._store.heartbeat(claim, self._claim_text)


_ADDED = {"records"}
"""Settings that earlier versions did not record; they are compared where they are there."""


def differences(existing: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The settings that differ, with both values, in one line; empty if there are none."""
    keys = sorted({*existing, *given}.difference(_ADDED - existing.keys()))
    keys = [key for key in keys if existing.get(key) != given.get(key)]
    return "; ".join(f"{key}: {_short(existing.get(key))} -> {_short(given.get(key))}" for key in keys)


def sweep(out: epath.PathLike) -> None:
    """Removes the work folder that a killed process left in a finished folder. Raises OSError if the storage fails."""
    open_store(out).clear()


def _claim_name(name: str) -> str:
    return f"{WORK}/{name}.claim"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
