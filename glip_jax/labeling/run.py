"""Runs a labelling job: labels shard after shard, here or on the workers of a cluster, and completes the output folder."""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from glip_jax.data import shards
from glip_jax.data.shard_cache import cache_folder
from glip_jax.io import provenance
from glip_jax.io.sharing import Engine, Part
from glip_jax.io.task_results import TaskResults
from glip_jax.labeling.phrases.finders import PhraseFinder
from glip_jax.labeling.pseudo import Labeler, Rules
from glip_jax.labeling.statistics import LabelStatistics, summary
from glip_jax.labeling.teacher import Teacher
from glip_jax.labeling.verifier import Verifier

__all__ = ["FORMAT", "Input", "LabelingJob", "LabelingWorker", "run"]

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the format of report.json and plan.json."""

_READS = 8
"""Results of finished tasks that are read concurrently."""


class Input(NamedTuple):
    """A folder of shards with captions to label."""

    path: str
    shards: shards.Shards


class _Task(NamedTuple):
    """The records of one shard file."""

    shards: shards.Shards
    begin: int
    """Index of its first record in the folder."""
    end: int
    """Index after its last record."""


@dataclass(frozen=True)
class LabelingJob:
    """Everything that defines a labelling job."""

    out: str
    """Output folder, local or gs://."""
    name: str
    inputs: Sequence[Input]
    teacher: Teacher
    finder: PhraseFinder
    rules: Rules
    about: Mapping[str, Any]
    """Provenance written into every record, beside threshold and code."""
    command: str
    code: str
    threads: int
    verifier: Verifier | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that determines the labels except the code, whose version each record states."""
        # The content of the shards, not their path, which may differ between hosts.
        inputs = {source.manifest.name: source.manifest.columns["sha256"][:16] for _, source in self.inputs}
        thresholds = {source.manifest.name: self.rules.threshold_of(source.manifest.name) for _, source in self.inputs}
        # The columns hold sizes and image hashes alone.
        records = {source.manifest.name: provenance.source_hash(path)[:16] for path, source in self.inputs}
        return {
            "format": FORMAT,
            "name": self.name,
            "inputs": inputs,
            "records": records,
            "thresholds": thresholds,
            **self.about,
        }


class LabelingWorker:
    """Labels shard files of a job, one a call."""

    def __init__(self, job: LabelingJob, join: bool = True) -> None:
        """`join`: another process has begun the job. Raises TaskError if its settings, or its folder, are others than here."""
        self._work = _tasks(job.inputs)
        self.results = TaskResults(job.out, list(self._work), job.settings(), cache_folder() / "labelling", join)
        self._labeler = Labeler(job.teacher, job.finder, job.rules, job.about, job.code, job.threads, job.verifier)

    def __call__(self, name: str, progress: Callable[[int], None] = lambda _: None) -> None:
        """Labels one shard file; the result is discarded if another process has finished it first."""
        begin, task, results = time.monotonic(), self._work[name], self.results
        if results.done(name):
            return
        try:
            writer = shards.ShardWriter(results.writing(name), 0)
            try:
                statistics = self._labeler.label(task.shards, task.begin, task.end, writer.add, progress)
                written = asdict(writer.close()) | {"file": name}
            except BaseException:
                writer.abandon()
                results.writing(name).unlink(missing_ok=True)
                raise
            statistics.seconds = time.monotonic() - begin
            device = provenance.versions()["device"]
            results.publish(name, {"written": written, "tally": statistics.as_json(), "device": device})
        except OSError:
            if not results.finished:  # otherwise the work folder was removed: other processes completed the job
                raise


def run(
    job: LabelingJob, part: Part | None = None, engine: Engine | None = None,
    make: Callable[[], Callable[[Any], Any]] | None = None,
) -> bool:  # fmt: skip
    """Labels the shards that are missing, of `part` or all, and completes the output folder if none is missing then.

    `engine` has the shards labelled by workers of a cluster, which `make` makes, instead of here. Returns whether the folder is complete.

    Raises TaskError if the folder holds the work of another job, ShardError if no caption got a box (the folder is then
    removed), and OSError for failures of the file system or the storage.
    """
    work = _tasks(job.inputs)
    if engine is None:
        worker = LabelingWorker(job, join=False)
        results = worker.results
    else:
        worker = None
        results = TaskResults(job.out, list(work), job.settings(), cache_folder() / "labelling")
    mine = [name for name in (part.of(results.names) if part else results.names) if name in results.missing]
    total, todo = (sum(work[name].end - work[name].begin for name in names) for names in (work, mine))
    labeled, begin = 0, time.monotonic()
    # A terminal shows a moving bar, a log file gets a line every 30 s.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(desc=f"label part {part}" if part else "label", total=todo if part else total, initial=0 if part else total - todo, unit="image",
              mininterval=interval, maxinterval=interval) as bar:  # fmt: skip

        def progress(count: int) -> None:
            nonlocal labeled
            labeled += count
            bar.set_postfix_str(f"{labeled / (time.monotonic() - begin):.1f} images/s", refresh=False)
            bar.update(count)

        if worker is not None:
            for name in mine:
                worker(name, progress)
        elif engine is not None and make is not None and mine:
            for name in engine(make, mine, lambda name: name):
                progress(work[name].end - work[name].begin)
    results.refresh()
    if results.missing:
        results.close()
        logger.info(
            f"{job.out}: part {part} is done; {len(results.missing)} of {len(work)} files are missing (first: {results.missing[0]}): the part "
            "that ends last completes the folder; so does the same command without --part"
        )
        return False
    try:
        if not results.finished:
            _finish(job, results, work)
    except FileNotFoundError:
        if not results.finished:  # otherwise another process has completed it, and removed the work folder
            raise
    results.clear()  # in every process: a late one may have created the work folder again
    return True


def _tasks(inputs: Sequence[Input]) -> dict[str, _Task]:
    """Output files and their input records, one for each input shard file, in order."""
    ranges = []
    for _, source in inputs:
        begin = 0
        for shard in source.manifest.shards:
            ranges.append(_Task(source, begin, begin + shard["records"]))
            begin += shard["records"]
    return dict(zip(shards.shard_files(len(ranges)), ranges, strict=True))


def _finish(job: LabelingJob, results: TaskResults, work: Mapping[str, _Task]) -> None:
    """Adds up the statistics of all shards and writes columns, report and manifest."""
    total, written, devices = LabelStatistics(), [], set[str]()
    with ThreadPoolExecutor(_READS) as pool:
        infos = list(pool.map(results.result_info, work))
    for info in infos:
        total.add(LabelStatistics.from_json(info["tally"]))
        devices.add(info.get("device", ""))
        part = info["written"]
        part |= {"labels": {int(label): n for label, n in part["labels"].items()}, "columns": tuple(part["columns"])}
        written.append(shards.Written(**part))
    reasons = total.report.dropped
    if not any(part.records for part in written):
        results.abandon()
        drops = ", ".join(f"{reason} {n} (first: {total.report.first[reason]})" for reason, n in reasons.most_common(5))
        raise shards.ShardError(f"nothing to write to {job.out}: of {total.captions} captions none got a box; {drops}")
    licences = dict.fromkeys(source.shards.manifest.licence for source in job.inputs)
    scratch = results.scratch("end")
    manifest = shards.complete(
        scratch, written, name=job.name, names=(), licence="; ".join(licences),
        source="; ".join(source.path for source in job.inputs), command=job.command, drops=dict(sorted(reasons.items())),
    )  # fmt: skip
    report = {
        "format": FORMAT, "name": job.name, "command": job.command, "licence": manifest.licence,
        "inputs": [source.path for source in job.inputs], "settings": job.settings(), "summary": summary(total), "versions": provenance.versions() | {"device": "; ".join(filter(None, sorted(devices)))},
    }  # fmt: skip
    (scratch / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    for file in (manifest.columns["file"], "report.json"):
        results.put(scratch / file, file)
    results.finish((scratch / "manifest.json").read_text())
    logger.info(_table(report["summary"]))


def _table(counts: Mapping[str, Any]) -> str:
    """The summary as lines for the terminal."""
    rows = [
        ("captions", f"{counts['captions']}", ""),
        ("kept", f"{counts['kept']}", f"{counts['kept_share']:.1%}"),
        ("phrases", f"{counts['phrases']}", f"{counts['phrases_with_boxes']} with a box"),
        ("boxes", f"{counts['boxes']}", f"{counts['boxes_per_phrase_with_boxes']:.2f} for a phrase with any"),
        ("concepts", f"{counts['concepts']}", f"{counts['concepts_with_boxes']} with a box"),
    ]
    judged, not_judged = counts["phrases_judged"], counts["phrases_not_judged"]
    if judged or not_judged:
        rows.append(("judged", f"{judged}", f"{counts['phrases_vetoed']} vetoed; not judged {not_judged}"))
    for kind, label in (("notes", "noted"), ("drops", "dropped")):
        rows += [(f"{label} {reason}", f"{n['count']}", f"first: {n['first']}") for reason, n in counts[kind].items()]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {count:>8}  {more}".rstrip() for name, count, more in rows)
