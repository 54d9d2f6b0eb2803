"""Storage of a work queue: a folder of a file system or of a bucket, with the same guarantees.

Exactly one of the processes that `create` a file succeeds, the file appears complete or not at all, and every process sees
it immediately. The age of a claim is measured by the clock of the storage, so the clocks of hosts may differ.

    file system   a file is created by a hard link, which fails if the name exists; a heartbeat sets the modification time.
                  Local disks, NFS and Lustre support both, gcsfuse does not
    bucket        an object is created on the condition that it does not exist; a heartbeat rewrites the claim. Results are
                  written below `cache_folder` and uploaded; a rename is a copy in the storage and a removal

Names are relative to the folder: `manifest.json`, `.partial/plan.json`.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from etils import epath

from glip_jax.data.shard_cache import cache_folder
from glip_jax.io import gcs
from glip_jax.io.claims import BucketClaims, Claim

__all__ = ["WORK", "Claim", "WorkStore", "open_store"]

WORK = ".partial"
"""Name of the work folder in the output folder."""

_REMOVALS = 16
"""Objects that are removed concurrently."""


@runtime_checkable
class WorkStore(Protocol):
    """A folder that several processes write. All methods raise OSError (`gcs.StorageError`) if the storage fails."""

    address: str

    def prepare(self, owner: str) -> None:
        """Creates the work folder, and a scratch folder of this process where one is needed."""
        ...

    def files(self) -> set[str]:
        """Names in the folder except WORK; empty if the folder does not exist."""
        ...

    def work(self) -> set[str]:
        """Names in WORK; empty if it does not exist."""
        ...

    def has(self, name: str) -> bool:
        """Whether the file exists."""
        ...

    def read(self, name: str) -> str:
        """Text of a file; FileNotFoundError if it does not exist."""
        ...

    def create(self, name: str, text: str) -> bool:
        """Creates a file atomically; False if it exists."""
        ...

    def read_claim(self, name: str) -> Claim:
        """A claim with its age; FileNotFoundError if there is none."""
        ...

    def take_over(self, name: str, text: str, claim: Claim) -> bool:
        """Replaces a claim by `text`; False if another process was first. Not exclusive in all cases: see `work_queue`."""
        ...

    def heartbeat(self, name: str, text: str) -> None:
        """Renews a claim, if it still is `text`."""
        ...

    def local(self, name: str) -> Path:
        """Local path at which this process writes a file before `put`."""
        ...

    def put(self, local: Path, name: str) -> None:
        """Moves a local file to `name`, replacing an existing one."""
        ...

    def rename(self, name: str, to: str) -> None:
        """Renames a file; does nothing if another process has. FileNotFoundError if neither name exists."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it exists."""
        ...

    def release(self, name: str, text: str) -> None:
        """Removes a claim, if it still is `text`."""
        ...

    def clear(self) -> None:
        """Removes WORK, the plan first, and the scratch folder of this process."""
        ...

    def remove_folder(self) -> None:
        """Removes the folder itself if it is empty."""
        ...


def open_store(out: epath.PathLike) -> WorkStore:
    """The store of a path, local or gs://."""
    return _BucketStore(gcs.address(out)) if gcs.is_remote(out) else _LocalStore(Path(out).absolute())


class _LocalStore:
    """A folder of a file system that all processes share."""

    def __init__(self, folder: Path) -> None:
        self.address, self._folder, self._work = str(folder), folder, folder / WORK

    def prepare(self, owner: str) -> None:
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

    def read_claim(self, name: str) -> Claim:
        path = self._folder / name
        text = path.read_text()
        probe = self._work / f"{self._owner}.clock"  # measures by the clock that also stamps the claims
        probe.touch()
        return Claim(text, probe.stat().st_mtime - path.stat().st_mtime, version=0)

    def take_over(self, name: str, text: str, claim: Claim) -> bool:
        path = self._folder / name
        if path.read_text() != claim.text:
            return False
        temporary = path.with_suffix(f".{self._owner}.temporary")
        temporary.write_text(text)
        temporary.replace(path)
        # If two processes take over at once, the text of the later one remains.
        return path.read_text() == text

    def heartbeat(self, name: str, text: str) -> None:
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

    def release(self, name: str, text: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.read(name) == text:
                self.remove(name)

    def clear(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)

    def remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # other files stay
            self._folder.rmdir()


class _BucketStore:
    """A folder in a bucket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._scratch: Path | None = None
        self._lock: IO[bytes] | None = None

    def prepare(self, owner: str) -> None:
        self._claims = BucketClaims(self.address, f"{WORK}/{owner}.clock")
        folder = cache_folder() / "labelling" / hashlib.sha256(self.address.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        # A live process holds the lock on its scratch folder: a folder that can be locked was left by a dead process.
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
        return set(gcs.list_files(f"{self.address}/{WORK}"))

    def has(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            gcs.stat(self._address(name))
            return True
        return False

    def read(self, name: str) -> str:
        return gcs.read(self._address(name)).decode()

    def create(self, name: str, text: str) -> bool:
        return self._claims.create(name, text)

    def read_claim(self, name: str) -> Claim:
        return self._claims.read(name)

    def take_over(self, name: str, text: str, claim: Claim) -> bool:
        return self._claims.take_over(name, text, claim)

    def heartbeat(self, name: str, text: str) -> None:
        self._claims.heartbeat(name, text)

    def local(self, name: str) -> Path:
        assert self._scratch is not None, "prepare() has not been called"
        return self._scratch / name

    def put(self, local: Path, name: str) -> None:
        gcs.upload_file(local, self._address(name))
        local.unlink()

    def rename(self, name: str, to: str) -> None:
        if self.has(to):  # copies appear complete; the original is removed with WORK
            return
        try:
            gcs.copy(self._address(name), self._address(to))
        except FileNotFoundError:
            if not self.has(to):
                raise
        self.remove(name)

    def remove(self, name: str) -> None:
        gcs.remove(self._address(name))

    def release(self, name: str, text: str) -> None:
        self._claims.release(name, text)

    def clear(self) -> None:
        left = self.work()
        if "plan.json" in left:
            self.remove(f"{WORK}/plan.json")
            left = self.work() - {"plan.json"}  # again, for files that were created before the plan was removed
        with ThreadPoolExecutor(_REMOVALS) as pool:
            list(pool.map(self.remove, (f"{WORK}/{name}" for name in left)))
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def remove_folder(self) -> None:
        """Does nothing: a folder in a bucket ends with its last object."""

    def _address(self, name: str) -> str:
        return f"{self.address}/{name}"
