"""Shares the shards of a labelling among processes, on any hosts, that know of one another only through the folder they write.

    OUT/.partial/plan.json            what all of them do, written by the first; another with other settings is refused
    OUT/.partial/TASK.claim           who is at work on a task; its time of change is a heartbeat
    OUT/.partial/TASK.OWNER.writing   a result that is being written
    OUT/.partial/TASK.json            the task is done: names the one result that counts, and what is to be said of it
    OUT/TASK                          that result
    OUT/manifest.json                 everything is done; `.partial` goes

A claim saves work, it decides nothing: one whose heartbeat is older than the lease, or whose process is seen to be dead,
is taken over, and in a rare race two processes do the same task. What decides is that TASK.json is made by a hard link,
which fails where the name exists: the process that made it has done the task, and the result of any other is removed.
The same holds for manifest.json. The file system must have hard links and show a new file to all hosts at once (local
disks, NFS, Lustre do; gcsfuse does not).
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["LEASE", "TaskError", "Tasks"]

LEASE = 120.0
"""Seconds without a heartbeat after which a task's process is taken for dead."""


class TaskError(ValueError):
    """A folder in which these tasks cannot be done."""


class Tasks:
    """The tasks of one folder, seen by one process."""

    def __init__(self, out: Path, names: Sequence[str], settings: Mapping[str, Any], lease: float = LEASE) -> None:
        """Joins those at work in `out`, or begins.

        `names`: the files to make; `settings`: all that decides what is in them, as JSON. Raises TaskError if the
        folder holds something else, or the work of other settings (with the differences); OSError if the file system
        refuses.
        """
        self.out, self.names, self.lease = out, tuple(names), lease
        self._work = out / ".partial"
        self._owner = uuid.uuid4().hex[:12]
        self._me = json.dumps(
            {"owner": self._owner, "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}, sort_keys=True
        )
        if out.exists() and not out.is_dir():
            raise TaskError(f"{out} is a file: expected a folder to make")
        if out.is_dir() and any(out.iterdir()) and not self._work.is_dir() and not self.finished:
            raise TaskError(f"{out} is not empty, without a manifest: remove it or name another folder")
        self._work.mkdir(parents=True, exist_ok=True)
        self._same_plan({"tasks": list(self.names), **settings})

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return (self.out / "manifest.json").exists()

    def done(self, name: str) -> bool:
        """Whether a task is done."""
        return (self._work / f"{name}.json").exists() or self.finished

    def mine(self, look: Callable[[], Any] = lambda: None) -> Generator[str, None, None]:
        """Tasks that this process is to do, one after the other, until all are done by whomever.

        A task that is not published when the next is asked for may come again. Waits for what others are at, and does
        it where they die; `look` is called now and then while it waits.
        """
        while True:
            waiting = False
            for name in self.names:
                if self.done(name):
                    continue
                with self.claim(name) as claimed:
                    if not claimed:
                        waiting = True
                    elif not self.done(name):
                        yield name
            if self.finished or (not waiting and all(map(self.done, self.names))):
                return
            if waiting:
                look()
                time.sleep(min(5.0, self.lease / 5))

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claims `name` while the context lasts; False where a living process has it, or the folder is finished."""
        path = self._work / f"{name}.claim"
        if not self._claimed(path):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            for left in self._work.glob(f"{name}.{self._owner}.writing"):
                left.unlink(missing_ok=True)
            if self._holder(path) == self._me:
                path.unlink(missing_ok=True)

    def writing(self, name: str) -> Path:
        """Where this process writes the result of a task."""
        return self._work / f"{name}.{self._owner}.writing"

    def publish(self, name: str, side: Mapping[str, Any]) -> bool:
        """Makes what lies at `writing` the result of a task, with `side` (JSON) beside it; False if another was first."""
        result = self.writing(name)
        with result.open("rb+") as file:
            os.fsync(file.fileno())
        if not self._create(f"{name}.json", json.dumps({"result": result.name, **side}, ensure_ascii=False)):
            result.unlink(missing_ok=True)
            return False
        self._settle(name, result.name)
        return True

    def side(self, name: str) -> dict[str, Any]:
        """What was said of a task that is done; also sees to it that its result has its name."""
        side = json.loads((self._work / f"{name}.json").read_text())
        self._settle(name, side.pop("result"))
        return side

    def finish(self, manifest: str) -> bool:
        """Writes manifest.json; False if another process was first."""
        return self._create("../manifest.json", manifest)

    def scratch(self, name: str) -> Path:
        """An empty folder of this process for what it makes under the claim `name`."""
        folder = self._work / f"{name}.{self._owner}.scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def abandon(self) -> None:
        """Removes everything, for work of which nothing comes."""
        for name in self.names:
            (self.out / name).unlink(missing_ok=True)
        self.clear()
        with contextlib.suppress(OSError):  # what is not ours stays
            self.out.rmdir()

    def clear(self) -> None:
        """Removes what only the work needed."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _settle(self, name: str, result: str) -> None:
        """Gives the result its name; whoever comes second finds it done."""
        with contextlib.suppress(FileNotFoundError):
            (self._work / result).replace(self.out / name)

    def _create(self, name: str, text: str) -> bool:
        """Makes a whole file that was not there; False if it was."""
        aside = self._work / f"{Path(name).name}.{uuid.uuid4().hex[:12]}.aside"
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, self._work / name)
            except FileExistsError:
                return False
            return True
        finally:
            aside.unlink(missing_ok=True)

    def _same_plan(self, plan: Mapping[str, Any]) -> None:
        path = self._work / "plan.json"
        text = json.dumps(plan, indent=1, sort_keys=True, ensure_ascii=False)
        if path.exists() or not self._create("plan.json", text):
            theirs, ours = json.loads(path.read_text()), json.loads(text)
            keys = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
            if keys:
                lines = "; ".join(f"{key}: {_short(theirs.get(key))} -> {_short(ours.get(key))}" for key in keys)
                raise TaskError(
                    f"{self.out} was begun with other settings (there -> given: {lines}): give those, name another "
                    "folder, or remove this one"
                )

    def _claimed(self, path: Path) -> bool:
        """Makes the claim, or takes it over from the dead."""
        try:
            if self._create(path.name, self._me):
                return True
            if not self._dead(path):
                return False
            aside = path.with_suffix(f".{self._owner}.aside")
            aside.write_text(self._me)
            aside.replace(path)
            # Of two that take over at once, the later one's words stand.
            return self._holder(path) == self._me
        except FileNotFoundError:
            if self.finished:  # and so the folder of the work is gone
                return False
            raise

    def _dead(self, path: Path) -> bool:
        """Whether the process of a claim is no more; removes what it was writing."""
        try:
            age = self._now() - path.stat().st_mtime
            holder = json.loads(path.read_text())
            gone = (holder["host"], holder["boot"]) == (socket.gethostname(), _boot()) and not _alive(holder["pid"])
            owner = holder["owner"]
        except FileNotFoundError:
            return False  # done this moment; the next round sees it
        except (ValueError, KeyError, TypeError):
            gone, owner = True, ""  # no claim of ours, or one that a crash left empty
        if not gone and age < self.lease:
            return False
        if owner:
            for left in self._work.glob(f"*.{owner}.writing"):
                if gone:  # a process that only sleeps may still wake up and go on
                    left.unlink(missing_ok=True)
        return True

    def _holder(self, path: Path) -> str:
        try:
            return path.read_text()
        except FileNotFoundError:
            return ""

    def _now(self) -> float:
        """The time by the clock that also stamps the claims: of a file server, hosts may have others."""
        probe = self._work / f"{self._owner}.clock"
        probe.touch()
        return probe.stat().st_mtime

    def _beat(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(self.lease / 6):
            if self._holder(path) == self._me:
                with contextlib.suppress(OSError):
                    os.utime(path)


def _boot() -> str:
    """What process numbers belong to: a machine since it was last started, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    """Whether a process of this machine is there; one that has ended and that its parent has not asked about is not."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
