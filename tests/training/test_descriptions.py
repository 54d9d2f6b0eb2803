"""Vectors of descriptions in training: the side loss, averaged text states, and checkpoints without the side loss's head."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import CaptionConfig, Config, ConfigError, DescriptionsConfig, LossConfig, MeshConfig, validate
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.mesh import make_mesh
from glip_jax.inference import Detector
from glip_jax.io.checkpoint_reader import open_checkpoint
from glip_jax.models.descriptions import averaged, description_table
from glip_jax.models.glip import GLIP
from glip_jax.structures.descriptions import Descriptions, DescriptionTable, read_descriptions
from glip_jax.structures.prompts import load_tokenizer, prompt_from_categories, tokenize
from glip_jax.training import loop
from glip_jax.training.losses import Denominators, LossSums, description_sums, total_loss
from glip_jax.training.optimizer import flat
from glip_jax.training.state import fresh_parameters
from glip_jax.training.step import glip_objective
from tests import tiny_run

pytestmark = pytest.mark.compiles

TOKENIZER = load_tokenizer(tiny_run.VOCABULARY)
TEXTS = {"cat": ["a red car", "a small cup"], "dog": ["a black horse"]}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with descriptions of two of its three names, and a frozen text encoder."""
    folder = tmp_path_factory.mktemp("described")
    (folder / "descriptions.json").write_text(json.dumps(TEXTS))
    config = tiny_run.config(tiny_run.write_sources(folder), dropout=0.0, steps=4)
    text = dataclasses.replace(config.model.text, frozen=True)
    settings = CaptionConfig(descriptions=DescriptionsConfig(str(folder / "descriptions.json")))
    config = tiny_run.replace(tiny_run.replace(config, "model", text=text), "data", captions=settings)
    return tiny_run.replace(config, "loss", description_weight=1.0)


def _averaging(config: Config) -> Config:
    captions = config.data.captions
    use = dataclasses.replace(captions.descriptions, use="mean")
    return tiny_run.replace(config, "data", captions=dataclasses.replace(captions, descriptions=use))


def _table(params: Any, config: Config) -> DescriptionTable:
    return description_table(params, config.model, read_descriptions(config.data.captions.descriptions.file), TOKENIZER)


def test_a_vector_is_the_mean_of_the_texts_own_tokens() -> None:
    config = tiny_run.config(dropout=0.0)
    params = jax.tree.map(jnp.asarray, tiny_run.parameters(config.model))
    table = description_table(params, config.model, Descriptions({**TEXTS, "tree": ["a car"] * 3}), TOKENIZER)

    def mean(text: str) -> Any:
        ids = jnp.array([TOKENIZER.encode(text).ids])
        states: Any = GLIP(config.model).apply({"params": params}, ids, ids >= 0, method="encode_text")
        return states[0, 1:-1].mean(0)

    np.testing.assert_allclose(table.share, [0, 2 / 3, 1 / 2, 3 / 4])
    wanted = [np.zeros(16), (mean("a red car") + mean("a small cup")) / 2, mean("a black horse"), mean("a car")]
    np.testing.assert_allclose(table.vectors, np.stack(wanted), atol=2e-6)
    states = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 16)), jnp.float32)
    found = averaged(states, np.array([[0, 1, 2]]), table)
    wanted = [
        states[0, 0],
        (states[0, 1] + mean("a red car") + mean("a small cup")) / 3,
        (states[0, 2] + wanted[2]) / 2,
    ]
    np.testing.assert_allclose(found[0], np.stack(wanted), atol=2e-6)


def test_the_side_loss_is_one_minus_the_cosine_at_described_positives(described: Config) -> None:
    batch: Any = next(iter(Mixture(described).batches()))
    targets: Any = jax.tree.map(
        jnp.array, glip_objective(described, descriptions=_blank()).targets(jax.tree.map(jnp.asarray, batch))
    )
    rng = np.random.default_rng(0)
    visual = rng.normal(size=(*targets.positive.shape, 16)).astype(np.float32)
    kernel, vectors = rng.normal(size=(16, 16)).astype(np.float32), rng.normal(size=(3, 16)).astype(np.float32)
    batch = batch._replace(box_weight=np.where(batch.box_mask, 0.5, 0).astype(np.float32), valid=np.arange(8) != 7)
    names = {"cat": 1, "dog": 2, "person": 0}
    wanted, counted = np.zeros(8), 0
    for image, anchor in zip(*np.nonzero(np.asarray(targets.positive))):
        ids = batch.tokens[image][batch.positive_map[image, targets.box_index[image, anchor]]]
        row = names[TOKENIZER.decode(ids.tolist())]  # type: ignore[attr-defined]
        if row and image != 7:
            predicted = visual[image, anchor] @ kernel
            cosine = predicted @ vectors[row] / np.linalg.norm(predicted) / np.linalg.norm(vectors[row])
            wanted[image] += 0.5 * (1 - cosine)
            counted += 1
    assert 3 < counted < targets.positive.sum()
    given = jax.tree.map(jnp.asarray, batch)
    found = description_sums(jnp.asarray(visual), jnp.asarray(kernel), jnp.asarray(vectors), targets, given)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def _blank() -> DescriptionTable:
    return DescriptionTable(np.zeros((3, 16), np.float32), np.zeros(3, np.float32))


