"""results.json of a benchmark: every number with its protocol, from the predictions in the working folder; and its tables.

{"format", "command", "date", "checkpoint": {...},
 "sets": {SET: {"title", "licence", "notes", "overlap": {"images", "names"},
                "asks": {ASK: {"protocol", "counts", "files", "detections", "seconds",
                               "metrics": {LABEL: {"main", "module", "evaluator", "options", "numbers", "published"}},
                               "chunking": [{"asked", "chunk", "seed", "images", "metric", "value", "difference"}]}}}},
 "groups": {GROUP: {"ASK, LABEL": {"mean", "median", "sets", "missing"}}},
 "missing": {SET: [files]}, "failed": {SET: reason}}
"""

import contextlib
import csv
import dataclasses
import functools
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from glip_jax import UserError
from glip_jax.evaluation.benchmark import blocks, overlap
from glip_jax.evaluation.benchmark.scoring import file_hashes, group_numbers, leaves, score_set
from glip_jax.evaluation.benchmark.sets import BenchmarkError, BenchmarkSet, PromptMode, number, scored_annotations
from glip_jax.evaluation.benchmark.table import GROUPS
from glip_jax.evaluation.metrics.files import MetricError
from glip_jax.io.retry import StorageError

__all__ = [
    "CHUNKING", "FORMAT", "Row", "collect", "csv_text", "cut_path", "earlier", "groups", "latex", "measured_rate", "predictions_in", "release_of",
    "rows", "scored_counts", "scored_paths",
]  # fmt: skip

FORMAT = 1

CHUNKING = "chunking"
"""Folder of a set for the predictions with other sizes and orders of prompts."""


class Row(NamedTuple):
    """A line of the table."""

    name: str
    mode: str
    label: str
    key: str
    value: float | None
    """Fraction; None: not defined on the set."""
    published: Sequence[Mapping[str, Any]]
    """Published numbers of this key; see `scoring.score_set`."""
    main: bool


def predictions_in(folder: epath.Path) -> dict[str, epath.Path]:
    """Finished predictions of a set by prompt mode: the folders with done.json, oldest name first."""
    if not folder.exists():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "done.json").exists()}


