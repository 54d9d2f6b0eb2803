"""From predictions to numbers with their protocol, and the published numbers that may stand beside them."""

import functools
import importlib
import importlib.metadata
import json
import statistics
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from etils import epath

from glip_jax.data.importers.readers import as_integer
from glip_jax.evaluation.benchmark.prompted import PromptedSet
from glip_jax.evaluation.benchmark.sets import (
    BenchmarkError,
    BenchmarkSet,
    Group,
    Metric,
    PromptMode,
    Published,
    find_sets,
    number,
    protocol,
)
from glip_jax.evaluation.metrics import d3
from glip_jax.evaluation.metrics.files import MetricError
from glip_jax.io import gcs
from glip_jax.io.provenance import code, file_hash
from glip_jax.io.workdir import write_atomic

__all__ = [
    "Protocol",
    "compared",
    "cut_annotations",
    "file_hashes",
    "group_numbers",
    "leaves",
    "score_set",
]

Protocol = dict[str, Any]
"""What a number depends on beside the checkpoint: `sets.protocol`; images: "all", or the number of first images; counts: "as published",
or "other" for an annotation file of another version; and where all images are asked alike prompts_per_image."""

_PYCOCOTOOLS = ("coco", "d3")
"""Metrics that pycocotools computes; the others are this package's own."""
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_BY_NAME = ("coco", "lvis", "d3")
"""Metrics that give numbers of single names."""


def score_set(
    item: BenchmarkSet,
    mode: PromptMode,
    used: Protocol,
    predictions: epath.Path,
    annotations: Mapping[str, str],
    release: str = "",
) -> dict[str, dict[str, Any]]:
    """The numbers of all metrics of a set for one file of predictions, by label.

    `used`: the protocol of the predictions; `annotations`: by role, the path that the metric reads; `release`: the folder of
    Flickr30k Entities, where its list of images lies elsewhere. Per label: numbers (as the metric
    returns them), main (the key of the number that stands for the set), evaluator, options, and published: what others report, each
    with `differs`, the settings in which its protocol is another; empty where it agrees; `refused`: why false alarms are not measured. Raises MetricError as the metric does.
    """
    results, usual = {}, _usual(item, mode)
    for metric in item.metrics:
        if metric.modes and mode.name not in metric.modes:
            continue
        module = importlib.import_module(f"glip_jax.evaluation.metrics.{metric.module}")
        more: dict[str, Any] = {"per_class": True} if metric.module in _BY_NAME else {}
        if metric.module == "flickr":
            more = {"release": release}
        refused = ""
        try:
            numbers = module.score(annotations[metric.file], str(predictions), **metric.options, **more)
        except MetricError as error:
            if metric.module != "absence":
                raise
            # Of the first images of a set nothing may be known to be absent; the other numbers do not depend on it.
            numbers, refused = {}, str(error)
        results[metric.label] = {
            "main": metric.main,
            "module": metric.module,
            "evaluator": _evaluator(metric),
            "options": dict(metric.options),
            "numbers": numbers,
            **({"refused": refused} if refused else {}),
            "published": [
                compared(each, used, usual, mode.prompts)
                for each in item.published
                if (each.mode, each.metric) == (mode.name, metric.label)
            ],
        }
    return results


def _evaluator(metric: Metric) -> str:
    own = f"glip_jax {metric.module}, code {_code()}"
    if metric.module in _PYCOCOTOOLS:
        return f"{own}, pycocotools {importlib.metadata.version('pycocotools')}"
    return own


@functools.cache
def _code() -> str:
    return code()["files"][:12]


def _usual(item: BenchmarkSet, mode: PromptMode) -> Protocol:
    return {name: value for name, value in protocol(item, mode).items() if name != "ask"}


def compared(
    published: Published, used: Protocol, usual: Mapping[str, Any] = _EMPTY, prompts: float | int = 0
) -> dict[str, Any]:
    """A published number for results.json. `differs`: settings whose values are not those of its protocol.

    `usual`: the protocol of the set in the table, which holds where the number says nothing else. `prompts`: prompts of an image in
    that protocol, 0 where they are not known: a smaller token budget splits the names otherwise.
    """
    expected = {"images": "all", "counts": "as published", **usual, **published.protocol}
    if prompts and "prompts_per_image" in used:
        expected["prompts_per_image"] = prompts
    differs = [
        "other counts of images or categories"
        if name == "counts"
        else f"{name}: {used[name]} here, published with {value}"
        if name in used
        else f"{name}: {value}"
        for name, value in expected.items()
        if used.get(name) != value
    ]
    return {
        "model": published.model, "key": published.key, "value": published.value, "source": published.source, "differs": differs,
    }  # fmt: skip


