"""The training step compiled ahead of a run, for every canvas, into the persistent compilation cache that the run reads.

For chips that are not there libtpu compiles on any CPU, one process a canvas at a time: a compiler may abort its process, and each has its own
flags. For the devices of this machine processes do it where they are CPUs, and threads where this process alone may hold them.

What jax asks the cache for is a hash of the program, the versions of jaxlib and libtpu, the compiler's flags, the topology and the devices. A run
finds a program if all of these are alike; else it compiles as if nothing was there.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from glip_jax.config import Config
from glip_jax.distributed.mesh import check_fits, make_mesh
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io import fsspec_gcs
from glip_jax.io.compiler_lines import without_slow_compile_alarms
from glip_jax.io.processes import end_with_parent
from glip_jax.io.retry import StorageError
from glip_jax.planning.compile import PlanError, abstract_batch, devices_of, environment
from glip_jax.structures.canvas import canvas_size
from glip_jax.training.monitoring.cached_programs import program_counts
from glip_jax.training.monitoring.chips import Topology
from glip_jax.training.programs import default_workers
from glip_jax.training.state import abstract_state
from glip_jax.training.step import glip_objective, make_step

__all__ = ["Precompiled", "canvases", "precompile"]

Canvas = tuple[int, int]

_NEEDS_CHIPS = "must be constructed with a Client"
"""What libtpu says of a program that is in the cache and cannot be loaded, as its chips are not here."""


class Precompiled(NamedTuple):
    """One canvas, done."""

    canvas: Canvas
    seconds: float
    """To trace, and to compile or to read."""
    cached: bool
    """Whether the program was in the cache already."""


@dataclass(frozen=True)
class _Job:
    """What a compiler process is told."""

    config: Config
    topology: Topology | None
    """None: the devices of the process."""
    workdir: str


def canvases(config: Config) -> list[Canvas]:
    """Every canvas (height, width) that the steps of `config` can have, pixels, the largest first."""
    data, multiple = config.data, config.model.input.extent_multiple
    sizes = {
        canvas_size(side, aspect, data.long_side, multiple) for side in data.short_sides for aspect in data.aspects
    }
    return sorted(sizes, key=lambda size: (size[0] * size[1], size[1]), reverse=True)


def precompile(config: Config, topology: Topology | None, workdir: str, workers: int = 0) -> Iterator[Precompiled]:
    """Compiles the step of `config` on all its canvases, `workers` at once, and yields each as it ends.

    `topology`: TPU chips that are not there; None: all devices of the processes that have joined. `workers` 0: one for every four cores, at most
    eight, at least one. Raises PlanError where a compiler fails or its process dies, MeshError where batch, mesh and devices do not fit,
    StorageError where the cache is in a bucket that does not answer.
    """
    job = _Job(config, topology, workdir)
    sizes = canvases(config)
    with _pool(job, min(workers or max(1, default_workers()), len(sizes))) as (pool, work):
        waiting = {pool.submit(work, size): size for size in sizes}
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:
            raise PlanError(
                "a process that compiled ended without a result, perhaps for want of memory: give fewer --workers; the same command goes on"
            ) from None
        finally:
            # What still compiles after an error or a signal ends with this process.
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _pool(job: _Job, workers: int) -> Iterator[tuple[Executor, Callable[[Canvas], Precompiled]]]:
    """What compiles, and the function to give it."""
    if job.topology is None and (jax.default_backend() != "cpu" or jax.process_count() > 1):
        compiler = _Compiler(job)
        with without_slow_compile_alarms():
            yield ThreadPoolExecutor(workers, "compile"), compiler
        return
    before = dict(os.environ)
    os.environ.update(environment(job.topology, "tpu-whole") if job.topology else {})
    try:
        context = multiprocessing.get_context("spawn")
        yield (
            ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job.topology,)),
            partial(_in_process, job),
        )
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Compiler:
    """Compiles one canvas a call."""

    def __init__(self, job: _Job) -> None:
        fsspec_gcs.install()
        self._config = job.config
        self._folder = enable_compilation_cache(job.workdir)
        # A program that cannot be kept was compiled for nothing; and every one is kept, however quickly it compiles.
        jax.config.update("jax_raise_persistent_cache_errors", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        program_counts()
        self._mesh = make_mesh(job.config.mesh, devices_of(job.topology, "tpu-whole") if job.topology else None)
        check_fits(job.config, self._mesh)
        self._state = abstract_state(job.config, self._mesh)
        names = tuple(sorted(job.config.data.sources))
        self._step: Any = make_step(job.config, self._mesh, glip_objective(job.config), self._state, names)

    def __call__(self, canvas: Canvas) -> Precompiled:
        begin, before = time.perf_counter(), program_counts(of_this_thread=True)
        batch = abstract_batch(self._config, canvas, self._mesh)
        try:
            # Not within a mesh, unlike a plan: the key is to be that of the training loop.
            self._step.lower(self._state, batch).compile()
        except StorageError:
            raise
        except Exception as fault:  # of the compiler, or of a program that cannot be read
            if _NEEDS_CHIPS not in str(fault):
                line = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
                raise PlanError(
                    f"canvas {canvas[0]}x{canvas[1]} cannot be compiled, or its program in {self._folder} cannot be read ({line})"
                ) from None
            return Precompiled(canvas, time.perf_counter() - begin, cached=True)
        found = program_counts(of_this_thread=True).since(before)
        return Precompiled(canvas, time.perf_counter() - begin, bool(found.cached))


_compiler: _Compiler | None = None
"""Of a process of the pool."""


def _start(topology: Topology | None) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if topology is not None:
        jax.config.update("jax_platforms", "cpu")


def _in_process(job: _Job, canvas: Canvas) -> Precompiled:
    global _compiler
    with without_slow_compile_alarms():
        _compiler = _compiler or _Compiler(job)
        return _compiler(canvas)
