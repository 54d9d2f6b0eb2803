"""The sets of the benchmark: their files, how each is asked, how it is scored, and what others published on it.

`table.py` holds the sets. `prompts.py` makes the prompts, `evaluation/metrics` scores the predictions.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from etils import epath

from glip_jax import UserError
from glip_jax.evaluation.metrics.files import MetricError, objects
from glip_jax.io import gcs
from glip_jax.io.paths import checked
from glip_jax.io.provenance import file_hash
from glip_jax.io.workdir import write_atomic

__all__ = [
    "ABSENCE", "PromptMode", "BenchmarkError", "BenchmarkSet", "Form", "Group", "Layout", "Metric", "Published", "SetFile", "agrees", "check_counts",
    "find_sets", "listing", "missing", "number", "version_notes", "own_set", "protocol", "scored_annotations",
]  # fmt: skip

Layout = Literal["categories", "flickr", "expressions", "d3", "omnilabel"]
"""What an annotation file asks: names of categories, phrases of captions, whole expressions, the descriptions of D3, or those of
OmniLabel."""

Form = Literal["coco", "flickr", "expressions", "omnilabel"]
"""Form of a file of predictions; see `prompted.prediction_rows`."""

PromptModeName = Literal[
    "names", "names_parallel", "retrieved", "prompts", "caption", "expression", "intra_parallel", "intra_concat", "inter_parallel", "inter_concat", "descriptions"
]  # fmt: skip


class BenchmarkError(UserError, ValueError):
    """A set that is unknown, incomplete, or of another version than expected."""


@dataclass(frozen=True)
class SetFile:
    """A file, or folder, of a set."""

    role: str
    """annotations, images, or what else the layout needs."""
    paths: tuple[str, ...]
    """Where it may lie below the data folder; the first that exists is used. An absolute path or gs:// is used as it is."""
    sha256: str = ""
    """"": not known."""
    optional: bool = False


@dataclass(frozen=True)
class PromptMode:
    """How a set is prompted: one run of the detector and one file of predictions."""

    name: PromptModeName
    """names: categories as the file names them; names_parallel: the same, one a prompt; retrieved: those that a cheap pass finds in the
    image; prompts: with the hand-written prompts of
    `BenchmarkSet.prompts`; intra, inter: the sentences of the image's group, or all; parallel, concat: one sentence a prompt, or as many
    as fit."""
    chunk: int = 0
    """Names or descriptions per prompt; 0: as many as the token budget allows."""
    boxes: int = 100
    """Boxes kept per prompt."""
    boxes_per_image: int = 0
    """Boxes kept per image over all its prompts; 0: all."""
    threshold: float = 0.05
    """`detection.threshold`."""
    token_scores: Literal["mean", "max"] = "mean"
    """`detection.token_scores`: the score of a phrase from those of its tokens."""
    short_side: int = 800
    long_side: int = 1333
    prompts: int = 0
    """Expected prompts per image, for estimates of time; 0: not known."""
    retrieved: int = 0
    """Names of an image that a cheap pass over all names chooses; 0: all names are prompted."""
    retrieval_side: int = 320
    """Short side of the images of that pass; the long side in proportion."""
    default: bool = True
    """False: only where it is asked for."""

    @property
    def has_chunks(self) -> bool:
        """Whether its prompts join names, of which they could have more or less. Not: one name a prompt, captions, expressions."""
        joined = self.name in ("names", "prompts", "intra_concat", "inter_concat", "descriptions")
        return joined and self.chunk != 1


@dataclass(frozen=True)
class Metric:
    """A score of a file of predictions."""

    label: str
    """Column of the table, such as "fixed AP"."""
    module: Literal["coco", "lvis", "flickr", "refexp", "grefcoco", "d3", "omnilabel", "absence"]
    """Module of `glip_jax.evaluation.metrics` whose `score` computes it."""
    main: str
    """Dotted key of the number that stands for the set, such as "any_box.1.all"; see `number`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `score`."""
    modes: tuple[str, ...] = ()
    """Names of the prompt modes that it scores; empty: all."""
    file: str = "annotations"
    """Role of the file that `score` takes as its annotations."""


