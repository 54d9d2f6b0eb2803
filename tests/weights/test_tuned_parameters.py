"""What fine-tuning adds to a base: tuned prompts by name, low-rank deltas, interpolated weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import FusionConfig, LoraConfig, TextConfig
from glip_jax.io.checkpoint_reader import fingerprint
from glip_jax.models.bert import Bert
from glip_jax.models.fusion import Fusion
from glip_jax.models.glip import GLIP
from glip_jax.models.tuned_prompts import NONE, find_rows
from glip_jax.structures.prompts import PromptError, load_tokenizer, prompt_from_categories
from glip_jax.training import optimizer as optim
from glip_jax.training.finetuning.modes import tuned_config
from glip_jax.weights.names import WeightError
from glip_jax.weights.tuned_parameters import interpolated, merged, prompt_table
from tests import tiny_run

CLS, SEP, DOT = 101, 102, 5
TABLE = np.full((6, 4), NONE, np.int32)
for _row, _ids in enumerate(([7, DOT], [8, 9, DOT], [7, DOT, 10, DOT], [CLS], [SEP], [DOT])):
    TABLE[_row, : len(_ids)] = _ids
# Token ids of a prompt, and the row of the table that each token should have; -1: none.
PROMPTS = [
    ([CLS, 7, DOT, 8, 9, SEP], [3, 0, 0, 1, 1, 4]),
    ([CLS, 8, 9, DOT, 7, SEP], [3, 1, 1, 1, 0, 4]),
    ([CLS, 8, 9, DOT, 7, DOT, SEP], [3, 1, 1, 1, 0, 0, 4]),
    ([CLS, 7, DOT, 10, DOT, 8, 9, SEP], [3, 2, 2, 2, 2, 1, 1, 4]),
    ([CLS, 7, 11, DOT, 8, 9, SEP], [-1, -1, -1, -1, 1, 1, -1]),
    ([CLS, 11, 7, DOT, 8, 9, SEP], [-1, -1, -1, -1, 1, 1, -1]),
    ([CLS, 8, DOT, 9, SEP], [-1] * 5),
    ([CLS, SEP], [-1, -1]),
]  # fmt: skip


def prompts_of_table():
    """(tokens, mask, row of each token) of `PROMPTS`, padded."""
    tokens, mask = np.zeros((len(PROMPTS), 10), np.int32), np.zeros((len(PROMPTS), 10), bool)
    wanted = np.full(tokens.shape, -1)
    for row, (ids, rows) in enumerate(PROMPTS):
        tokens[row, : len(ids)], mask[row, : len(ids)], wanted[row, : len(ids)] = ids, True, rows
    return tokens, mask, wanted


def test_names_are_found_in_the_tokens_of_a_prompt():
    tokens, mask, wanted = prompts_of_table()
    row, column, covered = map(np.asarray, jax.jit(find_rows)(TABLE, tokens, mask))
    assert np.where(covered, row, -1).tolist() == wanted.tolist()
    assert (TABLE[row, column] == tokens)[covered].all() and not row[~covered].any() and not column[~covered].any()


def _tokens(names, config):
    """Token ids and mask [1 T] of a prompt."""
    ids = load_tokenizer(tiny_run.VOCABULARY).encode(prompt_from_categories(names).caption).ids
    tokens, mask = (
        np.zeros((1, config.model.text.max_tokens), np.int32),
        np.zeros((1, config.model.text.max_tokens), bool),
    )
    tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
    return tokens, mask


@pytest.mark.compiles
def test_tuned_prompts_are_the_base_without_deltas_and_stay_with_their_names():
    base_config = tiny_run.config()
    base = tiny_run.parameters(base_config.model)
    config = tuned_config(base_config, "prompt", tiny_run.NAMES)
    network, plain = GLIP(config.model), GLIP(base_config.model)
    table = prompt_table(config, base, tiny_run.NAMES)
    encode = jax.jit(lambda params, *prompt: network.apply({"params": params}, *prompt, method="encode_text"))
    of_base = jax.jit(lambda params, *prompt: plain.apply({"params": params}, *prompt, method="encode_text"))
    tuned: Any = {"text": base["text"], "prompts": table._asdict()}
    prompt = _tokens(tiny_run.NAMES, config)
    states = np.asarray(encode(tuned, *prompt))
    np.testing.assert_allclose(states[prompt[1]], np.asarray(of_base(base, *prompt))[prompt[1]], atol=1e-6)
    rng = np.random.default_rng(0)
    tuned["prompts"] = tuned["prompts"] | {"deltas": rng.normal(size=table.deltas.shape).astype(np.float32)}
    # In another order each name has the states that it had, and BERT does not matter.
    other = _tokens(tiny_run.NAMES[::-1], config)
    nothing = {**tuned, "text": jax.tree.map(np.zeros_like, base["text"])}
    turned, before = np.asarray(encode(nothing, *other)), np.asarray(encode(tuned, *prompt))
    for name, row in zip(tiny_run.NAMES, table.tokens):
        here, there = other[0] == row[0], prompt[0] == row[0]
        assert here.sum() == there.sum() == 1
        np.testing.assert_array_equal(turned[here], before[there], err_msg=name)
    np.testing.assert_array_equal(turned[0, 0], before[0, 0], err_msg="[CLS]")
    # Beside a name that was not tuned, BERT gives its states, and those of [CLS] and [SEP].
    mixed = _tokens(("cat", "red"), config)
    found, expected = np.asarray(encode(tuned, *mixed))[0], np.asarray(of_base(base, *mixed))[0]
    np.testing.assert_allclose(found[[0, 3, 4]], expected[[0, 3, 4]], atol=1e-6)
    assert np.abs(found[1] - expected[1]).max() > 0.1
    with pytest.raises(PromptError, match="table of tuned prompts is of 3 names"):
        prompt_table(config, base, ("cat",))


@pytest.mark.compiles
def test_low_rank_deltas_begin_at_the_base_and_are_merged_into_kernels():
    text = TextConfig(vocabulary_size=16, width=8, layers=2, heads=2, hidden=8, positions=8, max_tokens=8)
    lora, fusion = LoraConfig(2, 1.5), FusionConfig(width=8, heads=2)
    tokens, mask = jnp.arange(4)[None], jnp.ones((1, 4), bool)
    rng = np.random.default_rng(0)
    visual, states = (jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32) for _ in range(2))

    @jax.jit
    def run(params):
        both = []
        for deltas in (LoraConfig(), lora):
            encoded = Bert(text, lora=deltas).apply({"params": params["text"]}, tokens, mask)
            fused = Fusion(fusion, False, jnp.float32, deltas).apply(
                {"params": params["head"]["tower"]["fusion"]}, visual, states, mask, mask
            )
            both.append((encoded, fused))
        return both

    @jax.jit
    def init(key):
        return {
            "text": Bert(text, lora=lora).init(key, tokens, mask)["params"],
            "head": {"tower": {"fusion": Fusion(fusion, False, jnp.float32, lora).init(key, visual, states, mask, mask)["params"]}},
        }  # fmt: skip

    params = jax.device_get(init(jax.random.key(0)))
    base, same = run(params)
    jax.tree.map(np.testing.assert_array_equal, base, same)
    leaves = optim.flat(params)
    for path in leaves:
        if path.endswith("_lora_b"):
            leaves[path] = rng.normal(size=leaves[path].shape).astype(np.float32)
    _, tuned = run(optim.nested(leaves))
    config = dataclasses.replace(tiny_run.config(), model=dataclasses.replace(tiny_run.model(), lora=lora))
    whole, plain = merged(optim.nested(leaves), config)
    assert plain.model.lora.rank == 0 and not [path for path in optim.flat(whole) if "lora" in path]
    folded, _ = run(optim.nested({**leaves, **optim.flat(whole)}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), tuned, folded)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), tuned, base))) > 0.01


def test_interpolated_weights_end_in_both_networks():
    rng = np.random.default_rng(0)
    base = {"head": {"box": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}}}
    tuned = {
        "head": {"box": {"kernel": rng.normal(size=(3, 4)).astype(np.float32)}},
        "text": {"query_lora_a": np.ones((2, 1), np.float32), "query_lora_b": np.full((1, 2), 2, np.float32)},
        "prompts": {"tokens": np.ones((4, 2), np.int32), "deltas": np.ones((4, 2, 3), np.float32)},
    }
    kernel = base["head"]["box"]["kernel"], tuned["head"]["box"]["kernel"]
    ends = [interpolated(base, tuned, share) for share in (0.0, 1.0)]
    for end, own in zip(ends, kernel):
        assert end["head"]["box"]["kernel"].tobytes() == own.tobytes()
    assert not ends[0]["text"]["query_lora_b"].any() and not ends[0]["prompts"]["deltas"].any()
    assert fingerprint(ends[1]) == fingerprint(tuned)
    middle = interpolated(base, tuned, 0.25)
    np.testing.assert_allclose(middle["head"]["box"]["kernel"], 0.75 * kernel[0] + 0.25 * kernel[1], rtol=1e-6)
    assert (middle["text"]["query_lora_b"] == 0.5).all() and (middle["text"]["query_lora_a"] == 1).all()
    assert middle["prompts"]["tokens"].dtype == np.int32
    with pytest.raises(WeightError, match="different networks.*head/box/kernel"):
        interpolated(base, {"text": tuned["text"]}, 0.5)
