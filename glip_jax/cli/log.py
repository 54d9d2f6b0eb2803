"""The log of a job in its terminal: INFO as bare lines on stdout, WARNING and above on stderr.

Modules say things through `logging.getLogger(__name__)`. Lines go through `tqdm.write`, which moves progress bars out of
the way, and are flushed at once, so that a pipe shows them as they come.
"""

import contextlib
import logging
import os
import select
import sys
from typing import TextIO

from tqdm import tqdm

__all__ = ["debugging", "discard_unread", "install", "is_unread", "set_process"]

_ROOT = "glip_jax"


class _TerminalHandler(logging.Handler):
    """Looks the streams up at every record, as tests and notebooks replace them."""

    process = 0

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        # Lines of process 0 are what scripts read, and the last line of a job begins with its name: both stay bare.
        prefix = f"[process {self.process}] " if self.process and record.levelno < logging.ERROR else ""
        try:
            tqdm.write(prefix + self.format(record), file=stream)
            stream.flush()
        except (BrokenPipeError, KeyboardInterrupt):
            raise
        except Exception:
            self.handleError(record)


def install(debug: bool = False) -> None:
    """Sends the package's log to the terminal; `debug` shows DEBUG as well. A second call only sets the level."""
    logger = logging.getLogger(_ROOT)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not any(isinstance(handler, _TerminalHandler) for handler in logger.handlers):
        logger.addHandler(_TerminalHandler())
    # Libraries put handlers of their own on the root logger, which would print every line again.
    logger.propagate = False


def debugging() -> bool:
    """Whether the log shows DEBUG, which --debug asks for."""
    return logging.getLogger(_ROOT).isEnabledFor(logging.DEBUG)


def is_unread() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more, as after `| head`."""
    return any(_is_unread(stream) for stream in (sys.stdout, sys.stderr))


def _is_unread(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except (OSError, ValueError, AttributeError):  # no file, or a closed one
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_unread() -> None:
    """Sends what is still written to a stream that nobody reads to nowhere; Python's flush at the end would fail."""
    for stream in (sys.stdout, sys.stderr):
        if _is_unread(stream):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            with contextlib.suppress(OSError):
                stream.flush()


def set_process(index: int) -> None:
    """Marks the lines of process `index` of several; those of process 0 stay as they are."""
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, _TerminalHandler):
            handler.process = index
