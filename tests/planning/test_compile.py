"""The step compiled for made-up devices in a process of its own: state, batch, collectives, the cache; and for a TPU if it can."""

import dataclasses
import fcntl
import json

import jax
import pytest

from glip_jax.config import MeshConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.chips import topology
from glip_jax.distributed.mesh import MeshError
from glip_jax.distributed.runtime import _STACKS, libtpu_arguments
from glip_jax.planning import compile
from glip_jax.planning.compile import PlanError, abstract_batch, abstract_mesh, compile_step, state_bytes
from glip_jax.planning.roofline import formula_sent
from glip_jax.training.state import abstract_state
from tests import tiny_run

CHIPS = topology("v5e:2x2")
CANVAS = (64, 64)
CONFIG = dataclasses.replace(tiny_run.config(), mesh=MeshConfig(data=2, fsdp=2))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, testrun_uid):
    """One for all processes that run tests."""
    folder = tmp_path_factory.getbasetemp().parent / f"plans_{testrun_uid}"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def facts(cache):
    """Compiled once for all tests here, by one of the processes."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compile_step(CONFIG, CHIPS, CANVAS, "fake", cache, lambda _: None)


def state(config=CONFIG, chips=CHIPS):
    mesh = abstract_mesh(config, chips)
    return state_bytes(abstract_state(config, mesh), abstract_batch(config, CANVAS, mesh))


def test_the_batch_is_that_of_training(tmp_path):
    config = tiny_run.config(tiny_run.write_sources(tmp_path))
    real = next(iter(Mixture(config).batches()))
    made = abstract_batch(config, CANVAS, abstract_mesh(config, CHIPS))
    assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in real]


def test_arguments_are_the_state_and_the_batch(facts):
    step = 4  # its number, an int32
    assert facts.needed is None and facts.arguments == sum(state().values()) + step
    assert facts.aliased >= state()["parameters"] + state()["optimizer"], "the state is donated, as in training"
    assert 0 < facts.activations < facts.temporaries and facts.peak > facts.arguments


def test_shards_are_a_part():
    split, whole = state(), state(dataclasses.replace(CONFIG, mesh=MeshConfig()))
    assert whole["parameters"] / 2 <= split["parameters"] < whole["parameters"]
    # Moments lie as their parameters do; beside them a counter.
    assert split["optimizer"] - 4 == pytest.approx(2 * split["averages"])
    assert whole["batch"] == split["batch"], "both axes split the batch"


def test_gradients_are_sent_over_both_axes(facts):
    over = {axes for each in facts.sent for axes in [each.axes]}
    assert ("data",) in over or ("data", "fsdp") in over
    gradients = sum(each.bytes for each in facts.sent if "data" in each.axes)
    # Adam has two moments of every trained parameter, as large as its gradient; the axes share them.
    assert gradients >= state()["optimizer"] / 2 - 8
    assert not any(each.outer for each in facts.sent)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_formulas_send_what_the_program_sends(facts, kind):
    """Once a step each. The formula takes every parameter for one that is split, so it may say a little more."""
    mesh = dict(abstract_mesh(CONFIG, CHIPS).shape)
    formula = sum(each.bytes for each in formula_sent(state(), mesh, CHIPS) if each.kind == kind)
    found = sum(each.bytes for each in facts.sent if each.kind == kind and each.axes == ("fsdp",))
    assert 0.7 * formula <= found <= 1.01 * formula


def test_products_are_counted(facts):
    assert facts.flops > 0 and facts.passes > facts.flops, "the box side is of highest precision"
    assert facts.known and facts.calls == 0
    assert facts.hot and facts.hot[0].bytes == max(each.bytes for each in facts.hot)


def test_the_second_time_nothing_is_compiled(facts, cache, monkeypatch):
    monkeypatch.setattr(compile.multiprocessing, "get_context", lambda _: pytest.fail("a process was started"))
    assert compile_step(CONFIG, CHIPS, CANVAS, "fake", cache) == facts
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=99))
    assert compile_step(longer, CHIPS, CANVAS, "fake", cache) == facts, "the length of training is no part of the step"


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
def test_what_changes_the_step_changes_the_key(config, chips, canvas):
    assert compile._key(config, chips, canvas, "fake") != compile._key(CONFIG, CHIPS, CANVAS, "fake")


def test_a_batch_that_does_not_split_is_refused_before_anything_is_compiled():
    with pytest.raises(MeshError, match="train.batch_size 6 does not split"):
        abstract_mesh(tiny_run.replace(CONFIG, "train", batch_size=6), CHIPS)


def test_too_few_devices_are_named():
    with pytest.raises(PlanError, match=r"v5e:64x64: \d+ devices are here, 4096 are wanted"):
        compile._devices(topology("v5e:64x64"), "fake")


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (32.06G) exceeds available HBM (15.75G).",
         32.06 * 2**30, 15.75 * 2**30),
        ("Ran out of memory in memory space hbm. Used 900.5M of 0.5G hbm. Exceeded", 900.5 * 2**20, 2**29),
        ("INVALID_ARGUMENT: something else", None, None),
    ],
)  # fmt: skip
def test_how_compilers_say_that_memory_is_short(message, needed, available):
    assert compile._shortage(message) == (needed, available)


def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "environment", lambda *_: {"JAX_PLATFORMS": "no_such_platform"})
    other = tiny_run.replace(CONFIG, "train", batch_size=32)
    with pytest.raises(PlanError) as error:
        compile_step(other, CHIPS, CANVAS, "local", tmp_path, lambda _: None)
    assert "\n" not in str(error.value) and "no_such_platform" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.tpu
def test_compiled_for_a_tpu(tmp_path):
    """The same step by the TPU's own compiler."""
    found = compile_step(CONFIG, CHIPS, CANVAS, "tpu", tmp_path, lambda _: None)
    assert found.needed is None and found.compiler.startswith("libtpu") and found.known and found.code is None
    assert found.arguments >= sum(state().values()), "tiles pad"
    assert 0 < found.padding < found.bytes and 0 < (found.activations or 0) < found.temporaries
    assert jax.default_backend() == "cpu"


