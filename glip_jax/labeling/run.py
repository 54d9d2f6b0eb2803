"""The work of the job `label`: shard after shard, together with whoever else is at it, and the folder's end."""

import contextlib
import json
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
from glip_jax.labeling.work_queue import Tasks

__all__ = ["FORMAT", "Input", "Plan", "run"]

FORMAT = 2
"""Of report.json and plan.json."""

_SIDES = 8
"""Finished tasks that are looked at at a time."""


class Input(NamedTuple):
    """Captions to label."""

    path: str
    shards: shards.Shards


class _Task(NamedTuple):
    """A file of captions."""

    shards: shards.Shards
    begin: int
    """First record in it, counted over the folder."""
    end: int


@dataclass(frozen=True)
class Plan:
    """All of a labelling."""

    out: str
    """Folder to make, local or gs://."""
    name: str
    inputs: Sequence[Input]
    teacher: Teacher
    finder: PhraseFinder
    rules: Rules
    about: Mapping[str, Any]
    """What every record says of its origin, beside threshold and code."""
    command: str
    code: str
    threads: int
    lease: float

    def settings(self) -> dict[str, Any]:
        """All that decides the labels but the code, of which each record says its own."""
        # What is in the shards, not where they lie: hosts may see them at different places.
        inputs = {own.manifest.name: own.manifest.columns["sha256"][:16] for _, own in self.inputs}
        thresholds = {own.manifest.name: self.rules.of(own.manifest.name) for _, own in self.inputs}
        return {"format": FORMAT, "name": self.name, "inputs": inputs, "thresholds": thresholds, **self.about}


def run(plan: Plan) -> None:
    """Labels until everything is done, by this process or others, and finishes the folder.

    Raises TaskError if the folder holds other work, ShardError if not one caption got a box (then nothing is left),
    OSError for what the system or the storage refuses.
    """
    work = _tasks(plan.inputs)
    tasks = Tasks(plan.out, list(work), plan.settings(), plan.lease)
    labeler = Labeler(plan.teacher, plan.finder, plan.rules, plan.about, plan.code, plan.threads)
    total = sum(task.end - task.begin for task in work.values())
    own, begin = 0, time.monotonic()
    # A terminal gets a moving bar, a log file a line now and then.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(desc="label", total=total, initial=_done(tasks, work), unit="image", mininterval=interval,
              maxinterval=interval) as bar:  # fmt: skip

        def made(count: int) -> None:
            nonlocal own
            own += count
            bar.set_postfix_str(f"this process {own / (time.monotonic() - begin):.1f} images/s", refresh=False)
            bar.update(count)

        def look() -> None:
            """What others have done counts for the time left."""
            bar.update(max(0, _done(tasks, work) - int(bar.n)))

        with contextlib.closing(tasks.mine(look)) as mine:
            for name in mine:
                look()
                _label(tasks, name, work[name], labeler, made)
    pause = 0.2
    while not tasks.finished:
        with tasks.claim("end") as claimed:
            if claimed and not tasks.finished:
                try:
                    _finish(plan, tasks, work)
                except FileNotFoundError:
                    if not tasks.finished:  # else another process, which slept longer than its lease, was first
                        raise
        if not tasks.finished:  # another process is at it
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
    tasks.clear()  # by everybody: who came late may have begun the folder of the work anew


def _tasks(inputs: Sequence[Input]) -> dict[str, _Task]:
    """The files to make, one for each file of captions, in order."""
    ranges = []
    for _, own in inputs:
        begin = 0
        for shard in own.manifest.shards:
            ranges.append(_Task(own, begin, begin + shard["records"]))
            begin += shard["records"]
    return dict(zip(shards.shard_files(len(ranges)), ranges, strict=True))


def _done(tasks: Tasks, work: Mapping[str, _Task]) -> int:
    return sum(work[name].end - work[name].begin for name in tasks.seen)


def _label(tasks: Tasks, name: str, task: _Task, labeler: Labeler, made: Callable[[int], None]) -> None:
    """One file; what another process finished first is let go."""
    begin = time.monotonic()
    try:
        writer = shards.ShardWriter(tasks.writing(name), 0)
        try:
            tally = labeler.label(task.shards, task.begin, task.end, writer.add, made)
            written = asdict(writer.close()) | {"file": name}
        except BaseException:
            writer.abandon()
            raise
        tally.seconds = time.monotonic() - begin
        tasks.publish(name, {"written": written, "tally": tally.as_json()})
    except OSError:
        if not tasks.finished:  # else the folder of the work is gone: others have ended it
            raise


def _finish(plan: Plan, tasks: Tasks, work: Mapping[str, _Task]) -> None:
    """Sums up, and writes columns, report and manifest."""
    total, written = LabelStatistics(), []
    with ThreadPoolExecutor(_SIDES) as pool:
        sides = list(pool.map(tasks.side, work))
    for side in sides:
        total.add(LabelStatistics.from_json(side["tally"]))
        part = side["written"]
        part |= {"labels": {int(label): n for label, n in part["labels"].items()}, "columns": tuple(part["columns"])}
        written.append(shards.Written(**part))
    reasons = total.report.dropped
    if not any(part.records for part in written):
        tasks.abandon()
        told = ", ".join(f"{reason} {n} (first: {total.report.first[reason]})" for reason, n in reasons.most_common(5))
        raise shards.ShardError(f"nothing to write to {plan.out}: of {total.captions} captions none got a box; {told}")
    licences = dict.fromkeys(given.shards.manifest.licence for given in plan.inputs)
    scratch = tasks.scratch("end")
    manifest = shards.complete(
        scratch, written, name=plan.name, names=(), licence="; ".join(licences),
        source="; ".join(given.path for given in plan.inputs), command=plan.command, drops=dict(sorted(reasons.items())),
    )  # fmt: skip
    report = {
        "format": FORMAT, "name": plan.name, "command": plan.command, "licence": manifest.licence,
        "inputs": [given.path for given in plan.inputs], "settings": plan.settings(), "summary": summary(total), "versions": provenance.versions(),
    }  # fmt: skip
    (scratch / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    for file in (manifest.columns["file"], "report.json"):
        tasks.put(scratch / file, file)
    tasks.finish((scratch / "manifest.json").read_text())
    print(_table(report["summary"]))


def _table(told: Mapping[str, Any]) -> str:
    """For the terminal."""
    rows = [
        ("captions", f"{told['captions']}", ""),
        ("kept", f"{told['kept']}", f"{told['kept_share']:.1%}"),
        ("phrases", f"{told['phrases']}", f"{told['phrases_with_boxes']} with a box"),
        ("boxes", f"{told['boxes']}", f"{told['boxes_per_phrase_with_boxes']:.2f} for a phrase with any"),
        ("concepts", f"{told['concepts']}", f"{told['concepts_with_boxes']} with a box"),
    ]
    for kind, label in (("notes", "noted"), ("drops", "left out")):
        rows += [(f"{label} {what}", f"{own['count']}", f"first: {own['first']}") for what, own in told[kind].items()]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name:<{width}}  {count:>8}  {more}".rstrip() for name, count, more in rows)
