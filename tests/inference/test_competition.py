"""Names of a list compete for the boxes of one place; rivals are asked beside them and dropped."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from glip_jax.config import Config, DetectionConfig
from glip_jax.inference import Detector, category_prompts, compete
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections
from tests import tiny_run

TOKENIZER = prompts.load_tokenizer(tiny_run.VOCABULARY)
NAMES, RIVALS = ["cat", "dog", "person"], ("bottle", "Dog", "cup", "red car", "traffic light")
RULE = DetectionConfig(name_decay=2.0, name_decay_iou=0.6)


def _config(**detection: Any) -> Config:
    config = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=128, batch_size=1)
    return tiny_run.replace(tiny_run.replace(config, "data", aspects=(1.0,)), "detection", threshold=0.0, **detection)


def _random(count: int = 60) -> Detections:
    rng = np.random.default_rng(3)
    corner, side = rng.integers(0, 40, (count, 2)), rng.integers(0, 30, (count, 2))
    boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
    return Detections(boxes, rng.random(count, np.float32), rng.integers(0, 4, count).astype(np.int32))


def test_a_box_gives_way_to_a_higher_one_of_another_name_in_its_place() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [0, 0, 10, 5], [30, 30, 30, 40]], np.float32)
    found = compete(
        Detections(boxes, np.array([0.8, 0.4, 0.6, 0.5, 0.3], np.float32), np.array([0, 1, 0, 1, -1], np.int32)), RULE
    )
    # 1 against 0 and 2, the higher counts: 0.4 * (0.4 / 0.8)^2. 2 is of the name of 0. Of 3 the IoU is 0.5 with 0, and 5 / 8 with 2.
    np.testing.assert_allclose(found.scores, [0.8, 0.6, 0.5 * (5 / 6) ** 2, 0.1], rtol=1e-6)
    assert found.phrases.tolist() == [0, 0, 1, 1] and found.boxes[:, 3].tolist() == [10, 8, 5, 9]
    assert found.alignment is None
    rival = compete(
        Detections(boxes, np.array([0.8, 0.4, 0.6, 0.5, 0.3], np.float32), np.array([-1, 1, -1, 1, 0], np.int32)), RULE
    )
    np.testing.assert_allclose(rival.scores, [0.5 * (5 / 6) ** 2, 0.3, 0.1], rtol=1e-6)
    nothing = compete(Detections(boxes[:0], np.array([], np.float32), np.array([], np.int32)), RULE)
    assert len(nothing.scores) == 0


def test_without_the_setting_scores_stay() -> None:
    given, default = _random(), DetectionConfig()
    found = compete(given, default)
    np.testing.assert_array_equal(found.scores, -np.sort(-given.scores))
    assert default.name_decay == 0 and default.rivals == ()


def test_the_exports_compete_alike() -> None:
    torch = pytest.importorskip("torch")
    from glip_jax.weights.portable import processing_glip

    pytest.importorskip("onnxruntime")
    from glip_jax.weights.portable.run_onnx import Detector as OnnxDetector

    given = _random()
    wanted = compete(given, RULE)
    assert (np.sort(wanted.scores) < np.sort(given.scores) - 1e-3).sum() > 5
    settings = {"name_decay": RULE.name_decay, "name_decay_iou": RULE.name_decay_iou}
    fields = [torch.from_numpy(field) for field in given[:3]]
    for one, other in zip(processing_glip.compete(*fields, **settings), wanted[:3], strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-5)
    runner = OnnxDetector.__new__(OnnxDetector)
    runner.settings = {"detection": settings}
    np.testing.assert_allclose(-np.sort(-runner._competed(*given[:3])), wanted.scores, rtol=1e-5)


def test_rivals_stand_behind_the_names_and_are_no_names() -> None:
    config = _config(rivals=RIVALS)
    asked = category_prompts(NAMES, TOKENIZER, config)
    assert [index for _, part in asked for index in part] == [0, 1, 2, -1, -1, -1, -1], "Dog is dog to the model"
    assert "".join(prompt.caption for prompt, _ in asked).count("bottle") == 1
    with pytest.raises(prompts.PromptError, match=r"detection.rivals.*斑马"):
        category_prompts(NAMES, TOKENIZER, _config(rivals=("斑马",)))


@pytest.mark.compiles
def test_what_a_rival_takes_is_not_found_under_a_name() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    plain, decay = _config(), {"name_decay": 3.0, "name_decay_iou": 0.5}
    params = tiny_run.parameters(plain.model)
    rivals = tuple(name for name in RIVALS if name != "Dog")
    (found,) = Detector(_config(rivals=RIVALS, **decay), params, devices=jax.devices()[:1]).categories([image], NAMES)
    (every,) = Detector(plain, params, devices=jax.devices()[:1]).categories([image], [*NAMES, *rivals])
    own = every._replace(phrases=np.where(every.phrases < len(NAMES), every.phrases, -1))
    wanted = compete(own, dataclasses.replace(plain.detection, **decay))
    assert len(found.scores) > 20 and (found.scores < 0.9 * -np.sort(-every.scores[own.phrases >= 0])).any()
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(found.scores, np.sqrt(found.alignment * found.centerness), rtol=1e-5)
