"""Any detection set that TensorFlow Datasets has prepared as array_record, read without TensorFlow.

The set is a folder with features.json and dataset_info.json, as `tfds build --file_format=array_record` leaves it. Its
features say what is what: an Image, and a sequence that has a BBoxFeature and a ClassLabel. `is_crowd`, `is_group_of`,
`neg_category_ids` and `not_exhaustive_category_ids` are understood. The pictures stay as they are stored.

Needs the package tensorflow-datasets (requirements-tfds.txt), for the import only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from etils import epath

from glip_jax.data.importers.categories import check_names
from glip_jax.data.importers.entry import Box, Entry, Opened, Report, SourceError
from glip_jax.data.importers.options import BuildOptions, Place
from glip_jax.io import gcs

__all__ = ["Tfds", "open_tfds"]


def open_tfds(folder: epath.PathLike, split: str = "train", *, strict: bool = False) -> Opened:
    """Detection entries of a split, in the order of the set.

    SourceError: the package or the set is missing, the split is not there, the files are no array_record, the features
    have no image or no boxes with labels, or lie in a bucket.
    """
    place = epath.Path(folder)
    if gcs.is_remote(folder):
        raise SourceError(
            f"{place} lies in a bucket, and array_record reads local files: copy the prepared set to a disk"
        )
    images = _Images(str(place), split, *_image_feature(_builder(place), place))
    features = images.builder.info.features
    boxes = _boxes_feature(features, place)
    check_names(dict(enumerate(boxes.names)), str(place))
    report = Report(strict=strict)
    count = len(images.source)
    inputs = tuple(place / name for name in ("features.json", "dataset_info.json") if (place / name).exists())
    entries = _entries(images, boxes, _title(place), report)
    return Opened(entries, images, report, tuple(boxes.names), count, inputs)


def _builder(place: epath.Path) -> Any:
    """The set's builder; SourceError if it cannot be opened."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise SourceError(
            f"{place} is read with the package tensorflow-datasets, which is not installed: "
            "python -m pip install -r requirements-tfds.txt"
        ) from None
    if not (place / "features.json").is_file():
        raise SourceError(
            f"{place} has no features.json: expected a prepared set, e.g. tensorflow_datasets/voc/2007/5.0.0"
        )
    try:
        return tfds.builder_from_directory(place)
    except Exception as error:  # whatever its own reader meets in files that are not as it wrote them
        raise SourceError(
            f"{place} is no set that TensorFlow Datasets can open ({error!s:.200}): prepare it again"
        ) from None


@dataclass
class _Images:
    """Reads the stored picture of an example; opens the set anew in each process."""

    folder: str
    split: str
    key: str
    """Of the Image feature."""

    @cached_property
    def builder(self) -> Any:
        return _builder(epath.Path(self.folder))

    @cached_property
    def source(self) -> Any:
        """Random access to the examples, pictures as bytes; SourceError if there is none."""
        import tensorflow_datasets as tfds

        splits = list(self.builder.info.splits)
        if self.split not in splits:
            raise SourceError(f"{self.folder} has the splits {', '.join(splits)}, not {self.split!r}: set --split")
        try:
            source = self.builder.as_data_source(split=self.split, decoders={self.key: tfds.decode.SkipDecoding()})
            len(source)
        except NotImplementedError:
            raise SourceError(
                f"{self.folder} is not stored as array_record: prepare it with tfds build --file_format=array_record"
            ) from None
        except Exception as error:  # files that are damaged, missing, or others than the set's own list says
            raise SourceError(
                f"{self.folder}, split {self.split}: its files cannot be read ({error!s:.200}): prepare it again"
            ) from None
        return source

    def example(self, index: int) -> Any:
        """The features of an example; OSError if it is damaged."""
        try:
            return self.source[index]
        except SourceError:
            raise
        except Exception as error:  # a block whose checksum differs, bytes that are no example of these features
            raise OSError(f"example {index} cannot be read ({error!s:.100})") from None

    def __call__(self, image: str) -> bytes:
        """The picture of example number `image`."""
        return bytes(self.example(int(image))[self.key])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Images, (self.folder, self.split, self.key)


class _Boxes(NamedTuple):
    """Where the boxes are in an example, by keys."""

    sequence: str
    box: str
    label: str
    names: list[str]
    to_names: Callable[[str, Any], list[str]]
    """Names of a feature of the example that is a sequence of labels."""


