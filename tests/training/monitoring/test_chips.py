"""Names of topologies, and the table of chips."""

import pytest

from glip_jax.training.monitoring.chips import CHIPS, TopologyError, chip_of, topology


@pytest.mark.parametrize(
    ("name", "shape", "devices", "hosts"),
    [
        ("v5e:8x16", (8, 16), 128, 32),
        ("v5litepod-64", (8, 8), 64, 16),
        ("v5e-256", (16, 16), 256, 64),
        ("v4-32", (2, 2, 4), 16, 4),
        ("v5p-8", (2, 2, 1), 4, 1),
        ("v6e:4x4*3", (4, 4), 48, 12),
        ("v5e:1x1", (1, 1), 1, 1),
        ("h100:12", (12,), 12, 2),
        ("tpu7x:2x2x1", (2, 2, 1), 8, 1),  # as jax counts: "8 devices" of libtpu 0.0.52
        ("tpu7x-128", (4, 4, 4), 128, 16),
    ],
)
def test_names(name, shape, devices, hosts):
    found = topology(name)
    assert (found.shape, found.devices, found.hosts) == (shape, devices, hosts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:2x2", "topology 'v7:2x2': expected one of v4, v5e, v5p, v6e, tpu7x, a100, h100, h200 with a shape"),
        ("v5e:8", r"has the shape \(8,\), 1 times: v5e has 2 dimensions of at least 1"),
        ("h100:0", "h100 has 1 dimension of at least 1"),
        ("v5e:4x4*0", "0 times"),
        ("v5e-48", "no slice of v5e has 48 chips"),
        ("v4-3", "no slice of v4 has 1 chips"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(TopologyError, match=message) as error:
        topology(name)
    assert "\n" not in str(error.value) and "v5e:16x16" in str(error.value)


def test_links():
    """Each dimension has its share of the chip's links, half of them where the last chip has no link to the first."""
    link = CHIPS["v5e"].link
    assert topology("v5e:16x16").link == link
    assert topology("v5e:8x16").link == 0.75 * link
    assert topology("v5e:8x8").link == 0.5 * link
    assert topology("v5e:1x4").link == 0.25 * link
    assert topology("v4:4x4x8").link == CHIPS["v4"].link
    assert topology("v4:2x4x4").link == 0.5 * CHIPS["v4"].link
    assert topology("h100:16").link == CHIPS["h100"].link
    assert topology("v5e:4x4*2").outer_link == CHIPS["v5e"].network / 4


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", "v4"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_device_kinds(kind, family):
    assert chip_of(kind) is CHIPS[family]


def test_a_cpu_has_no_published_peak():
    assert chip_of("cpu") is None
