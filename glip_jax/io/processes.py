"""Worker processes: those that leave signals to the process that started them, and end when it does."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

__all__ = ["end_with_parent", "stop_signals_blocked"]


def end_with_parent(*_: int) -> None:
    """Ends this process as soon as the one that started it has ended, also where that was killed.

    To be called first in a process that `multiprocessing` has spawned; Grain gives index and number of its workers. Not PR_SET_PDEATHSIG: that signal comes when the *thread*
    that started the process ends, and Grain starts its workers from a pool of threads.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes that start within it never receive SIGTERM, SIGINT and SIGHUP, from their first instruction on.

    A signal to the process group, as of Ctrl-C in a terminal, SLURM or systemd, would end workers before the process that
    started them has saved. That process still receives it, in another thread or afterwards. Blocked signals are inherited by
    threads and processes, through exec as well.
    """
    resource_tracker.ensure_running()  # which unblocks them where it starts with the first worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
