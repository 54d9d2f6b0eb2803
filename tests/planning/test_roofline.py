"""The roofline on constructed numbers, weak scaling, and the report."""

import dataclasses

import pytest

from glip_jax.config import CaptionConfig, DataConfig, TrainConfig
from glip_jax.planning import report
from glip_jax.planning.roofline import formula_sent, hardware_flops, mean_share, roofline, scaling
from glip_jax.planning.statistics import CollectiveTraffic, CompileStatistics
from glip_jax.training.monitoring.chips import topology
from glip_jax.training.monitoring.flops import flops_per_image
from tests import tiny_run

CANVAS = (64, 64)
STATE = {"parameters": 4e9, "optimizer": 6e9, "averages": 1e9, "batch": 0.5e9}
CHIPS = topology("v5e:8x16")
SENT = (CollectiveTraffic("all-reduce", ("data",), 3, 9e9, 18e9, False),)


def step_statistics(**values):
    defaults = {
        "arguments": 12e9,
        "outputs": 11e9,
        "aliased": 10.9e9,
        "temporaries": 3e9,
        "code": 0.1e9,
        "collectives": SENT,
    }
    return CompileStatistics(
        "tpu", "libtpu 1", **{**defaults, "flops": 190e12, "passes": 197e12, "bytes": 1638e9, **values}
    )


@pytest.fixture
def config():
    config = tiny_run.config()
    data = dataclasses.replace(config.data, workers=64, prefetch=8)
    return dataclasses.replace(config, data=data, train=TrainConfig(steps=3600, batch_size=256))


def plan(config, statistics, **values):
    return roofline(config, CHIPS, CANVAS, STATE, statistics, {"data": 128, "fsdp": 1, "tensor": 1}, **values)


def test_seconds_and_bound(config):
    found = plan(config, step_statistics())
    # 197 T at 197 T/s; 1638 GB at 819 GB/s; 18 GB over three quarters of 200 GB/s; 8 images a host by 64 cores.
    assert found.seconds == pytest.approx({"compute": 1.0, "memory": 2.0, "network": 0.12, "input": 8 / (64 * 200)})
    assert found.bound == "memory" and found.step_seconds == pytest.approx(2.12)
    assert found.images_per_second == pytest.approx(256 / 2.12)
    assert found.hours == pytest.approx(2.12) and found.chip_hours == pytest.approx(found.mean_hours * 128)
    useful = 2 * flops_per_image(config.model, *CANVAS).training
    assert found.useful_flops == useful and found.mfu == pytest.approx(useful / (2.12 * 197e12))


@pytest.mark.parametrize(
    ("change", "cores", "bound"),
    [
        ({"bytes": 1e9}, 200.0, "compute"),
        ({"collectives": (dataclasses.replace(SENT[0], sent_bytes=3e12),)}, 200.0, "network"),
        ({}, 0.01, "input"),
    ],
)
def test_each_resource_can_be_the_bound(config, change, cores, bound):
    found = plan(config, step_statistics(**change), images_per_core=cores)
    assert found.bound == bound
    assert found.step_seconds >= max(found.seconds.values())


def test_memory_and_whether_it_fits(config):
    found = plan(config, step_statistics())
    assert found.memory["padding of these"] == 0.5e9 and found.memory["activations and temporaries"] == 3e9
    assert found.memory["peak"] == pytest.approx(12e9 + 0.1e9 + 3e9 + 0.1e9)
    apart = plan(config, step_statistics(activations=2e9)).memory
    assert apart["activations"] == 2e9 and apart["temporaries"] == 1e9 and apart["peak"] == found.memory["peak"]
    assert found.fits is True
    assert plan(config, step_statistics(temporaries=6e9)).fits is False
    assert plan(config, step_statistics(available=15e9)).fits is False, (
        "the compiler's available memory counts, not the published one"
    )
    written = plan(config, step_statistics(code=None))
    assert written.memory["program, allowed for"] == 2**29 and "program" not in written.memory
    assert written.memory["peak"] == pytest.approx(12e9 + 0.1e9 + 3e9 + 2**29)
    assert plan(config, None).fits is None
    refused = plan(config, CompileStatistics("tpu", "libtpu 1", needed=20e9, available=16e9))
    assert refused.fits is False and refused.memory["peak"] == 20e9 and refused.bytes is None
    too_much = roofline(
        config, CHIPS, CANVAS, {**STATE, "parameters": 40e9}, None, {"data": 128, "fsdp": 1, "tensor": 1}
    )
    assert too_much.fits is False, "a state that does not fit is known without a compiler"


def test_traffic_between_slices_uses_the_slower_link(config):
    chips = topology("v5e:8x8*2")
    mesh = {"data": 128, "fsdp": 1, "tensor": 1}
    outer = step_statistics(collectives=(dataclasses.replace(SENT[0], outer=True),))
    found = roofline(config, chips, CANVAS, STATE, outer, mesh)
    assert found.seconds["network"] == pytest.approx(18e9 / (12.5e9 / 4))
    assert scaling(chips, found) is None


