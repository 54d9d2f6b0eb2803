"""Vectors of names: written once, so that a resumed run draws the same negatives, and made anew for other names."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.cli.name_vectors import FILE, give_vectors
from glip_jax.config import CaptionConfig
from glip_jax.data.mixture import Mixture
from glip_jax.models.glip import GLIP
from tests import tiny_run

pytestmark = pytest.mark.compiles


def test_vectors_are_those_of_the_first_parameters(tmp_path):
    config = tiny_run.config(tiny_run.write_sources(tmp_path))
    captions = CaptionConfig(hard_share=0.5, hard_by="meaning", dictionary=0.5)
    config = tiny_run.replace(config, "data", captions=captions)
    params = tiny_run.parameters(config.model)
    mixture, later = Mixture(config), Mixture(config)
    assert mixture.texts == tiny_run.NAMES
    give_vectors(mixture, params, tmp_path)
    vectors: Any = mixture.captioners[0].vectors
    tokens = np.array([mixture.captioners[0].tokenizer.encode(name).ids for name in mixture.texts[:1]], np.int32)
    states: Any = GLIP(config.model).apply(
        {"params": params}, jnp.asarray(tokens), jnp.ones(tokens.shape, bool), method="encode_text"
    )
    with np.load(tmp_path / FILE) as saved:
        np.testing.assert_allclose(saved["states"][0], np.asarray(states)[0, 1:-1].mean(0), atol=1e-5)
    give_vectors(later, tiny_run.parameters(config.model, seed=6), tmp_path)
    resumed: Any = later.captioners[0].vectors
    assert np.array_equal(resumed.vectors, vectors.vectors), "of a resumed run, whose text encoder has learned"
    batches = later.batches()
    assert next(batches).valid.all()
    batches.close()  # type: ignore[attr-defined]
    sources = {n: dataclasses.replace(source, negatives=("red",)) for n, source in config.data.sources.items()}
    other = Mixture(tiny_run.replace(config, "data", sources=sources))
    give_vectors(other, params, tmp_path)
    with np.load(tmp_path / FILE) as saved:
        assert saved["names"].tolist() == [*tiny_run.NAMES, "red"]
