"""Post-processing against a plain loop, and the Detector: chunks, compiled programs, caches, batch invariance."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glip_jax.config import AnchorConfig, Config, DetectionConfig, ModelConfig, PyramidConfig
from glip_jax.inference import Detector, category_prompts
from glip_jax.inference import detector as detector_module
from glip_jax.inference.postprocess import detect
from glip_jax.inference.programs import programs as programs_of
from glip_jax.structures import boxes as box
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections, Predictions, Prompt
from tests import tiny_run

pytestmark = pytest.mark.compiles

CANVAS, TOKENS, PHRASES = (64, 96), 6, 3
MODEL = ModelConfig(pyramid=PyramidConfig(strides=(16, 32)), anchors=AnchorConfig((32, 64)))
ANCHORS = box.anchors(CANVAS, (16, 32), (32, 64))
ENDS = (0, 24, 30)
TOKENIZER = prompts.load_tokenizer(tiny_run.VOCABULARY)


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
    """glip-reference 2.10, score by score: (score, phrase, box) after non-maximum suppression, descending."""
    candidates = []
    for begin, end in zip(ENDS, ENDS[1:]):
        level = []
        for anchor, phrase in np.ndindex(end - begin, PHRASES):
            anchor += begin
            p = 1 / (1 + np.exp(-found.logits[0, anchor].astype(np.float64)))
            rule = np.max if config.token_scores == "max" else np.mean
            alignments = [rule(p[tokens]) for tokens in phrase_map]
            nothing = max(p[len(p) - config.sinks :], default=0)
            alignment = alignments[phrase]
            if alignment > config.threshold and max(alignments) >= nothing:
                center = 1 / (1 + np.exp(-float(found.centerness[0, anchor])))
                decoded = box.clip(box.decode(found.deltas[0, anchor], ANCHORS[anchor]), np.array(size, np.float32))
                level.append((np.sqrt(alignment * center), phrase, decoded))
        level.sort(key=lambda item: -item[0])
        candidates += level[: config.candidates_per_level]
    candidates.sort(key=lambda item: -item[0])
    kept: list[tuple[float, int, np.ndarray]] = []
    for item in candidates:
        if all(item[1] != k[1] or box.iou(item[2], k[2]) <= config.nms_iou for k in kept):
            kept.append(item)
    return kept[: config.max_detections]


_CONFIGS = {
    "default": DetectionConfig(),
    "tight": DetectionConfig(threshold=0.3, candidates_per_level=20, nms_iou=0.3, max_detections=7),
    "max": DetectionConfig(threshold=0.5, token_scores="max", max_detections=20),
    "sinks": DetectionConfig(threshold=0.3, sinks=1),
}


@pytest.mark.parametrize(
    ("seed", "config"),
    [
        pytest.param(seed, config, id=f"{name}-{seed}")
        for name, config in _CONFIGS.items()
        for seed in range(1 if name in ("max", "sinks") else 4)
    ],
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
    parts = np.asarray(detections.alignment[0]) * np.asarray(detections.centerness[0])
    np.testing.assert_allclose(parts, np.asarray(detections.scores[0]) ** 2, rtol=1e-5)
    assert not np.asarray(detections.scores[0][~real]).any()


def test_presence_is_a_factor_of_the_alignment() -> None:
    """The mean logit of the tokens of a phrase, as a probability."""
    found, extent = _predictions(1), np.array([CANVAS], np.int32)
    phrase_map = np.array([[[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]], bool)
    present = found._replace(presence=np.array([[9, 3, -1, 30, -30, 9]], np.float32))
    model = dataclasses.replace(MODEL, head=dataclasses.replace(MODEL.head, presence=True))
    # The threshold is one of the alignment without it, so the third phrase keeps its boxes, in their order.
    config = DetectionConfig(threshold=0.2, nms_iou=1.0, max_detections=len(ANCHORS) * PHRASES)
    run = jax.jit(detect, static_argnums=(4, 5, 6))
    without = run(found, phrase_map, extent, extent, CANVAS, MODEL, config)
    having = run(present, phrase_map, extent, extent, CANVAS, model, config)
    factors = 1 / (1 + np.exp(-np.array([1.0, 30.0, -30.0])))
    for phrase, factor in enumerate(factors):
        own, plain = (np.asarray(d.alignment[0])[np.asarray(d.phrases[0]) == phrase] for d in (having, without))
        assert len(own) > 3
        np.testing.assert_allclose(np.sort(own), np.sort(plain) * factor, rtol=1e-4)


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


# The Detector with a network of a few thousand parameters.

NAMES = ["cat", "dog", "person", "red car", "traffic light", "bottle", "cup", "tree", "potted plant", "chair"]


def _config(chunk: int = 0) -> Config:
    config = tiny_run.replace(
        tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=128, chunk=chunk, batch_size=2
    )
    config = tiny_run.replace(config, "data", aspects=(1.0, 2.0), long_side=128)
    return tiny_run.replace(config, "detection", threshold=0.0, max_detections=200, nms_iou=1.0)


@pytest.fixture(scope="module")
def params() -> Any:
    """Random parameters without position embeddings, so that results do not depend on the order of names."""
    params = tiny_run.parameters(_config().model)
    (table,) = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "position" in str(path)]
    table[:] = 0
    return params


def _detector(config: Config, params: Any) -> Detector:
    """On one device; `tests/inference/test_devices.py` has several."""
    return Detector(config, params, devices=jax.devices()[:1])


def _images(*shapes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]


def _by_phrase(found: Detections, numbers: Any) -> list[np.ndarray]:
    return [np.asarray(found.scores)[np.asarray(found.phrases) == number][:10] for number in numbers]


@pytest.mark.parametrize("chunk", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["as many as fit", "one by one"])
def test_permuting_names_permutes_results(params: Any, chunk: int) -> None:
    detector, images = _detector(_config(chunk), params), _images((64, 64))
    # Prompts hold consecutive names: only names of one prompt may be permuted.
    names = NAMES[:4] if chunk == 0 else NAMES
    (before,) = detector.categories(images, names)
    order = np.random.default_rng(2).permutation(len(names))
    (after,) = detector.categories(images, [names[i] for i in order])
    expected, permuted = _by_phrase(before, order), _by_phrase(after, range(len(names)))
    assert min(map(len, expected)) > 0
    for one, other in zip(expected, permuted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    means = [scores[0] for scores in _by_phrase(before, range(len(names)))]
    assert len(np.unique(np.round(means, 6))) == len(names), "scores differ by name, so a permutation would be noticed"


@pytest.mark.slow
def test_indices_of_names_do_not_depend_on_chunks(params: Any) -> None:
    images = _images((64, 64))
    alone = {name: _detector(_config(1), params).categories(images, [name])[0] for name in NAMES[:4]}
    (chunked,) = _detector(_config(1), params).categories(images, NAMES[:4])
    for number, name in enumerate(NAMES[:4]):
        np.testing.assert_allclose(
            _by_phrase(chunked, [number])[0], _by_phrase(alone[name], [0])[0], rtol=1e-4, err_msg=name
        )


@given(
    st.lists(st.sampled_from([*NAMES, "dogs", "zebra9", "Éclair", "bow_(x)", "🙂 cup"]), min_size=1, max_size=25),
    st.integers(0, 6),
)
def test_any_chunks_give_the_same_indices(names: list[str], chunk: int) -> None:
    config = _config(chunk)
    asked: dict[int, str] = {}
    for prompt, numbers in category_prompts(names, TOKENIZER, config):
        tokenized = prompts.tokenize(prompt, TOKENIZER, config.model.text.max_tokens)
        assert len(numbers) == len(prompt.spans) == len(tokenized.phrase_map) and len(numbers) <= (chunk or 99)
        for row, number in enumerate(numbers):
            ((begin, end),) = prompt.spans[row]
            assert number not in asked
            asked[number] = prompt.caption[begin:end]
    assert [asked[number] for number in range(len(names))] == [prompts.clean_name(name) for name in names]


def test_no_names_are_refused() -> None:
    with pytest.raises(prompts.PromptError, match="no names"):
        category_prompts([], TOKENIZER, _config())


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (["cat", "Cat"], r"name 2 \('Cat'\) is the same to the model as name 1"),
        (["cat", "斑马"], "query: '斑马' has no word or character that the model's vocabulary knows"),
        (["cat", "(x)"], "name 2 of 2 is empty .'.x.': parentheses are removed"),
        (["ca\x07t"], r"has the character U\+0007"),
        ([], "there are no names to detect"),
        ("  ", "expected a list of names or a text"),
        (" . ", "names nothing: expected phrases with full stops"),
    ],
)
def test_queries_that_cannot_be_asked_are_refused(params: Any, query: Any, message: str) -> None:
    with pytest.raises(prompts.PromptError, match=message):
        _detector(_config(), params)([], query)


def test_what_is_not_asked_as_it_was_typed_is_said_once(params: Any, caplog: pytest.LogCaptureFixture) -> None:
    detector = _detector(_config(), params)
    for _ in range(2):
        detector([], ["cup (red)", "dog 斑马", "a, b. c"])
    assert [record.message for record in caplog.records] == [
        "note: query: the model's vocabulary does not know all of 'dog 斑马'",
        "note: query: asked without what stands in parentheses, as in training: 'cup (red) -> cup'",
    ]


@pytest.mark.slow
def test_one_program_per_canvas_and_one_encoding_per_text(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    programs_of.cache_clear()
    detector, encoded_texts, encoded_images = _detector(_config(3), params), [], []
    programs = detector._programs
    encode_text, encode_image = programs.encode_text, programs.encode_image
    monkeypatch.setattr(programs, "encode_text", lambda *a: (encoded_texts.append(1), encode_text(*a))[1])
    monkeypatch.setattr(programs, "encode_image", lambda *a, **k: (encoded_images.append(1), encode_image(*a, **k))[1])
    detector(_images((64, 64)), NAMES[:1])
    assert detector.compiled == {"image": 1, "text": 1, "ground": 1}
    # Another size of the same bucket, other numbers of images or names, a caption: nothing is compiled again.
    detector.categories(_images((64, 64)), NAMES)
    assert (len(encoded_images), len(encoded_texts)) == (2, 5), "image features once for all four chunks"
    detector.categories(_images((60, 60), (64, 64), (30, 30)), NAMES)
    detector.caption(_images((64, 64)), [Prompt("a cat and a dog", (((0, 5),), ((10, 15),)))])
    assert detector.compiled == {"image": 1, "text": 1, "ground": 1}
    assert (len(encoded_images), len(encoded_texts)) == (5, 6)
    detector.categories(_images((128, 64), (64, 64)), NAMES)
    assert detector.compiled == {"image": 2, "text": 1, "ground": 2}
    assert len(encoded_texts) == 6
    again = _detector(_config(3), params)
    again(_images((64, 64)), NAMES[:1])
    assert not again.compiled, "of the same settings, so of the same programs"


def test_the_latest_texts_are_cached(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_module, "_CACHED_TEXTS", 2)
    detector = _detector(_config(1), params)
    for name in NAMES[:3]:
        detector.text(prompts.prompt_from_categories([name]))
    assert [caption for caption, *_ in detector._texts] == NAMES[1:3]


def test_detections_are_in_image_pixels_and_batch_invariant(params: Any) -> None:
    detector, images = _detector(_config(), params), _images((32, 32), (64, 64), (40, 64))
    results = detector.categories(images, NAMES)
    for image, found in zip(images, results, strict=True):
        np.testing.assert_allclose(found.scores, np.sqrt(found.alignment * found.centerness), rtol=1e-5)
        assert (np.diff(found.scores) <= 0).all() and set(found.phrases.tolist()) <= set(range(len(NAMES)))
        assert found.boxes[:, 2].max() <= image.shape[1] and found.boxes[:, 3].max() <= image.shape[0]
    # Batch invariance: the same detections for the image alone.
    (alone,) = detector.categories(images[:1], NAMES)
    np.testing.assert_allclose(alone.scores, results[0].scores, rtol=1e-4)


def test_several_prompts_share_the_features_of_an_image(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, images, encoded_images = _detector(_config(), params), _images((64, 64), (40, 64), (32, 32)), []
    encode_image = detector._programs.encode_image
    monkeypatch.setattr(
        detector._programs, "encode_image", lambda *a, **k: (encoded_images.append(1), encode_image(*a, **k))[1]
    )
    texts = [["a cat", "red car . dog", "a tree"], [], ["dog and cup"]]
    asked = [[Prompt(text, (((0, 5),), ((len(text) - 3, len(text)),))) for text in own] for own in texts]
    found = detector.captions(images, asked)
    assert [len(own) for own in found] == [3, 0, 1] and len(encoded_images) == 1
    for image, prompts_, own in zip(images, asked, found, strict=True):
        for prompt, some in zip(prompts_, own, strict=True):
            (alone,) = detector.caption([image], [prompt])
            assert len(alone.scores) > 10 and set(alone.phrases.tolist()) == {0, 1}
            np.testing.assert_allclose(some.scores, alone.scores, rtol=1e-4)
            np.testing.assert_allclose(some.boxes[:10], alone.boxes[:10], atol=0.01)
    with pytest.raises(ValueError, match="3 images and prompts of 1"):
        detector.captions(images, asked[:1])
