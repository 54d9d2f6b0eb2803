"""Imports detection data sets that TensorFlow Datasets has prepared as array_record, without TensorFlow.

A prepared set is a folder with features.json and dataset_info.json, as `tfds build --file_format=array_record` creates it.
Images and boxes are found by the types of its features: an Image, and a sequence with a BBoxFeature and a ClassLabel.
`is_crowd`, `is_group_of`, `neg_category_ids` and `not_exhaustive_category_ids` are supported. Images are stored unchanged.

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
from glip_jax.data.importers.entry import Box, Entry, ImportSource, Report, SourceError
from glip_jax.data.importers.options import BuildOptions, PathArgument
from glip_jax.io import gcs

__all__ = ["Tfds", "TfdsImages", "open_tfds"]


def open_tfds(folder: epath.PathLike, split: str = "train", *, strict: bool = False) -> ImportSource:
    """Opens a split of a prepared set; entries in the order of the set.

    Raises SourceError if the package, the set or the split is missing, the files are not array_record, the features have no
    image or no boxes with labels, or the set is in a bucket.
    """
    path = epath.Path(folder)
    if gcs.is_remote(folder):
        raise SourceError(f"{path} is in a bucket, but array_record reads local files: copy the prepared set to a disk")
    images = TfdsImages(str(path), split, *_image_feature(_builder(path), path))
    features = images.builder.info.features
    boxes = _boxes_feature(features, path)
    check_names(dict(enumerate(boxes.names)), str(path))
    report = Report(strict=strict)
    count = len(images.source)
    entries = _entries(images, boxes, _title(path), report)
    return ImportSource(entries, images, report, tuple(boxes.names), count, _descriptions(path))


def _descriptions(path: epath.Path) -> tuple[epath.Path, ...]:
    return tuple(path / name for name in ("features.json", "dataset_info.json") if (path / name).exists())


def _builder(path: epath.Path) -> Any:
    """The set's builder; SourceError if it cannot be opened."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise SourceError(
            f"{path} is read with the package tensorflow-datasets, which is not installed: "
            "python -m pip install -r requirements-tfds.txt"
        ) from None
    if not (path / "features.json").is_file():
        raise SourceError(
            f"{path} has no features.json: expected a prepared set, e.g. tensorflow_datasets/voc/2007/5.0.0"
        )
    try:
        return tfds.builder_from_directory(path)
    except Exception as error:  # its reader raises various errors for damaged files
        raise SourceError(
            f"{path} is not a set that TensorFlow Datasets can open ({error!s:.200}): prepare it again"
        ) from None


@dataclass
class TfdsImages:
    """Reads the stored image of an example; each process opens the set itself."""

    folder: str
    split: str
    key: str
    """Key of the Image feature."""

    @cached_property
    def builder(self) -> Any:
        """The set's builder."""
        return _builder(epath.Path(self.folder))

    @cached_property
    def source(self) -> Any:
        """Random access to the examples, with images as bytes; SourceError if the split cannot be read."""
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
        except Exception as error:  # damaged or missing files, or files that do not match dataset_info.json
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
        except Exception as error:  # a wrong checksum, or bytes that do not match the features
            raise OSError(f"example {index} cannot be read ({error!s:.100})") from None

    def __call__(self, image: str) -> bytes:
        """The image of example number `image`."""
        return bytes(self.example(int(image))[self.key])

    def __reduce__(self) -> tuple[Any, ...]:
        return TfdsImages, (self.folder, self.split, self.key)


class _Boxes(NamedTuple):
    """Keys of the boxes in an example."""

    sequence: str
    box: str
    label: str
    names: list[str]
    to_names: Callable[[str, Any], list[str]]
    """Converts the value of a feature that is a sequence of labels to names."""


def _image_feature(builder: Any, path: epath.Path) -> tuple[str]:
    """Key of the image."""
    import tensorflow_datasets as tfds

    for key, feature in builder.info.features.items():
        if isinstance(feature, tfds.features.Image):
            return (key,)
    raise SourceError(f"{path} has no Image among its features: {', '.join(builder.info.features)}")


def _boxes_feature(features: Any, path: epath.Path) -> _Boxes:
    """The sequence with boxes and labels; of several labels the one named `label`."""
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
    raise SourceError(f"{path} has no sequence with a BBoxFeature and a ClassLabel: it is not a detection set")


def _title(path: epath.Path) -> str:
    """The last three parts of the path, e.g. voc/2007/5.0.0."""
    return "/".join(path.parts[-3:])


def _entries(images: TfdsImages, known: _Boxes, provenance: str, report: Report) -> Iterator[Entry]:
    for index in range(len(images.source)):
        try:
            example = images.example(index)
        except OSError as error:
            report.drop("image: example cannot be read", f"{provenance}, {error}")
            continue
        identity = _identity(example, index)
        objects = example[known.sequence]
        boxes: list[Box] = []
        labels, unfinished = [], []
        for i, (edges, label) in enumerate(zip(objects[known.box], objects[known.label])):
            where = f"box {i} of image {identity}"
            top, left, bottom, right = (float(edge) for edge in edges)
            group_flag = next((key for key in ("is_crowd", "is_group_of") if _flag(objects, key, i)), None)
            if not 0 <= int(label) < len(known.names):
                report.drop("box: category not listed", f"{where}, category {int(label)}")
            elif group_flag is not None:
                report.drop("box: crowd" if group_flag == "is_crowd" else "box: group", where)
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


def _flag(objects: Any, key: str, i: int) -> bool:
    return key in objects and int(objects[key][i]) == 1


def _identity(example: Any, index: int) -> str:
    """The id of the image in the set, else its number."""
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

    folder: tyro.conf.Positional[PathArgument]
    """Folder with features.json."""
    split: str = "train"

    @property
    def source(self) -> epath.Path:
        """The folder."""
        return self.folder

    @property
    def inputs(self) -> tuple[epath.Path, ...]:
        """The files that describe the set."""
        return _descriptions(self.folder)

    def open(self, scratch: Path) -> ImportSource:  # noqa: ARG002
        """Opens and validates the annotations."""
        return open_tfds(self.folder, self.split, strict=self.strict)
