"""The compiled programs of the training step, one for each canvas, compiled beside one another.

The first step on a canvas needs its program, and a program of the whole network takes a minute and more. On a host with many cores, as those of accelerators are,
threads compile the programs of the next canvases meanwhile: XLA compiles without Python's lock, only tracing takes turns.
"""

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from glip_jax.io.compiler_lines import without_slow_compile_alarms
from glip_jax.structures.batch import Batch
from glip_jax.training.step import StepFunction

__all__ = ["Programs", "default_workers"]

Canvas = tuple[int, int]

_MOST = 8
"""Compilations at once: each takes gigabytes of memory."""
_CORES = 4
"""For each thread: XLA keeps several cores busy, and on few of them the first step would wait longer for the others' sake."""


def default_workers() -> int:
    """How many programs this machine compiles beside one another; 0 on fewer than four cores."""
    return min(_MOST, (os.cpu_count() or 1) // _CORES)


class Programs:
    """A jitted step, compiled ahead for `canvases` (height, width), in their order, from its first call on.

    Args:
        step: (state, batch, ...) to (state, metrics), as of `training.step.make_step`.
        canvases: those of the next steps; others are compiled when they are needed.
        workers: threads that compile ahead; by default one for every four cores, eight at most. With none each program is compiled when it is needed.

    Leaving the context drops what was not begun. What a thread compiles then cannot be stopped.
    """

    def __init__(self, step: StepFunction, canvases: Iterable[Canvas], workers: int | None = None) -> None:
        self._step, self._canvases = step, list(dict.fromkeys(canvases))
        self._workers = default_workers() if workers is None else workers
        self._ahead: dict[Canvas, Future[StepFunction]] = {}
        self._used: dict[Canvas, StepFunction] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Programs":
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._stack.close()

    def waits(self, canvas: Canvas) -> bool:
        """Whether a step on this canvas has to wait for the compiler."""
        return canvas not in self._used and not (canvas in self._ahead and self._ahead[canvas].done())

    def __call__(self, canvas: Canvas, state: Any, batch: Batch, *rest: Any) -> Any:
        """The step on a batch of this canvas. Raises what the compiler raises."""
        if canvas in self._used:
            return self._used[canvas](state, batch, *rest)
        if not self._used:
            self._begin(canvas, (state, batch, *rest))
        with contextlib.nullcontext() if self._threads else without_slow_compile_alarms():
            program = self._used[canvas] = self._program(canvas)
            return program(state, batch, *rest)

    def _begin(self, first: Canvas, given: tuple[Any, ...]) -> None:
        """Starts to compile: the program that is needed now, then the others in the order of their steps."""
        others = [canvas for canvas in self._canvases if canvas != first]
        if not (self._workers and others and _holds_an_image(given[1], first)):
            return
        shapes = jax.tree.map(_shape, given)
        self._threads = ThreadPoolExecutor(self._workers, "compile")
        # From the main thread, and once: it exchanges the standard error of the process.
        self._stack.enter_context(without_slow_compile_alarms())
        for canvas in (first, *others):
            self._ahead[canvas] = self._threads.submit(self._compiled, _on_canvas(shapes, first, canvas))

    def _compiled(self, shapes: tuple[Any, ...]) -> StepFunction:
        jitted: Any = self._step
        return jitted.lower(*shapes).compile()

    def _program(self, canvas: Canvas) -> StepFunction:
        future = self._ahead.get(canvas)
        # One that waits for a thread is compiled here and now instead.
        return self._step if future is None or future.cancel() else future.result()


def _holds_an_image(batch: Batch, canvas: Canvas) -> bool:
    """Whether `image` are pixels or patches, whose shape follows from the canvas; `Feed` may give features instead."""
    shape = batch.image.shape
    return len(shape) == 4 and canvas[0] * shape[2] == canvas[1] * shape[1]


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=getattr(x, "sharding", None))


def _on_canvas(shapes: tuple[Any, ...], own: Canvas, other: Canvas) -> tuple[Any, ...]:
    """Arguments of the step on canvas `own`, as they are on another one."""
    state, batch, *rest = shapes
    image = batch.image
    sides = [side * there // here for side, here, there in zip(image.shape[1:3], own, other, strict=True)]
    changed = jax.ShapeDtypeStruct((image.shape[0], *sides, image.shape[3]), image.dtype, sharding=image.sharding)
    return state, batch._replace(image=changed), *rest
