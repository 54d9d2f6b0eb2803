"""The mask `phrase`: what a name's text states depend on, in BERT, in the head, in the Detector's cache and in exports."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from glip_jax.config import Config, TextConfig
from glip_jax.inference import Detector
from glip_jax.models.bert import BertLayer, text_mask
from glip_jax.models.glip import GLIP
from glip_jax.structures import prompts
from glip_jax.weights.export import full_state, network_settings
from glip_jax.weights.meaning import check_meaning
from glip_jax.weights.names import WeightError
from glip_jax.weights.portable import phrase_mask
from glip_jax.weights.portable.glip_network import GlipNetwork
from tests import tiny_run

pytestmark = pytest.mark.compiles

TOKENIZER = prompts.load_tokenizer(tiny_run.VOCABULARY)
CLS, SEP, STOP = 6, 7, 9
PROMPTS = [["cat", "red car", "dog"], ["dog", "red car"], ["person", "tree", "red car", "cup", "cat"]]


def _config(**text: Any) -> Config:
    config = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=128, batch_size=1)
    settings = {"mask": "phrase", "separators": (CLS, SEP, STOP), **text}
    return tiny_run.replace(config, "model", text=dataclasses.replace(config.model.text, **settings))


def _parameters(config: Config) -> Any:
    return jax.device_put(tiny_run.parameters(config.model))


def _tokenized(names: list[str]) -> Any:
    return prompts.tokenize(prompts.prompt_from_categories(names), TOKENIZER, 16)


def _states_of_names(names: list[str], encode: Any) -> dict[str, np.ndarray]:
    tokenized = _tokenized(names)
    states = np.asarray(encode(tokenized.tokens[None], tokenized.mask[None]))[0]
    return {name: states[row] for name, row in zip(names, tokenized.phrase_map)}


def _farthest(encode: Any) -> float:
    """Largest change of a name's states between prompts with other names and another order."""
    found = [_states_of_names(names, encode) for names in PROMPTS]
    return max(
        float(np.abs(one[name] - other[name]).max())
        for one in found
        for other in found
        for name in set(one) & set(other)
    )


def test_segments_end_at_separators() -> None:
    tokens = np.array([[CLS, 11, 12, STOP, 13, SEP, 0, 0], [CLS, SEP, 0, 0, 0, 0, 0, 0]])
    wanted = [[1, 4, 4, 5, 6, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    mask = np.array(wanted) > 0
    for found in (
        prompts.segment_ids(tokens, mask, (CLS, SEP, STOP)),
        prompts.segment_ids(jnp.asarray(tokens), jnp.asarray(mask), (CLS, SEP, STOP)),
        phrase_mask.segments(torch.tensor(tokens), torch.tensor(mask), (CLS, SEP, STOP)).numpy(),
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("mask", "most"), [("phrase", 2e-6), ("padding", None)])
def test_the_states_of_a_name_depend_on_no_other_name(mask: str, most: float | None) -> None:
    config = _config(mask=mask)
    params, network = _parameters(config), GLIP(config.model)
    encode = jax.jit(lambda tokens, mask: network.apply({"params": params}, tokens, mask, method="encode_text"))
    changed = _farthest(encode)
    assert changed < most if most else changed > 1e-2


def test_names_do_not_read_one_another_in_the_layers_of_the_head() -> None:
    config = _config().model.text
    layer, rng = BertLayer(config, False, jnp.float32, True), np.random.default_rng(0)
    tokenized = _tokenized(["cat", "red car", "dog"])
    mask = text_mask(jnp.asarray(tokenized.tokens[None]), jnp.asarray(tokenized.mask[None]), config)
    x = jnp.asarray(rng.normal(size=(1, 16, config.width)), jnp.float32)
    variables = layer.init(jax.random.key(0), x, mask)
    weights = jnp.asarray(rng.normal(size=config.width), jnp.float32)
    gradient = jax.jacobian(lambda x: layer.apply(variables, x, mask)[0][0] @ weights)(x)[:, 0]
    reads = np.abs(np.asarray(gradient)).max(-1) > 0
    cat, car, dog = tokenized.phrase_map
    ends = np.isin(tokenized.tokens, (CLS, SEP))
    for own, others in ((cat, car | dog), (car, cat | dog), (dog, cat | car)):
        assert reads[own][:, own | ends].all() and not reads[own][:, others].any()


def test_a_name_is_encoded_once_for_all_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config()
    params, network = _parameters(config), GLIP(config.model)
    detector, rows = Detector(config, params), []
    encode = detector._programs.encode_text
    monkeypatch.setattr(
        detector._programs, "encode_text", lambda p, t, m: (rows.append(int(m.any(-1).sum())), encode(p, t, m))[1]
    )
    for names in PROMPTS:
        tokenized, states = detector.text(prompts.prompt_from_categories(names))
        given = jnp.asarray(tokenized.tokens[None]), jnp.asarray(tokenized.mask[None])
        whole: Any = network.apply({"params": params}, *given, method="encode_text")
        np.testing.assert_allclose(states[tokenized.mask], np.asarray(whole)[0][tokenized.mask], atol=5e-6)
    # Two ends, the stop and three names; nothing; three further names.
    assert rows == [5, 3]
    detector.use(params)
    detector.text(prompts.prompt_from_categories(PROMPTS[1]))
    assert rows[2:] == [4], "parameters changed, so nothing that was encoded is used"


def test_the_exported_network_has_the_mask() -> None:
    config, tokenized = _config(), _tokenized(PROMPTS[2])
    params, rng = _parameters(config), np.random.default_rng(2)
    pixels, extent = rng.normal(size=(1, 64, 64, 3)).astype(np.float32), np.array([[64, 64]])
    tokens, mask = tokenized.tokens[None], tokenized.mask[None]
    with jax.default_matmul_precision("highest"):
        run: Any = jax.jit(lambda *arrays: GLIP(config.model).apply({"params": params}, *arrays))
        wanted = run(pixels, extent, tokens, mask)
    network = GlipNetwork(network_settings(config.model)).eval()
    network.load_state_dict({name: torch.from_numpy(x) for name, x in full_state(params, config.model).items()})
    with torch.inference_mode():
        logits, _, _ = network(
            torch.from_numpy(pixels.transpose(0, 3, 1, 2)), torch.from_numpy(tokens).long(), torch.from_numpy(mask)
        )
    np.testing.assert_allclose(logits.numpy()[:, :, mask[0]], np.asarray(wanted.logits)[:, :, mask[0]], atol=2e-4)
    assert network.separators, "else the network of PyTorch reads all names"


def test_what_the_mask_cannot_be_used_with_is_refused() -> None:
    config = _config()
    with pytest.raises(
        prompts.PromptError, match=r"model\.text\.separators is \(101, 102, 1012\).*\(6, 7, 9\): set it so"
    ):
        Detector(_config(separators=(101, 102, 1012)), None)
    without = tiny_run.replace(config, "data", captions=dataclasses.replace(config.data.captions, separator=" "))
    with pytest.raises(prompts.PromptError, match=r"separator is ' ', of which the vocabulary has no token"):
        Detector(without, None)
    released = tiny_run.model()
    assert released.text.mask == TextConfig().mask == "padding"
    with pytest.raises(WeightError, match=r"model\.text\.mask: padding -> phrase"):
        check_meaning(released, config, ["head/tower/text/query/kernel"], "init_from.model=glip.pth")
