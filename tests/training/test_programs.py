"""Programs of several canvases, compiled beside one another."""

import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.training.programs import Programs

CANVASES = [(8, 8), (8, 16), (16, 8)]


class _Batch(NamedTuple):
    image: jax.Array


def _batch(canvas, value=1.0):
    return _Batch(jnp.full((2, *canvas, 3), value))


class _Step:
    """A step whose tracing is seen, waits for `free` (canvas to event), and fails on `bad`."""

    def __init__(self, free=None, bad=None):
        self.traced, self.began, self.free, self.bad = [], threading.Event(), free or {}, bad
        self.jitted = jax.jit(self._step)

    def _step(self, state, batch, factor):
        canvas = batch.image.shape[1:3]
        self.traced.append((canvas, threading.current_thread() is threading.main_thread()))
        if canvas in self.free:
            self.began.set()
            assert self.free[canvas].wait(60)
        if canvas == self.bad:
            raise ValueError("too large")
        return state + factor * batch.image.sum(), {"size": jnp.asarray(canvas)}


def _run(programs: Any, canvas, state=1.0):
    state, metrics = programs(canvas, jnp.float32(state), _batch(canvas), np.float32(0.5))
    assert metrics["size"].tolist() == list(canvas)
    return float(state)


def _until_ready(programs, canvas):
    end = time.monotonic() + 60
    while programs.waits(canvas):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_results_are_the_step_s_and_each_canvas_is_compiled_once(workers):
    step = _Step()
    with Programs(step.jitted, CANVASES, workers) as programs:
        assert programs.waits(CANVASES[1])
        assert _run(programs, CANVASES[1]) == 1 + 0.5 * 2 * 8 * 16 * 3
        for canvas in CANVASES if workers else ():
            _until_ready(programs, canvas)
        traced = len(step.traced)
        for canvas in [*CANVASES, *CANVASES]:
            assert _run(programs, canvas) == 1 + 0.5 * 2 * canvas[0] * canvas[1] * 3
            assert not programs.waits(canvas)
    assert sorted(canvas for canvas, _ in step.traced) == CANVASES
    assert (traced, any(main for _, main in step.traced)) == ((3, False) if workers else (1, True))


def test_one_that_waits_for_a_thread_is_compiled_when_it_is_needed():
    free = threading.Event()
    step = _Step({CANVASES[1]: free})
    with Programs(step.jitted, CANVASES, 1) as programs:
        _run(programs, CANVASES[0])
        assert step.began.wait(60)
        _run(programs, CANVASES[2])
        assert step.traced[-1] == (CANVASES[2], True) and programs.waits(CANVASES[1])
        free.set()
        _run(programs, CANVASES[1])


def test_what_the_compiler_raises_comes_at_its_step_alone():
    step = _Step(bad=CANVASES[1])
    with Programs(step.jitted, CANVASES, 2) as programs:
        _run(programs, CANVASES[0])
        _run(programs, CANVASES[2])
        with pytest.raises(ValueError, match="too large"):
            _run(programs, CANVASES[1])


def test_leaving_drops_what_was_not_begun():
    free = threading.Event()
    step = _Step({CANVASES[1]: free})
    with Programs(step.jitted, CANVASES, 1) as programs:
        _run(programs, CANVASES[0])
        assert step.began.wait(60)
    free.set()
    _until_ready(programs, CANVASES[1])
    assert CANVASES[2] not in [canvas for canvas, _ in step.traced]


def test_features_in_the_place_of_an_image_are_compiled_when_they_are_needed():
    step = jax.jit(lambda state, batch: (state + batch.image.sum(), {}))
    features: Any = _Batch(jnp.ones((2, 5, 7)))
    with Programs(step, CANVASES, 2) as programs:
        state, _ = programs(CANVASES[1], jnp.float32(0), features)
        assert state == 70 and programs.waits(CANVASES[0])