ABSENCE = Metric("AP at 0.05 false alarms", "absence", "rates.0.05.AP")
"""AP from the score on that has at most 0.05 boxes per image and name that is known to be absent."""


@dataclass(frozen=True)
class Published:
    """A published number."""

    model: str
    mode: str
    """Name of the `PromptMode`."""
    metric: str
    """Label of the `Metric`."""
    key: str
    """Dotted key in the result of the metric; of a group: mean or median."""
    value: float
    """In percent."""
    source: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """What else has to agree with the measurement, by the names of `protocol`. A name that it lacks never agrees: so a protocol
    that is not stated, or that this package does not have, is written down."""


@dataclass(frozen=True)
class BenchmarkSet:
    """A set of the benchmark: one list of images with its annotations."""

    name: str
    title: str
    layout: Layout
    form: Form
    files: tuple[SetFile, ...]
    """With the roles annotations and images at least. Metrics score against annotations."""
    modes: tuple[PromptMode, ...]
    metrics: tuple[Metric, ...]
    licence: str
    counts: Mapping[str, int] = field(default_factory=dict)
    """Expected counts, as `PromptedSet.counts` names them; only those that are known. Another count is another version."""
    reported: Mapping[str, int] = field(default_factory=dict)
    """Counts that a paper or a catalog reports, which the released files may not have; another count is only noted."""
    prompt_rule: str = ""
    """The prompt in words."""
    widths: Literal["plus_one", "plain"] = "plain"
    """Width of a written box: x2 - x1 + 1, as GLIP writes COCO and ODinW, or x2 - x1."""
    image_rule: Literal["all", "val2017"] = "all"
    """val2017: the images whose coco_url lies in val2017, which are LVIS minival in the file of LVIS val."""
    stems_sha256: str = ""
    """SHA-256 of the sorted stems of the image files, one a line; "": not known."""
    prompts: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    """For the mode `prompts`: by name of a category the prefix, the text that is scored, and the suffix."""
    domain: str = ""
    """Part of a group, such as Aerial of RF100-VL."""
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know, such as contamination."""

    def file(self, role: str) -> SetFile:
        """The file of a role; KeyError if the set has none."""
        for each in self.files:
            if each.role == role:
                return each
        raise KeyError(f"{self.name} has no file {role!r}, only {', '.join(each.role for each in self.files)}")

    def path(self, role: str, data: str) -> epath.Path:
        """The first path of a file that exists below `data`, else its first path. KeyError for a role that the set lacks."""
        places = [_place(data, path) for path in self.file(role).paths]
        return next((place for place in places if len(places) == 1 or gcs.kind(place)), places[0])

    def mode(self, name: str) -> PromptMode:
        """The prompt mode of this name. Sets without hand-written prompts have the mode names in both columns. BenchmarkError for another."""
        for each in self.modes:
            if each.name == name or (name == "prompts" and each.name == "names" and not self.prompts):
                return each
        raise BenchmarkError(
            f"{self.name} is not asked by {name!r}: expected one of {', '.join(a.name for a in self.modes)}"
        )


@dataclass(frozen=True)
class Group:
    """Sets that are averaged: their plain mean and median."""

    name: str
    title: str
    sets: tuple[str, ...]
    columns: tuple[str, ...]
    """Names of prompt modes; see `BenchmarkSet.mode`."""
    summary: bool = True
    """Whether a mean over the sets is reported in the field; else the group is a short name only."""
    published: tuple[Published, ...] = ()


def _place(data: str, path: str) -> epath.Path:
    """A path of a set below the data folder; paths that are absolute or gs:// stay."""
    return epath.Path(path) if "://" in path else epath.Path(data) / path