def test_scaling(config):
    found = plan(config, step_statistics())
    scaled = scaling(CHIPS, found)
    assert scaled is not None
    times = [2 + 0.12 * (n - 1) / n / (127 / 128) for n in (16, 256)]
    assert scaled["step_seconds"] == pytest.approx(times)
    assert scaled["efficiency"] == pytest.approx(times[0] / times[1])
    assert scaling(topology("h100:8"), found) is None


def test_formulas_of_collective_traffic(config):
    state = {**STATE, "parameters": 1e9, "averages": 0.8e9}
    (data,) = formula_sent(state, {"data": 128, "fsdp": 1, "tensor": 1}, CHIPS)
    assert data.sent_bytes == pytest.approx(2 * 127 / 128 * 0.8e9) and not data.outer
    reduce, gather, scatter = formula_sent(state, {"data": 8, "fsdp": 16, "tensor": 1}, CHIPS)
    assert reduce.sent_bytes == pytest.approx(2 * 7 / 8 * 0.8e9), "each shard is reduced separately"
    assert gather.sent_bytes == pytest.approx(15 / 16 * 16e9), "parameters are gathered once per step"
    assert scatter.sent_bytes == pytest.approx(15 / 16 * 16 * 0.8e9)
    # Two hosts (slices): reduce-scatter and all-gather inside, all-reduce of each chip's share between them.
    for chips, inside in (("h100:16", 8), ("v5e:8x8*2", 64)):
        data = 2 * inside
        inner, outer = formula_sent(state, {"data": data, "fsdp": 1, "tensor": 1}, topology(chips))
        assert not inner.outer and inner.sent_bytes == pytest.approx(2 * (inside - 1) / inside * 0.8e9)
        assert outer.outer and outer.sent_bytes == pytest.approx(2 / 2 * 0.8e9 / inside)
    assert len(formula_sent(state, {"data": 4, "fsdp": 1, "tensor": 1}, topology("h100:4"))) == 1


def test_recomputed_flops(config):
    flops = flops_per_image(config.model, *CANVAS)
    blocks = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="blocks"))
    assert hardware_flops(config, flops) == flops.training + flops.parts["fusion"]
    more = hardware_flops(blocks, flops) - hardware_flops(config, flops)
    assert more == pytest.approx(flops.forward - flops.parts["pyramid"] - flops.parts["outputs"])
    kernels = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="kernels"))
    kept = hardware_flops(blocks, flops) - hardware_flops(kernels, flops)
    assert kept == pytest.approx(flops.parts["fusion"] + flops.parts["dynamic"])


def test_mean_flops_over_canvases(config):
    data = DataConfig(short_sides=(32, 64), long_side=64, aspects=(1.0,), captions=CaptionConfig())
    both = dataclasses.replace(config, data=data)
    small, large = (flops_per_image(config.model, side, side).training for side in (32, 64))
    assert mean_share(both, (64, 64)) == pytest.approx((small + large) / 2 / large)


def test_host_rates_and_memory(config):
    found = plan(config, step_statistics())
    assert found.host["images/s prepared"] == 64 * 200
    assert found.host["images/s wanted"] == pytest.approx(8 / 2.12)
    # Ten batches of 8 images, the state of four chips while a checkpoint is written, the process.
    assert found.host["memory wanted"] == pytest.approx(10 * 8 * 64 * 64 * 3 + 4 * 11e9 + 4e9)


def test_report_lines(config):
    found = plan(config, step_statistics())
    text = "\n".join(report.lines(config, CHIPS, CANVAS, found, step_statistics(), scaling(CHIPS, found)))
    assert "128 chips, 32 hosts; mesh: data 128" in text and "of 15.75: fits" in text
    assert "chip memory                     2.0000  <- the bound" in text
    assert "18.000 GB sent inside the slice" in text and "from 16 to 256 chips" in text
    none = "\n".join(report.lines(config, CHIPS, CANVAS, plan(config, None), None, None))
    assert (
        "nothing compiled" in none
        and "whether they fit is not known" in none
        and "chip memory                  not known" in none
    )
    refused = CompileStatistics("tpu", "libtpu 1", needed=20e9, available=16e9)
    text = "\n".join(report.lines(config, CHIPS, CANVAS, plan(config, refused), refused, None))
    assert "18.626  of 14.90: does NOT fit (the compiler refuses it" in text
    fake = dataclasses.replace(step_statistics(), mode="fake", trip_counts_known=False)
    text = "\n".join(report.lines(config, CHIPS, CANVAS, plan(config, fake), fake, None))
    assert "fake CPU devices" in text and "trip count of a loop is not known" in text
