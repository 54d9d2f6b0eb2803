"""Several processes that work as one: joining, checking that they agree, stopping together, noticing that one died.

jax.distributed carries the arrays. Beside it each process has one connection to process 0 (`Cluster`) for messages: process
0 compares the settings of all processes, forwards signals to stop, and reports whose connection broke. The kernel closes
the connection of a process that dies for any reason; a host that does not answer is noticed after half a minute.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from glip_jax import UserError
from glip_jax.distributed.exit_codes import BAD_INPUT, CANCELLED, DONE, PEER_LOST, PREEMPTED, UNEXPECTED

__all__ = ["ProcessGroup", "Cluster", "ProcessError", "announced", "join"]

_HANDSHAKE_BYTES = 1024
"""Bytes of the message that process 0 sends to all through jax: its address and a secret."""

_ANNOUNCERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES")
"""Variables by which SLURM, Open MPI and TPU hosts announce several processes."""

_RESUME_HINT = "What was saved is intact: the same command on all hosts goes on from it"

_UNWIND_SECONDS = 20.0
"""Time for a process that fails to unwind."""

_BLAME_SECONDS = 3.0
"""Time that a process whose collective failed waits for the message that another one died, which is the true reason."""


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
    job: str = "train"


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
    # Its own handler of SIGTERM would replace that of the job; the cluster agrees by itself.
    jax.config.update("jax_enable_preemption_service", False)
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
        jax.distributed.initialize(**where, initialization_timeout=group.timeout + 60)
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ProcessError(f"{who} ({reason}): {mend}") from None
    finally:
        last.cancel()
    if jax.process_count() < expected:
        raise ProcessError(
            f"{by} announces {expected} processes, but jax found {jax.process_count()}: start all of them"
        )


class _Member(NamedTuple):
    """A process of the cluster."""

    index: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.index} on {self.host} (pid {self.pid})"


class _Connection:
    """A connection that carries JSON, a line each."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        # A host without power closes nothing: after 10 s of silence it is asked three times.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection, self._file, self._lock = connection, connection.makefile("r"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends a message; one that nobody can receive any more is lost, as the reader's side finds out."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the connection is at its end or broken."""
        try:
            line = self._file.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Ends it for both sides."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class _Coordinator:
    """What process 0 does for all, itself included."""

    def __init__(self, count: int, timeout: float) -> None:
        self.secret, self._count, self._timeout = secrets.token_hex(16), count, timeout
        self._listener = socket.create_server(("", 0), backlog=count)
        self.port = self._listener.getsockname()[1]
        self._connections: dict[int, _Connection] = {}
        self._members: dict[int, _Member] = {}
        self._facts: dict[int, dict[str, str]] = {}
        self._at: dict[int, int] = {}
        self._signal, self._stop_at, self._over = 0, None, False
        self._left: set[int] = set()
        self._met, self._leaving = dict.fromkeys(range(count), 0), (0, 0)
        self._change = threading.Condition()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        refused = self._accept_all()
        self._send_all(refused=refused, members=[list(member) for member in self._members.values()])
        for index, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def _accept_all(self) -> str:
        """Waits for everybody; what keeps them from working together, or ""."""
        end = time.monotonic() + self._timeout
        while len(self._connections) < self._count and (left := end - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                accepted, _ = self._listener.accept()
                connection = _Connection(accepted)
                accepted.settimeout(5)  # a stranger may say nothing
                hello = connection.receive()
                accepted.settimeout(None)
            except OSError:
                continue
            if not hello or not secrets.compare_digest(str(hello.get("secret", "")), self.secret):
                connection.close()
                continue
            index = hello["index"]
            self._connections[index], self._facts[index] = connection, hello["facts"]
            self._members[index] = _Member(index, hello["host"], hello["pid"])
        self._listener.close()
        missing = sorted(set(range(self._count)) - set(self._connections))
        if missing:
            return f"process {', '.join(map(str, missing))} of {self._count} did not report in {self._timeout:g} s"
        first, lines = self._members[0], []
        for index in range(1, self._count):
            local, remote = self._facts[0], self._facts[index]
            names = [name for name in sorted({*local, *remote}) if local.get(name) != remote.get(name)]
            shown = [f"{name} is {remote.get(name, 'absent')}, not {local.get(name, 'absent')}" for name in names]
            more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
            if names:
                lines.append(f"{self._members[index]}: {'; '.join(shown[:6])}{more}")
        if not lines:
            return ""
        listed = " | ".join(lines[:4]) + (f" | and {len(lines) - 4} more processes" if len(lines) > 4 else "")
        return f"the processes differ from {first}: {listed}; give all hosts the same command, code and data"

    def _listen(self, index: int, connection: _Connection) -> None:
        while (message := connection.receive()) is not None:
            with self._change:
                if "stop" in message and not self._signal:
                    self._signal = message["stop"]
                    self._send_all(stop=self._signal)
                if "met" in message:
                    self._met[index] = message["met"]
                    if message["left_for"] and not self._leaving[0]:
                        self._leaving = (message["left_for"], message["met"])
                    self._send_all(met=min(self._met.values()), leaving=self._leaving)
                if "at" in message:
                    self._at[index] = message["at"]
                    if len(self._at) == self._count:
                        self._stop_at = max(self._at.values()) + 1
                        self._send_all(stop_at=self._stop_at)
                if "code" in message:
                    self._left.add(index)
                    together = self._stop_at is not None and message["code"] in (PREEMPTED, CANCELLED)
                    if message["code"] != DONE and not together:
                        self._blame(f"{self._members[index]} ended: {message['text']}", message["code"])
                    self._change.notify_all()
        with self._change:
            if index not in self._left:
                self._left.add(index)
                self._blame(f"{self._members[index]} died; its own log says why. {_RESUME_HINT}", PEER_LOST)
            self._change.notify_all()

    def _blame(self, text: str, code: int) -> None:
        """Ends everybody who is there, with the first reason only."""
        if not self._over:
            self._over = True
            self._send_all(gone=text, code=code)

    def _send_all(self, **message: Any) -> None:
        # This process last: what it hears may end it, and this thread with it.
        for index in sorted(self._connections, reverse=True):
            self._connections[index].send(**message)

    def close(self, timeout: float) -> None:
        """Waits until all have left, then ends the connections."""
        with self._change:
            self._change.wait_for(lambda: len(self._left) >= len(self._connections), timeout)
        self._send_all(closed=True)


class Cluster:
    """The processes of this job, as one of them sees them. Made once, after `join`, by all of them.

    Use as a context manager: an exception that leaves it ends all processes with its exit code; a process that dies
    ends the others, within a second, with its name and exit code PEER_LOST.
    """

    def __init__(
        self,
        facts: Mapping[str, str],
        code_of: Callable[[BaseException], int] = lambda _: UNEXPECTED,
        timeout: float = 60.0,
        place: tuple[int, int] | None = None,
        share: Callable[[bytes], bytes] | None = None,
        job: str = "train",
    ) -> None:
        """Meets the others. Raises ProcessError, everywhere, if one does not come or has other `facts` (name to value).

        `code_of`: the exit code that an exception will end this process with. `place` (index, number of processes) and
        `share`, which gives process 0's bytes to all, are jax's own by default.
        """
        self.index, self._count = (jax.process_index(), jax.process_count()) if place is None else place
        self._code_of, self._job = code_of, job
        self._coordinator = _Coordinator(self._count, timeout) if self.index == 0 else None
        own = self._coordinator
        handshake = json.dumps([own.port, own.secret, *_addresses()]).encode() if own else b""
        port, secret, *addresses = json.loads((share or _broadcast)(handshake))
        self._connection = _Connection(_connect(addresses, port))
        self._connection.send(
            secret=secret, index=self.index, host=socket.gethostname(), pid=os.getpid(), facts=dict(facts)
        )
        answer = self._connection.receive()
        if answer is None or answer["refused"]:
            raise ProcessError(answer["refused"] if answer else f"process 0 at {addresses[0]} ended before all had met")
        self._first = next(_Member(*member) for member in answer["members"] if member[0] == 0)
        self._change = threading.Condition()
        self._step, self._signal, self._stop_at = -1, 0, None
        self._signal_sent = self._left = False
        self._meetings, self._met = 0, 0
        self._leaving = (0, 0)  # a signal, and the meeting before which one left for it
        self.on_stop: Callable[[int], None] = lambda _: None
        """Takes the number of the first signal that any process received, in another thread."""
        threading.Thread(target=self._listen, daemon=True).start()

    def agreed(self, received: int, step: int) -> int:
        """The signal to stop for after `step`, the same step in all processes; 0 for none.

        `received`: the signal that this process got, 0 for none. To be called after each step's dispatch.
        """
        with self._change:
            if received and not self._signal_sent:
                self._signal_sent = True
                self._connection.send(stop=received)
            # Between the question where everybody is and its answer nobody moves on.
            self._change.wait_for(lambda: not self._signal or self._stop_at is not None)
            self._step = step
            return self._signal if self._stop_at is not None and step >= self._stop_at else 0

    def met(self, left_for: int = 0, received: Callable[[], int] = lambda: 0) -> int:
        """Waits until all processes have called it as often as this one, or one has left what they do together for a signal.

        `left_for`: the signal for which this process has left it, 0 for none. `received`: the signal that this process got by
        now; it interrupts the others (`on_stop`). If a signal is returned all processes have agreed to stop where they are.
        """
        with self._change:
            self._meetings += 1
            self._connection.send(met=self._meetings, left_for=left_for)
            while self._stop_at is None if self._left_for() else self._met < self._meetings:
                number = received() or self._left_for()
                if number and not self._signal_sent:
                    self._signal_sent = True
                    self._connection.send(stop=number)
                self._change.wait(0.2)  # the main thread handles signals between two waits
            return self._left_for()

    def _left_for(self) -> int:
        """The signal for which one has left before this meeting; one that has not seen yet that the meeting before took place goes on."""
        return self._leaving[0] if self._leaving[1] <= self._meetings else 0

    def _listen(self) -> None:
        while (message := self._connection.receive()) is not None and "closed" not in message:
            with self._change:
                if "stop" in message:
                    self._signal = message["stop"]
                    self._connection.send(at=self._step)
                    self.on_stop(self._signal)
                if "met" in message:
                    self._met, self._leaving = message["met"], message["leaving"]
                if "stop_at" in message:
                    self._stop_at = message["stop_at"]
                if "gone" in message and not self._left:
                    _end(f"{self._job}: {message['gone']}", message["code"])
                self._change.notify_all()
        if message is None and not self._left:
            _end(f"{self._job}: {self._first} died; its own log says why. {_RESUME_HINT}", PEER_LOST)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._left:
            code = DONE if error is None else self._code(error)
            reason = f"{kind and kind.__name__}: {str(error).partition(chr(10))[0]}"[:300]
            self._leave(code, "stopped" if isinstance(error, SystemExit) else reason)

    def _code(self, error: BaseException) -> int:
        if isinstance(error, SystemExit):
            return error.code if isinstance(error.code, int) else UNEXPECTED
        return CANCELLED if isinstance(error, KeyboardInterrupt) else self._code_of(error)

    def _leave(self, code: int, text: str) -> None:
        """Tells the others that this process ends with the exit code `code`, and why."""
        if code == UNEXPECTED:
            # A collective fails where its partner died: then the news is on its way, and ends this process.
            time.sleep(_BLAME_SECONDS)
        with self._change:
            self._left = True
        self._connection.send(code=code, text=text)
        if self._coordinator is not None:
            self._coordinator.close(60.0 if code == DONE else 5.0)
        if not self._together(code):
            # What is left to unwind may wait for processes that are gone.
            last = threading.Timer(_UNWIND_SECONDS, os._exit, (code,))
            last.daemon = True
            last.start()

    def _together(self, code: int) -> bool:
        """Whether all processes leave so, at the same step."""
        return code == DONE or (self._stop_at is not None and code in (PREEMPTED, CANCELLED))

    def finish(self, code: int) -> int:
        """To be called last, with the exit code; returns it. Where others are gone it ends this process at once:
        jax takes its leave of all others, and would wait for these.
        """
        if not self._together(code):
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)
        return code


def _broadcast(handshake: bytes) -> bytes:
    """Process 0's `handshake`, in all processes, by jax."""
    padded = np.zeros(_HANDSHAKE_BYTES, np.uint8)
    padded[: len(handshake)] = np.frombuffer(handshake, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes().rstrip(b"\0")


def _addresses() -> Iterator[str]:
    """Where others may find this host, likeliest first."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of a range that is nobody's; nothing is sent, but the route is looked up
        yield probe.getsockname()[0]
    with contextlib.suppress(OSError):
        yield from dict.fromkeys(
            str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
        )
    yield "127.0.0.1"


def _connect(addresses: list[str], port: int) -> socket.socket:
    """A connection to process 0."""
    fault = ""
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=10)
        except OSError as error:
            fault = error.strerror or str(error)
    raise ProcessError(
        f"process 0 is not reached at {', '.join(addresses)}, port {port} ({fault}): let the hosts' ports through"
    )


def _end(text: str, code: int) -> None:
    """Ends this process at once: its main thread may wait for a device, which waits for the process that is gone."""
    # No logger: the main thread may hold its lock.
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
