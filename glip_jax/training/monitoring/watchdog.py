"""Watches a run from a thread: a step that hangs leaves the stacks of all threads, and a profile can be requested while the run goes.

    WORKDIR/stacks.txt       stacks of all threads of the first process, when a step took many times the usual time
                             (stacks-3.txt: of process 3)
    WORKDIR/profile          a request, made while the run goes: the next five steps, or as many as the file says, are profiled
    WORKDIR/tensorboard/plugins/profile/    profiles, for TensorBoard's profile plugin or xprof

The thread writes the stacks with the interpreter's lock held. Where a library keeps the lock, faulthandler's own thread writes
them, which needs no Python. It comes second: it reads the frames of threads that may run, and ends the process by a segmentation
fault if one returns meanwhile. While a library keeps the lock none runs.
"""

import contextlib
import faulthandler
import logging
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import jax
from etils import epath

from glip_jax.io import gcs

__all__ = ["WriteFile", "Watchdog"]

logger = logging.getLogger(__name__)

_MEDIAN_STEPS = 50
"""The usual time of a step is the median of this many."""

_MIN_STEPS = 5
"""With fewer steps the usual time is not known."""

_POLL_SECONDS = 5.0
"""Between two looks for WORKDIR/profile."""

_PROFILED_STEPS = 5
"""Where WORKDIR/profile names no number."""

_LOCK_SECONDS = 5.0
"""A library that keeps the interpreter's lock for so long after the limit (or for the limit again, where that is shorter) is why
the thread has not written the stacks."""

WriteFile = Callable[[str, bytes], None]
"""Takes name and content of a file of the working folder: `Writer.file`."""


class _Deadline(NamedTuple):
    """What the thread waits for. Replaced as a whole, because another thread reads it."""

    begin: float
    limit: float
    """Seconds; 0: no limit."""
    usual: float
    """Seconds that it usually takes; 0: not known."""
    written: int = 0
    """Bytes of the file of stacks at `begin`."""