def leaves(numbers: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(dotted key, number) of all numbers in the result of a metric."""
    if isinstance(numbers, Mapping | list):
        inner = numbers.items() if isinstance(numbers, Mapping) else enumerate(numbers)
        for name, value in inner:
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(numbers, int | float) and not isinstance(numbers, bool):
        yield key, float(numbers)


def group_numbers(results: Mapping[str, Any], group: Group) -> dict[str, dict[str, Any]]:
    """Mean and median of the main numbers of a group's sets, by column (name of a prompt mode) and label of the metric.

    `results`: sets of results.json. Sets without a number, or with an undefined one, are listed as missing and are not averaged; a
    published mean stands beside one over all sets only. A column of which most sets are missing is left out.
    """
    found = {}
    for column in group.columns:
        items = {item.name: item for item in find_sets(group.sets)}
        prompted = {
            name: results[name]["asks"].get(items[name].mode(column).name) for name in group.sets if name in results
        }
        labels = dict.fromkeys(label for own in prompted.values() if own for label in own["metrics"])
        for label in labels:
            values = {name: _main(prompted.get(name), label) for name in group.sets}
            known = [value for value in values.values() if value is not None]
            if 2 * len(known) < len(values):
                continue
            missing = [name for name, value in values.items() if value is None]
            protocols = [own["protocol"] for own in prompted.values() if own]
            used = {key: value for key, value in protocols[0].items() if all(p.get(key) == value for p in protocols)}
            used |= {"sets": "some" if missing else "all"}
            first = items[group.sets[0]]
            usual = {**_usual(first, first.mode(column)), "sets": "all"}
            published = [each for each in group.published if (each.mode, each.metric) == (column, label)]
            found[f"{column}, {label}"] = {
                "mean": statistics.fmean(known), "median": statistics.median(known), "sets": len(known), "missing": missing,
                "published": [compared(each, used, usual) for each in published],
            }  # fmt: skip
    return found


def _main(prompted: Mapping[str, Any] | None, label: str) -> float | None:
    metric = prompted and prompted["metrics"].get(label)
    return number(metric["numbers"], metric["main"]) if metric else None


def file_hashes(item: BenchmarkSet, data: str) -> dict[str, dict[str, str]]:
    """Path and SHA-256 of the annotation files of a set by role, and `known`, the SHA-256 that its publisher or the table gives."""
    found = {}
    for file in item.files:
        path = item.path(file.role, data)
        if gcs.kind(path) == "file":
            found[file.role] = {"path": str(path), "sha256": file_hash(str(path)), "known": file.sha256}
    return found


def cut_annotations(prompted: PromptedSet, path: str, out: epath.Path) -> None:
    """Writes the annotation file at `path` to `out`, cut to the images that were asked; of Flickr30k Entities the list of images.

    Raises BenchmarkError for annotations that are no JSON with images and annotations.
    """
    match prompted.item.form:
        case "flickr":
            images = dict.fromkeys(
                str(image_prompt.id[0]) for image in prompted.images for image_prompt in image.image_prompts
            )
            write_atomic(out, "\n".join([*images, ""]))
            return
        case "expressions":  # an entry of `images` is an expression there, and several share an image
            chosen = {_plain(image_prompt.id) for image in prompted.images for image_prompt in image.image_prompts}
        case _:
            chosen = {_plain(image.id) for image in prompted.images}
    try:
        content = json.loads(epath.Path(path).read_text())
        content["images"] = [entry for entry in content["images"] if _plain(entry["id"]) in chosen]
        content["annotations"] = [entry for entry in content["annotations"] if _plain(entry["image_id"]) in chosen]
        if "descriptions" in content:
            for entry in content["descriptions"]:
                entry["image_ids"] = [image for image in entry["image_ids"] if _plain(image) in chosen]
            content["descriptions"] = [entry for entry in content["descriptions"] if entry["image_ids"]]
        for entry in content["annotations"]:
            entry.pop("segmentation", None)
        if prompted.item.layout == "d3" and (pickles := d3.pickles_beside(path)) is not None:
            for entry in content["categories"]:  # the cut file does not lie beside what tells them otherwise
                entry["is_negative"] = bool(pickles["sentences"][entry["id"]]["is_negative"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(
            f"{prompted.item.name}: {path} cannot be cut to the first {len(prompted.images)} images ({error!r}): give "
            "--config.evaluation.max-images=0"
        ) from None
    write_atomic(out, json.dumps(content))


def _plain(key: Any) -> str:
    """An id as text: 7, 7.0 and "7" are the same, as for the metrics."""
    number = as_integer(key)
    return str(key if number is None else number)
