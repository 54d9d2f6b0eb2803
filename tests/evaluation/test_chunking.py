"""The effect of the number and the order of the names in a prompt on AP50."""

import json

import numpy as np
import pytest
from PIL import Image

from glip_jax.config import EvaluationSet
from glip_jax.evaluation.chunking import Chunking, chunking_effect, chunking_lines, prompt_chunks
from glip_jax.evaluation.evaluate import evaluate_detection
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections
from tests import tiny_run

NAMES = ("cat", "dog", "person")


@pytest.fixture
def dataset(tmp_path):
    """Three images with a box of one name each; image k is filled with red value k."""
    images, annotations = [], []
    for k in range(3):
        Image.new("RGB", (64, 64), (k, 0, 0)).save(tmp_path / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png"})
        annotations.append({"id": k, "image_id": k, "category_id": k, "bbox": [8, 8, 24, 24]})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return EvaluationSet(str(tmp_path / "truth.json"), str(tmp_path))


class FirstNameOnly:
    """Detects a name only if it is the first of its prompt."""

    batch_size = group_size = 8

    def __init__(self, config):
        self.limit = config.evaluation.chunk or 3

    def categories_async(self, images, names, /):
        found = self.categories(images, names)
        return lambda: found

    def categories(self, images, names, /):
        found = []
        for image in images:
            index = list(names).index(NAMES[int(image[0, 0, 0])])
            box = [8, 8, 31, 31] if index % self.limit == 0 else [0, 0, 1, 1]
            found.append(Detections(np.array([box], np.float32), np.ones(1, np.float32), np.array([index], np.int32)))
        return found


def test_chunks_and_orders_are_compared_with_the_first(dataset):
    config = tiny_run.config()
    first = evaluate_detection(FirstNameOnly(config), config, dataset, progress=False)
    assert first.precision.per_class_50 == pytest.approx({"cat": 1, "dog": 0, "person": 0})
    made = []

    def make(changed):
        made.append(changed.evaluation.chunk)
        return FirstNameOnly(changed)

    effect = chunking_effect(make, config, dataset, Chunking((0, 2, 2, 1), (3,)), first, progress=False)
    # Only "cat" is first in a prompt of all names; with two names a prompt another one is too, and alone each is.
    assert [(one["chunk"], one["seed"]) for one in effect] == [(0, None), (0, 3), (2, None), (2, 3), (1, None), (1, 3)]
    assert made == [0, 2, 2, 1, 1], "the evaluation that is known is not repeated"
    assert [one["AP50"] for one in effect] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [one["difference"] for one in effect] == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    lines = dict(chunking_lines(effect))
    assert lines["at most 2 names a prompt, shuffled with seed 3"] == "AP50 0.6667, +0.3333"
    assert lines["at most 2 names a prompt, 2 orders"] == "mean AP50 0.6667, 0.6667 to 0.6667"


def test_a_subset_has_a_reference_of_its_own(dataset):
    config = tiny_run.config()
    first = evaluate_detection(FirstNameOnly(config), config, dataset, progress=False)
    effect = chunking_effect(FirstNameOnly, config, dataset, Chunking((0, 1), (), 1), first, progress=False)
    # Of the first image, which shows a cat.
    assert [(one["images"], one["AP50"]) for one in effect] == [(1, pytest.approx(1)), (1, pytest.approx(1))]


def test_seeds_are_other_orders(dataset):
    prompted = []

    class Recorder(FirstNameOnly):
        def categories(self, images, names, /):
            prompted.append(list(names))
            return super().categories(images, names)

    config = tiny_run.config()
    first = evaluate_detection(FirstNameOnly(config), config, dataset, progress=False)
    chunking_effect(Recorder, config, dataset, Chunking((0,), (0, 3, 0)), first, progress=False)
    assert prompted == [[NAMES[i] for i in np.random.default_rng(seed).permutation(3)] for seed in (0, 3)]
    assert prompted[0] != prompted[1] != list(NAMES) != prompted[0]


def test_a_single_name_has_no_variants(dataset):
    config = tiny_run.config()
    first = evaluate_detection(FirstNameOnly(config), config, dataset, progress=False)._replace(prompts=("cat",))
    assert chunking_effect(FirstNameOnly, config, dataset, Chunking((0, 1)), first, progress=False) == []


def test_the_chunks_are_those_of_the_detector():
    config = tiny_run.replace(tiny_run.config(), "evaluation", chunk=2)
    tokenizer = prompts.load_tokenizer(tiny_run.VOCABULARY)
    assert prompt_chunks(NAMES, tokenizer, config) == [["cat", "dog"], ["person"]]
