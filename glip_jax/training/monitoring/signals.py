"""SIGTERM, Ctrl-C and a closed terminal (SIGHUP) while training: the step is finished and saved, then the run ends; an evaluation is left at once."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["EvaluationLeft", "StopSignals"]

_REPEATED_SECONDS = 2.0
"""A signal that comes again so soon is the same one: a launcher forwards to its child what its whole process group got."""


class EvaluationLeft(BaseException):
    """A signal came during an evaluation. No Exception, which the code of an evaluation may catch."""


class StopSignals:
    """Collects the first SIGTERM, SIGINT or SIGHUP while it is entered; a second one acts as usual. In the main thread only."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came, 0 for none."""
        self._came, self._leaving, self._held = 0.0, False, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        with contextlib.suppress(ValueError):  # not the main thread, which alone can set handlers
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A signal that comes within it, or came before, raises EvaluationLeft there."""
        self._leaving = True
        try:
            if self.number:
                raise EvaluationLeft
            yield
        finally:
            self._leaving = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within `leaving`: what all processes do together, which none may leave alone. A signal raises EvaluationLeft at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._leaving and self.number:
            raise EvaluationLeft

    def forward(self, number: int) -> None:
        """From another thread: acts like the signal, if it would end an evaluation."""
        if self._leaving and self._previous and not self.number:
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and now - self._came < _REPEATED_SECONDS:
            return
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.number, self._came = number, now
        if self._leaving and not self._held:
            raise EvaluationLeft
