"""Sinks stand behind the tokens of every prompt, say what their settings say, and locations that fit them best give nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from glip_jax.config import ConfigError, validate
from glip_jax.inference import Detector
from glip_jax.inference.sinks import sink_states
from glip_jax.structures import prompts
from glip_jax.structures.batch import Prompt
from tests import tiny_run

pytestmark = pytest.mark.compiles

TOKENIZER = prompts.load_tokenizer(tiny_run.VOCABULARY)


def _config(**detection: Any) -> Any:
    config = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=128, batch_size=1)
    settings = {"threshold": 0.0, "nms_iou": 1.0, "max_detections": 300, **detection}
    return tiny_run.replace(tiny_run.replace(config, "data", aspects=(1.0,)), "detection", **settings)


def test_random_sinks_are_in_the_range_of_text_states() -> None:
    params = tiny_run.parameters(_config().model)
    params["text"]["layers"]["output_norm"]["scale"][-1] = 3.0
    params["text"]["layers"]["output_norm"]["bias"][-1] = 10.0
    states = np.asarray(sink_states(params, _config(sinks=64), TOKENIZER))
    assert states.shape == (64, _config().model.text.width)
    assert abs(states.mean() - 10) < 0.5 and abs(states.std() - 3) < 0.5
    np.testing.assert_array_equal(states[:5], np.asarray(sink_states(params, _config(sinks=5), TOKENIZER)))
    other = np.asarray(sink_states(params, _config(sinks=5, sink_seed=1), TOKENIZER))
    assert np.abs(other - states[:5]).max() > 1


def test_a_text_as_start_is_its_mean_state_and_must_be_known() -> None:
    params = tiny_run.parameters(_config().model)
    config = _config(sinks=2, sink_start="red car")
    _, states = Detector(_config(), params).text(Prompt("red car", (((0, 7),),)))
    length = len(TOKENIZER.encode("red car").ids)
    wanted = np.asarray(states)[1 : length - 1].mean(0)
    found = np.asarray(sink_states(params, config, TOKENIZER))
    np.testing.assert_allclose(found, np.stack([wanted] * 2), atol=1e-5)
    with pytest.raises(prompts.PromptError, match=r"detection.sink_start.*斑马"):
        sink_states(params, _config(sinks=2, sink_start="斑马"), TOKENIZER)


@pytest.mark.slow
def test_a_prompt_may_fill_the_token_budget() -> None:
    """The sinks are no part of the budget, take no detection's place, and change scores through fusion alone."""
    config, image = _config(sinks=4), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    params, budget = tiny_run.parameters(config.model), config.model.text.max_tokens
    names = ["cat", "dog", "person", "bottle", "cup", "tree", "red car"]
    prompt = prompts.prompt_from_categories(names)
    assert len(TOKENIZER.encode(prompt.caption).ids) == budget
    tokenized, states = Detector(config, params).text(prompt, budget)
    assert states.shape[0] == tokenized.mask.shape[0] == tokenized.phrase_map.shape[1] == budget + 4
    assert tokenized.mask[-4:].all() and not tokenized.phrase_map[:, -4:].any()
    (with_sinks,) = Detector(config, params).caption([image], [prompt])
    (without,) = Detector(_config(), params).caption([image], [prompt])
    assert 0 < len(with_sinks.scores) <= len(without.scores)
    assert set(with_sinks.phrases.tolist()) <= set(range(len(names)))
    assert np.abs(np.sort(with_sinks.scores)[-3:] - np.sort(without.scores)[-3:]).max() > 1e-6


@pytest.mark.parametrize(
    ("model", "detection", "message"),
    [
        ({"enabled": False}, {"sinks": 4}, r"detection\.sinks is 4, and the network has no fusion"),
        ({}, {"sinks": 65}, r"detection\.sinks.*65"),
        ({}, {"sinks": 2, "sink_start": " "}, r"detection\.sink_start is ' ': expected random or a text"),
    ],
)
def test_sinks_that_cannot_be_are_refused(model: Any, detection: Any, message: str) -> None:
    config = _config(**detection)
    config = tiny_run.replace(config, "model", fusion=dataclasses.replace(config.model.fusion, **model))
    with pytest.raises(ConfigError, match=message):
        validate(config)
