"""Keeps the alarms about slow compilation that XLA prints itself from the terminal; everything else passes."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

__all__ = ["without_slow_compile_alarms"]

_FILTER = """
import re, sys
alarm = re.compile(rb"slow_operation_alarm[.]cc|Very slow compile[?]|^[*]{32}$|Constant folding an instruction is taking|"
                   rb"constant-folding is inherently a trade-off|XLA has some guards that attempt to keep constant folding|"
                   rb"If you'd like to file a bug, run with envvar XLA_FLAGS|too slow, but fundamentally you'll always")
dropped = False
for line in sys.stdin.buffer:
    dropped = bool(alarm.search(line.strip())) or (dropped and not line.strip())
    if not dropped:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
"""


@contextlib.contextmanager
def without_slow_compile_alarms(after: float = 90.0) -> Iterator[None]:
    """Within it, from `after` seconds on, what the process writes to its standard error passes a filter of XLA's alarms.

    XLA has no setting for them; the first comes after two minutes of compiling. The filter is a process of its own, so the last
    words of a process that dies while it compiles pass too. Where none can be started, nothing is filtered.
    """
    installed: list[tuple[int, subprocess.Popen[bytes]]] = []

    def install() -> None:
        with contextlib.suppress(OSError):  # a closed standard error, or no process
            terminal = os.dup(2)
            # In a session of its own: a signal to the group of the training must not end it before the training has.
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _FILTER], stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            assert child.stdin is not None
            os.dup2(child.stdin.fileno(), 2)
            child.stdin.close()
            installed.append((terminal, child))

    timer = threading.Timer(after, install)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for terminal, child in installed:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            # Processes started meanwhile keep the filter alive as their standard error.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
