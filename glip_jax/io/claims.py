"""Claims of one process on a place that others may want: who it is, whether it is alive, and the claim on a working folder.

    WORKDIR/.lock    the training that writes there: host, boot, pid. Of a folder it is locked (flock) for as long as the process
                     lives; of a bucket its time of writing is a heartbeat

A process that was killed leaves no claim that blocks: the kernel releases its lock; in a bucket its claim is taken over at once
by a process of the same machine, and elsewhere as soon as its heartbeat is older than `LEASE`.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from glip_jax.io import gcs
from glip_jax.io.workdir import CheckpointError, workdir_path

__all__ = ["LEASE", "LOCK", "BucketClaims", "Claim", "Owned", "died", "holder", "owned_workdir"]

logger = logging.getLogger(__name__)

LEASE = 120.0
"""Seconds without a heartbeat after which the process of a claim is considered dead."""

LOCK = ".lock"

_RETRY_SECONDS = 2.0
"""Time for a process that ends to release its lock."""

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system without flock says, such as Lustre mounted without it."""


def holder(owner: str) -> str:
    """The text of a claim: this process, as JSON; `owner` is a random name of it."""
    pid = os.getpid()
    text = {"owner": owner, "host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _started(pid)}
    return json.dumps(text, sort_keys=True)


def died(text: str) -> tuple[bool, str]:
    """Whether the process of a claim is known to be dead, as one of this machine may be, and its owner ("" for no claim)."""
    try:
        found = json.loads(text)
        here = (found["host"], found["boot"]) == (socket.gethostname(), _boot())
        # A number may belong to another process by now, in a container that was started again even to this one.
        another = found.get("started", _started(found["pid"])) != _started(found["pid"])
        return here and (another or not _alive(found["pid"])), found["owner"]
    except (ValueError, KeyError, TypeError):
        return True, ""  # not a claim, or one that a crash left empty


def _boot() -> str:
    """Identifies the namespace of process ids: the boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine was started, in ticks since its boot; "" if that is not known."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _alive(pid: int) -> bool:
    """Whether a process of this machine is running; zombies are not."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Claim(NamedTuple):
    """State of a claim."""

    text: str
    age: float
    """Seconds since it was written or since the last heartbeat."""
    version: int
    """Generation that `take_over` replaces; 0 for a file system."""


class BucketClaims:
    """Claims in a folder of a bucket. An object is created on the condition that it does not exist; a heartbeat rewrites it."""

    def __init__(self, address: str, probe: str) -> None:
        """`probe`: name of a file to write for the clock of the storage, where nothing else was written yet."""
        self._address, self._probe = address, probe
        self._clock: float | None = None

    def create(self, name: str, text: str) -> bool:
        """Creates a file atomically; False if it exists."""
        return self._set_clock(gcs.put(f"{self._address}/{name}", text.encode(), over=0)) is not None

    def read(self, name: str) -> Claim:
        """A claim with its age; FileNotFoundError if there is none."""
        place = f"{self._address}/{name}"
        stamp = gcs.stat(place)
        if self._clock is None:
            probe = f"{self._address}/{self._probe}"
            self._set_clock(gcs.put(probe, b""))
            gcs.remove(probe)
        # The storage's time, estimated from its last response: late by that response's delay, so an age is never
        # overestimated.
        assert self._clock is not None
        age = self._clock + time.monotonic() - stamp.updated
        # A write between the two requests is not missed: `take_over` replaces only the generation that was read here.
        return Claim(text=gcs.read(place).decode(), age=age, version=stamp.generation)

    def take_over(self, name: str, text: str, claim: Claim) -> bool:
        """Replaces a claim by `text`; False if another process was first."""
        return self._set_clock(gcs.put(f"{self._address}/{name}", text.encode(), over=claim.version)) is not None

    def heartbeat(self, name: str, text: str) -> bool:
        """Renews a claim, if it still is `text`; False if it is not."""
        place = f"{self._address}/{name}"
        try:
            stamp = gcs.stat(place)
            mine = gcs.read(place).decode() == text
        except FileNotFoundError:
            return False
        if mine:
            self._set_clock(gcs.put(place, text.encode(), over=stamp.generation))
        return mine

    def release(self, name: str, text: str) -> None:
        """Removes a claim, if it still is `text`."""
        place = f"{self._address}/{name}"
        with contextlib.suppress(FileNotFoundError):
            stamp = gcs.stat(place)
            if gcs.read(place).decode() == text:
                gcs.remove(place, stamp.generation)

    def _set_clock(self, written: gcs.FileStat | None) -> gcs.FileStat | None:
        """Sets the clock by the time stamp of an object that the storage has just written."""
        if written is not None:
            self._clock = written.updated - time.monotonic()
        return written


class Owned:
    """A working folder that this process holds."""

    lost = ""
    """Why it is held no longer."""

    def check(self) -> None:
        """Raises CheckpointError if another process has taken the folder over, as after a suspension of this one."""
        if self.lost:
            raise CheckpointError(self.lost)


@contextlib.contextmanager
def owned_workdir(workdir: str, lease: float = LEASE, flag: str = "--workdir") -> Iterator[Owned]:
    """Holds the working folder, which exists, for this process alone. Raises CheckpointError if another one holds it.

    `flag`: the flag that names it, for messages.

    Where the file system has no locks a warning says so, and nothing is held.
    """
    text = holder(uuid.uuid4().hex[:12])
    with (_claimed if gcs.is_remote(workdir) else _locked)(workdir, text, lease, flag) as owned:
        yield owned


@contextlib.contextmanager
def _locked(workdir: str, text: str, lease: float, flag: str) -> Iterator[Owned]:
    path = Path(workdir_path(workdir)) / LOCK
    with _lock(path, workdir, lease, flag) as file:
        _write(file, text)
        try:
            yield Owned()
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path, workdir: str, lease: float, flag: str) -> IO[str]:
    """The locked file. Waits for a process that ends, and longer for one of another host, which may have been lost."""
    begin, said = time.monotonic(), False
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()  # its holder has removed it meanwhile
        except BlockingIOError:
            file.seek(0)
            who, here = _who(file.read())
            file.close()
            if time.monotonic() - begin > (_RETRY_SECONDS if here else lease):
                raise CheckpointError(_in_use(workdir, who, flag)) from None
            if not here and not said:
                logger.info(
                    f"{flag}={workdir} is locked by {who}: waiting up to {lease:.0f} s, in case that host was lost"
                )
                said = True
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning(f"{path} cannot be locked ({error.strerror}): start no second job in this folder")
            return file


