"""The job `benchmark`: a checkpoint on the field's sets, from official files to tables.

WORKDIR/SET/MODE/           detections of a set in one prompt mode: blocks while they are made, then predictions in the form that
                            evaluators read (`glip_jax.evaluation.benchmark.blocks`)
WORKDIR/SET/chunking/       the same with other numbers and orders of the names in a prompt (--chunk)
WORKDIR/results.json        every number with its protocol, hashes, overlap with the training data, published numbers
WORKDIR/results.csv         the same, a line a number
WORKDIR/results.tex         rows of the paper's Tables 2 to 4
WORKDIR/report.html         the HTML report

Detection and scoring are two steps: --score-only computes the numbers again from predictions that are there.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etils import epath

from glip_jax.cli import checkpoint_argument
from glip_jax.cli.chunk_arguments import ChunkArguments, chunking_of
from glip_jax.cli.command_line import CommandLineError, flags, split_settings
from glip_jax.cli.processes import ProcessArguments, checkpoint_fingerprint, fingerprints, run_joined, share_of
from glip_jax.config import Config, PathStr
from glip_jax.config.ranges import Limit
from glip_jax.distributed import exit_codes
from glip_jax.evaluation.benchmark import sets as benchmark_sets
from glip_jax.evaluation.benchmark.sets import BenchmarkError, BenchmarkSet, PromptMode
from glip_jax.evaluation.benchmark.table import SETS
from glip_jax.io.claims import owned_workdir
from glip_jax.io.workdir import check_shared, prepare, workdir_path, write_atomic

if TYPE_CHECKING:
    from glip_jax.distributed.cluster import Cluster
    from glip_jax.evaluation.shares import Share
    from glip_jax.inference import Detector
    from glip_jax.io.checkpoint import Checkpoint

__all__ = ["Benchmark", "main", "run"]

logger = logging.getLogger(__name__)

_EXAMPLE = "--checkpoint=runs/glip_t --sets=coco,lvis_minival,flickr_test,odinw13 --data=gs://bucket/sets --workdir=runs/glip_t/benchmark"
_CHOSEN = {
    "evaluation.chunk": "chunk", "evaluation.short_side": "short_side", "evaluation.long_side": "long_side",
    "detection.threshold": "threshold", "detection.max_detections": "boxes", "detection.token_scores": "token_scores",
}  # fmt: skip
"""Settings that a set fixes, by the field of `PromptMode`. Where the command line gives one, it holds, and published numbers are of
another protocol."""


@dataclass(frozen=True)
class Benchmark(ChunkArguments, ProcessArguments):
    """Evaluate a checkpoint on the benchmarks of the field.

    Detects every set that is asked for, writes predictions in the official forms, scores them, and writes tables, LaTeX rows and
    an HTML report. Every number stands with its protocol; a published number stands beside it only where the protocol agrees. If
    the job is stopped, the same command goes on. --list shows the sets, their files and what is missing.
    """

    sets: str = ""
    """Names of sets and groups with commas between them; --list shows them."""
    data: PathStr = ""
    """Folder that holds the files of the sets, local or gs://."""
    checkpoint: PathStr = ""
    """WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, a folder that `export` wrote, or a delta; local or gs://."""
    step: Limit | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""
    workdir: PathStr = ""
    """Folder for predictions, numbers and report, local or gs://; made if it is not there."""
    list: bool = False
    """Show the sets: files, counts, licence, what is missing below --data, and the estimated time; nothing is run."""
    score_only: bool = False
    """Score the predictions in --workdir again; no checkpoint is read and nothing is detected."""
    own: tuple[str, ...] = ()
    """Sets of your own: NAME,ANNOTATIONS,IMAGES, or NAME,ANNOTATIONS,IMAGES,LIKE with the set that it is asked and scored like
    (default: coco); further files of such a set as ROLE=PATH, with commas too (pickles=DIR of d3, captions=FILE of flickr_test)."""
    asks: str = ""
    """Prompt modes with commas between them (names, prompts, inter_parallel, ...); default: those that --list does not show as on
    request."""
    order: Limit | None = None
    """Seed of a shuffled order of the category names; default: by id, as published."""
    other_counts: bool = False
    """Note annotation files whose counts are not the published ones, instead of refusing them; published numbers are then of another
    protocol."""
    drawn: Limit = 12
    """Images with the worst errors that the report draws of each set."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what `run` raises. Exit code 2 if a set is missing or cannot be used, after the others are done."""
    settings, own = split_settings(argv)
    for option in ("--sets", "--own"):
        if sum(argument.partition("=")[0] == option for argument in own) > 1:
            raise CommandLineError(f"{option} is given twice, and only one would count: give all sets in one")
    job = flags(own, Benchmark, "benchmark", _EXAMPLE)
    items = _items(job)
    if job.list:
        from glip_jax.evaluation.benchmark.results import measured_rate

        logger.info(benchmark_sets.listing(items, job.data, measured_rate(job.workdir)))
        return exit_codes.DONE
    if not job.workdir:
        raise CommandLineError("no folder to write to: expected --workdir=DIR (made if it is not there)")
    if not items:
        raise CommandLineError("no sets: expected --sets=NAME,NAME or --own NAME,ANNOTATIONS,IMAGES; --list shows them")
    if job.sets and not job.data:
        raise CommandLineError(
            "no files: expected --data=DIR with the files of the sets; --list shows where they are looked for"
        )
    if (workdir_path(job.workdir) / "checkpoints").exists():
        raise CommandLineError(
            f"--workdir={job.workdir} is the working folder of a run: expected a folder of its own, such as {job.workdir}/benchmark"
        )
    command = shlex.join(["python", "-m", "glip_jax", "benchmark", *argv])
    if job.score_only:
        missing = {item.name: lacking for item in items if (lacking := benchmark_sets.missing(item, job.data))}
        return _finish(job, items, command, missing, {})

    def facts() -> dict[str, str]:
        asked = {"sets": ", ".join(item.name for item in items), "settings": " ".join(settings)}
        return {**fingerprints(None), **checkpoint_fingerprint(job.checkpoint, job.step), **asked}

    def work(cluster: "Cluster | None") -> int:
        checkpoint = checkpoint_argument.open_named(job.checkpoint, "", job.step)
        config = checkpoint_argument.settings_of(checkpoint, settings, "benchmark")
        with checkpoint_argument.fitting_parameters():
            return run(job, items, checkpoint, config, _given(settings), command, share_of(cluster))

    return run_joined("benchmark", job, facts, work)


