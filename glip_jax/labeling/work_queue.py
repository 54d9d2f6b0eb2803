"""Shares the shards of a labelling among processes, on any hosts, that know of one another only through the folder they write.

    OUT/.partial/plan.json            what all of them do, written by the first; another with other settings is refused
    OUT/.partial/TASK.claim           who is at work on a task; its time of change is a heartbeat
    OUT/.partial/TASK.OWNER.writing   a result that is being written
    OUT/.partial/TASK.json            the task is done: names the one result that counts, and what is to be said of it
    OUT/TASK                          that result
    OUT/manifest.json                 everything is done; `.partial` goes, plan.json first

OUT is a folder of a file system or gs://; `places` says how each keeps its promises.

A claim saves work, it decides nothing: one whose heartbeat is older than the lease, or whose process is seen to be dead,
is taken over, and in a rare race two processes do the same task. What decides is that TASK.json is created where there was
none: the process that made it has done the task, and the result of any other is removed. The same holds for manifest.json.

One who slept while all others ended the work would find no TASK.json again, and be first once more. So who has made one
looks whether the plan is still the one it joined, and takes its TASK.json back if not: the plan goes before anything else
does, so with the plan there nothing was removed yet, and whoever was first, was first.
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

from etils import epath

from glip_jax import UserError
from glip_jax.io import gcs
from glip_jax.labeling.work_store import WORK, Held, place_of

__all__ = ["LEASE", "TaskError", "Tasks", "differences", "sweep"]

LEASE = 120.0
"""Seconds without a heartbeat after which a task's process is taken for dead."""


class TaskError(UserError, ValueError):
    """A folder in which these tasks cannot be done."""


