"""Overlap of a set with shards of training data."""

import hashlib

import numpy as np

from glip_jax.data import shards
from glip_jax.data.records import Record
from glip_jax.evaluation.benchmark.overlap import image_overlap, name_overlap, read_training


def digest(content):
    return hashlib.sha256(content).hexdigest()


def test_images_by_content_and_names_as_prompts_have_them(tmp_path):
    boxes = np.array([[0, 0, 5, 5]], np.float32)
    images = [b"one", b"two", b"two", b"three"]
    records = (Record(str(i), "detection", image, 9, 9, boxes, (i % 2,)) for i, image in enumerate(images))
    shards.write(records, tmp_path / "a", name="a", names=("Traffic_light", "bow_(weapon)"))
    captions = (Record("c", "caption", b"five", 9, 9, np.zeros((0, 4), np.float32), caption="a cat") for _ in range(1))
    shards.write(captions, tmp_path / "b", name="b")
    training = read_training({"a": str(tmp_path / "a"), "b": str(tmp_path / "b"), "c": str(tmp_path / "c")})
    assert list(training.unread) == ["c"]
    assert "holds no finished shards" in training.unread["c"]
    assert len(training.hashes["a"]) == 3, "an image counts once"

    files = {"x.jpg": digest(b"two"), "y.jpg": digest(b"four"), "z.jpg": digest(b"five"), "copy.jpg": digest(b"two")}
    assert image_overlap(training, files) == {
        "images": 3, "found": 2, "by_source": {"a": 1, "b": 1}, "examples": ["x.jpg", "z.jpg"],
    }  # fmt: skip
    assert name_overlap(training, ["traffic light", "bow", "zebra", "Zebra"]) == {
        "names": 3, "found": 2, "by_source": {"a": 2}, "missing": ["Zebra"],
    }  # fmt: skip