def missing(item: BenchmarkSet, data: str) -> list[str]:
    """What a set lacks below `data`: per file or folder its role and where it was looked for. Images are not looked at."""
    return [
        f"{each.role}: {' or '.join(str(_place(data, path)) for path in each.paths[:3])}"
        for each in item.files
        if not each.optional and not any(gcs.kind(_place(data, path)) for path in each.paths)
    ]


def check_counts(item: BenchmarkSet, counts: Mapping[str, int], path: str) -> None:
    """Raises BenchmarkError, which names both, if the annotation file at `path` has other counts than expected."""
    if wrong := _differences(item.counts, counts):
        raise BenchmarkError(
            f"{path} {wrong}: it is an annotation file of another version; use the published file, evaluate this one as a set of your "
            "own, or give --other-counts"
        )


def version_notes(item: BenchmarkSet, counts: Mapping[str, int], path: str) -> list[str]:
    """Notes, which name both, if the annotation file at `path` has other counts than expected, or than a paper reports."""
    expected, reported = _differences(item.counts, counts), _differences(item.reported, counts)
    notes = [f"{path} {expected}: it is an annotation file of another version"] if expected else []
    return notes + [f"{path} {reported}, as reported: the published numbers are of another version"] * bool(reported)


def _differences(expected: Mapping[str, int], counts: Mapping[str, int]) -> str:
    wrong = [(name, count) for name, count in expected.items() if counts.get(name, count) != count]
    found = ", ".join(f"{counts[name]:,} {name}" for name, _ in wrong)
    return f"has {found}, expected {', '.join(f'{count:,} {name}' for name, count in wrong)}" if wrong else ""


def scored_annotations(item: BenchmarkSet, data: str, role: str, derived: epath.Path) -> epath.Path:
    """The annotation file that a metric scores against: the set's own; or LVIS minival, cut from the file of LVIS val and written to
    the folder `derived`, where only that is there. Raises MetricError for a file that cannot be read.
    """
    path = item.path(role, data)
    if item.image_rule == "all" or role != "annotations":
        return path
    chosen = set[Any]()
    others = False
    images = []
    for image in objects(path, "images", "annotations"):
        if in_val2017(image):
            chosen.add(image.get("id"))
            images.append(image)
        else:
            others = True
    if not others:
        return path
    boxes = [
        {key: value for key, value in box.items() if key != "segmentation"}
        for box in objects(path, "annotations", "annotations") if box.get("image_id") in chosen
    ]  # fmt: skip
    content = {"images": images, "annotations": boxes, "categories": [*objects(path, "categories", "annotations")]}
    target = derived / f"{item.name}.json"
    derived.mkdir(parents=True, exist_ok=True)
    write_atomic(target, json.dumps(content))
    return target


def in_val2017(image: Mapping[str, Any]) -> bool:
    """Whether an image of LVIS is one of COCO's val2017 by its coco_url. Files of minival alone may lack these."""
    url = image.get("coco_url")
    return "/val2017/" in url if isinstance(url, str) else "train2017/" not in str(image.get("file_name", ""))


