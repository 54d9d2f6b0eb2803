"""Random numbers by hash: as even as drawn ones, in both halves, between neighbours, rows, columns and keys."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.models.dropout import Dropout, bernoulli, hashed_bits

SHAPE = (2048, 256)
PLACES = SHAPE[0] * SHAPE[1]
KEYS = jax.random.split(jax.random.key(7), 4)


@pytest.fixture(scope="module")
def drawn():
    """For each key and half of the bits whether a place is kept with rate 0.1, less the mean, in standard deviations."""
    least, share = 6554, 1 - 6554 / 65536
    deviation = (share * (1 - share)) ** 0.5
    bits = np.asarray(jax.vmap(lambda key: hashed_bits(key, SHAPE))(KEYS))
    return [((half >= least) - share) / deviation for own in bits for half in (own >> 16, own & 0xFFFF)]


def test_every_value_comes_equally_often():
    for own in np.asarray(jax.vmap(lambda key: hashed_bits(key, SHAPE))(KEYS)):
        for byte in range(4):
            counts = np.bincount((own.reshape(-1) >> 8 * byte) & 0xFF, minlength=256)
            statistic = ((counts - PLACES / 256) ** 2 / (PLACES / 256)).sum()
            assert abs(statistic - 255) < 4 * (2 * 255) ** 0.5


def test_means_rows_and_columns_scatter_as_they_should(drawn):
    for own in drawn:
        assert abs(own.mean()) * PLACES**0.5 < 4
        for axis in (0, 1):
            sums = (own.sum(axis) ** 2).mean() / SHAPE[axis]
            assert abs(sums - 1) < 4 * (2 / SHAPE[1 - axis]) ** 0.5


@pytest.mark.parametrize("apart", [1, 2, 7, 128, 255, 256, 257, 256 * 64])
def test_neighbours_know_nothing_of_each_other(drawn, apart):
    for own in drawn:
        flat = own.reshape(-1)
        assert abs((flat[apart:] * flat[:-apart]).mean()) * (PLACES - apart) ** 0.5 < 4.5


def test_keys_and_halves_know_nothing_of_each_other(drawn):
    for one, other in itertools.combinations(drawn, 2):
        assert abs((one * other).mean()) * PLACES**0.5 < 4.5


def test_two_keys_do_not_walk_through_the_same_numbers(monkeypatch):
    """Where the first word is the same, the second tells them apart."""
    words = iter(jnp.asarray([[5, 0x1234ABCD], [5, 0x9E8F7061]], jnp.uint32))
    monkeypatch.setattr(jax.random, "bits", lambda *_: next(words))
    one, other = (np.asarray(hashed_bits(KEYS[0], SHAPE)) >= 2**31 for _ in range(2))
    assert abs((one == other).mean() - 0.5) < 0.01


def test_shares_are_met_and_may_be_traced():
    for share in (0.0, 0.05, 0.9, 1.0):
        kept = jax.jit(lambda share: bernoulli(KEYS[0], share, (4, *SHAPE)))(share)
        assert abs(float(kept.mean()) - share) < 0.001
        assert len({own.tobytes() for own in np.asarray(kept)}) == (1 if share in (0, 1) else 4), "each example its own"


def test_dropout_keeps_the_mean_and_is_nothing_outside_of_training():
    x = jnp.ones((4, 64, 256))
    found: Any = Dropout(0.25, train=True).apply({}, x, rngs={"dropout": KEYS[0]})
    assert sorted(set(np.asarray(found).reshape(-1).tolist())) == pytest.approx([0, 4 / 3])
    assert float(found.mean()) == pytest.approx(1, abs=0.01)
    assert Dropout(0.25, train=False).apply({}, x) is x
