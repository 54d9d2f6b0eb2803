"""Modes of fine-tuning: what each of them trains, by the table and by a step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import ConfigError, LoraConfig, validate
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.mesh import make_mesh, place_batch, shardings
from glip_jax.structures.batch import DROPS, Batch, Targets
from glip_jax.structures.prompts import PromptError, load_tokenizer
from glip_jax.training import optimizer as optim
from glip_jax.training.finetuning.modes import MODES, tuned_config
from glip_jax.training.losses import LossSums
from glip_jax.training.state import initial_state
from glip_jax.training.step import Objective, glip_objective, make_step
from tests import tiny_run

OUTPUTS = {
    "head/box/kernel", "head/box/bias", "head/centerness/kernel", "head/centerness/bias", "head/projection/kernel",
    "head/projection/bias", "head/log_scale", "head/bias_text", "head/bias0",
}  # fmt: skip
PROJECTIONS = ("query", "key", "value", "attention_output")
FUSION = ("visual_query", "visual_value", "visual_output", "text_key", "text_value", "text_output")
LORA = {
    *(f"{layers}/{name}_lora_{ab}" for layers in ("text/layers", "head/tower/text") for name in PROJECTIONS for ab in "ab"),
    *(f"head/tower/fusion/{name}_lora_{ab}" for name in FUSION for ab in "ab"),
}  # fmt: skip


def wanted(mode: str, paths: set[str]) -> set[str]:
    """What a mode trains, written out."""
    match mode:
        case "full":
            return paths
        case "head":
            return {path for path in paths if path.startswith(("pyramid/", "head/"))}
        case "text":
            return {path for path in paths if path.startswith("text/")}
        case "linear":
            return OUTPUTS
        case "prompt":
            return {"prompts/deltas"}
        case _:
            return LORA


def _changed(config, params, batch, objective):
    """Paths of the parameters that a step on `batch` changes."""
    before = {path: np.array(leaf) for path, leaf in optim.flat(params).items()}
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = initial_state(params, config)
    state = jax.device_put(state, shardings(state, mesh))
    state, _ = make_step(config, mesh, objective, state)(state, place_batch(batch, mesh))
    after = optim.flat(jax.device_get(state.params))
    assert after.keys() == before.keys()
    return {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}


def _sum_of_squares():
    """An objective in which every parameter has a gradient, whatever the images."""

    def targets(batch: Batch) -> Targets:
        anchors = jnp.zeros((len(batch.valid), 1))
        return Targets(anchors > 0, anchors.astype(jnp.int32), jnp.zeros((len(anchors), 1, 4)), anchors)

    def sums(params: Any, batch: Batch, targets: Targets, key: Any) -> LossSums:
        del targets, key
        nothing = jnp.zeros(len(batch.valid))
        squares = [jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return LossSums(nothing + sum(squares), nothing, nothing)

    return Objective(targets, sums)


@pytest.mark.compiles
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) if mode in ("full", "head", "text") else mode for mode in MODES]
)
def test_a_step_changes_what_the_mode_trains_and_nothing_else(mode):
    config = validate(tuned_config(tiny_run.config(), mode, tiny_run.NAMES))
    # Plain gradient descent compiles faster.
    config = tiny_run.replace(config, "optimizer", name="sgd", ema_decay=0.0, clip_norm=0.0)
    zeros, length = np.zeros((2, 1), np.float32), config.model.text.max_tokens
    batch = Batch(
        image=np.zeros((2, 8, 8, 3), np.uint8), size=np.full((2, 2), 8), extent=np.full((2, 2), 8),
        tokens=np.zeros((2, length), np.int32), token_mask=np.ones((2, length), bool), boxes=np.zeros((2, 1, 4), np.float32),
        box_mask=zeros > 0, box_weight=zeros, positive_map=np.zeros((2, 1, length), bool),
        token_loss_mask=np.ones((2, length), bool), valid=np.ones(2, bool), source=np.zeros(2, np.int32),
        record=np.zeros(2, np.int32), dropped=np.zeros((2, len(DROPS)), np.int32),
    )  # fmt: skip
    params = tiny_run.parameters(config.model)
    assert _changed(config, params, batch, _sum_of_squares()) == wanted(mode, set(optim.flat(params)))


@pytest.mark.slow
@pytest.mark.compiles
def test_a_step_of_the_network_changes_every_delta(tmp_path):
    """Low-rank deltas and tuned prompts at once: the gradient of the real losses reaches all of them."""
    config = tiny_run.config(tiny_run.write_sources(tmp_path))
    lora, prompt = (tuned_config(config, mode, tiny_run.NAMES).model for mode in ("lora", "prompt"))
    trainable = (*lora.trainable, *prompt.trainable)
    config = tiny_run.replace(
        dataclasses.replace(config, model=lora), "model", trainable=trainable, prompts=prompt.prompts
    )
    params = tiny_run.parameters(config.model)
    tokenizer = load_tokenizer(tiny_run.VOCABULARY)
    first, *cat, last = tokenizer.encode("cat").ids
    (dot,) = tokenizer.encode(".").ids[1:-1]
    table = params["prompts"]["tokens"]
    table[0, : len(cat) + 1], table[-3:, 0] = [*cat, dot], [first, last, dot]
    batches: Any = Mixture(config).batches()
    batch = next(batches)
    batches.close()
    assert _changed(config, params, batch, glip_objective(config)) == {"prompts/deltas", *LORA}


def test_settings_that_train_nothing_are_refused():
    config, leaves = tiny_run.config(), {"head": {"box": {"kernel": np.zeros(1)}}}

    def groups(*patterns):
        return optim.groups(leaves, dataclasses.replace(config.model, trainable=patterns), config.optimizer)

    assert groups("head/*")["head/box/kernel"].rate > 0
    with pytest.raises(ConfigError, match="'head/bax/\\*', which matches no parameter.*near: head/box/kernel"):
        groups("head/*", "head/bax/*")
    with pytest.raises(ConfigError, match="no parameter is left"):
        groups()
    with pytest.raises(PromptError, match="no names"):
        tuned_config(config, "prompt")
    assert tuned_config(config, "lora", rank=4, scale=1.0).model.lora == LoraConfig(4, 1.0)