class Watchdog:
    """The thread that watches the steps. Use as a context manager; call `heartbeat` after every step.

    A step hangs after `multiple` times the median step, but not before `min_seconds`; `multiple` 0: never. A compilation, or a
    step whose usual time is not known, hangs after `first` seconds. `write_file` takes files for a bucket and is None on processes
    that record nothing. `step`: completed steps.
    """

    def __init__(
        self,
        folder: epath.Path,
        multiple: float,
        min_seconds: float,
        first: float,
        write_file: WriteFile | None,
        step: int = 0,
    ) -> None:
        self._folder, self._write_file, self._step = folder, write_file, step
        self._multiple, self._min_seconds, self._first = multiple, min_seconds, first
        process = jax.process_index()
        self._name = f"stacks-{process}.txt" if process else "stacks.txt"
        self._times: deque[float] = deque(maxlen=_MEDIAN_STEPS)
        self._deadline = _Deadline(0.0, 0.0, 0.0)
        self._timer = threading.Lock()
        """Held where the deadline or faulthandler's timer changes: two threads do."""
        self._skip = True
        """The next step is not like the others: its time is not recorded."""
        self._end = threading.Event()
        self._remote = gcs.is_remote(folder)
        self._file: IO[str] | None = None
        self._requested, self._empty = 0, False

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._set_deadline(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._end.set()
        self._thread.join()
        if self._file is not None:
            empty = not os.fstat(self._file.fileno()).st_size
            self._file.close()
            if self._remote or empty:
                Path(self._file.name).unlink(missing_ok=True)  # someone may have tidied up

    def heartbeat(self, step: int) -> None:
        """Step `step` is complete, the next one begins."""
        usual = not self._skip
        if usual:
            self._times.append(time.monotonic() - self._deadline.begin)
        self._step, self._skip = step, False
        self._expect_step(usual)

    def take_request(self) -> int:
        """How many steps from the next one on WORKDIR/profile asked to profile since the last call; 0: none."""
        requested, self._requested = self._requested, 0
        return requested

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the first step of a shape: it takes longer than the others, but not longer than `first`."""
        self._set_deadline(self._first)
        yield
        self._skip = True
        self._expect_step(False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspends the watchdog, for example during an evaluation."""
        self._set_deadline(0.0)
        yield
        self._skip = True
        self._expect_step(False)

    def _expect_step(self, like_others: bool) -> None:
        """`like_others` False: the step after a compilation or an evaluation, which may wait for that of another host."""
        usual = statistics.median(self._times) if like_others and len(self._times) >= _MIN_STEPS else 0.0
        self._set_deadline(max(self._min_seconds, self._multiple * usual) if usual else self._first, usual)

    def _set_deadline(self, limit: float, usual: float = 0.0) -> None:
        """Starts to wait for `limit` seconds (0: no limit); `usual` is named in the message."""
        limit = limit if self._multiple else 0.0
        if limit and self._file is None:
            folder = Path(tempfile.mkdtemp()) if self._remote else Path(self._folder)
            # Appended to: stacks of an earlier run in this folder may tell why it was restarted.
            self._file = (folder / self._name).open("a+")
        file = self._file
        with self._timer:
            faulthandler.cancel_dump_traceback_later()
            written = os.fstat(file.fileno()).st_size if file is not None else 0
            self._deadline = _Deadline(time.monotonic(), limit, usual, written)
            if limit and file is not None:
                faulthandler.dump_traceback_later(limit + min(_LOCK_SECONDS, limit), file=file)

    def _watch(self) -> None:
        """The thread: writes and reports the stacks, and polls for requested profiles."""
        polled, reported = 0.0, None
        while not self._end.wait(min(1.0, self._min_seconds / 4)):
            deadline = self._deadline
            if deadline.limit and deadline is not reported and time.monotonic() - deadline.begin > deadline.limit:
                reported = deadline
                if self._write_stacks(deadline):
                    self._report(deadline)
            if self._write_file is not None and time.monotonic() - polled > _POLL_SECONDS:
                polled = time.monotonic()
                with contextlib.suppress(OSError, ValueError):  # the next poll tries again
                    self._poll()

    def _write_stacks(self, deadline: _Deadline) -> bool:
        """False: the step has ended meanwhile."""
        with self._timer:
            if self._file is None or self._deadline is not deadline:
                return False
            faulthandler.cancel_dump_traceback_later()
            if os.fstat(self._file.fileno()).st_size == deadline.written:  # else faulthandler's thread wrote them
                faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.write(f"(above: step {self._step + 1}, {time.strftime('%Y-%m-%d %H:%M:%S')})\n\n")
            self._file.flush()
        return True

    def _report(self, deadline: _Deadline) -> None:
        assert self._file is not None
        what = f"step {self._step + 1} has taken {deadline.limit:.0f} s"
        cause = "it hangs, or its data or storage does"
        if deadline.usual:
            what += f", the usual is {deadline.usual:.2f} s"
        else:
            what = f"{what}, with what is compiled for it (train.hang_first)"
            cause += ", or the compiler takes that long"
        stacks = self._folder / self._name
        self._file.seek(0)
        text = self._file.read()
        if not self._remote:
            with contextlib.suppress(OSError):  # the folder may be gone as well
                if not (os.path.exists(stacks) and os.path.samestat(os.fstat(self._file.fileno()), os.stat(stacks))):
                    Path(stacks).write_text(text)  # someone removed the file, which is still open here
        elif self._write_file is not None:
            self._write_file(self._name, text.encode())
        # Last: the thread that hangs may hold the lock of the log.
        logger.warning(f"{what}: {cause}; the stacks of all threads are in {stacks}")

    def _poll(self) -> None:
        path = self._folder / "profile"
        if path.exists():
            text = path.read_text().strip()
            if not text and not self._empty:
                self._empty = True  # someone may be about to write the number: the next poll takes it
                return
            path.unlink()
            self._empty = False
            self._requested = int(text) if text.isdigit() and int(text) else _PROFILED_STEPS
