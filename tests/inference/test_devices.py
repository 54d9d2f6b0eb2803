"""A Detector on several devices finds what it finds on one; the second evaluation of a run compiles nothing."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from glip_jax.config import Config, EvaluationSet
from glip_jax.evaluation.evaluate import evaluate
from glip_jax.inference import Detector
from glip_jax.structures.batch import Prompt
from tests import tiny_run

pytestmark = pytest.mark.compiles


def _config() -> Config:
    config = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=64, batch_size=2)
    return tiny_run.replace(config, "detection", threshold=0.0, max_detections=50, nms_iou=0.7)


@pytest.fixture(scope="module")
def params() -> Any:
    return tiny_run.parameters(_config().model)


def _images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (64 - k % 5, 60 + k % 3, 3), np.uint8) for k in range(count)]


def _xywh(box: np.ndarray) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1 + 1, y2 - y1 + 1]


@pytest.mark.slow
def test_eight_devices_find_what_one_finds(params: Any) -> None:
    """Images with no, one and several prompts, in batches that are full, partial and empty: the same boxes in the same order.

    XLA simplifies the program of one device and that of several differently, so scores differ in the last bit.
    """
    texts = ("a cat", "a dog . red car", "a tree near a cup")
    prompts = [Prompt(text, (((0, 5),), ((len(text) - 3, len(text)),))) for text in texts]
    asked = [prompts[: k % 4] for k in range(11)]
    one, eight = Detector(_config(), params, devices=jax.devices()[:1]), Detector(_config(), params)
    assert (one.group_size, eight.group_size) == (2, 16)
    expected, found = (detector.captions(_images(11), asked) for detector in (one, eight))
    assert [len(own) for own in found] == [len(own) for own in asked] and eight._counts[64, 64] == 6
    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert len(mine.scores) > 10
            np.testing.assert_array_equal(mine.phrases, other.phrases)
            for field, value in other._asdict().items():
                np.testing.assert_allclose(getattr(mine, field), value, rtol=1e-5, atol=1e-4, err_msg=field)


def test_the_second_evaluation_compiles_nothing(params: Any, tmp_path: Any) -> None:
    """Of a small set, then a large one; with other parameters, which the metrics show."""
    sets = {}
    for name, count, names in (
        ("small", 1, tiny_run.NAMES),
        ("large", 11, ("red car", "cup", "tree", "bottle", "chair")),
    ):
        images = []
        for k, pixels in enumerate(_images(count)):
            Image.fromarray(pixels).save(tmp_path / f"{name}{k}.png")
            images.append({"id": k, "file_name": f"{name}{k}.png", "height": pixels.shape[0], "width": pixels.shape[1]})
        found = Detector(_config(), params).categories(_images(count), names)
        boxes = [
            {"id": k + 1, "image_id": k, "category_id": int(of.phrases[0]), "bbox": _xywh(of.boxes[0])}
            for k, of in enumerate(found)
        ]
        content = {
            "images": images,
            "annotations": boxes,
            "categories": [{"id": k, "name": n} for k, n in enumerate(names)],
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        sets[name] = EvaluationSet(str(tmp_path / f"{name}.json"), str(tmp_path))
    detector = Detector(_config(), None)
    detector.use(params)
    first = evaluate(_config(), None, sets, progress=False, detector=detector)
    before = detector.compiled
    detector.use(None)
    detector.use(tiny_run.parameters(_config().model, seed=6))
    second = evaluate(_config(), None, sets, progress=False, detector=detector)
    assert detector.compiled == before
    assert first.keys() == second.keys() and first != second, "other parameters, other numbers"
    detector.use(params)
    assert evaluate(_config(), None, sets, progress=False, detector=detector) == first
    with pytest.raises(ValueError, match="no parameters"):
        Detector(_config(), None).categories(_images(1), ["cat"])
