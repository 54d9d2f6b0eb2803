"""The step compiled for fake CPU devices in a process of its own: state, batch, collectives, cache; and for TPUs with libtpu."""

import dataclasses
import fcntl
import json

import jax
import pytest

from glip_jax.config import MeshConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.mesh import MeshError
from glip_jax.distributed.runtime import _STACKS, libtpu_arguments
from glip_jax.planning import compile
from glip_jax.planning.compile import PlanError, abstract_batch, abstract_mesh, compile_step, state_bytes
from glip_jax.planning.roofline import formula_sent
from glip_jax.training.monitoring.chips import topology
from glip_jax.training.state import abstract_state
from tests import tiny_run

CHIPS = topology("v5e:2x2")
CANVAS = (64, 64)
CONFIG = dataclasses.replace(tiny_run.config(), mesh=MeshConfig(data=2, fsdp=2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, testrun_uid):
    """A plan cache shared by all test processes."""
    folder = tmp_path_factory.getbasetemp().parent / f"plans_{testrun_uid}"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def statistics(cache):
    """Statistics, compiled once for all tests of this module by one of the test processes."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compile_step(CONFIG, CHIPS, CANVAS, "fake", cache, lambda _: None)


def state(config=CONFIG, chips=CHIPS):
    mesh = abstract_mesh(config, chips)
    return state_bytes(abstract_state(config, mesh), abstract_batch(config, CANVAS, mesh))


def test_the_abstract_batch_matches_a_training_batch(tmp_path):
    config = tiny_run.config(tiny_run.write_sources(tmp_path))
    real = next(iter(Mixture(config).batches(patches=config.model.patches)))
    abstract = abstract_batch(config, CANVAS, abstract_mesh(config, CHIPS))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(real)
    ]


@pytest.mark.slow
def test_arguments_are_the_state_and_the_batch(statistics):
    step = 4  # the step number, an int32
    assert statistics.needed is None and statistics.arguments == sum(state().values()) + step
    assert statistics.aliased >= state()["parameters"] + state()["optimizer"], "the state is donated, as in training"
    assert 0 < statistics.activations < statistics.temporaries and statistics.peak > statistics.arguments


@pytest.mark.compiles
def test_sharded_state_is_smaller():
    split, whole = state(), state(dataclasses.replace(CONFIG, mesh=MeshConfig()))
    assert whole["parameters"] / 2 <= split["parameters"] < whole["parameters"]
    # Moments are sharded like their parameters; in addition there is a counter.
    assert split["optimizer"] - 4 == pytest.approx(2 * split["averages"])
    assert whole["batch"] == split["batch"], "both axes split the batch"


@pytest.mark.slow
def test_gradients_are_reduced_over_both_axes(statistics):
    over = {axes for each in statistics.collectives for axes in [each.axes]}
    assert ("data",) in over or ("data", "fsdp") in over
    gradients = sum(each.bytes for each in statistics.collectives if "data" in each.axes)
    # Adam has two moments per trained parameter, each as large as its gradient and sharded over the axes.
    assert gradients >= state()["optimizer"] / 2 - 8
    assert not any(each.outer for each in statistics.collectives)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_formulas_agree_with_the_compiled_collectives(statistics, kind):
    """Each runs once per step. The formula assumes that every parameter is sharded, so it may exceed it slightly."""
    mesh = dict(abstract_mesh(CONFIG, CHIPS).shape)
    formula = sum(each.bytes for each in formula_sent(state(), mesh, CHIPS) if each.kind == kind)
    found = sum(each.bytes for each in statistics.collectives if each.kind == kind and each.axes == ("fsdp",))
    assert 0.7 * formula <= found <= 1.01 * formula


@pytest.mark.slow
def test_flops_are_counted(statistics):
    assert statistics.flops > 0 and statistics.passes > statistics.flops, "the box branch uses the highest precision"
    assert statistics.trip_counts_known and statistics.undeclared_kernels == 0
    assert statistics.top_operations and statistics.top_operations[0].bytes == max(
        each.bytes for each in statistics.top_operations
    )


@pytest.mark.slow
def test_a_cached_plan_is_not_compiled_again(statistics, cache, monkeypatch):
    monkeypatch.setattr(compile.multiprocessing, "get_context", lambda _: pytest.fail("a process was started"))
    assert compile_step(CONFIG, CHIPS, CANVAS, "fake", cache) == statistics
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=99))
    assert compile_step(longer, CHIPS, CANVAS, "fake", cache) == statistics, (
        "the number of steps does not change the program"
    )


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("config", "chips", "canvas"),
    [
        (tiny_run.replace(CONFIG, "train", batch_size=16), CHIPS, CANVAS),
        (tiny_run.replace(CONFIG, "model", remat="blocks"), CHIPS, CANVAS),
        (dataclasses.replace(CONFIG, mesh=MeshConfig()), CHIPS, CANVAS),
        (CONFIG, topology("v5e:2x4"), CANVAS),
        (CONFIG, CHIPS, (64, 96)),
    ],
)
def test_settings_of_the_step_change_the_cache_key(config, chips, canvas):
    assert compile._key(config, chips, canvas, "fake") != compile._key(CONFIG, CHIPS, CANVAS, "fake")


def test_a_batch_that_does_not_divide_is_refused_before_compiling():
    with pytest.raises(MeshError, match="train.batch_size 6 does not split"):
        abstract_mesh(tiny_run.replace(CONFIG, "train", batch_size=6), CHIPS)


def test_too_few_devices_are_named():
    with pytest.raises(PlanError, match=r"v5e:64x64: found \d+ devices, expected 4096"):
        compile.devices_of(topology("v5e:64x64"), "fake")


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (32.06G) exceeds available HBM (15.75G).",
         32.06 * 2**30, 15.75 * 2**30),
        ("Ran out of memory in memory space hbm. Used 900.5M of 0.5G hbm. Exceeded", 900.5 * 2**20, 2**29),
        ("INVALID_ARGUMENT: something else", None, None),
    ],
)  # fmt: skip
def test_out_of_memory_messages_of_compilers(message, needed, available):
    assert compile._memory_shortage(message) == (needed, available)


@pytest.mark.processes
def test_a_failing_compiler_gives_a_one_line_error(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "environment", lambda *_: {"JAX_PLATFORMS": "no_such_platform"})
    other = tiny_run.replace(CONFIG, "train", batch_size=32)
    with pytest.raises(PlanError) as error:
        compile_step(other, CHIPS, CANVAS, "local", tmp_path, lambda _: None)
    assert "\n" not in str(error.value) and "no_such_platform" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.tpu
def test_compiled_for_tpu_slices_which_exchange_only_gradient_sums(tmp_path):
    """The step compiled by libtpu. The traffic of fsdp stays inside a slice; only all-reduces over data cross the data centre network."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=4))
    chips = topology("v5e:2x2*2")
    found = compile_step(config, chips, CANVAS, "tpu", tmp_path, lambda _: None)
    assert (
        found.needed is None and found.compiler.startswith("libtpu") and found.trip_counts_known and found.code is None
    )
    assert found.arguments >= sum(state(config, chips).values()), "tiles pad"
    assert 0 < found.padding < found.bytes and 0 < (found.activations or 0) < found.temporaries
    assert jax.default_backend() == "cpu"
    outer = [each for each in found.collectives if each.outer]
    assert outer and {each.axes for each in outer} <= {("data",), ("data", "fsdp")}, found.collectives
    assert {each.kind for each in outer} <= {"all-reduce", "all-gather"}, outer
    inner = {each.kind for each in found.collectives if each.axes == ("fsdp",) and not each.outer}
    assert {"all-gather", "reduce-scatter"} <= inner
    # A slice sends its sum of the gradients, each chip the part that fsdp assigns to it.
    gradients = sum(each.bytes for each in outer if each.kind == "all-reduce")
    assert gradients >= state(config, chips)["optimizer"] / 2 - 8


@pytest.mark.slow
def test_a_cached_tpu_whole_plan_serves_tpu(tmp_path, statistics):
    """A plan with code generation has all statistics of one without."""
    path = tmp_path / f"{compile._key(CONFIG, topology('v5e:2x2'), CANVAS, 'tpu-whole')}.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(statistics, mode="tpu-whole", code=5.0))))
    found = compile.cached(CONFIG, topology("v5e:2x2"), CANVAS, "tpu", tmp_path)
    assert found is not None and found.code == 5.0
    assert compile.cached(CONFIG, topology("v5e:2x2"), (64, 128), "tpu", tmp_path) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 3 * [8 << 20]),
        ("--xla_a=1 --default_thread_stack_size=7", [8 << 20, 7, 8 << 20]),
    ],
)
def test_compiler_threads_get_larger_stacks(before, after):
    arguments = libtpu_arguments(before)
    assert arguments.startswith(before) and [word in arguments for word in before.split()] == [True] * len(
        before.split()
    )
    found = dict(word.lstrip("-").split("=") for word in arguments.split())
    assert [int(found[flag]) for flag in _STACKS] == after
    assert libtpu_arguments(arguments) == arguments
