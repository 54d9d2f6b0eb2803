"""Where the shared work of `tasks` lies: a folder of a file system, or one in a bucket. Both give the same few promises.

Of all processes that `create` a file one succeeds, and what it wrote is there as a whole or not at all; a new file is seen
by everybody at once; a claim's age is by the place's own clock, so that hosts may have others.

    a folder   created by a hard link, which fails where the name exists; a heartbeat is the file's time. Local disks, NFS
               and Lustre have these, gcsfuse does not
    a bucket   created under the condition that there is no such object; a heartbeat writes the claim again. Results are
               written below `cache_folder` and sent; a rename is a copy inside the storage and a removal

Names are relative to the folder: `manifest.json`, `.partial/plan.json`.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple, Protocol, runtime_checkable

from etils import epath

from glip_jax.data.shard_cache import cache_folder
from glip_jax.io import gcs

__all__ = ["WORK", "Held", "Place", "place_of"]

WORK = ".partial"
"""The folder of what only the work needs."""

_REMOVALS = 16
"""Objects that are removed at a time."""


class Held(NamedTuple):
    """A claim as it is found."""

    text: str
    age: float
    """Seconds since it was written or its holder gave a sign of life."""
    version: int
    """What `take` replaces; 0 where the place has no such number."""


@runtime_checkable
class Place(Protocol):
    """A folder that several processes work in. All methods raise OSError (`storage.StorageError`) if it refuses."""

    address: str

    def begin(self, owner: str) -> None:
        """Makes what is needed to work here."""
        ...

    def files(self) -> set[str]:
        """Names of what lies in the folder itself, but for WORK; empty if it is not there."""
        ...

    def work(self) -> set[str]:
        """Names in WORK; empty if it is not there."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def read(self, name: str) -> str:
        """A file's text; FileNotFoundError if it is not there."""
        ...

    def create(self, name: str, text: str) -> bool:
        """Makes a whole file that was not there; False if it was."""
        ...

    def held(self, name: str) -> Held:
        """A claim, with its age; FileNotFoundError if there is none."""
        ...

    def take(self, name: str, text: str, held: Held) -> bool:
        """Puts `text` in place of a claim; False if another process was first. Decides nothing: see `tasks`."""
        ...

    def beat(self, name: str, text: str) -> None:
        """A sign of life, if the claim still is `text`."""
        ...

    def local(self, name: str) -> Path:
        """Where this process writes what `put` gives a name in WORK."""
        ...

    def put(self, local: Path, name: str) -> None:
        """Gives a local file a name here, in place of one that is there."""
        ...

    def rename(self, name: str, to: str) -> None:
        """Gives a file another name; whoever comes second finds it done. FileNotFoundError if neither is there."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file; none there is no fault."""
        ...

    def give_back(self, name: str, text: str) -> None:
        """Removes a claim, if it still is `text`."""
        ...

    def clear(self) -> None:
        """Removes WORK, the plan first, and what of this process lies elsewhere."""
        ...

    def remove_folder(self) -> None:
        """Removes the folder itself if nothing is left in it."""
        ...


def place_of(out: epath.PathLike) -> Place:
    """The place of a path, local or gs://."""
    return _Bucket(gcs.address(out)) if gcs.is_remote(out) else _Folder(Path(out).absolute())