def _image_feature(builder: Any, place: epath.Path) -> tuple[str]:
    """Key of the picture."""
    import tensorflow_datasets as tfds

    for key, feature in builder.info.features.items():
        if isinstance(feature, tfds.features.Image):
            return (key,)
    raise SourceError(f"{place} has no Image among its features: {', '.join(builder.info.features)}")


def _boxes_feature(features: Any, place: epath.Path) -> _Boxes:
    """The sequence with boxes and labels; of several labels the one called label or objects_label first."""
    import tensorflow_datasets as tfds

    def to_names(key: str, values: Any) -> list[str]:
        inner = getattr(features[key], "feature", None)
        if not isinstance(inner, tfds.features.ClassLabel):
            return []
        return [inner.names[int(v)] for v in values if 0 <= int(v) < len(inner.names)]

    for sequence, feature in features.items():
        inner: Any = getattr(feature, "feature", feature)
        if not isinstance(inner, tfds.features.FeaturesDict):
            continue
        inner = dict(inner.items())
        boxes = [key for key, item in inner.items() if isinstance(item, tfds.features.BBoxFeature)]
        labels = [key for key, item in inner.items() if isinstance(item, tfds.features.ClassLabel)]
        labels.sort(key=lambda key: key != "label")
        if boxes and labels:
            return _Boxes(sequence, boxes[0], labels[0], list(inner[labels[0]].names), to_names)
    raise SourceError(f"{place} has no sequence with a BBoxFeature and a ClassLabel: it is no detection set")


def _title(place: epath.Path) -> str:
    """voc/2007/5.0.0 of a longer path."""
    return "/".join(place.parts[-3:])


def _entries(images: _Images, known: _Boxes, provenance: str, report: Report) -> Iterator[Entry]:
    for index in range(len(images.source)):
        try:
            example = images.example(index)
        except OSError as error:
            report.drop("image: example cannot be read", f"{provenance}, {error}")
            continue
        identity = _identity(example, index)
        things = example[known.sequence]
        boxes: list[Box] = []
        labels, unfinished = [], []
        for i, (edges, label) in enumerate(zip(things[known.box], things[known.label])):
            where = f"box {i} of image {identity}"
            top, left, bottom, right = (float(edge) for edge in edges)
            hidden = next((key for key in ("is_crowd", "is_group_of") if _flag(things, key, i)), None)
            if not 0 <= int(label) < len(known.names):
                report.drop("box: category not listed", f"{where}, category {int(label)}")
            elif hidden is not None:
                report.drop("box: crowd" if hidden == "is_crowd" else "box: group", where)
                unfinished.append(known.names[int(label)])
            else:
                boxes.append((left, top, right, bottom))
                labels.append(int(label))
        absent = (
            known.to_names("neg_category_ids", example["neg_category_ids"]) if "neg_category_ids" in example else None
        )
        if "not_exhaustive_category_ids" in example:
            unfinished += known.to_names("not_exhaustive_category_ids", example["not_exhaustive_category_ids"])
        yield Entry(
            id=identity, image=str(index), kind="detection", boxes=tuple(boxes), relative=True, labels=tuple(labels),
            known_absent=None if absent is None else tuple(absent),
            not_exhaustive=tuple(dict.fromkeys(unfinished)), provenance=provenance,
        )  # fmt: skip


def _flag(things: Any, key: str, i: int) -> bool:
    return key in things and int(things[key][i]) == 1


def _identity(example: Any, index: int) -> str:
    """What the set calls the image, else its number."""
    for key in ("image/id", "image_id", "image/filename"):
        if key in example:
            value = example[key]
            return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return str(index)


@dataclass(frozen=True, kw_only=True)
class Tfds(BuildOptions):
    """Import a detection set that TensorFlow Datasets has prepared as array_record; TensorFlow is not needed.

    example: python -m glip_jax data tfds tensorflow_datasets/voc/2007/5.0.0 --split=train --out=shards/voc
    """

    folder: tyro.conf.Positional[Place]
    """Folder with features.json."""
    split: str = "train"

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    def opened(self, scratch: Path) -> Opened:  # noqa: ARG002
        """The entries."""
        return open_tfds(self.folder, self.split, strict=self.strict)