def own_set(name: str, annotations: str, images: str, like: str = "coco", **others: str) -> BenchmarkSet:
    """A user's own set, asked and scored like the set `like` of the table, without its expected counts and published numbers.

    `annotations`, `images`: paths; `others`: of further files by role (pickles of D3, captions of Flickr30k). Raises
    BenchmarkError for a name that is taken or has characters other than letters, digits, "_", "-", "+" and ".", an unknown
    `like`, and a role that it lacks.
    """
    from glip_jax.evaluation.benchmark.table import GROUPS, SETS

    # It names a folder of --workdir, beside the folder `annotations`.
    if not re.fullmatch(r"\w[\w.+-]*", name) or name.lower() in {*SETS, *GROUPS, "annotations"}:
        raise BenchmarkError(
            f"the set of your own is named {name!r}: expected letters, digits, _ - + ., a letter or digit first, and none of the names of "
            "--list"
        )
    (model,) = find_sets([like])[:1]
    roles = {"annotations": annotations, "images": images, **others}
    for role, path in roles.items():
        checked(path, f"{role} of {name}")
        if role not in {each.role for each in model.files}:
            raise BenchmarkError(
                f"{name}: a set like {like} has no {role}, only {', '.join(f.role for f in model.files)}"
            )
    files = tuple(
        dataclasses.replace(each, paths=(_absolute(roles[each.role]),), sha256="")
        for each in model.files
        if each.role in roles
    )
    lacking = [each.role for each in model.files if not each.optional and each.role not in roles]
    if lacking:
        raise BenchmarkError(f"{name}: a set like {like} also needs {', '.join(lacking)}")
    lists_absent = _lists_absent(annotations)
    metrics = (*model.metrics, ABSENCE) if lists_absent and ABSENCE not in model.metrics else model.metrics
    modes: dict[str, PromptMode] = {each.name: each for each in model.modes}
    if lists_absent and "names" in modes:
        alone = dataclasses.replace(modes["names"], name="names_parallel", chunk=1, prompts=0, default=False)
        modes.setdefault("names_parallel", alone)
    return dataclasses.replace(
        model, metrics=metrics, modes=tuple(modes.values()), name=name, title=f"{name} (as {model.name})", files=files, counts={}, reported={}, stems_sha256="", image_rule="all", published=(),
        licence="your own", notes=(), domain="",
    )  # fmt: skip


def _lists_absent(annotations: str) -> bool:
    """Whether images of a file list `known_absent`; not for a file that cannot be read, which is refused when its set is detected."""
    try:
        return gcs.kind(annotations) == "file" and any(
            "known_absent" in each for each in objects(annotations, "images", "annotations")
        )
    except MetricError:
        return False


def _absolute(path: str) -> str:
    return path if "://" in path else str(epath.Path(path).absolute())


def find_sets(names: Sequence[str]) -> list[BenchmarkSet]:
    """The sets of names and groups (odinw13, refcoco, ...), each once, in this order; upper case is lower case.

    Raises BenchmarkError for an unknown name, with those like it, and for an empty list.
    """
    from glip_jax.evaluation.benchmark.table import GROUPS, SETS

    found: dict[str, BenchmarkSet] = {}
    for name in (each.strip().lower() for each in names):
        if name not in SETS and name not in GROUPS:
            near = difflib.get_close_matches(name, [*GROUPS, *SETS], 3) or [*GROUPS]
            raise BenchmarkError(f"there is no set {name!r}: did you mean {', '.join(near)}? --list names all")
        found |= {each: SETS[each] for each in (GROUPS[name].sets if name in GROUPS else (name,))}
    if not found:
        raise BenchmarkError("no set is named: expected names such as coco,lvis_minival,flickr_test,odinw13")
    return list(found.values())


def protocol(item: BenchmarkSet, mode: PromptMode, order: int | None = None) -> dict[str, Any]:
    """What a number depends on besides the model, by name: the fields of `mode`, the order of the names, widths of boxes."""
    settings = {
        each.name: getattr(mode, each.name)
        for each in dataclasses.fields(mode)
        if each.name not in ("name", "prompts", "default")
        and (mode.retrieved or each.name not in ("retrieved", "retrieval_side"))
    }
    return {"ask": mode.name, **settings, "order": "by id" if order is None else f"seed {order}", "widths": item.widths}


def agrees(published: Published, measured: Mapping[str, Any]) -> bool:
    """Whether a measurement with the protocol `measured` (as of `protocol`) is comparable with a published number."""
    return all(name in measured and measured[name] == value for name, value in published.protocol.items())


def number(result: Mapping[str, Any], key: str) -> float | None:
    """The number under a dotted key of a metric's result, positions in lists included; None if it is missing or undefined (-1)."""
    value = _under(result, key)
    defined = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value != -1
    return float(value) if defined else None