def _write(file: IO[str], text: str) -> None:
    """Says in the file who holds its lock; that the lock is held does not depend on it."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(text)
        file.flush()


@contextlib.contextmanager
def _claimed(workdir: str, text: str, lease: float, flag: str) -> Iterator[Owned]:
    address, owned, stop = gcs.address(workdir), Owned(), threading.Event()
    claims = BucketClaims(address, f"{LOCK}.{uuid.uuid4().hex[:12]}.clock")
    _claim(claims, workdir, text, lease, flag)

    def renew() -> None:
        while not stop.wait(lease / 6):
            with contextlib.suppress(OSError):  # the next heartbeat tries again
                if not claims.heartbeat(LOCK, text):
                    owned.lost = (
                        f"another process has taken over {flag}={workdir}, as this one gave no sign of life for {lease:.0f} s: "
                        "only one of them can go on"
                    )
                    return

    thread = threading.Thread(target=renew, name="claim", daemon=True)
    thread.start()
    try:
        yield owned
    finally:
        stop.set()
        thread.join(1.0)  # it may wait for a storage that does not answer
        with contextlib.suppress(OSError):
            claims.release(LOCK, text)


def _claim(claims: BucketClaims, workdir: str, text: str, lease: float, flag: str) -> None:
    """Creates the claim, or takes over that of a dead process; waits until it is known to be dead or alive."""
    first: Claim | None = None
    while not claims.create(LOCK, text):
        try:
            found = claims.read(LOCK)
            if died(found.text)[0] or found.age > lease:
                if claims.take_over(LOCK, text, found):
                    return
                continue
        except FileNotFoundError:
            continue  # released in between
        who, here = _who(found.text)
        if here or (first is not None and found.version != first.version):
            raise CheckpointError(_in_use(workdir, who, flag))
        if first is None:
            logger.info(
                f"{flag}={workdir} is claimed by {who}, {found.age:.0f} s ago: waiting until it gives a sign of life, or for "
                f"{lease - found.age:.0f} s"
            )
            first = found
        time.sleep(min(2.0, lease / 10))


def _who(text: str) -> tuple[str, bool]:
    """The process of a claim in words, and whether it is of this machine."""
    try:
        found = json.loads(text)
        return f"pid {found['pid']} on {found['host']}", (found["host"], found["boot"]) == (
            socket.gethostname(),
            _boot(),
        )
    except (ValueError, KeyError, TypeError):
        return "another process", True


def _in_use(workdir: str, who: str, flag: str) -> str:
    job = "a training" if flag == "--workdir" else "another job"
    return f"{flag}={workdir} is in use: {job} ({who}) writes there; wait until it has ended, stop it, or give another {flag}"