@pytest.mark.tpu
def test_slices_of_a_tpu_exchange_sums_of_gradients_alone(tmp_path):
    """fsdp stays inside a slice; over the data centre's network goes what data adds up."""
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=4))
    chips = topology("v5e:2x2*2")
    found = compile_step(config, chips, CANVAS, "tpu", tmp_path, lambda _: None)
    outer = [each for each in found.sent if each.outer]
    assert outer and {each.axes for each in outer} <= {("data",), ("data", "fsdp")}, found.sent
    assert {each.kind for each in outer} <= {"all-reduce", "all-gather"}, outer
    inner = {each.kind for each in found.sent if each.axes == ("fsdp",) and not each.outer}
    assert {"all-gather", "reduce-scatter"} <= inner
    # A slice sends its sum of the gradients: a chip its part of what fsdp splits.
    gradients = sum(each.bytes for each in outer if each.kind == "all-reduce")
    assert gradients >= state(config, chips)["optimizer"] / 2 - 8


def test_the_whole_program_serves_for_its_beginning(tmp_path, facts):
    """What was compiled to the end knows all that a compile without machine code does."""
    path = tmp_path / f"{compile._key(CONFIG, topology('v5e:2x2'), CANVAS, 'tpu-whole')}.json"
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(facts, how="tpu-whole", code=5.0))))
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
def test_the_compilers_threads_get_larger_stacks(before, after):
    made = libtpu_arguments(before)
    assert made.startswith(before) and [word in made for word in before.split()] == [True] * len(before.split())
    found = dict(word.lstrip("-").split("=") for word in made.split())
    assert [int(found[flag]) for flag in _STACKS] == after
    assert libtpu_arguments(made) == made
