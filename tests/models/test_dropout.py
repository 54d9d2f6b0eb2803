"""Random bits by hash: uniform and independent in both halves, between neighbors, rows, columns and keys."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.models.dropout import Dropout, bernoulli, hashed_bits, words_of

SHAPE = (2048, 256)
ELEMENTS = SHAPE[0] * SHAPE[1]
KEYS = jax.random.split(jax.random.key(7), 4)


@pytest.fixture(scope="module")
def drawn():
    """Per key and half of the bits: standardized indicator of the elements that dropout of rate 0.1 keeps."""
    threshold, probability = 6554, 1 - 6554 / 65536
    deviation = (probability * (1 - probability)) ** 0.5
    bits = np.asarray(jax.vmap(lambda key: hashed_bits(words_of(key), SHAPE))(KEYS))
    return [((half >= threshold) - probability) / deviation for words in bits for half in (words >> 16, words & 0xFFFF)]


def test_bytes_are_uniform():
    for own in np.asarray(jax.vmap(lambda key: hashed_bits(words_of(key), SHAPE))(KEYS)):
        for byte in range(4):
            counts = np.bincount((own.reshape(-1) >> 8 * byte) & 0xFF, minlength=256)
            statistic = ((counts - ELEMENTS / 256) ** 2 / (ELEMENTS / 256)).sum()
            assert abs(statistic - 255) < 4 * (2 * 255) ** 0.5


def test_means_of_all_rows_and_columns(drawn):
    for own in drawn:
        assert abs(own.mean()) * ELEMENTS**0.5 < 4
        for axis in (0, 1):
            sums = (own.sum(axis) ** 2).mean() / SHAPE[axis]
            assert abs(sums - 1) < 4 * (2 / SHAPE[1 - axis]) ** 0.5


@pytest.mark.parametrize("distance", [1, 2, 7, 128, 255, 256, 257, 256 * 64])
def test_neighbors_are_independent(drawn, distance):
    for own in drawn:
        flat = own.reshape(-1)
        assert abs((flat[distance:] * flat[:-distance]).mean()) * (ELEMENTS - distance) ** 0.5 < 4.5


def test_keys_and_halves_are_independent(drawn):
    for one, other in itertools.combinations(drawn, 2):
        assert abs((one * other).mean()) * ELEMENTS**0.5 < 4.5


def test_keys_with_an_equal_word_are_independent():
    """The second word differs."""
    words = jnp.asarray([[5, 0x1234ABCD], [5, 0x9E8F7061]], jnp.uint32)
    one, other = (np.asarray(hashed_bits(own, SHAPE)) >= 2**31 for own in words)
    assert abs((one == other).mean() - 0.5) < 0.01


def test_probabilities_are_met_and_may_be_traced():
    for probability in (0.0, 0.05, 0.9, 1.0):
        kept = jax.jit(lambda p: bernoulli(KEYS[0], p, (4, *SHAPE)))(probability)
        assert abs(float(kept.mean()) - probability) < 0.001
        assert len({own.tobytes() for own in np.asarray(kept)}) == (1 if probability in (0, 1) else 4), (
            "examples differ"
        )


def test_dropout_keeps_the_mean_and_is_the_identity_outside_of_training():
    x = jnp.ones((4, 64, 256))
    found: Any = Dropout(0.25, train=True).apply({}, x, rngs={"dropout": KEYS[0]})
    assert sorted(set(np.asarray(found).reshape(-1).tolist())) == pytest.approx([0, 4 / 3])
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
    assert Dropout(0.25, train=False).apply({}, x) is x
