"""Several processes, here threads, evaluate a set together: each its own images, all the numbers of one."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.evaluate import evaluate_detection
from glip_jax.evaluation.shares import Share
from glip_jax.structures.batch import Detections

IMAGES = 7


@dataclass(frozen=True)
class ThreadShare(Share):
    """Gathers in this process."""

    barrier: Any = None
    values: Any = None

    def gather(self, value):
        self.values[self.index] = value
        self.barrier.wait(60)
        return list(self.values)


def shares(count):
    barrier, values = threading.Barrier(count), [None] * count
    return [ThreadShare(index, count, barrier=barrier, values=values) for index in range(count)]


class Detector:
    """Finds a box per image, with a score that many images have, and counts the images it was given."""

    batch_size, group_size = 1, 2

    def __init__(self):
        self.seen = []

    def categories_async(self, images, _, /):
        self.seen += [int(image[0, 0, 0]) for image in images]
        one = np.array([[0, 0, 9, 9]], np.float32)
        found = [
            Detections(
                one + int(image[0, 0, 0]) % 3, np.full(1, 0.5, np.float32), np.array([image[0, 0, 0] % 2], np.int32)
            )
            for image in images
        ]
        return lambda: found


@pytest.fixture
def dataset(tmp_path):
    """Images of several shapes; image k is filled with red value k."""
    images, boxes = [], []
    for k in range(IMAGES):
        height, width = 20 + 7 * k % 13, 30
        Image.new("RGB", (width, height), (k, 0, 0)).save(tmp_path / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "height": height, "width": width})
        boxes.append({"id": k + 1, "image_id": k, "category_id": k % 2, "bbox": [k % 2, 0, 10, 10]})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return EvaluationSet(str(tmp_path / "truth.json"), str(tmp_path))


@pytest.mark.parametrize("count", [2, 9])
def test_several_processes_have_the_results_of_one(dataset, count):
    """Also where a process has no image."""
    alone = evaluate_detection(Detector(), Config(), dataset, progress=False)
    detectors = [Detector() for _ in range(count)]

    def run(share):
        return evaluate_detection(detectors[share.index], Config(), dataset, progress=False, share=share)

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(run, shares(count)))
    assert sorted(image for detector in detectors for image in detector.seen) == list(range(IMAGES))
    assert max(len(detector.seen) for detector in detectors) == -(-IMAGES // count)
    for result in results:
        assert (result.precision, result.permuted, result.pictures) == (alone.precision, alone.permuted, alone.pictures)
        assert list(result.detections) == list(alone.detections) == list(range(IMAGES)), (
            "in the order of the annotations"
        )
        for key, found in result.detections.items():
            for field, value in alone.detections[key]._asdict().items():
                np.testing.assert_array_equal(getattr(found, field), value)
