"""Several processes that work as one: joining, checking that they agree, stopping together, noticing that one died.

jax.distributed does it. Its coordination service has a heartbeat of every process, and ends the others with SIGABRT when one falls
silent. Its preemption service tells all processes that one received SIGTERM, and names the step after which all stop.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from glip_jax import UserError
from glip_jax.distributed.exit_codes import BAD_INPUT, PEER_LOST, UNEXPECTED

__all__ = ["Cluster", "Member", "ProcessError", "ProcessGroup", "announced", "check_alike", "join", "leave"]

_ANNOUNCERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
"""Variables by which SLURM, Open MPI and TPU hosts announce several processes."""

_RESUME_HINT = "What was saved is intact: the same command on all hosts goes on from it"

_UNWIND_SECONDS = 20.0
"""Time for a process that fails to unwind."""

_LEAVE_SECONDS = 5.0
"""Time that a process that fails waits for the others, which may fail in the same way."""

_SHUTDOWN_SECONDS = 24 * 3600
"""Time that a process which is done waits for the others: process 0 may still write. A death ends the wait."""

_BROKEN = re.compile(r"Gloo|NCCL|CoordinationService|coordination service")
"""In the errors of what the processes do together, where one of them is gone: collectives on CPU and GPU, barriers."""


class ProcessError(UserError, RuntimeError):
    """The processes cannot work as one; the message names the process, and what differs or is missing."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a job; if all is empty, as SLURM or the TPU hosts announce them."""

    coordinator: str = ""
    """HOST:PORT of process 0."""
    processes: int = 0
    index: int = -1
    timeout: int = 300
    """Seconds to wait for the other processes."""
    heartbeat: int = 30
    """Seconds of silence after which a process is taken for dead, and the others end."""
    job: str = "train"
    saves: bool = False
    """Whether the job stops by `Cluster.agreed`: SIGTERM is then left to jax's preemption service, and no longer ends the process."""


def announced(environment: Mapping[str, str]) -> tuple[int, str]:
    """(number of processes, variable that announces it); (1, "") if no variable announces more than one."""
    for name in _ANNOUNCERS:
        value = environment.get(name, "")
        number = len(value.split(",")) if name.endswith("HOSTNAMES") else int(value) if value.isdigit() else 1
        if number > 1:
            return number, name
    return 1, ""


def join(group: ProcessGroup) -> None:
    """Joins the other processes (jax.distributed); before anything else of jax is used.

    Raises ProcessError if fewer come than were announced or `group` is half given; ends the process with a line and
    exit code BAD_INPUT if they have not come in `group.timeout` seconds.
    """
    given = {"coordinator": bool(group.coordinator), "processes": group.processes > 0, "index": group.index >= 0}
    missing = [f"--{name}" for name, is_given in given.items() if not is_given]
    if missing and len(missing) < len(given):
        raise ProcessError(
            f"{' and '.join(missing)} not given: expected --coordinator, --processes and --index together"
        )
    explicit = not missing
    if explicit and group.index >= group.processes:
        raise ProcessError(
            f"--index={group.index}: expected 0 to {group.processes - 1}, as --processes={group.processes}"
        )
    if explicit and not re.fullmatch(r".+:\d+", group.coordinator):
        raise ProcessError(f"--coordinator={group.coordinator}: expected HOST:PORT of process 0")
    expected, by = (group.processes, "--processes") if explicit else announced(os.environ)
    # It replaces the job's handler of SIGTERM by its own.
    jax.config.update("jax_enable_preemption_service", group.saves)
    where: dict[str, Any] = {}
    mend = "start it on all hosts of a TPU pod or under srun, or give --coordinator, --processes and --index"
    if explicit:
        where["coordinator_address"] = group.coordinator
        where["num_processes"], where["process_id"] = group.processes, group.index
        mend = (
            f"start all of them with --coordinator={group.coordinator} and --processes={group.processes}, each with "
            "its own --index, and let that port of process 0 through"
        )
    who = f"{f'process {group.index} of {expected}' if explicit else 'this process'}: the others did not come together"
    # jax itself ends the process where they do not, with pages of its own; so this comes before it.
    last = threading.Timer(group.timeout, _end, (f"{group.job}: {who} in {group.timeout} s: {mend}", BAD_INPUT))
    last.daemon = True
    last.start()
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=group.timeout + 60,
            heartbeat_timeout_seconds=group.heartbeat,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ProcessError(f"{who} ({reason}): {mend}") from None
    finally:
        last.cancel()
    if jax.process_count() < expected:
        raise ProcessError(
            f"{by} announces {expected} processes, but jax found {jax.process_count()}: start all of them"
        )
    if jax.process_count() == 1 and group.saves:  # nobody asks the preemption service then
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


