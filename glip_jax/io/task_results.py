"""Results of the tasks of a job in the folder that it makes: whoever creates the entry of a task has done it.

    OUT/.partial/plan.json            settings of the job, written by the first process; others with other settings are refused
    OUT/.partial/TASK.OWNER.writing   a result that is being written (for a bucket in a local folder)
    OUT/.partial/TASK.OWNER.result    a result of which is not decided yet whether it counts
    OUT/.partial/TASK.json            the task is done: names the result that counts, and holds what is known of it
    OUT/TASK                          that result
    OUT/manifest.json                 the job is done; `.partial` is removed, plan.json first

OUT is a folder of a file system or gs://. Who does which task is decided elsewhere (one process in order, `--part`, Ray). Where two
do the same one, the atomic creation of TASK.json decides, and the other result is removed. The same holds for manifest.json.

    file system   a file is created by a hard link, which fails if the name exists; local disks, NFS and Lustre do, gcsfuse does not
    bucket        an object is created on the condition that it does not exist; a rename is a copy in the storage and a removal

A process that was suspended until after the job was completed would find no TASK.json and could create one again. A process
that has created a TASK.json therefore checks that plan.json is still the one it joined, and removes its TASK.json otherwise.
plan.json is removed first, so while it exists nothing else has been removed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from glip_jax import UserError
from glip_jax.io import gcs

__all__ = ["TaskError", "TaskResults", "differences", "is_begun", "sweep"]

_WORK = ".partial"
"""Name of the work folder in the output folder."""

_REMOVALS = 16
"""Objects that are removed concurrently."""


class TaskError(UserError, ValueError):
    """The output folder cannot be used for this job."""


class TaskResults:
    """The tasks of one folder and what is known of them, as seen by one process."""

    def __init__(
        self, out: epath.PathLike, names: Sequence[str], settings: Mapping[str, Any], scratch: Path, join: bool = False
    ) -> None:
        """Joins the work in `out`, or starts it.

        `names`: the files to create; `settings`: everything that determines their content, as JSON; `scratch`: a local folder for results
        on their way to a bucket; `join`: the work has been started by another process, whose folder this one must see. Raises TaskError if
        the folder holds something else or work with other settings (the message lists the differences), and OSError for
        failures of the file system or the storage.
        """
        self.names = tuple(names)
        self._store = _open_store(out)
        self._owner = uuid.uuid4().hex[:12]
        if gcs.kind(out) == "file":
            raise TaskError(f"{self._store.address} is a file: expected a folder to create")
        if join and not self._store.has(f"{_WORK}/plan.json"):
            raise TaskError(
                f"{self._store.address} is not the folder of this job on {socket.gethostname()}: give an --out that all nodes see, on a shared "
                "file system or gs://"
            )
        if self._store.files() and not self._store.work() and not self.finished:
            raise TaskError(f"{self._store.address} is not empty, without a manifest: remove it or name another folder")
        self._store.prepare(self._owner, scratch)
        self._plan = self._join({"tasks": list(self.names), **settings})
        self._seen: set[str] = set()
        self.refresh()

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return self._store.has("manifest.json")

    @property
    def missing(self) -> list[str]:
        """The tasks that were not done when this process last checked, in order."""
        return [name for name in self.names if name not in self._seen]

    def done(self, name: str) -> bool:
        """Whether a task is done."""
        if name not in self._seen and (self._store.has(f"{_WORK}/{name}.json") or self.finished):
            self._seen.add(name)
        return name in self._seen

    def refresh(self) -> None:
        """Updates what is known to be done, with two requests."""
        existing = self._store.work()
        self._seen.update(self.names if self.finished else (name for name in self.names if f"{name}.json" in existing))

    def writing(self, name: str) -> Path:
        """The local file for the result of a task; whoever does not publish it removes it."""
        return self._store.local(f"{name}.{self._owner}.writing")

    def publish(self, name: str, info: Mapping[str, Any], local: Path | None = None) -> bool:
        """Makes the file `local` (default: `writing`) the result of a task, with `info` (JSON); False if another process was first."""
        local = self.writing(name) if local is None else local
        result, entry = f"{name}.{self._owner}.result", f"{_WORK}/{name}.json"
        if self.done(name):
            local.unlink(missing_ok=True)
            return False
        self._store.put(local, f"{_WORK}/{result}")
        first = self._store.create(entry, json.dumps({"result": result, **info}, ensure_ascii=False))
        if first and not self._plan_unchanged():
            self._store.remove(entry)
            first = False
        if not first:
            self._store.remove(f"{_WORK}/{result}")
            return False
        self._rename_result(name, result)
        return True

    def result_info(self, name: str) -> dict[str, Any]:
        """The `info` of a task that is done; also completes the renaming of its result if necessary."""
        info = json.loads(self._store.read(f"{_WORK}/{name}.json"))
        self._rename_result(name, info.pop("result"))
        return info

    def put(self, local: Path, name: str) -> None:
        """Moves a local file into the folder, under `name`."""
        self._store.put(local, name)

    def finish(self, manifest: str) -> bool:
        """Writes manifest.json; False if another process was first."""
        return self._store.create("manifest.json", manifest)

    def scratch(self, name: str) -> Path:
        """An empty local folder for what this process creates."""
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
        """Removes the work folder, and what this process has on its machine."""
        self._store.clear()
        self.close()

    def close(self) -> None:
        """Removes what this process has on its machine."""
        self._store.close()

    def _rename_result(self, name: str, result: str) -> None:
        """Renames the result to its final name; does nothing if another process has done so."""
        self._store.rename(f"{_WORK}/{result}", name)

    def _join(self, plan: Mapping[str, Any]) -> str:
        """The text of the plan that all processes share; TaskError if it differs from `plan`."""
        wanted = json.loads(json.dumps(plan))
        # The writer's name distinguishes this plan from one that is created after the job was completed or abandoned.
        text = json.dumps({**wanted, "begun_by": self._owner}, indent=1, sort_keys=True, ensure_ascii=False)
        while True:
            if self._store.create(f"{_WORK}/plan.json", text):
                return text
            with contextlib.suppress(FileNotFoundError):  # the job was completed in between
                text = self._store.read(f"{_WORK}/plan.json")
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
            return self._store.read(f"{_WORK}/plan.json") == self._plan
        return False


_ADDED = {"records"}
"""Settings that earlier versions did not record; they are compared where they are there."""


def differences(existing: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The settings that differ, with both values, in one line; empty if there are none."""
    keys = sorted({*existing, *given}.difference(_ADDED - existing.keys()))
    keys = [key for key in keys if existing.get(key) != given.get(key)]
    return "; ".join(f"{key}: {_short(existing.get(key))} -> {_short(given.get(key))}" for key in keys)


