"""Keeps the alarms about slow compilation that XLA prints itself from the terminal; everything else passes."""

import contextlib
import os
import subprocess
import sys
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
def without_slow_compile_alarms() -> Iterator[None]:
    """Within it, what the process writes to its standard error passes a filter of XLA's alarms, of which XLA has no setting.

    The filter is a process of its own, so the last words of a process that dies while it compiles pass too. Where none can be
    started, nothing is filtered.
    """
    sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        try:
            # In a session of its own: a signal to the group of the training must not end it before the training has.
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _FILTER], stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except OSError:
            yield
            return
        assert child.stdin is not None
        os.dup2(child.stdin.fileno(), 2)
        child.stdin.close()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            # Processes started meanwhile keep the filter alive as their standard error.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
    finally:
        os.close(terminal)
