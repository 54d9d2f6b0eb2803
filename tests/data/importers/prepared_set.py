"""A small detection set as TensorFlow Datasets prepares it, written by that library."""

import functools
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["prepare"]


def _jpeg(i: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(np.full((24, 32, 3), 40 * i, np.uint8)).save(file, "JPEG")
    file.seek(0)
    return file


def prepare(folder: Path) -> Path:
    """Writes three examples below `folder`; returns the folder of the version."""
    _builder()(data_dir=folder, file_format="array_record").download_and_prepare()
    (place,) = folder.glob("*/1.0.0")
    return place


@functools.cache
def _builder() -> Any:
    """The builder of the set; TFDS registers a name once per process."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # nothing is downloaded

        def _info(self):
            thing = {
                "bbox": tfds.features.BBoxFeature(),
                "is_crowd": np.bool_,
                "label": tfds.features.ClassLabel(names=["cat", "dog", "cow"]),
            }
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/id": np.int64,
                "objects": tfds.features.Sequence(thing),
                "neg_category_ids": tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog", "cow"])),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):  # noqa: ARG002
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                box = tfds.features.BBox(ymin=0.25, xmin=0.5, ymax=0.5, xmax=1.0)
                whole = tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=1.0)
                things = [
                    {"bbox": box, "is_crowd": False, "label": i},
                    {"bbox": whole, "is_crowd": True, "label": 0},
                ]
                yield i, {"image": _jpeg(i), "image/id": 100 + i, "objects": things, "neg_category_ids": [2]}

    return Tiny
