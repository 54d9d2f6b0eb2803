"""Groups are read ahead, started and yielded in order; errors come where a loop would meet them."""

import threading

import pytest

from glip_jax.inference import pipelined


class Device:
    """Records what is started and waited for."""

    def __init__(self):
        self.events = []

    def start(self, group, read):
        self.events.append(f"start {group[0]}")

        def finish():
            self.events.append(f"finish {group[0]}")
            return [10 * each for each in read]

        return finish


def test_groups_come_in_order_with_two_on_the_device():
    device = Device()
    groups = ([begin, begin + 1] for begin in range(0, 8, 2))
    found = list(pipelined(groups, lambda item: -item, device.start))
    assert found == [([n, n + 1], [-n, -n - 1], [-10 * n, -10 * n - 10]) for n in range(0, 8, 2)]
    assert device.events == [
        "start 0", "start 2", "finish 0", "start 4", "finish 2", "start 6", "finish 4", "finish 6"
    ]  # fmt: skip


def test_the_next_group_is_read_while_the_device_computes():
    """The first result is not waited for before the third group has been read."""
    read = {n: threading.Event() for n in range(3)}

    def finish():
        assert read[2].wait(30), "the threads read on"

    for _ in pipelined([[0], [1], [2]], lambda n: read[n].set(), lambda *_: finish):
        pass


@pytest.mark.parametrize("where", ["groups", "read", "start"])
def test_an_error_comes_after_the_groups_before_it(where):
    device, yielded = Device(), []

    def fail(at, here, value=None):
        if at == 4 and here == where:
            raise OSError("image 4")
        return value

    def start(group, read):
        fail(group[0], "start")
        return device.start(group, read)

    groups = (fail(n, "groups", [n]) for n in range(6))
    results = pipelined(groups, lambda n: fail(n, "read", n), start)
    for _ in range(4):
        yielded += next(results)[0]
    with pytest.raises(OSError, match="image 4"):
        next(results)
    assert yielded == [0, 1, 2, 3]


def test_whoever_leaves_reads_no_further():
    read = []
    for _ in pipelined(([n] for n in range(100)), read.append, lambda *_: lambda: None):
        break
    assert len(read) <= 4
