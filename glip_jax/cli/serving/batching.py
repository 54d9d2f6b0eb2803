"""The thread that owns the detectors: images of different requests become batches.

A batch is of images of one canvas, so that it is one step of the compiled program. It begins when its first image is taken and closes when it is
full or WAIT seconds later, whichever comes first. Two batches are in hand at a time: the next is prepared while the device computes.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from glip_jax import UserError
from glip_jax.inference import Detector
from glip_jax.structures.batch import Detections, Prompt

__all__ = ["WAIT", "Batcher", "QueueFullError"]

logger = logging.getLogger(__name__)

WAIT = 0.02
"""Seconds that the first image of a batch waits for others."""
_PENDING = 2
"""Batches in hand at a time."""
_PIXELS = 400_000_000
"""Pixels of decoded images that may wait: 1.2 GB."""

Query = Sequence[tuple[Prompt, Any]]
"""Prompts, each with the indices that its phrases get in the result."""


class QueueFullError(UserError, RuntimeError):
    """More images wait than the queue holds."""


class _Work(NamedTuple):
    """An image that waits for a batch."""

    pixels: UInt8[np.ndarray, "H W 3"]
    query: Query
    canvas: tuple[int, int]
    future: "Future[Detections]"


class _Batch(NamedTuple):
    """A batch that the device computes."""

    works: list[_Work]
    finish: Callable[[], list[Detections]]


class Batcher:
    """Runs `detector` in a thread of its own; all other threads hand in images and get futures.

    `single`: a detector of the same parameters for one image at a time. It runs where at most `ratio` images wait: what a full batch takes, in
    times of one image.
    """

    def __init__(self, detector: Detector, single: Detector, ratio: float = 1.0, limit: int = 64) -> None:
        """`limit`: images that may wait or be computed at a time."""
        self.detector, self.single, self.ratio, self.limit = detector, single, ratio, limit
        self.batches = self.images = 0
        """Batches and images that were computed."""
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._reserved = 0
        self._thread = threading.Thread(target=self._run, name="detector", daemon=True)

    @property
    def waiting(self) -> int:
        """Images that have a place in the queue, those in the works included."""
        return self._reserved

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread when all that it was handed is computed; it takes no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Within it, `count` places of the queue are taken. Raises QueueFullError if there are not as many."""
        with self._changed:
            if self._reserved + count > self.limit:
                raise QueueFullError(
                    f"the queue is full: {self._reserved} of {self.limit} images wait, {count} more do not fit; try again later"
                )
            self._reserved += count
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= count

    def submit(self, pixels: UInt8[np.ndarray, "H W 3"], query: Query) -> "Future[Detections]":
        """The detections of an image, whose `phrases` are the indices of `query`. Raises QueueFullError for too many pixels that wait."""
        work = _Work(pixels, query, self.detector.canvas(*pixels.shape[:2])[1], Future())
        with self._changed:
            pixels_waiting = sum(other.pixels.shape[0] * other.pixels.shape[1] for other in self._waiting)
            if self._waiting and pixels_waiting + pixels.shape[0] * pixels.shape[1] > _PIXELS:
                raise QueueFullError(
                    f"the queue is full: images of {pixels_waiting / 1e6:.0f} megapixels wait; try again later"
                )
            if self._stopped:
                raise QueueFullError("the server is stopping: try another one, or later")
            self._waiting.append(work)
            self._changed.notify_all()
        return work.future

    def _run(self) -> None:
        pending: deque[_Batch] = deque()
        while works := self._take(wait=not pending):
            if works is not _NOTHING:
                pending += self._start(works)
            while pending and (works is _NOTHING or len(pending) >= _PENDING):
                self._finish(pending.popleft())
                if works is _NOTHING:
                    break

    def _take(self, wait: bool) -> list[_Work] | tuple[()] | None:
        """The images of the next batch; `_NOTHING` if there are none and `wait` is False; None when all is done and the thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped or not wait)
            if not self._waiting:
                return None if self._stopped and wait else _NOTHING
            canvas, size = self._waiting[0].canvas, self.detector.group_size
            # Nobody waits for company that would save nothing.
            closing = time.monotonic() + (WAIT if self.ratio < size else 0.0)
            while len(chosen := [work for work in self._waiting if work.canvas == canvas][:size]) < size:
                left = closing - time.monotonic()
                if left <= 0 or self._stopped:
                    break
                self._changed.wait(left)
            taken = {id(work) for work in chosen}
            self._waiting = deque(work for work in self._waiting if id(work) not in taken)
            return chosen

    def _start(self, works: list[_Work]) -> list[_Batch]:
        """Hands images to the device, without those whose client went away. What fails, fails for all of the batch."""
        works = [work for work in works if work.future.set_running_or_notify_cancel()]
        if not works:
            return []
        # One by one, each is answered as soon as it is computed.
        alone = len(works) <= self.ratio
        detector = self.single if alone else self.detector
        batches = []
        for part in [[work] for work in works] if alone else [works]:
            try:
                finish = detector.queries_async([work.pixels for work in part], [work.query for work in part])
            except Exception as error:
                _failed(part, error)
                continue
            batches.append(_Batch(part, finish))
            self.batches, self.images = self.batches + 1, self.images + len(part)
        return batches

    def _finish(self, batch: _Batch) -> None:
        try:
            found = batch.finish()
        except Exception as error:
            _failed(batch.works, error)
            return
        for work, detections in zip(batch.works, found, strict=True):
            work.future.set_result(detections)


_NOTHING: Any = (None,)


def _failed(works: Sequence[_Work], error: Exception) -> None:
    for work in works:
        work.future.set_exception(error)
