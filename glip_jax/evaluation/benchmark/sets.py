"""The sets of the benchmark: their files, how each is asked, how it is scored, and what others published on it.

`table.py` holds the sets. Questions for a detector are made by `questions.py`, predictions are scored by `evaluation/metrics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from etils import epath

from glip_jax import UserError

__all__ = [
    "Ask", "BenchmarkError", "BenchmarkSet", "Layout", "Metric", "Published", "SetFile", "check_counts", "find_sets", "missing", "own_set", "scored_annotations",
]  # fmt: skip

Layout = Literal["categories", "flickr", "expressions", "d3", "omnilabel"]
"""What an annotation file asks: names of categories, phrases of captions, whole expressions, the descriptions of D3, or those of
OmniLabel."""

Form = Literal["coco", "flickr", "expressions", "omnilabel"]
"""Form of a file of predictions; see `questions.answer_rows`."""


class BenchmarkError(UserError, ValueError):
    """A set that is unknown, incomplete, or of another version than expected."""


@dataclass(frozen=True)
class SetFile:
    """A file, or folder, of a set."""

    role: str
    """annotations, images, or what else the layout needs."""
    paths: tuple[str, ...]
    """Where it may lie below the data folder; the first that exists is used. An absolute path or gs:// is used as it is."""
    folder: bool = False
    sha256: str = ""
    """"": not known."""


@dataclass(frozen=True)
class Ask:
    """A way of asking a set: one run of the detector and one file of predictions."""

    name: Literal[
        "names", "prompts", "caption", "expression", "intra_parallel", "intra_concat", "inter_parallel", "inter_concat", "descriptions"
    ]  # fmt: skip
    """names: categories as the file names them; prompts: with GLIP's hand-written prompts."""
    chunk: int = 0
    """Names or descriptions per prompt; 0: as many as the token budget allows."""
    boxes: int = 100
    """Boxes kept per prompt."""
    boxes_per_image: int = 0
    """Boxes kept per image over all its prompts; 0: all."""
    threshold: float = 0.05
    """`detection.threshold`."""
    token_scores: Literal["mean", "max"] = "mean"
    """`detection.token_scores`: how the tokens of a phrase make its score."""
    short_side: int = 800
    long_side: int = 1333


@dataclass(frozen=True)
class Metric:
    """A score of a file of predictions."""

    label: str
    """Column of the table, such as "fixed AP"."""
    module: Literal["coco", "lvis", "flickr", "refexp", "grefcoco", "d3", "omnilabel"]
    """Module of `glip_jax.evaluation.metrics` whose `score` computes it."""
    main: str
    """Dotted key of the number that stands for the set, such as "any_box.1.all"."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `score`."""
    file: str = "annotations"
    """Role of the file that `score` takes as its annotations."""


@dataclass(frozen=True)
class Published:
    """A published number."""

    model: str
    ask: str
    """Name of the `Ask`."""
    metric: str
    """Label of the `Metric`."""
    key: str
    """Dotted key in the result of the metric."""
    value: float
    """In percent."""
    source: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    """What else has to agree with the measurement, by the names of `Ask`'s fields."""


@dataclass(frozen=True)
class BenchmarkSet:
    """A set of the benchmark: one list of images with its annotations."""

    name: str
    title: str
    layout: Layout
    form: Form
    files: tuple[SetFile, ...]
    """With the roles annotations and images at least."""
    asks: tuple[Ask, ...]
    metrics: tuple[Metric, ...]
    """Each is computed for the predictions of every ask."""
    licence: str
    counts: Mapping[str, int] = field(default_factory=dict)
    """Expected counts, as `Questions.counts` names them; only those that are known."""
    widths: Literal["plus_one", "plain"] = "plain"
    """Width of a written box: x2 - x1 + 1 as GLIP does for COCO and ODinW, or x2 - x1."""
    image_rule: Literal["all", "val2017"] = "all"
    """val2017: the images whose coco_url lies in val2017, which are LVIS minival in the file of LVIS val."""
    stems_sha256: str = ""
    """SHA-256 of the sorted stems of the image files, one a line; "": not known."""
    prompts: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    """For the ask `prompts`: by name of a category the prefix, the text that is scored, and the suffix."""
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
        places = [epath.Path(data) / path for path in self.file(role).paths]
        return next((place for place in places if place.exists()), places[0])


def missing(item: BenchmarkSet, data: str) -> list[str]:
    """What a set lacks below `data`: per file or folder its role and where it was looked for. Images are not looked at."""
    raise NotImplementedError


def check_counts(item: BenchmarkSet, counts: Mapping[str, int], path: str) -> None:
    """Raises BenchmarkError, which names both, if the annotation file at `path` has other counts than expected."""
    raise NotImplementedError


def scored_annotations(item: BenchmarkSet, data: str, role: str, derived: epath.Path) -> epath.Path:
    """The annotation file that a metric scores against: the set's own, or one derived from it and written to `derived`.

    Derived are LVIS minival where only the file of LVIS val is there, and D3's boxes without separation by group.
    """
    raise NotImplementedError


def own_set(name: str, annotations: str, images: str, like: str = "coco") -> BenchmarkSet:
    """A user's own set, asked and scored like the set `like` of the table, without its counts and published numbers."""
    raise NotImplementedError


def find_sets(names: Sequence[str]) -> list[BenchmarkSet]:
    """The sets of names and groups (`odinw13`, `refcoco`, ...), each once. Raises BenchmarkError for an unknown one."""
    raise NotImplementedError