def is_begun(out: epath.PathLike) -> bool:
    """Whether the folder holds work of tasks that is not completed. Raises OSError if the storage fails."""
    store = _open_store(out)
    return store.has(f"{_WORK}/plan.json") and not store.has("manifest.json")


def sweep(out: epath.PathLike) -> None:
    """Removes the work folder that a killed process left in a finished folder. Raises OSError if the storage fails."""
    _open_store(out).clear()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _open_store(out: epath.PathLike) -> "_LocalStore | _BucketStore":
    """The store of a path, local or gs://. Its names are relative to the folder: `manifest.json`, `.partial/plan.json`."""
    return _BucketStore(gcs.address(out)) if gcs.is_remote(out) else _LocalStore(Path(out).absolute())


class _LocalStore:
    """A folder of a file system that all processes share. `_BucketStore` has the same methods; both raise OSError if the storage fails."""

    def __init__(self, folder: Path) -> None:
        self.address, self._folder, self._work = str(folder), folder, folder / _WORK

    def prepare(self, owner: str, scratch: Path) -> None:  # noqa: ARG002
        """Creates the work folder, or a scratch folder of this process where one is needed."""
        self._work.mkdir(parents=True, exist_ok=True)

    def files(self) -> set[str]:
        """Names in the folder except _WORK; empty if the folder does not exist."""
        return set(os.listdir(self._folder)) - {_WORK} if self._folder.is_dir() else set()

    def work(self) -> set[str]:
        """Names in _WORK; empty if it does not exist."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return set(os.listdir(self._work))
        return set()

    def has(self, name: str) -> bool:
        """Whether the file exists."""
        return (self._folder / name).exists()

    def read(self, name: str) -> str:
        """Text of a file; FileNotFoundError if it does not exist."""
        return (self._folder / name).read_text()

    def create(self, name: str, text: str) -> bool:
        """Creates a file atomically, complete at once; False if it exists."""
        temporary = self._work / f"{Path(name).name}.{uuid.uuid4().hex[:12]}.temporary"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, self._folder / name)
            except FileExistsError:
                return False
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        """Local path at which this process writes a file before `put`."""
        return self._work / name

    def put(self, local: Path, name: str) -> None:
        """Moves a local file to `name`, replacing an existing one."""
        with local.open("rb+") as file:
            os.fsync(file.fileno())
        target = self._folder / name
        if (
            local.stat().st_dev != target.parent.stat().st_dev
        ):  # a rename would not be atomic: first to the same file system
            local = Path(shutil.move(local, self._work / f"{uuid.uuid4().hex[:12]}.temporary"))
        local.replace(target)

    def rename(self, name: str, to: str) -> None:
        """Renames a file; does nothing if another process has. FileNotFoundError if neither name exists."""
        try:
            (self._folder / name).replace(self._folder / to)
        except FileNotFoundError:
            if not self.has(to):
                raise

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        (self._folder / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes _WORK, the plan first."""
        self.remove(f"{_WORK}/plan.json")
        shutil.rmtree(self._work, ignore_errors=True)

    def close(self) -> None:
        """Removes the scratch folder of this process."""

    def remove_folder(self) -> None:
        """Removes the folder itself if it is empty."""
        with contextlib.suppress(OSError):  # other files stay
            self._folder.rmdir()