def _items(job: Benchmark) -> Sequence[BenchmarkSet]:
    """The sets that --sets and --own name; for --list without either, all."""
    names = [name.strip() for name in job.sets.split(",") if name.strip()]
    if job.list and not names and not job.own:
        names = [*SETS]
    items = [*benchmark_sets.find_sets(names)] if names else []
    for text in job.own:
        parts = [part.strip() for part in text.split(",")]
        others = dict(part.split("=", 1) for part in parts[3:] if "=" in part)
        parts = [part for part in parts if "=" not in part or part in parts[:3]]
        if len(parts) not in (3, 4) or not all(parts):
            raise CommandLineError(f"--own {text}: expected NAME,ANNOTATIONS,IMAGES or NAME,ANNOTATIONS,IMAGES,LIKE")
        items.append(benchmark_sets.own_set(*parts, **others))
    names = [item.name for item in items]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CommandLineError(f"--own: the name {twice[0]} is given twice")
    return items


def _modes(item: BenchmarkSet, names: str) -> Sequence[PromptMode]:
    """The prompt modes of a set that --asks names, or its default ones. Raises BenchmarkError if the set has none of them."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        return [mode for mode in item.modes if mode.default]
    found = [mode for mode in item.modes if mode.name in wanted]
    if not found:
        raise BenchmarkError(f"{item.name} is asked by {', '.join(mode.name for mode in item.modes)}, not by {names}")
    return found


def _given(settings: Sequence[str]) -> dict[str, str]:
    """Fields of `PromptMode` that settings of the command line replace, by the name of the setting."""
    names = [setting.partition("=")[0].removeprefix("--config.").replace("-", "_") for setting in settings]
    return {name: _CHOSEN[name] for name in names if name in _CHOSEN}


def run(
    job: Benchmark,
    items: Sequence[BenchmarkSet],
    checkpoint: "Checkpoint",
    config: Config,
    given: Mapping[str, str],
    command: str,
    share: "Share",
) -> int:
    """Detects, scores and reports; returns the exit code. Several processes share the images of every set.

    Raises CheckpointError for a checkpoint of another network, a folder that not all processes share, or one in which another job
    writes; BenchmarkError for a folder with results of another checkpoint.
    """
    prepare(job.workdir)
    check_shared(job.workdir)
    with owned_workdir(job.workdir, flag="benchmark --workdir") if share.first else contextlib.nullcontext():
        missing, failed = _detect(job, items, checkpoint, config, given, share)
        code = _finish(job, items, command, missing, failed) if share.first else exit_codes.DONE
        return share.gather(code)[0]  # all end together, with one exit code


def _detect(
    job: Benchmark,
    items: Sequence[BenchmarkSet],
    checkpoint: "Checkpoint",
    config: Config,
    given: Mapping[str, str],
    share: "Share",
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Detects all sets; returns what files are missing, by set, and the sets that cannot be used, with the reason."""
    from glip_jax.evaluation.benchmark.predict import Run, compare_chunks, predict
    from glip_jax.evaluation.benchmark.results import earlier
    from glip_jax.io.checkpoint import fingerprint

    which = config.evaluation.parameters
    logger.info(f"{checkpoint_argument.describe(checkpoint)}, parameters: {which}")
    parameters = checkpoint.parameters(which)
    about = _about(checkpoint, config, fingerprint(parameters))
    earlier(epath.Path(job.workdir), about)
    benchmark = Run(
        job.data, epath.Path(job.workdir), config, _Detectors(parameters).of, about, share, job.order, job.other_counts
    )
    missing, failed, chunking = dict[str, list[str]](), dict[str, str](), chunking_of(job)
    for item in items:
        lacking = next(filter(None, share.gather(benchmark_sets.missing(item, job.data))), [])
        if lacking:
            missing[item.name] = lacking
            continue
        try:
            for mode in _modes(item, job.asks):
                mode = _with_given(mode, config, given)
                predict(benchmark, item, mode)
                if chunking is not None and mode.has_chunks:
                    compare_chunks(benchmark, item, mode, chunking)
        except BenchmarkError as error:
            failed[item.name] = str(error).removeprefix(f"{item.name}: ")
            logger.error(f"left out: {item.name}: {failed[item.name]}")
    return missing, failed


