"""Memory that is lent again: only when nobody looks at it any more, and none for a copy in another process."""

import gc
import pickle

import numpy as np

from glip_jax.data.images import Memory


def _address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_array_is_gone():
    memory = Memory()
    first = memory.lend((4, 100, 3))
    first[:] = 7
    where, part = _address(first), first[2:]
    del first
    gc.collect()
    second = memory.lend((4, 100, 3))
    assert _address(second) != where, "a slice still looks at it"
    second[:] = 0
    assert (part == 7).all()
    del part
    gc.collect()
    assert _address(memory.lend((4, 100, 3))) == where


def test_smaller_and_larger_arrays_share_the_pieces():
    memory = Memory()
    large = memory.lend((4096, 10))
    where = _address(large)
    del large
    gc.collect()
    small = memory.lend((5, 3))
    assert _address(small) == where and small.shape == (5, 3) and small.dtype == np.uint8
    del small
    gc.collect()
    larger = memory.lend((4096, 20))
    larger[:] = 1
    del larger
    gc.collect()
    assert memory.lend((4096, 20)).sum() == 4096 * 20, "the piece that was too small is gone, this one came back"


def test_a_copy_lends_its_own():
    memory = Memory()
    lent = memory.lend((16,))
    lent[:] = 1
    copy = pickle.loads(pickle.dumps(memory))
    other = copy.lend((16,))
    other[:] = 2
    assert (lent == 1).all()