class _Folder:
    """A folder of a file system that all processes see."""

    def __init__(self, folder: Path) -> None:
        self.address, self._folder, self._work = str(folder), folder, folder / WORK

    def begin(self, owner: str) -> None:
        self._work.mkdir(parents=True, exist_ok=True)
        self._owner = owner

    def files(self) -> set[str]:
        return set(os.listdir(self._folder)) - {WORK} if self._folder.is_dir() else set()

    def work(self) -> set[str]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return set(os.listdir(self._work))
        return set()

    def has(self, name: str) -> bool:
        return (self._folder / name).exists()

    def read(self, name: str) -> str:
        return (self._folder / name).read_text()

    def create(self, name: str, text: str) -> bool:
        aside = self._work / f"{Path(name).name}.{uuid.uuid4().hex[:12]}.aside"
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(aside, self._folder / name)
            except FileExistsError:
                return False
            return True
        finally:
            aside.unlink(missing_ok=True)

    def held(self, name: str) -> Held:
        path = self._folder / name
        text = path.read_text()
        probe = self._work / f"{self._owner}.clock"  # the clock that also stamps the claims
        probe.touch()
        return Held(text, probe.stat().st_mtime - path.stat().st_mtime, version=0)

    def take(self, name: str, text: str, held: Held) -> bool:
        path = self._folder / name
        if path.read_text() != held.text:
            return False
        aside = path.with_suffix(f".{self._owner}.aside")
        aside.write_text(text)
        aside.replace(path)
        # Of two that take over at once, the later one's words stand.
        return path.read_text() == text

    def beat(self, name: str, text: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.read(name) == text:
                os.utime(self._folder / name)

    def local(self, name: str) -> Path:
        return self._work / name

    def put(self, local: Path, name: str) -> None:
        with local.open("rb+") as file:
            os.fsync(file.fileno())
        local.replace(self._folder / name)

    def rename(self, name: str, to: str) -> None:
        try:
            (self._folder / name).replace(self._folder / to)
        except FileNotFoundError:
            if not self.has(to):
                raise

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def give_back(self, name: str, text: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.read(name) == text:
                self.remove(name)

    def clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)

    def remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # what is not ours stays
            self._folder.rmdir()


class _Bucket:
    """A folder in a bucket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._clock: float | None = None
        self._scratch: Path | None = None
        self._lock: IO[bytes] | None = None

    def begin(self, owner: str) -> None:
        self._owner = owner
        folder = cache_folder() / "labelling" / hashlib.sha256(self.address.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        # A process holds the lock on its scratch for as long as it lives: what can be locked was left by the dead.
        for left in folder.iterdir():
            with contextlib.suppress(OSError), (left / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        self._scratch, aside = folder / owner, folder / f"{owner}.lock"
        self._lock = aside.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._scratch.mkdir()
        aside.rename(self._scratch / "lock")

    def files(self) -> set[str]:
        return set(gcs.listing(self.address))

    def work(self) -> set[str]:
        return set(gcs.listing(f"{self.address}/{WORK}"))

    def has(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            gcs.stamp(self._at(name))
            return True
        return False

    def read(self, name: str) -> str:
        return gcs.read(self._at(name)).decode()

    def create(self, name: str, text: str) -> bool:
        return self._noted(gcs.put(self._at(name), text.encode(), over=0)) is not None

    def held(self, name: str) -> Held:
        found = gcs.stamp(self._at(name))
        if self._clock is None:
            probe = f"{WORK}/{self._owner}.clock"
            self._noted(gcs.put(self._at(probe), b""))
            self.remove(probe)
        # The storage's time, by a clock of ours that was set when it last answered: late by that answer's way, so
        # nobody is taken for older than he is.
        assert self._clock is not None
        age = self._clock + time.monotonic() - found.updated
        # Who writes between the two is not missed: `take` replaces what was stamped and nothing else.
        return Held(text=self.read(name), age=age, version=found.generation)

    def take(self, name: str, text: str, held: Held) -> bool:
        return self._noted(gcs.put(self._at(name), text.encode(), over=held.version)) is not None

    def beat(self, name: str, text: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = gcs.stamp(self._at(name))
            if self.read(name) == text:
                self._noted(gcs.put(self._at(name), text.encode(), over=found.generation))

    def local(self, name: str) -> Path:
        assert self._scratch is not None, "begin comes first"
        return self._scratch / name

    def put(self, local: Path, name: str) -> None:
        gcs.send(local, self._at(name))
        local.unlink()

    def rename(self, name: str, to: str) -> None:
        if self.has(to):  # a copy appears as a whole; what it was made of goes with WORK
            return
        try:
            gcs.copy(self._at(name), self._at(to))
        except FileNotFoundError:
            if not self.has(to):
                raise
        self.remove(name)

    def remove(self, name: str) -> None:
        gcs.remove(self._at(name))

    def give_back(self, name: str, text: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            found = gcs.stamp(self._at(name))
            if self.read(name) == text:
                gcs.remove(self._at(name), found.generation)

    def clear(self) -> None:
        left = self.work()
        if "plan.json" in left:
            self.remove(f"{WORK}/plan.json")
            left = self.work() - {"plan.json"}  # once more: what was made before the plan went
        with ThreadPoolExecutor(_REMOVALS) as pool:
            list(pool.map(self.remove, (f"{WORK}/{name}" for name in left)))
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def remove_folder(self) -> None:
        """Folders in a bucket end with what is in them."""

    def _at(self, name: str) -> str:
        return f"{self.address}/{name}"

    def _noted(self, written: gcs.Stamp | None) -> gcs.Stamp | None:
        """Sets the clock by what the storage has just written."""
        if written is not None:
            self._clock = written.updated - time.monotonic()
        return written