def _under(value: Any, key: str) -> Any:
    """The value under a dotted key; names may have dots themselves, as "0.05"."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        name, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if isinstance(value, Mapping) and name in value:
            return _under(value[name], rest) if rest else value[name]
    if isinstance(value, Sequence) and not isinstance(value, str) and parts[0].isdigit() and int(parts[0]) < len(value):
        return _under(value[int(parts[0])], ".".join(parts[1:])) if parts[1:] else value[int(parts[0])]
    return None


def listing(sets: Iterable[BenchmarkSet], data: str, prompts_per_second: float | None = None) -> str:
    """The text of --list: per set its files, expected counts, hashes, licence, what is missing, and the estimated time.

    `prompts_per_second`: the measured rate of the detector in prompts of one image; None: not measured.
    """
    lines = [line for item in sets for line in [*_described(item, data, prompts_per_second), ""]]
    if not data and any("needed" in line for line in lines):
        lines.append("no --data=DIR is given, so no file was looked for; the paths are below it")
    return "\n".join(lines).rstrip("\n")


def _described(item: BenchmarkSet, data: str, rate: float | None) -> list[str]:
    counts = ", ".join(f"{count:,} {name}" for name, count in {**item.counts, **item.reported}.items()) or "not known"
    modes = ", ".join(f"{mode.name}{'' if mode.default else ' (on request)'}" for mode in item.modes)
    lines = [f"{item.name}: {item.title}", f"  asked by {modes}: {item.prompt_rule}"]
    for each in item.files:
        lines.append(f"  {each.role}: {_state(item, each, data)}")
    if item.stems_sha256:
        lines.append(f"  SHA-256 of the sorted names of its images: {item.stems_sha256}")
    lines += [f"  expected: {counts}", f"  metrics: {', '.join(metric.label for metric in item.metrics)}"]
    lines += [f"  licence: {item.licence}", f"  time: {_time(item, data, rate)}"]
    return lines + [f"  note: {note}" for note in item.notes]


def _state(item: BenchmarkSet, file: SetFile, data: str) -> str:
    """Where a file is, with the expected and the found hash; or where it was looked for."""
    if not data and not any(path.startswith("/") or "://" in path for path in file.paths):
        kind = "not needed" if file.optional else "needed"
        return f"{' or '.join(file.paths[:3])} ({kind}; SHA-256 expected: {file.sha256 or 'not known'})"
    place = item.path(file.role, data)
    match gcs.kind(place):
        case "file":
            return f"{place} (found; SHA-256 expected: {file.sha256 or 'not known'}, found: {file_hash(str(place))})"
        case "folder":
            return f"{place} (found)"
    tried = " or ".join(str(_place(data, path)) for path in file.paths[:3])
    return f"{tried} ({'not there, not needed' if file.optional else 'MISSING'}; SHA-256 expected: {file.sha256 or 'not known'})"


def _listed_images(item: BenchmarkSet, data: str) -> int:
    """The number of images that the annotation file lists; 0 where it is not there or cannot be read."""
    path = item.path("annotations", data)
    try:
        return sum(1 for _ in objects(path, "images", "annotations")) if gcs.kind(path) == "file" else 0
    except MetricError:
        return 0


def _time(item: BenchmarkSet, data: str, rate: float | None) -> str:
    # Of referring expressions an entry of `images` is one expression.
    known = 0 if item.layout == "expressions" else {**item.counts, **item.reported}.get("images", 0)
    images = known or _listed_images(item, data)
    per_image = [1 if item.layout == "expressions" else mode.prompts for mode in item.modes if mode.default]
    prompts = [images * each for each in per_image]
    if not all(prompts):
        return "not known before the annotations are read"
    total = f"{sum(prompts):,.0f} prompts"
    return f"{total}; the rate is not measured yet" if not rate else f"{total}, about {_duration(sum(prompts) / rate)}"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def read_values(name: str) -> dict[str, Any]:
    """The `sets` of a JSON file beside this module."""
    return json.loads((epath.Path(__file__).parent / name).read_text())["sets"]