def _about(checkpoint: "Checkpoint", config: Config, parameters: str) -> dict[str, Any]:
    """What results.json says of the checkpoint, and where its training data lie."""
    from glip_jax.io import provenance
    from glip_jax.io.workdir import started_from

    return {
        "name": config.name, "workdir": checkpoint.workdir, "step": checkpoint.step,
        "parameters": config.evaluation.parameters, "started_from": started_from(checkpoint.workdir),
        "hashes": {"parameters": parameters, "code": provenance.code()}, "versions": provenance.versions(),
        "sources": {name: source.path for name, source in checkpoint.config.data.sources.items()},
    }  # fmt: skip


def _with_given(mode: PromptMode, config: Config, given: Mapping[str, str]) -> PromptMode:
    """The prompt mode with what the command line replaces."""
    replaced = {field: getattr(getattr(config, section), name) for (section, _, name), field in
                ((setting.partition("."), field) for setting, field in given.items())}  # fmt: skip
    return dataclasses.replace(mode, **replaced)


class _Detectors:
    """Detectors with one set of parameters, one for each setting of post-processing and sizes; all share the encoded texts."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = parameters
        self._made: dict[str, Detector] = {}

    def of(self, config: Config) -> "Detector":
        """The detector with these settings, made at the first call."""
        from glip_jax.distributed.runtime import enable_compilation_cache
        from glip_jax.inference import Detector

        key = repr((config.detection, config.evaluation))
        if key not in self._made:
            enable_compilation_cache()
            first = next(iter(self._made.values()), None)
            self._made[key] = Detector(config, self._parameters if first is None else first.params, texts_of=first)
        return self._made[key]


def _finish(
    job: Benchmark,
    items: Sequence[BenchmarkSet],
    command: str,
    missing: Mapping[str, Sequence[str]],
    failed: Mapping[str, str],
) -> int:
    """Scores the sets, writes results and report, prints the table; returns the exit code.

    Raises BenchmarkError if no set has a number.
    """
    from glip_jax.cli.reports.benchmark_report import render, table
    from glip_jax.evaluation.benchmark import results as benchmark_results

    folder = epath.Path(job.workdir)
    left = [item for item in items if item.name not in missing and item.name not in failed]
    sets, checkpoint, refused = benchmark_results.collect(left, folder, job.data, logger.info)
    failed = {**failed, **refused}
    shown = list(items)
    if sets:
        known, asked = benchmark_results.earlier(folder, checkpoint), {item.name for item in items}
        # A set that is scored again keeps its place.
        known = {name: sets.get(name, own) for name, own in known.items() if name in sets or name not in asked}
        shown += [SETS[name] for name in known if name in SETS and name not in asked]
        sets = {**known, **sets}
    results = {
        "format": benchmark_results.FORMAT, "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checkpoint": checkpoint, "sets": sets, "groups": benchmark_results.groups(sets), "missing": dict(missing), "failed": failed,
    }  # fmt: skip
    if sets:
        name = checkpoint["name"]
        write_atomic(folder / "results.json", json.dumps(results, indent=1))
        write_atomic(folder / "results.csv", benchmark_results.csv_text(results))
        write_atomic(folder / "results.tex", benchmark_results.latex(results, name))
        logger.info(table(results))
        write_atomic(folder / "report.html", render(results, shown, job.data, folder, job.drawn))
        logger.info(
            f"numbers: {folder / 'results.json'}, results.csv, results.tex; HTML report: {folder / 'report.html'}"
        )
    for name, lacking in missing.items():
        logger.warning(f"missing: {name}: {'; '.join(lacking)}")
    for name, reason in refused.items():
        logger.error(f"not scored: {name}: {reason}")
    absent = len(missing) + len(failed)
    if not sets:
        raise BenchmarkError(
            f"none of the {len(items)} sets has a number: {len(missing)} missing, {len(failed)} not usable"
        )
    if absent:
        logger.error(f"benchmark: {absent} of {len(items)} sets have no numbers: {', '.join([*missing, *failed])}")
    return exit_codes.BAD_INPUT if absent else exit_codes.DONE