class Tasks:
    """The tasks of one folder, seen by one process."""

    def __init__(
        self, out: epath.PathLike, names: Sequence[str], settings: Mapping[str, Any], lease: float = LEASE
    ) -> None:
        """Joins those at work in `out`, or begins.

        `names`: the files to make; `settings`: all that decides what is in them, as JSON. Raises TaskError if the
        folder holds something else, or the work of other settings (with the differences); OSError if the file system
        or the storage refuses.
        """
        self.names, self.lease = tuple(names), lease
        self._place = place_of(out)
        self._owner = uuid.uuid4().hex[:12]
        self._me = json.dumps(
            {"owner": self._owner, "host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}, sort_keys=True
        )
        if gcs.kind(out) == "file":
            raise TaskError(f"{self._place.address} is a file: expected a folder to make")
        if self._place.files() and not self._place.work() and not self.finished:
            raise TaskError(f"{self._place.address} is not empty, without a manifest: remove it or name another folder")
        self._place.begin(self._owner)
        self._plan = self._joined({"tasks": list(self.names), **settings})
        self._seen: set[str] = set()
        self._look()

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return self._place.has("manifest.json")

    @property
    def seen(self) -> frozenset[str]:
        """The tasks that were done when this process last looked."""
        return frozenset(self._seen)

    def done(self, name: str) -> bool:
        """Whether a task is done."""
        if name not in self._seen and (self._place.has(f"{WORK}/{name}.json") or self.finished):
            self._seen.add(name)
        return name in self._seen

    def mine(self, look: Callable[[], Any] = lambda: None) -> Generator[str, None, None]:
        """Tasks that this process is to do, one after the other, until all are done by whomever.

        A task that is not published when the next is asked for may come again. Waits for what others are at, and does
        it where they die; `look` is called now and then while it waits.
        """
        while not self.finished:
            waiting = False
            self._look()
            for name in self.names:
                if name in self._seen:
                    continue
                with self.claim(name) as claimed:
                    if not claimed:
                        waiting = True
                    elif not self.done(name):
                        yield name
                        self._look()
            if not waiting and all(map(self.done, self.names)):
                return
            if waiting:
                look()
                time.sleep(min(5.0, self.lease / 5))

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claims `name` while the context lasts; False where a living process has it, or the folder is finished."""
        if not self._claimed(name):
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._beat, args=(_claim(name), stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            self.writing(name).unlink(missing_ok=True)
            self._place.give_back(_claim(name), self._me)

    def writing(self, name: str) -> Path:
        """Where this process writes the result of a task: a local file, which goes when the claim ends."""
        return self._place.local(f"{name}.{self._owner}.writing")

    def publish(self, name: str, side: Mapping[str, Any]) -> bool:
        """Makes what lies at `writing` the result of a task, with `side` (JSON) beside it; False if another was first."""
        result, entry = f"{name}.{self._owner}.result", f"{WORK}/{name}.json"
        if self.done(name):
            self.writing(name).unlink(missing_ok=True)
            return False
        self._place.put(self.writing(name), f"{WORK}/{result}")
        first = self._place.create(entry, json.dumps({"result": result, **side}, ensure_ascii=False))
        if first and not self._planned():
            self._place.remove(entry)
            first = False
        if not first:
            self._place.remove(f"{WORK}/{result}")
            return False
        self._settle(name, result)
        return True

    def side(self, name: str) -> dict[str, Any]:
        """What was said of a task that is done; also sees to it that its result has its name."""
        side = json.loads(self._place.read(f"{WORK}/{name}.json"))
        self._settle(name, side.pop("result"))
        return side

    def put(self, local: Path, name: str) -> None:
        """Moves a local file into the folder, under `name`."""
        self._place.put(local, name)

    def finish(self, manifest: str) -> bool:
        """Writes manifest.json; False if another process was first."""
        return self._place.create("manifest.json", manifest)

    def scratch(self, name: str) -> Path:
        """An empty local folder of this process for what it makes under the claim `name`."""
        folder = self._place.local(f"{name}.{self._owner}.scratch")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def abandon(self) -> None:
        """Removes everything, for work of which nothing comes."""
        for name in self.names:
            self._place.remove(name)
        self.clear()
        self._place.remove_folder()

    def clear(self) -> None:
        """Removes what only the work needed."""
        self._place.clear()

    def _look(self) -> None:
        """Notes which tasks are done, at one request."""
        there = self._place.work()
        self._seen.update(name for name in self.names if f"{name}.json" in there)
        if "plan.json" not in there and self.finished:
            self._seen.update(self.names)

    def _settle(self, name: str, result: str) -> None:
        """Gives the result its name; whoever comes second finds it done."""
        self._place.rename(f"{WORK}/{result}", name)

    def _joined(self, plan: Mapping[str, Any]) -> str:
        """The text of the plan that all follow; TaskError if it says something else."""
        ours = json.loads(json.dumps(plan))
        # Its writer's name tells this plan from one that is made anew when the work was ended or given up.
        own = json.dumps({**ours, "begun_by": self._owner}, indent=1, sort_keys=True, ensure_ascii=False)
        while True:
            if self._place.create(f"{WORK}/plan.json", own):
                return own
            with contextlib.suppress(FileNotFoundError):  # the work ended this moment
                text = self._place.read(f"{WORK}/plan.json")
                break
        theirs = json.loads(text)
        if lines := differences({k: v for k, v in theirs.items() if k != "begun_by"}, ours):
            raise TaskError(
                f"{self._place.address} was begun with other settings (there -> given: {lines}): give those, name "
                "another folder, or remove this one"
            )
        return text

    def _planned(self) -> bool:
        """Whether the work that this process joined goes on."""
        with contextlib.suppress(FileNotFoundError):
            return self._place.read(f"{WORK}/plan.json") == self._plan
        return False

    def _claimed(self, name: str) -> bool:
        """Makes the claim, or takes it over from the dead."""
        try:
            held = self._place.held(_claim(name))  # first: a bucket bears many who look, and few who try to write
        except FileNotFoundError:
            try:
                return self._place.create(_claim(name), self._me)
            except FileNotFoundError:
                if self.finished:  # and so the folder of the work is gone
                    return False
                raise
        try:
            return self._dead(name, held) and self._place.take(_claim(name), self._me, held)
        except FileNotFoundError:
            return False  # given back this moment; the next round sees it

    def _dead(self, name: str, held: Held) -> bool:
        """Whether the process of a claim is no more; removes what it was writing."""
        try:
            holder = json.loads(held.text)
            gone = (holder["host"], holder["boot"]) == (socket.gethostname(), _boot()) and not _alive(holder["pid"])
            owner = holder["owner"]
        except (ValueError, KeyError, TypeError):
            gone, owner = True, ""  # no claim of ours, or one that a crash left empty
        if not gone and held.age < self.lease:
            return False
        if gone and owner:  # a process that only sleeps may still wake up and go on
            self._place.remove(f"{WORK}/{name}.{owner}.writing")
        return True

    def _beat(self, claim: str, stop: threading.Event) -> None:
        while not stop.wait(self.lease / 6):
            with contextlib.suppress(OSError):
                self._place.beat(claim, self._me)


def differences(there: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What two settings do not share, both values of each, in a line; nothing if they are the same."""
    keys = [key for key in sorted({*there, *given}) if there.get(key) != given.get(key)]
    return "; ".join(f"{key}: {_short(there.get(key))} -> {_short(given.get(key))}" for key in keys)


def sweep(out: epath.PathLike) -> None:
    """Removes what a killed process left of the work on a finished folder. Raises OSError if the storage refuses."""
    place_of(out).clear()


def _claim(name: str) -> str:
    return f"{WORK}/{name}.claim"


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