class Member(NamedTuple):
    """A process, and what all must have alike."""

    index: int
    host: str
    pid: int
    facts: Mapping[str, str]
    """Name to value."""

    def __str__(self) -> str:
        return f"process {self.index} on {self.host} (pid {self.pid})"


def check_alike(members: Sequence[Member]) -> None:
    """Raises ProcessError if the facts of a process differ from those of the first; the message names both and the differing values."""
    first, lines = members[0], []
    for member in members[1:]:
        own, others = first.facts, member.facts
        names = [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]
        shown = [f"{name} is {others.get(name, 'absent')}, not {own.get(name, 'absent')}" for name in names]
        more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
        if names:
            lines.append(f"{member}: {'; '.join(shown[:6])}{more}")
    if lines:
        listed = " | ".join(lines[:4]) + (f" | and {len(lines) - 4} more processes" if len(lines) > 4 else "")
        raise ProcessError(
            f"the processes differ from {first}: {listed}; give all hosts the same command, code and data"
        )


class Cluster:
    """The processes of this job, as one of them sees them: how they stop together. Made once, after `join`, by all of them.

    All count the same: steps, and within evaluations seconds, which each counts at its own pace until they meet. jax's preemption
    service names the count at which all stop.

    Use as a context manager: a process that an exception leaves ends within 20 s, whatever waits for the others; one that finds
    another gone ends at once, with one line and exit code PEER_LOST.
    """

    def __init__(self, code_of: Callable[[BaseException], int] = lambda _: UNEXPECTED, job: str = "train") -> None:
        """`code_of`: the exit code that an exception will end this process with."""
        self._code_of, self._job = code_of, job
        self._count, self._asked, self._signal = 0, False, 0
        self._since, self._base = time.monotonic(), 0

    def agreed(self) -> bool:
        """Whether to stop after this step, the same step in all processes. To be called after each step's dispatch; without communication."""
        self._advance()
        self._since, self._base = time.monotonic(), self._count
        return self._asked

    def asked(self) -> bool:
        """Whether any process received a signal. To be called about once a second by each process within what they do at their own pace.

        Without communication. Once it is true it stays so, and the processes are to meet next.
        """
        # No count is left out: the service names one of them.
        while not self._asked and self._count < self._base + int(time.monotonic() - self._since):
            self._advance()
        return self._asked

    def _advance(self) -> None:
        self._count += 1
        self._asked = multihost_utils.reached_preemption_sync_point(self._count)

    def met(self, received: int) -> int:
        """Waits until all processes have called it, with no program of theirs in flight: it is a collective. Returns the signal to stop for,
        the same in all processes, if one of them was `asked` or has `agreed` to stop; else 0.

        `received`: what this process got other than SIGTERM and passed on as SIGTERM, 0 for none. After a signal all have agreed to
        stop where they are: it returns the same at once.
        """
        if not self._signal:
            rows = np.asarray(
                multihost_utils.process_allgather(np.array([self._asked, self._count, received], np.int32))
            )
            if rows[:, 0].any():
                kinds = (kind for kind in (signal.SIGINT, signal.SIGHUP) if kind in rows[:, 2])
                self._signal = int(next(kinds, signal.SIGTERM))
            self._count = self._base = int(rows[:, 1].max())
            self._since = time.monotonic()
        return self._signal

    def together(self, error: BaseException | None) -> bool:
        """Whether all processes leave so: done, or stopped after the same step."""
        return error is None or (isinstance(error, SystemExit) and self._signal != 0)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or self.together(error):
            return
        code = self._code_of(error)
        if code == UNEXPECTED and _BROKEN.search(str(error)):
            reason = str(error).partition("\n")[0][:300]
            _end(
                f"{self._job}: another process died or left: its own log says why ({reason}). {_RESUME_HINT}", PEER_LOST
            )
        # What is left to unwind may wait for processes that are gone.
        _end_after(_UNWIND_SECONDS, code)


def leave(code: int) -> NoReturn:
    """Ends this process, which failed, with the exit code `code`: at once where all processes fail, else after some seconds.

    The others lose its heartbeat then, or, if it is process 0, the service.
    """
    _end_after(_LEAVE_SECONDS, code)
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()  # waits for the others: the service ends whom it was not told of
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _end_after(seconds: float, code: int) -> None:
    last = threading.Timer(seconds, os._exit, (code,))
    last.daemon = True
    last.start()


def _end(text: str, code: int) -> NoReturn:
    """Ends this process at once: what unwinds, and jax at a normal end, would wait for processes that are gone."""
    # No logger: the main thread may hold its lock.
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
