"""Absent names in evaluation sets, with a detector whose scores are known."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from glip_jax.config import Config, EvaluationConfig, EvaluationSet, ModelConfig, TextConfig
from glip_jax.evaluation.absent_names import scalar_names
from glip_jax.evaluation.at_start import metric_names
from glip_jax.evaluation.average_precision import load_ground_truth
from glip_jax.evaluation.evaluate import evaluate_detection, scalars
from glip_jax.evaluation.single_names import single_name_absence
from glip_jax.evaluation.thresholds import ThresholdError, choose, numbers_at, read_thresholds
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections
from tests.tiny_run import VOCABULARY

CONFIG = Config(
    model=ModelConfig(text=TextConfig(vocabulary=str(VOCABULARY), vocabulary_size=512, max_tokens=32, positions=512)),
    evaluation=EvaluationConfig(batch_size=2),
)
NAMES = ("red", "dog", "cat")
IMAGES = 20


@pytest.fixture
def dataset(tmp_path):
    """Twenty images with a box of "a_red thing"; dogs are absent from all, cats from the first two, where they are look-alikes."""
    (tmp_path / "images").mkdir()
    images = []
    for k in range(IMAGES):
        Image.new("RGB", (40, 30), (k, 0, 0)).save(tmp_path / "images" / f"{k}.png")
        absent = ["dog", "cat"] if k < 2 else ["dog"]
        images.append(
            {
                "id": k,
                "file_name": f"{k}.png",
                "height": 30,
                "width": 40,
                "known_absent": absent,
                "look_alikes": absent[1:],
            }
        )
    boxes = [{"id": k + 1, "image_id": k, "category_id": 1, "bbox": [2, 2, 20, 10]} for k in range(IMAGES)]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    (tmp_path / "truth.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return EvaluationSet(str(tmp_path / "truth.json"), str(tmp_path / "images"), {"red": "a red"})


def _found(scores):
    """The true box of the red thing for each of the first names."""
    boxes = np.tile(np.array([2, 2, 21, 11], np.float32), (len(scores), 1))
    return Detections(boxes, np.array(scores, np.float32), np.arange(len(scores), dtype=np.int32))


class Prone:
    """Finds the red thing with 0.8; dogs with 0.02 k in image k, cats with 0.6, both with 0.7 where they are the only name."""

    group_size = batch_size = 2
    tokenizer = prompts.load_tokenizer(VOCABULARY)

    def __init__(self):
        self.alone = Counter()

    def categories_async(self, images, names, /):
        assert list(names) == ["a red", "dog", "cat"]
        return lambda: [_found((0.8, 0.02 * image[0, 0, 0], 0.6)) for image in images]

    def detect_async(self, _, prompts_, /):
        captions = [prompt.caption for given in prompts_ for prompt in given]
        self.alone.update(captions)
        return lambda: [[_found((0.8 if prompt.caption == "a red" else 0.7,)) for prompt in given]
                        for given in prompts_]  # fmt: skip


def test_an_evaluation_measures_absent_names(dataset):
    result = evaluate_detection(Prone(), CONFIG, dataset, progress=False, rates=(0.5,))
    assert result.absence is not None
    assert result.absence["absent_pairs"] == 22 and result.absence["present_pairs"] == 20
    # Dogs: 0.3 from the fifteenth image on (0.02 x 15), so five; cats in two images.
    assert result.absence["thresholds"]["0.3"]["false_alarms"] == pytest.approx((5 + 2) / 22)
    assert result.absence["look_alikes"]["thresholds"]["0.5"]["false_alarms"] == 1
    assert result.absence["boxes_not_judged"] == 18, "cats where nothing is known of them"
    numbers = scalars(result)
    assert numbers["false_alarms@0.5"] == pytest.approx(2 / 22) and numbers["absent_pairs"] == 22
    # At 0.05 one of 22 boxes may pass, of two equal ones none: from above 0.6.
    assert result.absence["rates"]["0.05"]["threshold"] == pytest.approx(0.6, abs=1e-6)
    assert numbers["AP_at_false_alarms_0.05"] == pytest.approx(1) and list(result.absence["rates"]) == [
        "0.01",
        "0.05",
        "0.25",
        "0.5",
    ]
    known = metric_names(load_ground_truth(dataset.annotations, dataset, "x"))
    assert set(scalar_names()) <= set(numbers) <= {*known, "APl"}


def test_names_asked_alone(dataset):
    detector = Prone()
    result = evaluate_detection(detector, CONFIG, dataset, progress=False)
    alone = single_name_absence(detector, CONFIG, dataset, result, 1, progress=False)
    assert detector.alone["a red"] == 20 and detector.alone["cat"] == 2 and 18 <= detector.alone["dog"] <= 20
    assert alone["absent_pairs"] == 20 == alone["present_pairs"] and alone["look_alikes"]["absent_pairs"] == 2
    half = alone["thresholds"]["0.5"]
    assert half["false_alarms"] == 1 and half["found_pairs"] == 1 and half["presence_MCC"] == 0
    assert alone["rates"]["0.05"]["threshold"] == pytest.approx(0.7, abs=1e-6)


def test_thresholds_of_a_report_are_applied_by_name(dataset, tmp_path):
    result = evaluate_detection(Prone(), CONFIG, dataset, progress=False)
    measured = {"small": dict(result.absence or {}, absent_pairs=3, rates={}), "x": result.absence or {}}
    chosen = choose(measured, 0.05, "the report")
    # Twenty pairs of dogs allow one box: from above the second highest score. Two pairs of cats allow none.
    assert chosen.source == "x"
    assert chosen.of(["dog", "a dog", "cat", "cow"]) == pytest.approx([0.36, 0.36, 0.6, 0.6], abs=1e-6)
    numbers = numbers_at(result, chosen)
    assert numbers["false_alarms"] == pytest.approx(1 / 22), "the best dog, and no cat"
    assert numbers["AP"] == pytest.approx(1) and numbers["found_pairs"] == 1
    (tmp_path / "evaluation.json").write_text(json.dumps({"sets": {"x": {"absence": result.absence}, "y": {}}}))
    assert read_thresholds(str(tmp_path), 0.05) == chosen
    alone = (result.absence or {}) | {"alone": {"rates": {"0.05": {"threshold": 0.75}}}}
    assert choose({"x": alone}, 0.05, "x", alone=True).of(["dog"]) == [0.75]
    assert choose({"x": alone}, 0.05, "x").threshold == chosen.threshold


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no report of `evaluate`"), ("[]", "is no report of `evaluate`"),
        ('{"sets": {"x": {"AP": 1}}}', "has no set with names that are known to be absent"),
        ('{"sets": {"x": {"absence": {"absent_pairs": 1, "rates": {"0.05": {}}}}}}', r"thresholds for 0.05 .*, not for 0.1: .*--false-alarms=0.1"),
    ],
)  # fmt: skip
def test_reports_without_thresholds_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ThresholdError, match=message):
        read_thresholds(str(tmp_path / "evaluation.json"), 0.1)


def test_a_name_that_is_boxed_and_listed_as_absent_counts_as_present(dataset):
    with open(dataset.annotations) as file:
        content = json.load(file)
    content["images"][0]["known_absent"].append("red")
    with open(dataset.annotations, "w") as file:
        json.dump(content, file)
    truth = load_ground_truth(dataset.annotations, dataset, "x")
    assert (
        truth.listed[0].known_absent == (1, 2)
        and truth.left_out["name: known absent but boxed, not kept as absent"] == 1
    )