@pytest.mark.slow
def test_its_gradient_reaches_its_head_and_the_visual_tower_alone(described: Config) -> None:
    params = fresh_parameters(described, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    batch: Any = jax.tree.map(jnp.asarray, next(iter(Mixture(described).batches())))
    objective = glip_objective(described, train=False, descriptions=_table(params, described))
    targets = objective.targets(batch)

    @jax.jit
    def gradients(params: Any) -> Any:
        return jax.grad(lambda p: objective.sums(p, batch, targets, jax.random.key(0)).description.sum())(params)

    reached = {path for path, found in flat(gradients(params)).items() if np.abs(found).max() > 1e-6}
    assert "head/description/kernel" in reached
    for part in ("backbone/", "pyramid/", "head/tower/convolution/", "head/tower/fusion/"):
        assert any(path.startswith(part) for path in reached), part
    beside = (
        "text/",
        "head/tower/text/",
        "head/box",
        "head/centerness",
        "head/projection",
        "head/bias",
        "head/log_scale",
        "head/scales",
    )
    assert not [path for path in reached if path.startswith(beside)]


def test_the_side_loss_is_a_weighted_part_of_the_loss() -> None:
    sums = LossSums(*(jnp.asarray([2.0, 4.0]),) * 3)._replace(description=jnp.asarray([1.0, 2.0]))
    over = Denominators(jnp.asarray(4.0), jnp.asarray(1.0))
    none, found = (total_loss(sums, over, LossConfig(description_weight=weight)) for weight in (0.0, 3.0))
    assert "description" not in none[1] and found[1]["description"] == found[0] - none[0] == 3.0 * 3.0 / 4.0


@pytest.mark.slow
def test_training_averages_the_text_states_of_described_names(described: Config) -> None:
    config = tiny_run.replace(_averaging(described), "loss", description_weight=0.0)
    params = jax.tree.map(jnp.asarray, tiny_run.parameters(config.model))
    table, mixture = _table(params, config), Mixture(config)
    batch: Any = jax.tree.map(jnp.asarray, next(iter(mixture.batches())))
    objective = glip_objective(config, train=False, descriptions=table)
    targets = objective.targets(batch)
    sums = jax.jit(lambda batch: objective.sums(params, batch, targets, jax.random.key(0)))
    found, bare = sums(batch), sums(batch._replace(described=jnp.zeros_like(batch.described)))
    assert np.abs(found.token - bare.token).max() > 1e-3
    # Evaluation of the same prompt has the same states.
    prompt = prompt_from_categories(["dog", "cat", "person"])
    _, states = Detector(config, params).text(prompt, 16)
    tokenized = tokenize(prompt, TOKENIZER, 16)
    rows = mixture.descriptions.token_rows(prompt, tokenized) if mixture.descriptions else None
    encoded: Any = GLIP(config.model).apply(
        {"params": params}, jnp.asarray(tokenized.tokens[None]), jnp.asarray(tokenized.mask[None]), method="encode_text"
    )
    assert rows is not None and set(rows.tolist()) == {0, 1, 2}
    np.testing.assert_allclose(states, averaged(encoded, rows[None], table)[0], atol=1e-5)
    assert np.abs(states - encoded[0])[rows > 0].max() > 0.01
    np.testing.assert_allclose(states[rows == 0], encoded[0][rows == 0], atol=1e-5)


@pytest.mark.slow
def test_a_run_with_both_resumes_to_the_same_bits_and_is_read_without_the_head(
    described: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For one device less is compiled.
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    config = _averaging(described)
    whole = loop.train(config, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
    resumed = loop.train(config, str(tmp_path / "parts"))
    for path, leaf in flat(whole.params).items():
        np.testing.assert_array_equal(leaf, flat(resumed.params)[path], path)
    assert "head/description/kernel" in flat(whole.params)
    assert "description" not in open_checkpoint(str(tmp_path / "whole")).parameters("ema")["head"]


def test_what_cannot_be_trained_is_refused(described: Config) -> None:
    with pytest.raises(ConfigError, match="loss.description_weight is 1.0, and model.text.frozen is False"):
        validate(tiny_run.replace(described, "model", text=dataclasses.replace(described.model.text, frozen=False)))
    with pytest.raises(
        ConfigError, match="loss.description_weight is 1.0, and data.captions.descriptions.file is empty"
    ):
        validate(tiny_run.replace(described, "data", captions=CaptionConfig()))
    with pytest.raises(ConfigError, match="are for the job `train`"):
        glip_objective(described)
    thawed = dataclasses.replace(described.model.text, frozen=False)
    config = tiny_run.replace(
        tiny_run.replace(_averaging(described), "loss", description_weight=0.0), "model", text=thawed
    )
    with pytest.raises(ConfigError, match="mean with model.text.frozen"):
        glip_objective(config, descriptions=_blank())
