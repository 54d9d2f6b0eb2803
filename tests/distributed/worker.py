"""The job `train` with the stand-in network, as one of several processes: python -m tests.distributed.worker ARGS.

PAUSE         N:FILE, wait before the N-th batch until FILE exists; prints "paused" first
CODE          in the place of the hash of the package's code
WAIT          a file for which an evaluation waits; prints "evaluating step N" first
SCORES        what the evaluations give, one after another; the fourth and later ones take three seconds
"""

import functools
import hashlib
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from glip_jax.cli import train
from glip_jax.evaluation.shares import Share
from glip_jax.io import provenance
from glip_jax.training import loop, state
from tests.run_job import run_job
from tests.training import stand_in

real_place, real_code, real_scored = loop.place_batch, provenance.code, loop.Checkpoints.scored
calls, evaluations = [], []


def rows(batch) -> list[str]:
    """A hash of each example of a batch, over all its fields."""
    arrays = jax.tree.leaves(batch)
    return [hashlib.sha256(b"".join(a[i].tobytes() for a in arrays)).hexdigest()[:12] for i in range(len(arrays[0]))]


def place(batch, mesh):
    calls.append(1)
    number, _, file = os.environ.get("PAUSE", "0:").partition(":")
    if len(calls) == int(number):
        print("paused", flush=True)
        while not Path(file).exists():
            time.sleep(0.05)
    print(f"batch {len(calls)}: {' '.join(rows(batch))}", flush=True)
    return real_place(batch, mesh)


def _evaluating(real, *arguments, **more):
    return real(*arguments, **{**more, "evaluate": evaluate if jax.process_count() > 1 else None})


def evaluate(params, step, meet):
    """On the host, whole, whatever devices the parameters lie on. In all processes, which get one another's results."""
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)), "whole parameters of this process"
    print(f"evaluating step {step}", flush=True)
    while "WAIT" in os.environ and not Path(os.environ["WAIT"]).exists():
        time.sleep(0.05)
    found = Share(jax.process_index(), jax.process_count(), meet).gather(jax.process_index())
    print(f"evaluated step {step}, gathered {found}", flush=True)
    if "SCORES" not in os.environ:
        return {"evaluation/set/norm": float(np.linalg.norm(params["head"]["box"]["kernel"]))}
    evaluations.append(step)
    time.sleep(3 * (len(evaluations) > 3))
    return {"evaluation/set/AP": float(os.environ["SCORES"].split()[len(evaluations) - 1])}


def scored(self, step, value):
    print(f"scored step {step}: {value:.3g}", flush=True)
    real_scored(self, step, value)


if __name__ == "__main__":
    train.train = functools.partial(_evaluating, train.train)
    loop.place_batch = place
    state._initializer, loop.glip_objective = stand_in.initializer, stand_in.objective
    loop.Checkpoints.scored = scored
    provenance.code = lambda: {"files": os.environ.get("CODE") or real_code()["files"]}
    sys.exit(run_job("train", sys.argv[1:]))
