"""The job `evaluate`: a checkpoint on the sets of `config.evaluation`.

OUT/evaluation.json             numbers of every set; settings, prompts and hashes that they depend on
OUT/detections_SET.json         detections: COCO's results format, or with `phrase` (its number) for `category_id`
OUT/report.html                 the HTML report of the run
FILE, FILE_annotations.json     with --coco=FILE.json: the detections of the set with boxes, see `glip_jax.cli.coco_files`

OUT is the working folder unless --out names another. evaluation.json is written after the detections, each file aside
and renamed, so an interrupted job leaves the earlier report as it was.
"""

import datetime
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from etils import epath

from glip_jax.cli import checkpoint_argument, coco_files
from glip_jax.cli.chunk_arguments import ChunkArguments, chunking_of
from glip_jax.cli.command_line import Arguments, CommandLineError, parse
from glip_jax.cli.processes import ProcessArguments, checkpoint_fingerprint, fingerprints, run_joined, share_of
from glip_jax.config import Config, EvaluationSet, PathStr, first_names
from glip_jax.config.ranges import FalseAlarms, Limit
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.structures.batch import Detections

if TYPE_CHECKING:
    from glip_jax.evaluation.chunking import Chunking
    from glip_jax.evaluation.evaluate import Evaluated, Grounded
    from glip_jax.evaluation.shares import Share
    from glip_jax.evaluation.thresholds import Thresholds
    from glip_jax.inference import Detector
    from glip_jax.io.checkpoint import Checkpoint

