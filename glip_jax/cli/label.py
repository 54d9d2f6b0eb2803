"""The job `label`: captions become grounding data, by a checkpoint or by the detections of another detector.

OUT/records-*.array_record   pseudo records, a file for each file of the captions' shards
OUT/report.json              what was kept, detected and dropped, and all that it depends on
OUT/report.html              the same as an HTML report, with drawn samples
OUT/manifest.json            written last except for the report: the folder is finished
FILE, FILE_annotations.json  with --coco=FILE.json: the boxes in COCO's results format, see `glip_jax.cli.coco_files`

Several machines share the work by --ray or --part: see `glip_jax.io.sharing`.
"""

import contextlib
import json
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from glip_jax.cli import checkpoint_argument, coco_files
from glip_jax.cli.command_line import CommandLineError, flags, split_settings
from glip_jax.cli.ray_engine import ray_engine
from glip_jax.config import PathStr
from glip_jax.config.ranges import BelowOne, Count, Fraction, Limit, Pixels, Range
from glip_jax.data import shards
from glip_jax.data.manifest import read_file
from glip_jax.data.negatives.dictionary import DETERMINERS
from glip_jax.data.records import Record, RecordError
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io import gcs
from glip_jax.io.sharing import SharingFlags, without_sharing
from glip_jax.io.task_results import TaskError, differences, sweep
from glip_jax.labeling.phrases.finders import MAX_PHRASES, PhraseFinder, head, phrase_finder

if TYPE_CHECKING:
    from glip_jax.labeling.outside import OutsideTeacher
    from glip_jax.labeling.pseudo import Rules
    from glip_jax.labeling.run import Input, LabelingJob, LabelingWorker
    from glip_jax.labeling.teacher import Teacher
    from glip_jax.labeling.verifier import Verifier

__all__ = ["Label", "label", "main"]

logger = logging.getLogger(__name__)

_EXAMPLE = "shards/cc3m --checkpoint=runs/teacher --out=shards/cc3m_labelled"
_RENAMED = {"--most-boxes": "--max-boxes", "--most-phrases": "--max-phrases"}