def earlier(workdir: epath.Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """`sets` of the results.json in the working folder; empty without one.

    Raises BenchmarkError if it is of another checkpoint: the tables of a folder are of one.
    """
    path = workdir / "results.json"
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise BenchmarkError(f"{path} is of another version of glip_jax: remove it and give the same command again")
        of = found["checkpoint"]
        same = of["hashes"]["parameters"] == checkpoint["hashes"]["parameters"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise BenchmarkError(f"{path} is damaged ({error!r}): remove it and give the same command again") from None
    if not same:
        raise BenchmarkError(
            f"{workdir} holds results of another checkpoint ({of['workdir']}, step {of['step']}, {of['parameters']} parameters): give "
            "another --workdir"
        )
    return found["sets"]


def collect(
    items: Sequence[BenchmarkSet], workdir: epath.Path, data: str, report: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Scores the predictions of the sets in the working folder.

    Returns `sets` of results.json; what the predictions record of their checkpoint; and the sets that cannot be scored, with the reason:
    those without predictions and those whose files are refused. Raises BenchmarkError if the predictions are of several checkpoints.
    """
    sets, failed, checkpoints = dict[str, Any](), dict[str, str](), dict[str, Any]()
    training = functools.cache(lambda text: overlap.read_training(json.loads(text)))
    for item in items:
        found = predictions_in(workdir / item.name)
        for mode in item.modes:
            if mode.name not in found:
                continue
            report(f"scoring {item.name}, {mode.name}")
            try:
                plan, done = _records(found[mode.name])
                used, release = plan["about"]["protocol"], release_of(item, data)
                annotations, predictions = scored_paths(item, data, found[mode.name], workdir, used)
                metrics = score_set(item, mode, used, predictions, annotations, release)
            except StorageError:
                raise
            except UserError as error:
                again = f"; or remove {found[mode.name]} to detect again" if str(found[mode.name]) in str(error) else ""
                failed[item.name] = f"{mode.name}: {error}{again}"
                continue
            about = plan["about"]
            if used["images"] == "all" and (changed := _changed_files(item, data, about["files"])):
                about["files"] |= changed
                about["notes"].append(f"{', '.join(changed)}: changed since the detection; scored as now")
            checkpoints[plan["parameters"]] = about["checkpoint"]
            own = sets.setdefault(item.name, {
                "title": item.title, "licence": item.licence, "notes": list(item.notes),
                "overlap": _overlap(training(json.dumps(about["checkpoint"]["sources"])), done["digests"], about["names"]), "asks": {},
            })  # fmt: skip
            shared = ("protocol", "counts", "files", "prompts", "longest_prompt", "notes")
            own["asks"][mode.name] = {
                **{key: about[key] for key in shared}, "detections": done["detections"], "seconds": done["seconds"], "metrics": metrics,
            }  # fmt: skip
            try:
                compared = _chunking(item, mode, workdir, data, own["asks"][mode.name], report)
            except MetricError as error:
                failed[item.name] = f"{mode.name}, {CHUNKING}: {error}"
                continue
            if compared:
                own["asks"][mode.name]["chunking"] = compared
        if item.name not in sets and item.name not in failed:
            failed[item.name] = f"{workdir / item.name} holds no finished predictions: run without --score-only"
    if len(checkpoints) > 1:
        which = "; ".join(f"{own['workdir']} step {own['step']}" for own in checkpoints.values())
        raise BenchmarkError(
            f"{workdir} holds predictions of {len(checkpoints)} checkpoints ({which}): give each its own --workdir"
        )
    return sets, next(iter(checkpoints.values()), {}), failed


def _chunking(
    item: BenchmarkSet, mode: PromptMode, workdir: epath.Path, data: str, entry: Mapping[str, Any], report: Callable[[str], None]
) -> list[dict[str, Any]]:  # fmt: skip
    """What `predict.compare_chunks` detected, scored by the main number of the set; the first is the reference. [] without.

    Raises BenchmarkError for damaged records and MetricError as the metric.
    """
    from glip_jax.evaluation.chunking import described  # which loads jax

    label, main = next((label, metric) for label, metric in entry["metrics"].items() if metric["module"] != "absence")
    place, found = workdir / item.name / CHUNKING, []
    item = dataclasses.replace(item, metrics=tuple(metric for metric in item.metrics if metric.label == label))
    for folder in predictions_in(place).values():
        plan, _ = _records(folder)
        used = plan["about"]["protocol"]
        if used["ask"] != mode.name:
            continue
        report(f"scoring {item.name}, {CHUNKING}, {folder.name}")
        annotations, predictions = scored_paths(item, data, folder, workdir, used)
        metrics = score_set(item, mode, used, predictions, annotations, release_of(item, data))
        found.append((used, metrics[label]["numbers"]))
    if not found:
        return []
    images = {json.dumps(used["images"]) for used, _ in found}
    if json.dumps(entry["protocol"]["images"]) in images:
        found.append((entry["protocol"], main["numbers"]))
    protocol = entry["protocol"]

    def rank(each: Any) -> tuple[bool, bool, bool, int, int]:
        used, _ = each
        seed = _seed(used)
        reference = (used["chunk"], used["order"]) == (protocol["chunk"], protocol["order"])
        return (
            used["chunk"] != protocol["chunk"],
            not reference,
            used["chunk"] == 0,
            used["chunk"],
            -1 if seed is None else seed,
        )

    results = list[dict[str, Any]]()
    for used, numbers in sorted(found, key=rank):
        value, seed = number(numbers, main["main"]), _seed(used)
        first = results[0]["value"] if results else value
        results.append({
            "asked": described(used["chunk"], seed), "chunk": used["chunk"], "seed": seed, "images": used["images"], "metric": label,
            "value": value, "difference": None if value is None or first is None else value - first,
        })  # fmt: skip
    return results


def _seed(used: Mapping[str, Any]) -> int | None:
    """The seed of the order of a protocol; None: by id."""
    return None if used["order"] == "by id" else int(used["order"].removeprefix("seed "))


def _changed_files(item: BenchmarkSet, data: str, files: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Files of a set, by role, that are not those of the detection."""
    now = file_hashes(item, data)
    return {role: file for role, file in now.items() if file["sha256"] != files.get(role, {}).get("sha256")}


def _records(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """plan.json and done.json of finished predictions. Raises BenchmarkError if they are damaged or of another version."""
    try:
        plan = json.loads((folder / "plan.json").read_text())
        if plan["format"] != blocks.FORMAT:
            raise BenchmarkError(f"{folder} is of another version of glip_jax: remove it and detect again")
        _ = plan["about"]["protocol"], plan["about"]["checkpoint"], plan["parameters"]
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        if isinstance(error, UserError):
            raise
        raise BenchmarkError(
            f"{folder / 'plan.json'} is damaged ({error!r}): remove {folder} and detect again, without --score-only"
        ) from None
    return plan, blocks.read_done(folder)


def measured_rate(workdir: str) -> float | None:
    """Prompts of one image that all processes together answered in a second, over the finished sets of a working folder; None without
    any.
    """
    prompts, seconds = 0, 0.0
    places = epath.Path(workdir).iterdir() if workdir and epath.Path(workdir).is_dir() else ()
    for path in places:
        for own in predictions_in(path).values() if path.is_dir() else ():
            with contextlib.suppress(BenchmarkError):  # what is damaged is said where it is scored
                plan, done = _records(own)
                prompts += plan["about"]["prompts"]
                seconds += done["seconds"] / plan["about"]["processes"]
    return prompts / seconds if seconds else None


def release_of(item: BenchmarkSet, data: str) -> str:
    """The folder of Flickr30k Entities, "" for other sets."""
    return str(item.path("annotations", data).parent) if item.form == "flickr" else ""


def cut_path(item: BenchmarkSet, folder: epath.Path, role: str) -> epath.Path:
    """Where the annotations of the first images lie that `evaluation.max_images` chose, if it did."""
    return folder / f"{role}{'.txt' if item.form == 'flickr' else '.json'}"


def scored_paths(
    item: BenchmarkSet, data: str, folder: epath.Path, workdir: epath.Path, used: Mapping[str, Any]
) -> tuple[dict[str, str], epath.Path]:
    """What a set's predictions in `folder` are scored with: annotations by role, cut if only some images were asked; predictions.

    `used`: the protocol of the predictions. Raises BenchmarkError if the cut annotations are gone.
    """
    annotations = {}
    for role in {"annotations", *(metric.file for metric in item.metrics)}:
        path = scored_annotations(item, data, role, workdir / "annotations")
        if used["images"] != "all":
            path = cut_path(item, folder, role)
            if not path.exists():
                raise BenchmarkError(
                    f"{path} is gone, the annotations of the images asked: remove {folder} and detect again"
                )
        annotations[role] = str(path)
    parts = folder / "predictions"
    return annotations, parts if parts.exists() else folder / "predictions.json"


def _overlap(training: overlap.Training, digests: Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
    if not training.hashes and not training.unread:
        return {"unread": {}, "sources": 0}
    known = {"unread": training.unread, "sources": len(training.hashes)}
    if training.hashes:
        known["images"] = overlap.image_overlap(training, digests)
        if names:
            known["names"] = overlap.name_overlap(training, names)
    return known


def groups(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Means and medians of the groups of which a set was scored."""
    found = {
        name: group_numbers(sets, group)
        for name, group in GROUPS.items()
        if group.summary and sets.keys() & set(group.sets)
    }
    return {name: own for name, own in found.items() if own}


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """The lines of the table: of every metric the main number, those beside it, and those of which others are published."""
    for name, own in results["sets"].items():
        for mode, asked in own["asks"].items():
            for label, metric in asked["metrics"].items():
                published = defaultdict[str, list[Any]](list)
                for each in metric["published"]:
                    published[each["key"]].append(each)
                for key in dict.fromkeys([metric["main"], *_beside(metric), *published]):
                    value = number(metric["numbers"], key)
                    yield Row(name, mode, label, key, value, published.get(key, ()), key == metric["main"])


def _beside(metric: Mapping[str, Any]) -> list[str]:
    """Keys beside the main one: recall at other ranks, AP of other kinds; not those of single classes or types."""
    main = metric["main"]
    if metric["module"] == "absence":  # thresholds and shares are no percents
        return []
    if ".1." in main:  # recall at 1 of Flickr30k; what is beside it are types of phrases
        return [main.replace(".1.", f".{rank}.", 1) for rank in ("5", "10")]
    parent = main.rpartition(".")[0]
    keys = [key for key, _ in leaves(metric["numbers"]) if key.rpartition(".")[0] == parent]
    return [key for key in keys if key != "kept" and number(metric["numbers"], key) is not None][:13]


def scored_counts(asked: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of images, boxes, expressions, phrases or descriptions that an entry of `asks` was scored on, where they are known.

    With few images an AP moves by tens of points with one box (ODinW has sets of three).
    """
    found = {name: count for name, count in asked["counts"].items() if name in _SIZES}
    if asked["protocol"]["images"] != "all":
        found = {"images": asked["protocol"]["images"]}
    counts = next(iter(asked["metrics"].values()))["numbers"].get("counts", {})
    return found | {name: counts[name] for name in ("images", "boxes") if isinstance(counts.get(name), int)}


_SIZES = ("images", "boxes", "captions", "phrases", "expressions", "descriptions")


def csv_text(results: Mapping[str, Any]) -> str:
    """A line for every number of every metric, with its protocol; published numbers in columns of their own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    protocol = (
        "chunk", "order", "images", "boxes", "boxes_per_image", "threshold", "token_scores", "short_side", "long_side", "widths",
    )  # fmt: skip
    writer.writerow(["set", "ask", "metric", "key", "value", "step", "parameters", *protocol, "evaluator", "published"])
    checkpoint = results["checkpoint"]
    for name, own in results["sets"].items():
        for mode, asked in own["asks"].items():
            for label, metric in asked["metrics"].items():
                for key, value in leaves(metric["numbers"]):
                    published = [
                        f"{each['model']} {each['value']}"
                        for each in metric["published"]
                        if each["key"] == key and not each["differs"]
                    ]
                    writer.writerow([
                        name, mode, label, key, value, checkpoint.get("step"), checkpoint.get("parameters"),
                        *(asked["protocol"].get(field) for field in protocol), metric["evaluator"], "; ".join(published),
                    ])  # fmt: skip
    return stream.getvalue()


_TABLES = {
    "Table 2: COCO val2017, zero-shot": [("coco", "", ("AP",))],
    "Table 3: LVIS MiniVal and Val v1.0, fixed AP": [("lvis_minival", "fixed", ("APr", "APc", "APf", "AP")), ("lvis_val", "fixed", ("APr", "APc", "APf", "AP"))],
    "Table 4: Flickr30k Entities val and test, any-box": [
        (name, "any", tuple(f"any_box.{rank}.all" for rank in (1, 5, 10))) for name in ("flickr_val", "flickr_test")
    ],
}  # fmt: skip
"""Columns of the rows: set, a word of the metric's label, keys."""


def latex(results: Mapping[str, Any], model: str) -> str:
    """Rows in the form of the GLIP paper's Tables 2 to 4, in percent; `--` for what is not measured."""
    lines = []
    for title, columns in _TABLES.items():
        cells, heads = [], []
        for name, word, keys in columns:
            modes = results["sets"].get(name, {}).get("asks", {})
            metric = next((m for own in modes.values() for label, m in own["metrics"].items() if word in label), None)
            for key in keys:
                value = number(metric["numbers"], key) if metric else None
                cells.append("--" if value is None else f"{100 * value:.1f}")
                heads.append(f"{name} {key}")
        lines += [f"% {title}: {', '.join(heads)}", f"{_escaped(model)} & {' & '.join(cells)} \\\\"]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
