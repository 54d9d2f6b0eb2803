"""Encoded examples: the losses of the same images, in the order of any start."""

import dataclasses

import jax
import numpy as np
import pytest

from glip_jax.config import CropConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.mesh import make_mesh
from glip_jax.training import optimizer as optim
from glip_jax.training.finetuning import encoded
from glip_jax.training.state import fresh_parameters
from glip_jax.training.step import glip_objective
from tests import tiny_run

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A head on frozen encoders; images are mirrored half of the time, and cropped."""
    sources = tiny_run.write_sources(tmp_path_factory.mktemp("sources"))
    base = tiny_run.config(sources, dropout=0.0, steps=6, batch_size=4)
    text = dataclasses.replace(base.model.text, frozen=True)
    model = dataclasses.replace(base.model, text=text, trainable=("pyramid/*", "head/*"))
    return dataclasses.replace(
        base, model=model, data=dataclasses.replace(base.data, short_sides=(64,), flip=0.5, crop=CropConfig(0.7))
    )


@pytest.fixture(scope="module")
def params(config):
    return fresh_parameters(config, make_mesh(config.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def examples(config, params, tmp_path_factory):
    return encoded.EncodedMixture(Mixture(config), params, tmp_path_factory.mktemp("features"))


@pytest.mark.slow
def test_losses_are_those_of_the_images(config, params, examples):
    """Each row is compared with the image that it was made of, which float16 of the maps changes a little."""
    batch = next(examples.batches(2))
    mixture = Mixture(config)
    mirrored = [key[2] % 2 for key in examples.keys_of(2)]
    assert any(mirrored) and not all(mirrored)
    rows = []
    for key, flip in zip(examples.keys_of(2), mirrored):
        own = dataclasses.replace(config, data=dataclasses.replace(config.data, flip=float(flip)))
        rows.append(examples.example(encoded.Examples(own, mixture.shards, mixture.captioners), key))
    images = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    np.testing.assert_array_equal(images.boxes, batch.boxes)
    whole, fed = glip_objective(config, train=False), encoded.objective_of_encoded(config, examples.canvas)
    key = jax.random.key(0)
    expected = jax.jit(lambda p, b: whole.sums(p, b, whole.targets(b), key))(params, images)
    found = jax.jit(lambda p, b: fed.sums(p, b, fed.targets(b), key))(params, batch)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3)


def test_a_resumed_run_sees_the_same_batches(config, params, examples, tmp_path):
    """Whatever is encoded anew, and whether it is."""
    later = encoded.EncodedMixture(Mixture(config), params, tmp_path, start=3)
    straight = list(examples.batches(0))
    assert len(straight) == 6
    for one, other in zip(straight[3:], later.batches(3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again = encoded.EncodedMixture(Mixture(config), params, tmp_path, start=3)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == files
    jax.tree.map(np.testing.assert_array_equal, next(later.batches(4)), next(again.batches(4)))


def test_where_all_names_are_asked_seeds_share_what_is_encoded(config, params, tmp_path):
    """All examples and their mirrors, each once; without random crops there is nothing else."""
    captions = dataclasses.replace(config.data.captions, mode="all_names", shuffle=False)
    data = dataclasses.replace(config.data, captions=captions, crop=CropConfig())
    for seed in (0, 1):
        own = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, seed=seed))
        batches = list(encoded.EncodedMixture(Mixture(own), params, tmp_path).batches(0))
        assert len(batches) == 6 and batches[0].image.text is not None
    (folder,) = tmp_path.iterdir()
    assert len(np.load(folder / "maps0.npy", mmap_mode="r")) == 2 * 16


def test_only_frozen_encoders_are_encoded(config, params):
    paths = list(optim.flat(params))
    assert encoded.encodes_images(config, paths) and encoded.encodes_text(config, paths)
    free = dataclasses.replace(config, model=dataclasses.replace(config.model, trainable=("*",)))
    assert not encoded.encodes_images(free, paths)
    moving = dataclasses.replace(config, data=dataclasses.replace(config.data, short_sides=(64, 96)))
    assert not encoded.encodes_images(moving, paths)
