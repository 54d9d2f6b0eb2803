"""Times labelling on Ray, with one and with two workers on one machine, against the plain job.

Captions, images and network are those of `benchmarks.label`, in six files; a run labels all of them into a new folder. Detector and programs
are made before, as a job of hours makes them once; Ray's own processes run beside on the same cores.

* `one`, `two`: `label --ray` with one worker that Ray gives all cores, or two of half of them; XLA takes all cores of the machine anyway.
* `plain`: the job in one process.

Each side on Ray labels once in its own process too, and ends with an error if the shards differ. A ratio of 1.05 is an overhead of 5 %; for images/s
divide --images (300) by the seconds.

    python -m benchmarks.ray_label --threads 2 --rounds 5
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.alternating import Runs, Settings, main

FILES = 6


def _job(folder: Path, threshold: float) -> Any:
    """The job on the shards in `folder`, without an output folder."""
    from benchmarks.label import teacher_and_finder
    from glip_jax.data import shards
    from glip_jax.distributed.runtime import enable_compilation_cache
    from glip_jax.labeling.pseudo import Rules
    from glip_jax.labeling.run import Input, LabelingJob

    enable_compilation_cache()
    source = shards.Shards(folder / "captions")
    teacher, finder = teacher_and_finder()
    return LabelingJob(
        out="", name="made", inputs=[Input(str(source.path), source)], teacher=teacher, finder=finder,
        rules=Rules(threshold), about={"teacher": "random"}, command="", code="benchmark", threads=4,
    )  # fmt: skip


def _worker(folder: Path, threshold: float) -> Callable[[tuple[str, str]], None]:
    """What labels on a worker: a folder to make, and one of its files."""
    from glip_jax.labeling.run import LabelingWorker

    job = _job(folder, threshold)

    @functools.lru_cache(1)
    def labels(out: str) -> LabelingWorker:
        return LabelingWorker(dataclasses.replace(job, out=out))

    return lambda task: labels(task[0])(task[1])


def _hashes(out: str) -> list[str]:
    return [shard["sha256"] for shard in json.loads(Path(out, "manifest.json").read_text())["shards"]]


@contextlib.contextmanager
def _new(folder: Path) -> Iterator[str]:
    # The two processes communicate over stdout.
    with tempfile.TemporaryDirectory(dir=folder) as out, contextlib.redirect_stdout(sys.stderr):
        yield f"{out}/made"


def images_of(arguments: Sequence[str]) -> int:
    """The number of images of a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_label")
    parser.add_argument("--images", type=int, default=300, choices=range(FILES, 301), metavar="6 to 300")
    return parser.parse_args(arguments).images


def _setting(settings: Settings) -> tuple[Path, Any]:
    from benchmarks.label import threshold_of, write_captions

    folder = Path(tempfile.mkdtemp(prefix="glip_jax_ray_label_"))
    write_captions(folder, FILES, images_of(settings.arguments))
    job = _job(folder, 0.0)
    return folder, _job(folder, threshold_of(job.inputs[0].shards, job.teacher, job.finder))


def plain_runs(settings: Settings) -> Runs:
    """Labels in this process."""
    from glip_jax.labeling.run import run

    folder, job = _setting(settings)

    def once() -> None:
        with _new(folder) as out:
            run(dataclasses.replace(job, out=out))

    return {"demo": once}


def ray_runs(count: int, settings: Settings) -> Runs:
    """Labels by `count` workers of a cluster of one node."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from glip_jax.distributed.ray_tasks import ray_workers
    from glip_jax.labeling.run import run

    folder, job = _setting(settings)
    node = {"num_cpus": settings.threads, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    make = functools.partial(_worker, folder, job.rules.threshold)
    stack = contextlib.ExitStack()
    atexit.register(stack.close)  # which also keeps the workers
    resources = {"CPU": settings.threads / count}
    work = stack.enter_context(ray_workers(str(cluster.address), make, count=count, resources=resources))

    def once() -> list[str]:
        with _new(folder) as out:
            run(
                dataclasses.replace(job, out=out),
                None,
                lambda _, names, __: work(names, lambda name: (out, name)),
                make,
            )
            return _hashes(out)

    with _new(folder) as out:
        run(dataclasses.replace(job, out=out))
        if once() != _hashes(out):
            raise SystemExit("the shards that were labelled on Ray differ from those of the plain job")

    def timed() -> None:
        once()

    return {"demo": timed}


if __name__ == "__main__":
    sides = {"one": functools.partial(ray_runs, 1), "two": functools.partial(ray_runs, 2), "plain": plain_runs}
    main("benchmarks.ray_label", __doc__ or "", sides, ("demo",), lambda own: print(f"{images_of(own)} images"))