@dataclass(frozen=True)
class Label(SharingFlags):
    """Label captions with boxes for their noun phrases, which a teacher detects in the images.

    SHARDS are folders that `python -m glip_jax data caption-tsv` and the like made. OUT becomes a folder of shards for
    training: each phrase has the boxes with a score above the threshold; phrases without one are marked as unknown.
    The score is sqrt(alignment x centerness), as in `predict`. The same command resumes after a stop. Several
    machines share the work by --ray or by --part. A second round, with the student as the teacher, is the same command with its --checkpoint.

    Another teacher: --detections=FILE.json, a COCO results file that any detector wrote, with --categories.

    A second judge: --verifier, another checkpoint or results file. Phrases that it does not find in the image become unknown.
    """

    shards: Annotated[tyro.conf.Positional[tuple[PathStr, ...]], tyro.conf.arg(metavar="SHARDS ...")] = ()
    """Folders of shards with captions, local or gs://."""
    out: PathStr = ""
    """Folder to make: local, on a file system that all hosts see, or gs://; a finished one of the same settings is left as
    it is."""
    checkpoint: PathStr = ""
    """The teacher: WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, a folder that `export` wrote, or a delta;
    local or gs://."""
    workdir: PathStr = ""
    """The same as --checkpoint=WORKDIR."""
    step: Limit | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""
    ema: bool = True
    """Use the averaged parameters, where the run kept them; --no-ema: those of the last step."""
    threshold: BelowOne = 0.5
    """Boxes with a higher score are kept."""
    threshold_for: tyro.conf.UseAppendAction[tuple[str, ...]] = field(default_factory=tuple)
    """SOURCE=0.4: another threshold for one source, by the name in its manifest; may be given several times."""
    max_boxes: Count = 10
    """Maximum number of boxes of a phrase."""
    nms: Annotated[float, Range(0, 1, above=True)] | None = None
    """Of two boxes of a phrase that overlap by more, the better one stays; default: config.detection.nms_iou."""
    finder: Literal["lexicon", "spacy"] = "lexicon"
    """How phrases are found; spacy needs requirements-spacy.txt."""
    max_phrases: Count = MAX_PHRASES
    """Maximum number of phrases of a caption."""
    flip: bool = False
    """Detect in the mirrored image too, unless the caption contains left or right, and average."""
    scales: tuple[Pixels, ...] = ()
    """Short sides in pixels to detect at and average over; default: config.evaluation.short_side alone."""
    batch_size: Limit = 0
    """Images of a step on each device; 0: config.evaluation.batch_size. Scores do not depend on it."""
    detections: PathStr = ""
    """COCO results file of another detector: a list of image_id, category_id, bbox, score."""
    categories: PathStr = ""
    """Annotation file that names its categories and lists its images."""
    match: Literal["", "id", "name"] = ""
    """How captions are matched with the images of --detections or a --verifier file; default: by path, or by id where one side has no paths; id: by
    the image ids alone; name: by file name, whatever its folder. What is uncertain is left out and counted."""
    verifier: PathStr = ""
    """A second judge of the phrases that got boxes: a checkpoint as --checkpoint names one, with its own settings, or a COCO results
    file FILE.json as --detections. A phrase for which it has no box above its threshold becomes unknown; one that it cannot judge
    keeps its boxes. Both are counted."""
    verifier_categories: PathStr = ""
    """Annotation file that names the categories of a --verifier file and lists its images."""
    verifier_threshold: BelowOne | None = None
    """A phrase is in the image if the verifier has a box with a higher score; default: 0.3."""
    verifier_iou: Fraction = 0.0
    """Boxes that no such box of the verifier overlaps by at least this IoU are dropped too; 0: only existence counts."""
    verifier_asks: Literal["", "phrase", "caption"] = ""
    """What a prompt of a --verifier checkpoint holds; default: phrase, each alone, whose score depends on nothing else; caption: the
    whole caption, as the teacher reads it, which costs as much as the teacher does, however many phrases there are."""
    coco: PathStr = ""
    """FILE.json: when OUT is finished, write its boxes in COCO's results format too, and FILE_annotations.json with images, categories
    and boxes. A category is a phrase up to its head noun, without article and in the singular."""
    name: str = ""
    """Name of the source that is made; default: the name of OUT."""
    threads: Annotated[int, Range(1, 1024)] = 4
    """Threads that read, decode and find phrases ahead."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what `label` raises."""
    settings, own = split_settings(argv)
    # Tuples may be written with commas, as settings are.
    own = [part for argument in own for part in _split_tuple(argument)]
    job = flags(own, Label, "label", _EXAMPLE, _RENAMED)
    with checkpoint_argument.fitting_parameters():
        label(job, settings, shlex.join(["python", "-m", "glip_jax", "label", *without_sharing(argv)]))
    return exit_codes.DONE


