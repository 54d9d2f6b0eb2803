"""A build by several machines: each writes shards from ranges of the same index, and whoever ends last merges them.

The entries come in one order whoever reads the annotation files, so every process of a static part makes its own index, in
`shard_cache.cache_folder`; on a cluster the process that gives out the tasks makes it, and a task carries its entries. The shards and
their descriptions lie in the output folder (`glip_jax.io.task_results`). The result is that of `build`, byte for byte. All machines
must see the images: a machine without the folder of images is refused, as it would drop them as missing.
"""

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from glip_jax.data.importers.build import (
    BuildPlan,
    Index,
    build_lock,
    excluded_hashes,
    merge,
    name_output_in_errors,
    open_index,
    settings_of,
    tasks_of,
)
from glip_jax.data.importers.entry import ImageFolder, ImportSource, SourceError, image_folder
from glip_jax.data.importers.report import BuildReport
from glip_jax.data.importers.workers import Job, Task, lines_of, run, shard_info, write_shard
from glip_jax.data.records import RecordError
from glip_jax.data.shard_cache import cache_folder
from glip_jax.data.shards import Manifest, ShardError
from glip_jax.io import gcs
from glip_jax.io.sharing import Engine, Part
from glip_jax.io.task_results import TaskResults

__all__ = ["ImportWorker", "build_shared"]

logger = logging.getLogger(__name__)

_LOCAL = ("out", "source", "command", "processes")
"""Settings of a build that may differ between the processes that share it."""


def build_shared(
    plan: BuildPlan, open_source: Callable[[Path], ImportSource], part: Part | None = None, engine: Engine | None = None
) -> tuple[Manifest, BuildReport] | None:
    """Writes the shards that are missing, of `part` or all, here or by the `ImportWorker`s of `engine`, and completes the folder if none
    is missing then; None if one is, or if another process has completed it.

    Raises what `build` raises; TaskError if the folder holds the work of another command.
    """
    excluded, origins = excluded_hashes(plan.exclude)
    name = hashlib.sha256(gcs.address(plan.out).encode()).hexdigest()[:16]
    partial = cache_folder() / "importing" / name / (f"part-{part.index}-of-{part.count}" if part else "all")
    with build_lock(partial, plan.out), name_output_in_errors(plan.out):
        try:
            index = open_index(plan, partial, settings_of(plan, origins), open_source)
            np.save(partial / "excluded.npy", np.array(sorted(excluded), np.uint64))
            tasks = {task.file: task for task in tasks_of(plan, index)}
            settings = _shared_settings(plan, origins, index)
            results = TaskResults(plan.out, list(tasks), settings, cache_folder() / "sharing")
            job = Job(partial, index.path, index.images, len(index.names), plan.strict, plan.orientation)
            mine = [file for file in (part.of(results.names) if part else results.names) if file in results.missing]
            if engine is None:
                publish = functools.partial(_publish, results, partial)
                run(job, [tasks[file] for file in mine], plan.processes, publish)
            else:
                make = functools.partial(ImportWorker, gcs.address(plan.out), results.names, settings, job, excluded)
                _run_on(engine, make, tasks, mine, index.path)
            results.refresh()
            made = None
            if results.missing:
                results.close()
                logger.info(
                    f"{plan.out}: part {part} is done; {len(results.missing)} of {len(tasks)} files are missing (first: {results.missing[0]}): "
                    "the part that ends last completes the folder; so does the same command without --part"
                )
            elif not results.finished:
                made = _complete(plan, partial, index, origins, results)
            shutil.rmtree(partial, ignore_errors=True)
            return made
        except (SourceError, ShardError, RecordError):
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _shared_settings(plan: BuildPlan, origins: list[dict[str, Any]], index: Index) -> dict[str, Any]:
    """Everything that determines the shards, with the content of the annotation files in place of their paths."""
    settings = {key: value for key, value in json.loads(settings_of(plan, origins)).items() if key not in _LOCAL}
    name = plan.name or str(plan.out).rstrip("/").rpartition("/")[2]
    return settings | {"name": name, "inputs": [item["sha256"] for item in index.inputs], "entries": index.count}


def _publish(results: TaskResults, folder: Path, file: str) -> None:
    """Makes a shard that was written in `folder`, with its description, the result of its task."""
    description = folder / f"{file}.json"
    results.publish(file, json.loads(description.read_text()), folder / file)
    description.unlink()


def _run_on(
    engine: Engine, make: Callable[[], "ImportWorker"], tasks: Mapping[str, Task], files: Sequence[str], index: Path
) -> None:
    total, todo = (sum(tasks[file].end - tasks[file].begin for file in some) for some in (tasks, files))
    with tqdm(desc="records", total=total, initial=total - todo, unit="record", disable=None) as bar:
        for file in engine(make, files, lambda file: (file, list(lines_of(index, tasks[file])))):
            bar.update(tasks[file].end - tasks[file].begin)


def _complete(
    plan: BuildPlan, partial: Path, index: Index, origins: list[dict[str, Any]], results: TaskResults
) -> tuple[Manifest, BuildReport] | None:
    """Merges the shards of all; None if another process has done so meanwhile."""
    try:
        described = [shard_info(results.result_info(file)) for file in results.names]
        manifest, report = merge(plan, partial, index, origins, described)
        for file in (manifest.columns["file"], "report.json"):
            results.put(partial / file, file)
        first = results.finish((partial / "manifest.json").read_text())
    except FileNotFoundError:
        if not results.finished:
            raise
        return None
    except (SourceError, ShardError):
        results.abandon()
        raise
    results.clear()
    return (manifest, report) if first else None


class ImportWorker:
    """Writes shards on a machine of a cluster, one a call."""

    def __init__(
        self, out: str, names: Sequence[str], settings: Mapping[str, Any], job: Job, excluded: frozenset[int]
    ) -> None:
        """Raises SourceError if this machine does not see the images, TaskError if it does not see the folder `out`."""
        if isinstance(job.images, ImageFolder):
            image_folder(job.images.path)
        self._results = TaskResults(out, names, settings, cache_folder() / "sharing", join=True)
        self._job, self._excluded = replace(job, folder=self._results.scratch("import")), excluded

    def __call__(self, task: tuple[str, Sequence[str]]) -> None:
        """Writes the shard of a file name and its packed entries; it is discarded if another process has written it first."""
        file, lines = task
        if not self._results.done(file):
            write_shard(self._job, file, lines, self._excluded, lambda _: None)
            _publish(self._results, self._job.folder, file)
