"""Many prompts for an image: calls of the program, padding, networks without fusion."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import Config
from glip_jax.inference import Detector, category_prompts
from glip_jax.inference import detector as detector_module
from glip_jax.inference.detector import _calls, _Request
from glip_jax.inference.postprocess import detect
from glip_jax.models.glip import GLIP, normalize
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.prompts import load_tokenizer, tokenize
from tests import tiny_run

NAMES = ["cat", "dog", "person", "red car", "traffic light", "bottle", "cup"]


def _config(max_tokens: int = 16, fused: bool = True, chunk: int = 1) -> Config:
    config = tiny_run.config(dropout=0.0)
    config = tiny_run.replace(config, "evaluation", short_side=64, long_side=128, chunk=chunk, batch_size=2)
    config = tiny_run.replace(config, "detection", threshold=0.0, max_detections=50, nms_iou=0.7)
    text = dataclasses.replace(config.model.text, max_tokens=max_tokens, positions=max(32, max_tokens))
    fusion = dataclasses.replace(config.model.fusion, enabled=fused)
    return tiny_run.replace(config, "model", text=text, fusion=fusion)


def _detector(config: Config, params: Any = None) -> Detector:
    return Detector(config, params, devices=jax.devices()[:1])


def _images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(count)]


def _prompt(words: int) -> Prompt:
    caption = " ".join(["cat"] * words)
    return Prompt(caption, (((0, 3),), ((len(caption) - 3, len(caption)),)))


def test_a_call_holds_so_many_steps_and_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector_module, "_STEPS", 3)
    shared = [_prompt(1) for _ in range(4)]
    by_prompts = [_Request(0, prompt, None) for prompt in shared]
    assert _calls(by_prompts, 2) == [by_prompts[:3], by_prompts[3:]], "three different prompts a call"
    by_steps = [_Request(image, shared[0], None) for image in range(13)]
    assert [len(call) for call in _calls(by_steps, 2)] == [6, 6, 1], "three steps of two rows"
    assert _calls([], 2) == []


def test_padding_depends_on_the_prompts_of_the_image_alone() -> None:
    detector = _detector(_config(256))
    expected = {1: 32, 30: 32, 31: 64, 62: 64, 63: 80, 110: 112, 126: 128, 127: 144, 254: 256}
    for words in (254, 1, 127, 30, 31, 62, 126, 63, 110):
        assert detector._padding([_prompt(words)]) == (expected[words], 16), words
    assert detector._padding([_prompt(1), _prompt(63), _prompt(30)]) == (80, 16), "the longest"
    many = Prompt("cat dog", (((0, 3),),) * 39)
    assert detector._padding([_prompt(1), many]) == (32, 40), "slots for all phrases"
    assert _detector(_config(16))._padding([_prompt(1)]) == (16, 16), "at most the budget"


@pytest.mark.compiles
@pytest.mark.slow
def test_scores_do_not_depend_on_the_padding() -> None:
    config = _config(64)
    detector, images = _detector(config, tiny_run.parameters(config.model)), _images(1)
    short, long = _prompt(3), _prompt(40)
    ((alone,),) = detector.captions(images, [[short]])
    ((beside, _),) = detector.captions(images, [[short, long]])
    assert {length for _, length, *_ in detector._texts} == {32, 64} and len(alone.scores) > 20
    np.testing.assert_allclose(beside.scores, alone.scores, rtol=1e-4)
    np.testing.assert_array_equal(beside.phrases[:10], alone.phrases[:10])
    # Images of one batch with prompts of two lengths: to the bit what each is alone.
    (first,), (second,) = detector.captions(_images(2), [[short], [long]])
    for field, expected in zip(first, alone, strict=True):
        np.testing.assert_array_equal(field, expected)
    assert len(second.scores) > 20


def _one_by_one(config: Config, params: Any, image: np.ndarray) -> list[Detections]:
    """Detections of each name by the whole network, as the original computes them."""
    tokenizer = load_tokenizer(config.model.text.vocabulary)
    size, pixels = jnp.array([image.shape[:2]], jnp.int32), jnp.asarray(image[None])

    @jax.jit
    def run(params: Any, tokens: Any, mask: Any, phrase_map: Any) -> Any:
        normalized = normalize(pixels, size, config.model.input)
        found: Any = GLIP(config.model).apply({"params": params}, normalized, size, tokens, mask)
        return detect(found, phrase_map, size, size, (64, 64), config.model, config.detection)

    results = []
    for prompt, _ in category_prompts(NAMES, tokenizer, config):
        tokens, mask, phrase_map = tokenize(prompt, tokenizer, config.model.text.max_tokens)
        results.append(
            jax.tree.map(lambda x: np.asarray(x)[0], run(params, tokens[None], mask[None], phrase_map[None]))
        )
    return results


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True], ids=["no fusion", "fusion"])
def test_names_in_several_calls_equal_the_whole_network_once_a_prompt(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector_module, "_STEPS", 4)
    config = _config(fused=fused)
    params = tiny_run.parameters(config.model)
    images = _images(1)
    (found,) = _detector(config, params).categories(images, NAMES)
    for name, expected in enumerate(_one_by_one(config, params, images[0])):
        used = expected.phrases >= 0
        own = found.phrases == name
        assert used.sum() == own.sum() > 5
        np.testing.assert_allclose(found.scores[own], expected.scores[used], rtol=1e-4)
        np.testing.assert_allclose(found.boxes[own][:5], expected.boxes[used][:5], atol=0.01)