def label(job: Label, settings: Sequence[str], command: str) -> None:
    """Labels what is missing, or a part of it, and writes the HTML report of a folder that is finished then.

    `settings`: the --config arguments. Raises CommandLineError, CheckpointError, ConfigError, SourceError, ShardError or
    TaskError for what cannot be done; OSError for what the system or the storage refuses: then the same command goes on.
    """
    from glip_jax.cli.reports.label_report import write_report
    from glip_jax.labeling.run import run

    _checked(job)
    part, resources = job.static_part(), job.resources()
    out = _address(job)
    if job.coco:
        coco_files.check_target(job.coco, out)
    existing = shards.finished(out)
    before = None if existing is None else _finished_settings(out, job, existing.command)
    if job.ray:
        import jax

        jax.config.update(
            "jax_platforms", "cpu"
        )  # the accelerators of this machine are for its worker, which is another process
    begin, code = time.monotonic(), _code()
    engine = ray_engine(job, resources) if job.ray else None
    labeling = _job(job, settings, command, code)
    if existing is not None and before is not None:
        if lines := differences(before, json.loads(json.dumps(labeling.settings()))):
            raise TaskError(
                f"{job.out} is finished, with other settings (existing -> given: {lines}): name another folder, or remove it"
            )
        sweep(out)
        logger.info(
            f"{job.out} is finished ({existing.records} records, made by: {existing.command}); nothing is made twice"
        )
        if not gcs.kind(f"{out}/report.html"):
            logger.info(f"HTML report: {write_report(out)}")
        if job.coco:
            _write_coco(job.coco, out)
        return
    if not run(labeling, part, engine, partial(_worker, job, settings, command, code)):
        return
    if not gcs.kind(f"{out}/report.html"):
        write_report(out)
    if job.coco:
        _write_coco(job.coco, out)
    logger.info(
        f"{job.out}: finished, this process worked {time.monotonic() - begin:.0f} s; HTML report: {out}/report.html"
    )


def _address(job: Label) -> str:
    return gcs.address(job.out) if gcs.is_remote(job.out) else str(Path(job.out).absolute())


def _job(job: Label, settings: Sequence[str], command: str, code: str) -> "LabelingJob":
    """The job that the flags describe, with what it reads opened."""
    from glip_jax.labeling.run import LabelingJob

    thresholds, out, inputs = _checked(job), _address(job), _inputs(job.shards)
    unknown = sorted(set(thresholds) - {given.shards.manifest.name for given in inputs})
    if unknown:
        known = ", ".join(given.shards.manifest.name for given in inputs)
        raise CommandLineError(f"--threshold-for={unknown[0]}=...: there is no such source; there are: {known}")
    finder = phrase_finder(job.finder, job.max_phrases)
    teacher, rules, about = _teacher(job, settings, thresholds, [given.shards.manifest.name for given in inputs])
    verifier, about_verifier = _verifier(job, inputs, about["teacher"])
    return LabelingJob(
        out=out, name=job.name or out.rpartition("/")[2], inputs=inputs, teacher=teacher, finder=finder, rules=rules,
        about=about | about_verifier | _finder_record(finder, job), command=command, code=code, threads=job.threads,
        verifier=verifier,
    )  # fmt: skip


def _worker(job: Label, settings: Sequence[str], command: str, code: str) -> "LabelingWorker":
    """What labels on a worker of a cluster; the records name the code of the process that began the job."""
    from glip_jax.labeling.run import LabelingWorker

    with checkpoint_argument.fitting_parameters():
        return LabelingWorker(_job(job, settings, command, code))


def _write_coco(path: str, out: str) -> None:
    """Writes the boxes of a finished folder as COCO's results; records of one image are one image there.

    Ids of images are those of the captions' source where it numbers all images, else 1, 2, ... in the order of the records.
    """
    made, ids = shards.Shards(out), dict[str, int]()
    given = {(_image(record), record.image_id) for record in _records(made)}
    numbered = all(number.isdecimal() for _, number in given)
    numbered = numbered and len({file for file, _ in given}) == len({number for _, number in given}) == len(given)
    numbers = {file: int(number) if numbered else index for index, (file, number) in enumerate(sorted(given), 1)}
    categories: list[dict[str, Any]] = []

    def images() -> Iterator[coco_files.DetectedImage]:
        seen = set[str]()
        for record in _records(made):
            file = _image(record)
            names = [_category(record.caption, spans[0]) for spans in record.spans]
            for name in names:
                if name not in ids:
                    ids[name] = len(ids) + 1
                    categories.append({"id": ids[name], "name": name})
            about = {"id": numbers[file], "file_name": file, "height": record.height, "width": record.width}
            rows = coco_files.result_rows(numbers[file], record.boxes, record.scores, [ids[name] for name in names])
            yield coco_files.DetectedImage(None if file in seen else about, rows)
            seen.add(file)

    coco_files.write(path, out, categories, images())


