"""Counts the programs that this process compiled, and those that it took from jax's persistent compilation cache instead.

jax reports both as events (`jax.monitoring`), in the thread that asks for the program.
"""

import threading
from collections import Counter
from typing import Any, NamedTuple

import jax

__all__ = ["ProgramCounts", "program_counts"]

_ASKED, _FOUND = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"

_events: Counter[tuple[str, int]] = Counter()
"""By event and thread."""
_listening = threading.Lock()


class ProgramCounts(NamedTuple):
    """Since the first call of `program_counts`."""

    compiled: int
    cached: int

    def since(self, before: "ProgramCounts") -> "ProgramCounts":
        """What came after `before`."""
        return ProgramCounts(self.compiled - before.compiled, self.cached - before.cached)


def program_counts(of_this_thread: bool = False) -> ProgramCounts:
    """How many programs were compiled and read since the first call, which only begins to count."""
    if _listening.acquire(blocking=False):  # once, and never released
        jax.monitoring.register_event_listener(_count)
    thread = threading.get_ident()
    asked, found = (
        sum(n for (event, own), n in _events.copy().items() if event == name and (own == thread or not of_this_thread))
        for name in (_ASKED, _FOUND)
    )
    return ProgramCounts(asked - found, found)


def _count(event: str, **_: Any) -> None:
    if event in (_ASKED, _FOUND):
        _events[event, threading.get_ident()] += 1
