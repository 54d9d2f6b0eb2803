"""Looks at a run from beside it: a step that hangs leaves the stacks of all threads, and a profile can be had on demand.

    WORKDIR/stacks.txt       where every thread of the first process stood when a step took many times its usual time
                             (stacks-3.txt: of process 3)
    WORKDIR/profile          made by somebody while the run goes: the next five steps, or as many as the file says, are profiled
    WORKDIR/tensorboard/plugins/profile/    profiles, for TensorBoard's profile plugin or xprof

The stacks are written by a thread of faulthandler's, which needs nothing of Python: they come even where a library holds the
interpreter's lock.
"""

import contextlib
import faulthandler
import statistics
import sys
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

__all__ = ["Watchdog"]

_LOOKED_AT = 50
"""Steps of which the median is usual."""

_FEWEST = 5
"""Steps before which nothing is usual."""

_ASK_SECONDS = 5.0
"""Between two looks for WORKDIR/profile."""

_STEPS = 5

Keep = Callable[[str, bytes], None]
"""Takes a file of the working folder: `Writer.file`."""


class _Wait(NamedTuple):
    """What is waited for: replaced whole, as another thread reads it."""

    begin: float
    limit: float
    """Seconds; 0: as long as it takes."""
    usual: float
    """Seconds that it usually takes; 0: not known."""


class Watchdog:
    """The thread beside the steps. Use as a context manager; `beat` after every step.

    `multiple`: of the median step, after which a step hangs, but not before `least` seconds; 0: never. `first`: seconds after which
    a compilation does, or a step of which nothing is usual yet. `keep` sends files to a bucket, None on processes that record
    nothing.
    """

    def __init__(self, folder: epath.Path, multiple: float, least: float, first: float, keep: Keep | None) -> None:
        self._folder, self._multiple, self._least, self._first, self._keep = folder, multiple, least, first, keep
        number = jax.process_index()
        self._name = f"stacks-{number}.txt" if number else "stacks.txt"
        self._times: deque[float] = deque(maxlen=_LOOKED_AT)
        self._wait = _Wait(0.0, 0.0, 0.0)
        self._skip = True
        self._end = threading.Event()
        self._remote = gcs.is_remote(folder)
        self._file: IO[str] | None = None
        self.step = 0
        """Completed steps."""
        self.asked = 0
        """Steps that somebody wants profiled; the loop takes it back to 0."""

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()
        self._arm(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._end.set()
        self._thread.join()
        if self._file is not None:
            self._file.close()
            path = Path(self._file.name)
            if self._remote or not path.stat().st_size:
                path.unlink()

    def heartbeat(self, step: int) -> None:
        """Step `step` is over, the next begins."""
        usual = not self._skip
        if usual:
            self._times.append(time.monotonic() - self._wait.begin)
        self.step, self._skip = step, False
        self._await_step(usual)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """The first step of a shape is made here: it is not like the others, but it ends some time."""
        self._arm(self._first)
        yield
        self._skip = True
        self._await_step(False)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here is no step, and may take as long as it does (an evaluation)."""
        self._arm(0.0)
        yield
        self._skip = True
        self._await_step(False)

    def _await_step(self, like_others: bool) -> None:
        """`like_others` False: the step after a compilation or an evaluation, as it may wait for another host's."""
        usual = statistics.median(self._times) if like_others and len(self._times) >= _FEWEST else 0.0
        self._arm(max(self._least, self._multiple * usual) if usual else self._first, usual)

    def _arm(self, limit: float, usual: float = 0.0) -> None:
        """Begins to wait: `limit` seconds, or (0) as long as it takes; `usual` is said then."""
        faulthandler.cancel_dump_traceback_later()
        limit = limit if self._multiple else 0.0
        self._wait = _Wait(time.monotonic(), limit, usual)
        if not limit:
            return
        if self._file is None:
            folder = Path(tempfile.mkdtemp()) if self._remote else Path(self._folder)
            # What a run before left here may be why there is this one.
            self._file = (folder / self._name).open("a")
        faulthandler.dump_traceback_later(limit, file=self._file)

    def _look(self) -> None:
        """The thread: says what faulthandler wrote, and looks whether a profile is wanted."""
        asked, said = 0.0, None
        while not self._end.wait(min(1.0, self._least / 4)):
            wait = self._wait
            if wait.limit and wait is not said and time.monotonic() - wait.begin > wait.limit + 0.2:
                said = wait
                self._tell(wait)
            if self._keep is not None and time.monotonic() - asked > _ASK_SECONDS:
                asked = time.monotonic()
                with contextlib.suppress(OSError, ValueError):  # tried again in a moment
                    self._ask()

    def _tell(self, wait: _Wait) -> None:
        if self._file is None:
            return
        what, long = f"step {self.step + 1} has taken {wait.limit:.0f} s", "it hangs, or its data or storage does"
        if wait.usual:
            what += f", the usual is {wait.usual:.2f} s"
        else:
            what = f"{what}, with what is compiled for it (train.hang_first)"
            long += ", or the compiler takes that long"
        print(
            f"{what}: {long}; the stacks of all threads are in {self._folder / self._name}", file=sys.stderr, flush=True
        )
        self._file.write(f"(above: step {self.step + 1}, {time.strftime('%Y-%m-%d %H:%M:%S')})\n\n")
        self._file.flush()
        if self._remote and self._keep is not None:
            self._keep(self._name, Path(self._file.name).read_bytes())

    def _ask(self) -> None:
        path = self._folder / "profile"
        if path.exists():
            text = path.read_text().strip()
            path.unlink()
            self.asked = int(text) if text.isdigit() and int(text) else _STEPS
