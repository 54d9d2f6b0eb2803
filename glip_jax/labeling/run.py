"""Runs a labelling job: labels shard after shard, shared with other processes, and completes the output folder."""

import contextlib
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
from glip_jax.io import provenance
from glip_jax.labeling.phrases.finders import PhraseFinder
from glip_jax.labeling.pseudo import Labeler, Rules
from glip_jax.labeling.statistics import LabelStatistics, summary
from glip_jax.labeling.teacher import Teacher
from glip_jax.labeling.verifier import Verifier
from glip_jax.labeling.work_queue import WorkQueue

__all__ = ["FORMAT", "Input", "LabelingJob", "run"]

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
    lease: float
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


def run(job: LabelingJob) -> None:
    """Labels until all shards are done, by this process or others, and completes the output folder.

    Raises TaskError if the folder holds the work of another job, ShardError if no caption got a box (the folder is then
    removed), and OSError for failures of the file system or the storage.
    """
    work = _tasks(job.inputs)
    queue = WorkQueue(job.out, list(work), job.settings(), job.lease)
    labeler = Labeler(job.teacher, job.finder, job.rules, job.about, job.code, job.threads, job.verifier)
    total = sum(task.end - task.begin for task in work.values())
    labeled, begin = 0, time.monotonic()
    # A terminal shows a moving bar, a log file gets a line every 30 s.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(desc="label", total=total, initial=_done(queue, work), unit="image", mininterval=interval,
              maxinterval=interval) as bar:  # fmt: skip

        def progress(count: int) -> None:
            nonlocal labeled
            labeled += count
            bar.set_postfix_str(f"this process {labeled / (time.monotonic() - begin):.1f} images/s", refresh=False)
            bar.update(count)

        def add_others() -> None:
            """Counts what other processes have done, for the estimate of the time left."""
            bar.update(max(0, _done(queue, work) - int(bar.n)))

        with contextlib.closing(queue.claim_tasks(add_others)) as claimed_tasks:
            for name in claimed_tasks:
                add_others()
                _label(queue, name, work[name], labeler, progress)
    pause = 0.2
    while not queue.finished:
        with queue.claim("end") as claimed:
            if claimed and not queue.finished:
                try:
                    _finish(job, queue, work)
                except FileNotFoundError:
                    if not queue.finished:  # otherwise another process completed it: this one exceeded its lease
                        raise
        if not queue.finished:  # another process is completing it
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
    queue.clear()  # in every process: a late one may have created the work folder again


def _tasks(inputs: Sequence[Input]) -> dict[str, _Task]:
    """Output files and their input records, one for each input shard file, in order."""
    ranges = []
    for _, source in inputs:
        begin = 0
        for shard in source.manifest.shards:
            ranges.append(_Task(source, begin, begin + shard["records"]))
            begin += shard["records"]
    return dict(zip(shards.shard_files(len(ranges)), ranges, strict=True))


def _done(queue: WorkQueue, work: Mapping[str, _Task]) -> int:
    return sum(work[name].end - work[name].begin for name in queue.seen)


def _label(queue: WorkQueue, name: str, task: _Task, labeler: Labeler, progress: Callable[[int], None]) -> None:
    """Labels one shard file; the result is discarded if another process finished it first."""
    begin = time.monotonic()
    try:
        writer = shards.ShardWriter(queue.writing(name), 0)
        try:
            statistics = labeler.label(task.shards, task.begin, task.end, writer.add, progress)
            written = asdict(writer.close()) | {"file": name}
        except BaseException:
            writer.abandon()
            raise
        statistics.seconds = time.monotonic() - begin
        queue.publish(name, {"written": written, "tally": statistics.as_json()})
    except OSError:
        if not queue.finished:  # otherwise the work folder was removed: other processes completed the job
            raise


def _finish(job: LabelingJob, queue: WorkQueue, work: Mapping[str, _Task]) -> None:
    """Adds up the statistics of all shards and writes columns, report and manifest."""
    total, written = LabelStatistics(), []
    with ThreadPoolExecutor(_READS) as pool:
        infos = list(pool.map(queue.result_info, work))
    for info in infos:
        total.add(LabelStatistics.from_json(info["tally"]))
        part = info["written"]
        part |= {"labels": {int(label): n for label, n in part["labels"].items()}, "columns": tuple(part["columns"])}
        written.append(shards.Written(**part))
    reasons = total.report.dropped
    if not any(part.records for part in written):
        queue.abandon()
        drops = ", ".join(f"{reason} {n} (first: {total.report.first[reason]})" for reason, n in reasons.most_common(5))
        raise shards.ShardError(f"nothing to write to {job.out}: of {total.captions} captions none got a box; {drops}")
    licences = dict.fromkeys(source.shards.manifest.licence for source in job.inputs)
    scratch = queue.scratch("end")
    manifest = shards.complete(
        scratch, written, name=job.name, names=(), licence="; ".join(licences),
        source="; ".join(source.path for source in job.inputs), command=job.command, drops=dict(sorted(reasons.items())),
    )  # fmt: skip
    report = {
        "format": FORMAT, "name": job.name, "command": job.command, "licence": manifest.licence,
        "inputs": [source.path for source in job.inputs], "settings": job.settings(), "summary": summary(total), "versions": provenance.versions(),
    }  # fmt: skip
    (scratch / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    for file in (manifest.columns["file"], "report.json"):
        queue.put(scratch / file, file)
    queue.finish((scratch / "manifest.json").read_text())
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
