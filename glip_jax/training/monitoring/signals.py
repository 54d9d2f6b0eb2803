"""SIGTERM, Ctrl-C and a closed terminal (SIGHUP) while training: the step is finished and saved, then the run ends; an evaluation is left at once."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["EvaluationLeft", "StopSignals"]

_REPEATED_SECONDS = 2.0
"""A signal that comes again so soon is the same one: a launcher forwards to its child what its whole process group got."""

_LOOK_SECONDS = 1.0
"""Between two questions whether another process received a signal."""


class EvaluationLeft(BaseException):
    """A signal came during an evaluation. No Exception, which the code of an evaluation may catch."""


class StopSignals:
    """Collects the first SIGTERM, SIGINT or SIGHUP while it is entered; a second one acts as usual. In the main thread only.

    Of one of several processes it collects SIGINT and SIGHUP, and passes them on as SIGTERM, of which jax's preemption service tells
    all processes; that is the service's, also where it comes again.
    """

    def __init__(self, asked: Callable[[], bool] | None = None) -> None:
        """`asked`: whether any of several processes received a signal; None for one that is alone."""
        self._several, self._asked = asked is not None, asked or (lambda: self.number != 0)
        self.number = 0
        """The signal that came, 0 for none."""
        self._came, self._leaving, self._held = 0.0, False, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        with contextlib.suppress(ValueError):  # not the main thread, which alone can set handlers
            own = () if self._several else (signal.SIGTERM,)
            for number in (*own, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A signal that comes within it, or came before, raises EvaluationLeft there; also one to another process, within seconds."""
        with self._looking() if self._several and self._previous else contextlib.nullcontext():
            self._leaving = True
            try:
                if self._asked():
                    raise EvaluationLeft
                yield
            finally:
                self._leaving = False

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGALRM, self._look)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _look(self, *_: object) -> None:
        if self._leaving and not self._held and self._asked():
            raise EvaluationLeft

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within `leaving`: what all processes do together, which none may leave alone. A signal raises EvaluationLeft at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._leaving and self._asked():
            raise EvaluationLeft

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and now - self._came < _REPEATED_SECONDS:
            return
        if self.number:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.number, self._came = number, now
        if self._several:
            signal.raise_signal(signal.SIGTERM)
        elif self._leaving and not self._held:
            raise EvaluationLeft
