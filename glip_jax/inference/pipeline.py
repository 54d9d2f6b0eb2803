"""Reading overlaps the device: one generator for evaluation, prediction, labelling and benchmarks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["pipelined"]

_READERS = 32
"""Threads; most wait for files of a bucket, and decoding takes the cores that there are."""

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_Found = TypeVar("_Found")


def pipelined(
    groups: Iterable[Sequence[_Item]],
    read: Callable[[_Item], _Read],
    start: Callable[[Sequence[_Item], list[_Read]], Callable[[], _Found]],
    pending: int = 2,
) -> Iterator[tuple[Sequence[_Item], list[_Read], _Found]]:
    """Reads the next group in threads while the device computes; yields (group, read, found) of each group, in order.

    Args:
        groups: items, such as paths, that share a call of the detector; taken one group ahead.
        read: makes an item ready, in one of several threads.
        start: takes a group and what `read` returned for its items, starts the device, and returns a function that waits for
            the result, as `Detector.detect_async` does.
        pending: groups that are on the device at a time, at least 1. Their features take its memory.

    An error of `groups`, `read` or `start` is raised after the groups before it were yielded.
    """
    reading: deque[tuple[Sequence[_Item], list[Future[_Read]]]] = deque()
    started: deque[tuple[Sequence[_Item], list[_Read], Callable[[], _Found]]] = deque()
    source: Iterator[Sequence[_Item]] | None = iter(groups)
    failure: Exception | None = None
    pool = ThreadPoolExecutor(_READERS, "read")

    def read_ahead() -> None:
        """Lets the threads have a group beside the one that is needed next."""
        nonlocal source, failure
        while source is not None and len(reading) < 2:
            try:
                group = next(source, None)
            except Exception as error:
                group, failure = None, error
            if group is None:
                source = None
            else:
                reading.append((group, [pool.submit(read, item) for item in group]))

    def finish_first() -> tuple[Sequence[_Item], list[_Read], _Found]:
        group, results, finish = started.popleft()
        return group, results, finish()

    try:
        while True:
            read_ahead()
            if not reading:
                break
            group, futures = reading.popleft()
            try:
                results = [future.result() for future in futures]
                started.append((group, results, start(group, results)))
            except Exception as error:
                failure = error
                break
            if len(started) >= pending:
                yield finish_first()
        while started:
            yield finish_first()
        if failure is not None:
            raise failure
    finally:
        # A reader may wait for a bucket for minutes, and whoever leaves after a signal does so at once.
        pool.shutdown(wait=False, cancel_futures=True)
