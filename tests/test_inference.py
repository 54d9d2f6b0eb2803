"""From predictions to detections: against a plain loop, and the Detector's bookkeeping."""

from typing import Any

import jax
import numpy as np
import pytest

from glip_jax import boxes as box
from glip_jax.config import AnchorConfig, DetectionConfig, ModelConfig, PyramidConfig
from glip_jax.inference import detect
from glip_jax.structures import Detections, Predictions

CANVAS, TOKENS, PHRASES = (64, 96), 6, 3
MODEL = ModelConfig(pyramid=PyramidConfig(strides=(16, 32)), anchors=AnchorConfig((32, 64)))
ANCHORS = box.anchors(CANVAS, (16, 32), (32, 64))
ENDS = (0, 24, 30)


def _predictions(seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    return Predictions(
        (rng.normal(size=(1, len(ANCHORS), TOKENS)) * 2).astype(np.float32),
        (rng.normal(size=(1, len(ANCHORS), 4))).astype(np.float32),
        rng.normal(size=(1, len(ANCHORS))).astype(np.float32),
    )


def _detect(
    found: Predictions, phrase_map: np.ndarray, extent: np.ndarray, config: DetectionConfig, size: Any = None
) -> Detections:
    size = extent if size is None else size
    return jax.jit(detect, static_argnums=(4, 5, 6))(found, phrase_map, size, extent, CANVAS, MODEL, config)


def _by_loops(
    found: Predictions, phrase_map: np.ndarray, size: tuple[int, int], config: DetectionConfig
) -> list[tuple[float, int, np.ndarray]]:
    """glip-reference 2.10, score by score; survivors of a full suppression, best first."""
    candidates = []
    for begin, end in zip(ENDS, ENDS[1:]):
        level = []
        for place, phrase in np.ndindex(end - begin, PHRASES):
            place += begin
            p = 1 / (1 + np.exp(-found.logits[0, place, phrase_map[phrase]].astype(np.float64)))
            if p.mean() > config.threshold:
                center = 1 / (1 + np.exp(-float(found.centerness[0, place])))
                decoded = box.clip(box.decode(found.deltas[0, place], ANCHORS[place]), np.array(size, np.float32))
                level.append((np.sqrt(p.mean() * center), phrase, decoded))
        level.sort(key=lambda item: -item[0])
        candidates += level[: config.candidates_per_level]
    candidates.sort(key=lambda item: -item[0])
    kept: list[tuple[float, int, np.ndarray]] = []
    for item in candidates:
        if all(item[1] != k[1] or box.iou(item[2], k[2]) <= config.nms_iou for k in kept):
            kept.append(item)
    return kept[: config.max_detections]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "config",
    [DetectionConfig(), DetectionConfig(threshold=0.3, candidates_per_level=20, nms_iou=0.3, max_detections=7)],
    ids=["default", "tight"],
)
def test_equals_the_loop(seed: int, config: DetectionConfig) -> None:
    found = _predictions(seed)
    phrase_map = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]], bool)
    size, extent = np.array([[60, 90]], np.int32), np.array([CANVAS], np.int32)
    detections = _detect(found, phrase_map[None], extent, config, size)
    wanted = _by_loops(found, phrase_map, (60, 90), config)
    real = np.asarray(detections.phrases[0]) >= 0
    assert real.sum() == len(wanted) > 3
    np.testing.assert_allclose(detections.scores[0][real], [w[0] for w in wanted], rtol=1e-5)
    np.testing.assert_array_equal(detections.phrases[0][real], [w[1] for w in wanted])
    np.testing.assert_allclose(detections.boxes[0][real], [w[2] for w in wanted], atol=1e-3)
    assert not np.asarray(detections.scores[0][~real]).any()


def test_a_phrase_without_tokens_is_never_found() -> None:
    found = _predictions(0)
    phrase_map = np.zeros((1, PHRASES, TOKENS), bool)
    phrase_map[0, 1, 2] = True
    extent = np.array([CANVAS], np.int32)
    detections = _detect(found, phrase_map, extent, DetectionConfig())
    assert set(np.asarray(detections.phrases[0]).tolist()) <= {-1, 1}
    assert np.isfinite(np.asarray(detections.scores)).all()


def test_equal_scores_go_to_the_lowest_index() -> None:
    found = _predictions(0)
    found = Predictions(np.zeros_like(found.logits), np.zeros_like(found.deltas), np.zeros_like(found.centerness))
    phrase_map = np.zeros((1, 1, TOKENS), bool)
    phrase_map[0, 0, 0] = True
    extent = np.array([CANVAS], np.int32)
    config = DetectionConfig(nms_iou=0.99, max_detections=3)
    detections = _detect(found, phrase_map, extent, config)
    wanted = box.clip(ANCHORS[:3], np.array(CANVAS, np.float32))
    np.testing.assert_allclose(detections.boxes[0], wanted, atol=1e-4)