__all__ = ["EvaluateArguments", "evaluate_checkpoint", "main", "phrase_results"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateArguments(ChunkArguments, ProcessArguments, Arguments):
    """Evaluate a checkpoint on the sets of config.evaluation.

    Prints a table and writes evaluation.json (numbers, and the settings and hashes that they depend on),
    detections_SET.json and the HTML report report.html. All devices work. Several processes (--distributed) share the images of
    a set; the numbers are those of one.
    """

    checkpoint: PathStr = ""
    """The checkpoint to evaluate: WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, a folder that `export` wrote, or a delta;
    local or gs://."""
    workdir: PathStr = ""
    """Folder of the run: its checkpoint is evaluated unless --checkpoint names another, and the report is written there."""
    step: Limit | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""
    out: PathStr = ""
    """Folder for the report, local or gs://; default: the working folder."""
    measure_chunking: bool = False
    """--chunk with the usual prompts and with prompts half as long, in the order of ids and shuffled with seed 0."""
    alone: Limit = 1
    """Of a set that lists absent names: that many times the number of its images are pairs of an image and an absent name asked again, one
    name a prompt; as many pairs of names that are there, and of look-alikes. 0: none."""
    false_alarms: FalseAlarms | None = None
    """Also report the numbers of every set from the threshold on that leaves at most this many false alarms per image and absent name;
    names with enough pairs have their own threshold."""
    report: PathStr = ""
    """evaluation.json from which --false-alarms takes the thresholds; default: this evaluation if one of its sets lists absent names,
    else the one in the folder of the checkpoint."""
    coco: PathStr = ""
    """FILE.json: write the detections in COCO's results format there too, with the ids of the annotations, and FILE_annotations.json
    with the images, the categories and the detections as boxes. Of several sets with categories: FILE_SET.json each."""
    unless_done: bool = False
    """Keep an evaluation.json that was made with the same checkpoint, settings, code, versions, annotations and images."""


def main(argv: Sequence[str]) -> int:
    """Runs the job. Raises CommandLineError or ConfigError, and what `evaluate_checkpoint` raises."""
    example = "--config=configs/demo.py --checkpoint=runs/demo --out=runs/demo/nms05 --config.detection.nms-iou=0.5"
    arguments = parse(argv, EvaluateArguments, "evaluate", example)
    chunking = _chunking(arguments)

    def facts() -> dict[str, str]:
        where = arguments.checkpoint or arguments.workdir
        return fingerprints(arguments.config) | checkpoint_fingerprint(where, arguments.step)

    return run_joined("evaluate", arguments, facts, lambda cluster: _evaluate(arguments, chunking, share_of(cluster)))


def _evaluate(arguments: EvaluateArguments, chunking: "Chunking | None", share: "Share") -> int:
    workdir = "" if arguments.checkpoint else arguments.workdir
    checkpoint = checkpoint_argument.open_named(arguments.checkpoint, workdir, arguments.step)
    out = arguments.out or arguments.workdir
    if not out and checkpoint.step is None:
        raise CommandLineError("no folder for the report: expected --out=DIR with an exported --checkpoint or a delta")
    out = out or checkpoint.workdir
    # All processes look, as all read the checkpoint together, and do the same then.
    for name, path in _coco_targets(arguments.config, arguments.coco).items():
        coco_files.check_target(path, arguments.config.evaluation.sets[name].images)
    if arguments.unless_done and all(share.gather(_done(arguments, checkpoint, out))):
        logger.info(f"{out} is evaluated; nothing is measured twice")
        return exit_codes.DONE
    with checkpoint_argument.fitting_parameters():
        absent = _absent_names(arguments)
        evaluate_checkpoint(arguments.config, checkpoint, out, chunking, share, absent, arguments.coco)
    return exit_codes.DONE


class AbsentNames(NamedTuple):
    """What is measured of absent names, as the flags of these names say."""

    alone: int = 0
    false_alarms: float | None = None
    report: str = ""


def _absent_names(arguments: EvaluateArguments) -> AbsentNames:
    """The flags, checked."""
    rate = arguments.false_alarms
    if arguments.report and rate is None:
        raise CommandLineError(f"--report={arguments.report} gives thresholds for --false-alarms, which is not given")
    return AbsentNames(arguments.alone, rate, arguments.report)


def evaluate_checkpoint(
    config: Config, checkpoint: "Checkpoint", out: str, chunking: "Chunking | None" = None, share: "Share | None" = None,
    absent: AbsentNames | None = None, coco: str = "",
) -> "dict[str, Evaluated | Grounded]":  # fmt: skip
    """Evaluates a checkpoint on all sets, logs the table, writes the files named above to `out`; returns the evaluations.

    `share`: the part of this process where several evaluate together; the first logs and writes. `absent`: what is measured of names
    that are known to be absent. `coco`: of `EvaluateArguments`, whose target was checked.

    Raises CommandLineError if the config names no set, CheckpointError for a checkpoint of another network or where `out`
    cannot be written, EvaluationError or GroundTruthError for a set that cannot be evaluated; annotations are read before
    anything is computed.
    """
    from glip_jax.cli.report import write_report
    from glip_jax.cli.reports.run_report import table
    from glip_jax.evaluation.chunking import chunking_effect, chunking_lines
    from glip_jax.evaluation.evaluate import Evaluated, check_set, evaluate_set
    from glip_jax.evaluation.shares import Share
    from glip_jax.evaluation.single_names import single_name_absence
    from glip_jax.inference import Detector
    from glip_jax.io import fsspec_gcs
    from glip_jax.io.workdir import check_network, on_first_process, prepare, write_atomic

    share, absent = share or Share(), absent or AbsentNames()
    log = logger.info if share.first else lambda _: None
    if not config.evaluation.sets:
        raise CommandLineError("config.evaluation.sets is empty: name a set with annotations and images")
    for name, dataset in config.evaluation.sets.items():
        for note in check_set(name, dataset, config):
            log(f"note: {note}")
    workdir = checkpoint.workdir
    check_network(workdir, checkpoint.settings, config)
    given = _given_thresholds(config, absent, workdir)
    folder = epath.Path(out)
    on_first_process(lambda: prepare(str(folder)))
    fsspec_gcs.do_without(enable_compilation_cache(out))
    log(f"{checkpoint_argument.describe(checkpoint)}, parameters: {config.evaluation.parameters}")
    parameters = checkpoint.parameters(config.evaluation.parameters)
    detector = Detector(config, parameters)

    def make(other: Config) -> Detector:
        return Detector(other, None, texts_of=detector)

    results, content = {}, {}
    rates = () if absent.false_alarms is None else (absent.false_alarms,)
    for name, dataset in config.evaluation.sets.items():
        result = evaluate_set(detector, config, dataset, name=name, report=log, share=share, rates=rates)
        if isinstance(result, Evaluated) and result.absence is not None and absent.alone:
            result.absence["alone"] = single_name_absence(
                detector, config, dataset, result, absent.alone, name, share=share, rates=rates
            )
        results[name], content[name] = result, _entry(result, dataset, detector, config)
        if chunking is not None and isinstance(result, Evaluated):
            compared = _of_set(chunking, config, content[name]["chunks"])
            content[name]["chunking"] = chunking_effect(make, config, dataset, compared, result, name, share=share)
    if absent.false_alarms is not None:
        _add_numbers_at(absent.false_alarms, results, content, given)
    summary = {**_provenance(config, checkpoint, parameters), "absent_names": absent._asdict(), "sets": content}
    if not share.first:
        return results
    for name, result in results.items():
        write_atomic(folder / f"detections_{name}.json", json.dumps(_rows(result)))
    write_atomic(folder / "evaluation.json", json.dumps(summary, indent=1))
    for name, path in _coco_targets(config, coco).items():
        _write_coco(path, results[name], config.evaluation.sets[name].images)
    logger.info(table(results))
    for name, entry in content.items():
        for asked, numbers in chunking_lines(entry.get("chunking", ())):
            logger.info(f"{name}, {asked}: {numbers}")
    for name, entry in content.items():
        if at := entry.get("at_false_alarms"):
            shown = ", ".join(f"{key} {value:.4f}" for key, value in at["numbers"].items() if value is not None)
            logger.info(
                f"{name}, at {at['false_alarms']:g} false alarms ({at['set']}: from {at['threshold']:.3f}): {shown}"
            )
    logger.info(f"numbers, settings and hashes: {folder / 'evaluation.json'}")
    logger.info(f"HTML report: {write_report(workdir, out=str(folder))}")
    return results


def _coco_targets(config: Config, coco: str) -> dict[str, str]:
    """The file of --coco by set with categories; CommandLineError if there is no such set."""
    if not coco:
        return {}
    names = [name for name, dataset in config.evaluation.sets.items() if dataset.kind == "detection"]
    if not names:
        kinds = ", ".join(f"{name} ({dataset.kind})" for name, dataset in config.evaluation.sets.items()) or "no sets"
        raise CommandLineError(
            f"--coco={coco}: results have categories, expected a set of kind detection, found {kinds}"
        )
    path = epath.Path(coco)
    several = {name: str(path.parent / f"{path.stem}_{name}{path.suffix}") for name in names}
    return several if len(names) > 1 else {names[0]: coco}


def _write_coco(path: str, result: Any, folder: str) -> None:
    """Writes the detections of a set as COCO's results, for the images that were evaluated."""
    rows: dict[Any, list[dict[str, Any]]] = {image: [] for image in result.image_ids}
    for row in _rows(result):
        rows[row["image_id"]].append(row)
    entries = [entry for entry in result.truth.content["images"] if entry["id"] in rows]
    images = (coco_files.DetectedImage(entry, rows[entry["id"]]) for entry in entries)
    coco_files.write(path, folder, result.truth.content["categories"], images)


def _given_thresholds(config: Config, absent: AbsentNames, workdir: str) -> "Thresholds | None":
    """The thresholds of a report for --false-alarms; None where this evaluation gives them. Raises ThresholdError."""
    from glip_jax.evaluation.average_precision import load_ground_truth
    from glip_jax.evaluation.thresholds import read_thresholds

    if absent.false_alarms is None:
        return None
    detection = {name: dataset for name, dataset in config.evaluation.sets.items() if dataset.kind == "detection"}
    truths = (load_ground_truth(dataset.annotations, dataset, name) for name, dataset in detection.items())
    if not absent.report and any(names.known_absent for truth in truths for names in truth.listed.values()):
        return None
    return read_thresholds(absent.report or str(epath.Path(workdir) / "evaluation.json"), absent.false_alarms)


def _add_numbers_at(
    rate: float, results: "dict[str, Evaluated | Grounded]", content: dict[str, dict[str, Any]], given: "Thresholds | None",
) -> None:  # fmt: skip
    """Adds `at_false_alarms` to the entry of each set: its numbers from the thresholds on, `given` or those of this evaluation."""
    from glip_jax.evaluation.thresholds import choose, numbers_at

    measured = {name: entry["absence"] for name, entry in content.items() if entry.get("absence")}
    given = given or choose(measured, rate, "this evaluation")
    for name, result in results.items():
        content[name]["at_false_alarms"] = given.summary() | {"numbers": numbers_at(result, given)}


def _chunking(arguments: EvaluateArguments) -> "Chunking | None":
    """What --chunk or --measure-chunking compare; without chunks for the latter, whose chunks depend on the set."""
    chunks = chunking_of(arguments)
    if not arguments.measure_chunking:
        return chunks
    if chunks is not None:
        raise CommandLineError("--chunk and --measure-chunking are two ways to say what is compared: leave one out")
    from glip_jax.evaluation.chunking import Chunking

    return Chunking((), (0,), arguments.chunk_images)


def _of_set(chunking: "Chunking", config: Config, chunks: Sequence[Sequence[str]]) -> "Chunking":
    """`chunking` with the chunks of --measure-chunking: those of `config`, and half of the longest of `chunks`."""
    usual = (config.evaluation.chunk, -(-max(map(len, chunks)) // 2))
    return chunking if chunking.chunks else replace(chunking, chunks=usual)


def _is_compared(chunking: "Chunking | None", config: Config, entry: dict[str, Any]) -> bool:
    """Whether the entry of a set in evaluation.json has what `chunking` asks for."""
    from glip_jax.evaluation.chunking import requested

    if chunking is None or entry["kind"] != "detection" or len(entry["prompts"]) < 2:
        return True
    images = min(chunking.images or len(entry["image_ids"]), len(entry["image_ids"]))
    wanted = [(*variant, images) for variant in requested(_of_set(chunking, config, entry["chunks"]))]
    return [(one["chunk"], one["seed"], one["images"]) for one in entry.get("chunking", ())] == wanted


def phrase_results(detections: dict[Any, Detections]) -> list[dict[str, Any]]:
    """Detections of phrases by image id, as rows with `phrase` (its number) and bbox x, y, width, height.

    Corners are plain: width = x2 - x1 (glip-reference 5.4). Unused rows (phrase -1) are left out.
    """
    rows = []
    for image, found in detections.items():
        for box, score, phrase in zip(np.asarray(found.boxes), np.asarray(found.scores), np.asarray(found.phrases)):
            if phrase >= 0:
                x1, y1, x2, y2 = (float(value) for value in box)
                rows.append(
                    {
                        "image_id": image,
                        "phrase": int(phrase),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(score),
                    }
                )
    return rows


def _done(arguments: EvaluateArguments, checkpoint: "Checkpoint", out: str) -> bool:
    """Whether `out` holds what an evaluation would write now, of the same files."""
    from glip_jax.evaluation.evaluate import hash_pictures, saved_set
    from glip_jax.io import provenance

    config, folder = arguments.config, epath.Path(out)
    parameters = checkpoint.parameters(config.evaluation.parameters)
    now = json.loads(json.dumps(_provenance(config, checkpoint, parameters)))
    try:
        found = json.loads((folder / "evaluation.json").read_text())
        for summary in (now, found):
            # Of the code its files count: a commit that leaves them as they are changes no number.
            summary["hashes"]["code"] = summary["hashes"]["code"]["files"]
            # Under the names of before, without settings that were added since, as long as these change nothing.
            summary["settings"] = first_names(summary["settings"])
        # The path of the run does not affect results; its parameters are compared by their hashes.
        same = all(found[key] == now[key] for key in now if key not in ("date", "workdir"))
        same = same and found["sets"].keys() == config.evaluation.sets.keys()
        asked = _absent_names(arguments)._asdict()
        same = same and found.get("absent_names", asked) == asked  # which earlier versions do not have
        for name, dataset in config.evaluation.sets.items():
            entry = found["sets"].get(name, {})
            same = same and saved_set(entry) == dataset
            same = same and entry["hashes"]["annotations"] == provenance.file_hash(dataset.annotations)
            same = same and (folder / f"detections_{name}.json").exists()
            same = same and entry["hashes"]["pictures"] == hash_pictures(dataset, name, entry["image_ids"])
            same = same and _is_compared(_chunking(arguments), config, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    written = all(epath.Path(path).exists() for path in _coco_targets(config, arguments.coco).values())
    return same and written and (folder / "report.html").exists()


def _rows(result: "Evaluated | Grounded") -> list[dict[str, Any]]:
    from glip_jax.evaluation.average_precision import GroundTruth, coco_results

    match result.truth:
        case GroundTruth():
            return coco_results(result.truth, result.detections)
        case _:
            return phrase_results(result.detections)


def _entry(
    result: "Evaluated | Grounded", dataset: EvaluationSet, detector: "Detector", config: Config
) -> dict[str, Any]:
    """The entry of a set in evaluation.json."""
    from glip_jax.evaluation.chunking import prompt_chunks
    from glip_jax.evaluation.evaluate import Evaluated, Grounded, scalars
    from glip_jax.io import provenance

    shared = {
        **asdict(dataset),
        "image_ids": list(result.image_ids),
        "hashes": {"annotations": provenance.file_hash(dataset.annotations), "pictures": result.pictures},
    }
    match result:
        case Evaluated():
            chance = result.permuted
            ratio = result.precision.numbers["AP50"] / chance if chance > 0 else None
            return {
                **shared,
                "prompts": list(result.prompts),
                "chunks": prompt_chunks(result.prompts, detector.tokenizer, config),
                "numbers": result.precision.numbers | {"AP50_permuted": chance, "AP50_ratio": ratio},
                "per_class": result.precision.per_class,
                "per_class_50": result.precision.per_class_50,
                **({"absence": result.absence} if result.absence is not None else {}),
                "left_out": result.truth.left_out,
            }
        case Grounded():
            return {
                **shared,
                "numbers": scalars(result),
                "phrases": result.recall.phrases,
                "counts": result.counts,
                "left_out": result.truth.left_out,
                "unasked": [[key, list(numbers)] for key, numbers in result.unasked.items()],
            }


def _provenance(config: Config, checkpoint: "Checkpoint", parameters: dict[str, Any]) -> dict[str, Any]:
    """Everything that the numbers depend on, except the sets."""
    from glip_jax.cli.report import FORMAT
    from glip_jax.io import provenance
    from glip_jax.io.checkpoint import fingerprint
    from glip_jax.io.workdir import started_from

    which, saved, workdir = config.evaluation.parameters, checkpoint.settings, checkpoint.workdir
    raw = parameters if which == "raw" else checkpoint.parameters("raw")
    return {
        "format": FORMAT,
        "name": config.name,
        "seed": saved.get("train.seed", 0),
        "workdir": workdir,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": checkpoint.step,
        "parameters": which,
        "settings": provenance.score_settings(config),
        "started_from": started_from(workdir),
        "hashes": {
            # The first as `train` prints it at the end of a run; the second is of what was evaluated.
            "checkpoint": fingerprint(raw),
            "parameters": fingerprint(parameters),
            "config": provenance.config_hash(config),
            "checkpoint's config": provenance.config_hash(saved),
            "code": provenance.code(),
        },
        "versions": provenance.versions(),
    }