class _BucketStore:
    """A folder in a bucket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._scratch: Path | None = None

    def prepare(self, owner: str, scratch: Path) -> None:
        folder = scratch / hashlib.sha256(self.address.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        # A live process holds the lock on its scratch folder: a folder that can be locked was left by a killed one.
        for left in folder.iterdir():
            with contextlib.suppress(OSError), (left / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        self._scratch, temporary = folder / owner, folder / f"{owner}.lock"
        self._lock = temporary.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._scratch.mkdir()
        temporary.rename(self._scratch / "lock")

    def files(self) -> set[str]:
        return set(gcs.list_files(self.address))

    def work(self) -> set[str]:
        return set(gcs.list_files(f"{self.address}/{_WORK}"))

    def has(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            gcs.stat(self._address(name))
            return True
        return False

    def read(self, name: str) -> str:
        return gcs.read(self._address(name)).decode()

    def create(self, name: str, text: str) -> bool:
        return gcs.put(self._address(name), text.encode(), over=0) is not None

    def local(self, name: str) -> Path:
        assert self._scratch is not None, "prepare() has not been called"
        return self._scratch / name

    def put(self, local: Path, name: str) -> None:
        gcs.upload_file(local, self._address(name))
        local.unlink()

    def rename(self, name: str, to: str) -> None:
        if self.has(to):  # copies appear complete; the original is removed with _WORK
            return
        try:
            gcs.copy(self._address(name), self._address(to))
        except FileNotFoundError:
            if not self.has(to):
                raise
        self.remove(name)

    def remove(self, name: str) -> None:
        gcs.remove(self._address(name))

    def clear(self) -> None:
        left = self.work()
        if "plan.json" in left:
            self.remove(f"{_WORK}/plan.json")
            left = self.work() - {"plan.json"}  # again, for files that were created before the plan was removed
        with ThreadPoolExecutor(_REMOVALS) as pool:
            list(pool.map(self.remove, (f"{_WORK}/{name}" for name in left)))

    def close(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def remove_folder(self) -> None:
        """Does nothing: a folder in a bucket ends with its last object."""

    def _address(self, name: str) -> str:
        return f"{self.address}/{name}"
