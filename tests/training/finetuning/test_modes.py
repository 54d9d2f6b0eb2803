"""Modes of fine-tuning: what each of them trains, by the table and by a step."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from glip_jax.config import ConfigError, LoraConfig, validate
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.mesh import make_mesh, place_batch, shardings
from glip_jax.structures.prompts import PromptError, load_tokenizer
from glip_jax.training import optimizer as optim
from glip_jax.training.finetuning.modes import MODES, tuned_config
from glip_jax.training.state import initial_state
from glip_jax.training.step import glip_objective, make_step
from glip_jax.weights.names import parameter_shapes
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


@pytest.mark.compiles
@pytest.mark.parametrize("mode", MODES)
def test_the_table_names_the_parameters_of_each_mode(mode):
    config = validate(tuned_config(tiny_run.config(), mode, tiny_run.NAMES))
    # Traced once for the modes that add nothing.
    shapes = parameter_shapes(
        dataclasses.replace(tiny_run.model(), lora=config.model.lora, prompts=config.model.prompts)
    )
    trained, fixed = optim.split(optim.nested(shapes), config.model)
    assert set(optim.flat(trained)) == wanted(mode, set(shapes))
    assert not set(optim.flat(trained)) & set(optim.flat(fixed))


@pytest.mark.compiles
@pytest.mark.parametrize(
    "mode",
    ["lora", "prompt", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("full", "head", "linear", "text"))],
)
def test_a_step_changes_what_the_mode_trains_and_nothing_else(tmp_path, mode):
    config = tuned_config(tiny_run.config(tiny_run.write_sources(tmp_path)), mode, tiny_run.NAMES)
    params: Any = optim.flat(tiny_run.parameters(config.model))
    if mode == "prompt":
        shape = params["prompts/tokens"].shape
        params["prompts/tokens"] = np.full(shape, -1, np.int32)
        # [CLS] cat [SEP] of tests/fixtures/vocab_tiny1.txt: the name is found in the prompts of both sources.
        first, *cat, last = load_tokenizer(tiny_run.VOCABULARY).encode("cat").ids
        (dot,) = load_tokenizer(tiny_run.VOCABULARY).encode(".").ids[1:-1]
        params["prompts/tokens"][0, : len(cat) + 1] = [*cat, dot]
        params["prompts/tokens"][-3:, 0] = [first, last, dot]
    before = {path: np.array(leaf) for path, leaf in params.items()}
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = initial_state(optim.nested(params), config)
    state = jax.device_put(state, shardings(state, mesh))
    batches: Any = Mixture(config).batches()
    batch = next(batches)
    batches.close()
    state, _ = make_step(config, mesh, glip_objective(config), state)(state, place_batch(batch, mesh))
    after = optim.flat(jax.device_get(state.params))
    changed = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    assert changed == wanted(mode, set(after))


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
