"""The log of a job in its terminal: INFO as bare lines on stdout, WARNING and above on stderr.

Modules say things through `logging.getLogger(__name__)`. Lines go through `tqdm.write`, which moves progress bars out of
the way, and are flushed at once, so that a pipe shows them as they come.
"""

import logging
import sys

from tqdm import tqdm

__all__ = ["debugging", "install", "set_process"]

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


def set_process(index: int) -> None:
    """Marks the lines of process `index` of several; those of process 0 stay as they are."""
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, _TerminalHandler):
            handler.process = index