def _records(made: shards.Shards) -> Iterator[Record]:
    return (made[index] for index in range(len(made)))


def _image(record: Record) -> str:
    """What the records of one image have in common: its path, else its id."""
    return record.file or record.image_id or record.id


def _category(caption: str, span: tuple[int, int]) -> str:
    """The category of a phrase, with which `label --detections` finds it again: "brown teddy bear" of "the two brown teddy bears"."""
    from glip_jax.labeling.outside import category_words

    words = list(category_words(caption[span[0] : head(caption, span)[1]]))
    while len(words) > 1 and words[0] in DETERMINERS:
        del words[0]
    return " ".join(words)


def _finished_settings(out: str, job: Label, command: str) -> dict[str, Any]:
    """What a finished folder was labelled with; TaskError if it holds something else."""
    try:
        report = json.loads(read_file(f"{out}/report.json"))
        _ = report["summary"]["captions"]
        return dict(report["settings"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise TaskError(
            f"{job.out} holds shards that no labelling made (but: {command or 'unknown'}): name another folder to make"
        ) from None


def _split_tuple(argument: str) -> list[str]:
    """`--scales=640,800` as one argument an item."""
    option, equals, value = argument.partition("=")
    return [option, *filter(None, value.split(","))] if option == "--scales" and equals else [argument]


def _checked(job: Label) -> dict[str, float]:
    """The thresholds of sources; CommandLineError for options that make no sense."""
    if not job.shards:
        raise CommandLineError("nothing to label: expected folders of shards with captions")
    if not job.out:
        raise CommandLineError("no folder to make: expected --out=DIR")
    if bool(job.detections) == bool(job.checkpoint or job.workdir):
        found = "both" if job.detections else "neither"
        raise CommandLineError(f"expected one teacher, --checkpoint=DIR or --detections=FILE.json, found {found}")
    if job.detections and not job.categories:
        raise CommandLineError(
            "--detections hold numbers only: give the file that names them, --categories=ANNOTATIONS.json"
        )
    unused = {"--no-ema": not job.ema, "--step": job.step is not None} if job.detections else {
        "--categories": bool(job.categories), "--match": bool(job.match) and not _is_file(job.verifier)
    }  # fmt: skip
    for option in (option for option, given in unused.items() if given):
        teacher = "--detections" if job.detections else "--checkpoint"
        raise CommandLineError(f"{option} has no meaning with a teacher of {teacher}: leave it out")
    if job.detections and (job.flip or job.scales):
        raise CommandLineError(
            "--flip and --scales change how images are detected in, which --detections does not do: leave them out"
        )
    _check_verifier(job)
    thresholds = {}
    for pair in job.threshold_for:
        source, _, value = pair.rpartition("=")
        try:
            thresholds[source] = float(value)
        except ValueError:
            raise CommandLineError(f"--threshold-for={pair}: expected SOURCE=0.4") from None
    for source, value in thresholds.items():
        if not 0 <= value < 1:
            raise CommandLineError(f"--threshold-for={source}={value}: expected 0 <= threshold < 1")
    return thresholds


def _is_file(verifier: str) -> bool:
    """Whether --verifier names a results file, not a checkpoint."""
    return verifier.endswith(".json")


def _check_verifier(job: Label) -> None:
    """CommandLineError for options of a verifier that make no sense."""
    given = {
        "--verifier-categories": bool(job.verifier_categories), "--verifier-threshold": job.verifier_threshold is not None,
        "--verifier-iou": job.verifier_iou > 0, "--verifier-asks": bool(job.verifier_asks),
    }  # fmt: skip
    if not job.verifier:
        for option in (option for option, used in given.items() if used):
            raise CommandLineError(f"{option} has no meaning without --verifier: give one, or leave it out")
    elif _is_file(job.verifier):
        if not job.verifier_categories:
            raise CommandLineError(
                f"--verifier={job.verifier} holds numbers only: give the file that names them, --verifier-categories=ANNOTATIONS.json"
            )
        if job.verifier_asks:
            raise CommandLineError(
                f"--verifier-asks has no meaning with the file --verifier={job.verifier}: leave it out"
            )
    elif job.verifier_categories:
        raise CommandLineError("--verifier-categories has no meaning with a checkpoint as --verifier: leave it out")


def _inputs(paths: Sequence[str]) -> "list[Input]":
    """The shards, opened; CommandLineError for records that are not to be labelled, or two sources of one name."""
    from glip_jax.labeling.run import Input

    inputs: list[Input] = []
    for path in paths:
        opened = shards.Shards(path)
        kinds, name = opened.manifest.kinds, opened.manifest.name
        wrong = sorted(set(kinds) - {"caption", "pseudo"})
        if wrong:
            why = "has no caption" if wrong[0] == "detection" else "has boxes that people made, which would be lost"
            raise CommandLineError(
                f"{path} holds {kinds[wrong[0]]} records of kind {wrong[0]}, which {why}: expected captions (or pseudo records)"
            )
        if name in (given.shards.manifest.name for given in inputs):
            raise CommandLineError(f"two of the folders are named {name}: label them into two folders")
        inputs.append(Input(path, opened))
    return inputs


def _teacher(
    job: Label, settings: Sequence[str], thresholds: dict[str, float], sources: Sequence[str]
) -> "tuple[Teacher, Rules, dict[str, Any]]":
    """The teacher, the rules for its boxes, and what is recorded of both."""
    from glip_jax.io import provenance
    from glip_jax.io.checkpoint import fingerprint
    from glip_jax.labeling.outside import open_detections
    from glip_jax.labeling.pseudo import Rules
    from glip_jax.labeling.teacher import DetectorTeacher, detector_views

    if job.detections:
        if settings:
            raise CommandLineError(f"{settings[0]}: --detections has no settings")
        rules = Rules(job.threshold, thresholds, 0.6 if job.nms is None else job.nms, job.max_boxes)
        teacher = open_detections(job.detections, job.categories, rules.min_threshold(sources), job.match)
        about = {
            "teacher": f"detections {provenance.file_hash(job.detections)[:16]}",
            "config": f"categories {provenance.file_hash(job.categories)[:16]}",
        }
        logger.info(", ".join([f"{job.detections}: an outside teacher", *teacher.notes]))
        if job.match:
            about["match"] = job.match
        return teacher, rules, about | {"nms": rules.nms_iou, "most_boxes": rules.max_boxes}
    checkpoint = checkpoint_argument.open_named(job.checkpoint, job.workdir, job.step)
    config = checkpoint_argument.settings_of(checkpoint, settings, "label")
    which = config.evaluation.parameters if job.ema else "raw"
    rules = Rules(job.threshold, thresholds, config.detection.nms_iou if job.nms is None else job.nms, job.max_boxes)
    enable_compilation_cache()
    params = checkpoint.parameters(which)
    threshold = rules.min_threshold(sources)
    views = detector_views(config, params, threshold, rules.nms_iou, job.flip, job.scales, job.batch_size or None)
    logger.info(f"{checkpoint_argument.describe(checkpoint)}, {which} parameters, {len(views)} views of an image")
    about = {
        "teacher": fingerprint(params)[:16], "config": provenance.config_hash(config)[:16],
        "nms": rules.nms_iou, "most_boxes": rules.max_boxes,
    }  # fmt: skip
    if len(views) > 1:
        about["views"] = f"{'flip ' if job.flip else ''}{','.join(map(str, job.scales))}".strip()
    return DetectorTeacher(views, rules.nms_iou, threshold), rules, about


def _verifier(job: Label, inputs: "Sequence[Input]", teacher: str) -> "tuple[Verifier | None, dict[str, Any]]":
    """The second judge, if any, and what is recorded of it; `teacher`: what is recorded of the teacher."""
    from glip_jax.io import provenance
    from glip_jax.io.checkpoint import fingerprint
    from glip_jax.labeling.outside import open_detections
    from glip_jax.labeling.teacher import DetectorTeacher, detector_views
    from glip_jax.labeling.verifier import PhraseTeacher, Verifier

    if not job.verifier:
        return None, {}
    threshold = 0.3 if job.verifier_threshold is None else job.verifier_threshold
    about = {"verifier_threshold": threshold} | ({"verifier_iou": job.verifier_iou} if job.verifier_iou else {})
    if _is_file(job.verifier):
        outside = open_detections(job.verifier, job.verifier_categories, threshold, job.match, shared=True)
        _check_images(job, inputs, outside)
        about |= {
            "verifier": f"detections {provenance.file_hash(job.verifier)[:16]}",
            "verifier_config": f"categories {provenance.file_hash(job.verifier_categories)[:16]}",
        } | ({"match": job.match} if job.match else {})  # fmt: skip
        logger.info(", ".join([f"{job.verifier}: the verifier, above {threshold}", *outside.notes]))
        judge: Teacher = outside
    else:
        checkpoint = checkpoint_argument.open_named(job.verifier, "", None)
        config, asks = checkpoint.config, job.verifier_asks or "phrase"
        enable_compilation_cache()
        params = checkpoint.parameters(config.evaluation.parameters)
        nms = config.detection.nms_iou
        network = DetectorTeacher(
            detector_views(config, params, threshold, nms, False, (), job.batch_size or None), nms, threshold
        )
        judge = network if asks == "caption" else PhraseTeacher(network)
        about |= {
            "verifier": fingerprint(params)[:16], "verifier_config": provenance.config_hash(config)[:16], "verifier_asks": asks,
        }  # fmt: skip
        what = f"{config.evaluation.parameters} parameters, above {threshold}, a prompt for each {asks}"
        logger.info(f"{checkpoint_argument.describe(checkpoint)}: the verifier, {what}")
    if about["verifier"] == teacher:
        logger.warning(
            f"note: --verifier={job.verifier} is the teacher itself, which repeats its own mistakes: another model tells more"
        )
    return Verifier(judge, threshold, job.verifier_iou), about


_TRIED = 64
"""Records of a source that are looked up in the file of a verifier before the work begins."""


def _check_images(job: Label, inputs: "Sequence[Input]", outside: "OutsideTeacher") -> None:
    """CommandLineError if a verifier's file knows no image of a source: nothing would be judged."""
    for path, source in inputs:
        tried = sorted({len(source) * k // _TRIED for k in range(_TRIED)})
        reasons = []
        for index in tried:
            with contextlib.suppress(RecordError):  # counted when it is labelled
                record = source[index]
                image, reason = outside.find(record.id, record.file, record.image_id, (record.height, record.width))
                if image is not None:
                    break
                reasons.append(f"{record.id}: {reason}")
        else:
            raise CommandLineError(
                f"--verifier={job.verifier} knows none of {len(tried)} images tried of {path} (first: {reasons[0] if reasons else 'none can be read'}): "
                "expected detections of the images of the captions, or another --match"
            )


def _finder_record(finder: PhraseFinder, job: Label) -> dict[str, Any]:
    return {"finder": f"{finder.name} {finder.version}", "most_phrases": job.max_phrases}


def _code() -> str:
    """The version of the code in a word: the commit, with a + where files differ from it, or the files' hash."""
    from glip_jax.io import provenance

    code = provenance.code()
    with contextlib.suppress(KeyError):
        return code["commit"][:12] + ("+" if code["changed_since_commit"] else "")
    return f"files {code['files'][:12]}"
