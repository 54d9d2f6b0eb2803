"""The effect of other names in the prompt on AP50."""

import json

import numpy as np
import pytest
from PIL import Image

from glip_jax.config import EvaluationSet
from glip_jax.evaluation.chunking import chunking_effect, prompt_chunks
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


def test_the_effect_of_chunking(dataset):
    config = tiny_run.config()
    first = evaluate_detection(FirstNameOnly(config), config, dataset, progress=False)
    effect = chunking_effect(FirstNameOnly(config), FirstNameOnly, config, dataset, first, 3, progress=False)
    shuffled, shorter = effect
    # Only "cat" is first in a prompt; with two names a prompt "person" is too.
    assert first.precision.per_class_50 == pytest.approx({"cat": 1, "dog": 0, "person": 0})
    assert shorter["asked"] == "at most 2 names a prompt"
    assert (shorter["AP50"], shorter["difference"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (shuffled["AP50"], shuffled["difference"]) == (pytest.approx(1 / 3), pytest.approx(0))


def test_shuffled_names_are_in_another_order(dataset):
    prompted = []

    class Recorder(FirstNameOnly):
        def categories(self, images, names, /):
            prompted.append(list(names))
            return super().categories(images, names)

    config = tiny_run.config()
    first = evaluate_detection(Recorder(config), config, dataset, progress=False)
    chunking_effect(Recorder(config), Recorder, config, dataset, first, 3, progress=False)
    assert prompted[0] == prompted[2] == list(NAMES)
    assert prompted[1] != prompted[0] and sorted(prompted[1]) == sorted(NAMES)


def test_a_single_name_has_no_variants(dataset):
    config = tiny_run.config()
    first = evaluate_detection(FirstNameOnly(config), config, dataset, progress=False)._replace(prompts=("cat",))
    assert chunking_effect(FirstNameOnly(config), FirstNameOnly, config, dataset, first, 1, progress=False) == []


def test_the_chunks_are_those_of_the_detector():
    config = tiny_run.replace(tiny_run.config(), "evaluation", chunk=2)
    tokenizer = prompts.load_tokenizer(tiny_run.VOCABULARY)
    assert prompt_chunks(NAMES, tokenizer, config) == [["cat", "dog"], ["person"]]
