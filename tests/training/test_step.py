"""The step: one result on any mesh and for any number of micro-batches; averages, frozen parameters, counts, non-finite losses."""

import dataclasses
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import LoraConfig, MeshConfig, TextConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.mesh import abstract, make_mesh, parameter_specs, place_batch, shardings
from glip_jax.planning.compile import compile_step
from glip_jax.planning.hlo import collectives
from glip_jax.structures.batch import DROPS
from glip_jax.training import optimizer as optim
from glip_jax.training.monitoring.chips import topology
from glip_jax.training.state import abstract_state, fresh_parameters, initial_state
from glip_jax.training.step import first_gradients, glip_objective, make_step
from tests import tiny_run
from tests.training import stand_in
from tests.training.same_path import same_path

pytestmark = pytest.mark.compiles

ONE = MeshConfig(data=1)
NAMES = ("boxes", "captions")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tiny_run.write_sources(tmp_path_factory.mktemp("sources"))


def _batches(config, number):
    batches: Any = Mixture(config).batches()
    result = [next(batches) for _ in range(number)]
    batches.close()
    return result


def _mesh(config: MeshConfig):
    return make_mesh(config, jax.devices()[: 1 if config == ONE else 8])


def _train(config, mesh, batches, objective=None, params=None):
    """State and metrics after a step on each batch, on the host."""
    params = stand_in.parameters(config, jax.random.key(1)) if params is None else params
    state = initial_state(jax.tree.map(jnp.array, params), config)
    state = jax.device_put(state, shardings(state, mesh))
    step = make_step(config, mesh, objective or stand_in.objective(config), state, NAMES)
    metrics = []
    for batch in batches:
        state, step_metrics = step(state, place_batch(batch, mesh))
        metrics.append(jax.device_get(step_metrics))
    return jax.device_get(state), metrics


def _close(one, other, tolerance, floor=1e-6):
    """Asserts that the largest difference of each array, relative to its largest value, is below `tolerance`.

    Arrays whose norm is below `floor` of the global norm are left out.
    """
    norm = np.sqrt(sum(float((np.float64(leaf) ** 2).sum()) for leaf in jax.tree.leaves(one)))
    assert np.isfinite(norm)
    flat = optim.flat(other)
    for path, leaf in optim.flat(one).items():
        if np.linalg.norm(leaf) > floor * norm:
            difference = np.abs(np.float64(leaf) - flat[path]).max() / np.abs(leaf).max()
            assert difference < tolerance, f"{path}: {difference}"


def _traffic(params, mesh, config):
    """Bytes that the step has to send along data and fsdp, by (kind, axes), from the sizes of the arrays."""
    sizes, split = dict(mesh.shape), [axis for axis in ("data", "fsdp") if mesh.shape[axis] > 1]
    table: defaultdict[tuple, int] = defaultdict(int)
    specs = optim.flat(parameter_specs(params, mesh))
    for path, leaf in optim.flat(params).items():
        # Along tensor each device holds a part and sends that only.
        size = leaf.size * 4 // (sizes["tensor"] if "tensor" in specs[path] else 1)
        if "fsdp" in specs[path] and sizes["fsdp"] > 1:
            table["all-gather", ("fsdp",)] += size
            table["reduce-scatter", ("fsdp",)] += size
            table["all-reduce", ("data",)] += size // sizes["fsdp"] if sizes["data"] > 1 else 0
        else:
            table["all-reduce", tuple(split)] += size
    table["all-reduce", tuple(split)] += 2 * 4  # the denominators
    columns = 3 + 2 + 5 + len(DROPS)  # parts of the loss and weights; counts and indices; what was dropped
    table["all-gather", tuple(split)] += config.train.batch_size * columns * 4
    return {key: size for key, size in table.items() if size and key[1]}


def _check_traffic(compiled, params, mesh, config, min_share=1.0, over_tensor=0):
    """Compares the collectives of the program with `_traffic` and, along tensor, with sums of `over_tensor` bytes.

    `min_share`: share of the table that must be sent; the compiler drops what it finds to be zero or a duplicate.
    """
    found: defaultdict[tuple, int] = defaultdict(int)
    for each in collectives(compiled):
        assert each.times_known
        # By default a TPU multiplies in bfloat16, and gathers operands in that type.
        found[each.kind, each.axes(mesh.shape)] += each.times * each.bytes * (2 if each.dtypes == ("bf16",) else 1)
    wanted = _traffic(params, mesh, config)
    # It also sums small arrays by all-reduce, of which each device then keeps its part.
    scatter, reduce = ("reduce-scatter", ("fsdp",)), ("all-reduce", ("fsdp",))
    if {scatter, reduce} <= set(found) and reduce not in wanted:
        found[scatter] += found.pop(reduce)
    if over_tensor:
        wanted["all-reduce", ("tensor",)] = over_tensor
    # The gradient norm: one value for every sharded parameter, over the axes that shard it.
    spare = 4 * len(jax.tree.leaves(params))
    for key, size in found.items():
        limit = wanted.get(key, 0) + (spare if key[0] == "all-reduce" or key == scatter else 0)
        assert min_share * wanted.get(key, 0) <= size <= limit, (key, size, wanted.get(key, 0))
    assert set(wanted) <= set(found)


def _sums_over_tensor(config, mesh, text_layers, canvas=(0, 0)):
    """Bytes that the layers split over tensor sum, from the sizes of the layers.

    A text layer sums its two outputs in the forward pass and the gradients of its two inputs in the backward pass; a Swin block
    has one such pair (none for a canvas without cells).
    """
    images = config.train.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    sent = text_layers * 4 * images * config.model.text.max_tokens * config.model.text.width * 4
    for stage, depth in enumerate(config.model.backbone.depths):
        cells = (canvas[0] >> 2 + stage) * (canvas[1] >> 2 + stage)
        sent += depth * 2 * images * cells * (config.model.backbone.width << stage) * 4
    return sent


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        MeshConfig(data=2, fsdp=4),
    ],
)
def test_the_program_sends_the_intended_collectives_only(sources, mesh):
    config = tiny_run.config(sources)
    (batch,) = _batches(config, 1)
    params = jax.eval_shape(lambda: stand_in.parameters(config, jax.random.key(1)))
    placed = _mesh(mesh)
    state = jax.eval_shape(lambda p: initial_state(p, config), params)
    step = make_step(config, placed, stand_in.objective(config), state, NAMES)
    compiled = step.lower(abstract(state, placed), jax.eval_shape(lambda: batch)).compile()
    _check_traffic(compiled, params, placed, config)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=8), marks=pytest.mark.slow),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
)
def test_eight_devices_equal_one(sources, mesh):
    config = tiny_run.config(sources)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=0.0))
    batches = _batches(config, 5)
    params = stand_in.parameters(config, jax.random.key(1))
    gradients = [
        jax.device_get(first_gradients(params, batches[0], config, _mesh(m), stand_in.objective(config)))
        for m in (ONE, mesh)
    ]
    _close(*gradients, tolerance=1e-5)
    (one, numbers), (eight, others) = (_train(config, _mesh(m), batches) for m in (ONE, mesh))
    same_path(config, one.params, eight.params, 5)
    np.testing.assert_allclose(numbers[-1]["loss"], others[-1]["loss"], rtol=1e-5)


@pytest.mark.slow
def test_layers_split_over_tensor_with_remat_and_micro_batches(sources):
    """On a mesh where only tensor has several devices, with low-rank deltas of the projections."""
    config = tiny_run.replace(tiny_run.config(sources, dropout=0.0), "model", lora=LoraConfig(2))
    parts = tiny_run.replace(tiny_run.replace(config, "model", remat="blocks"), "optimizer", accumulate=2)
    params = stand_in.parameters(config, jax.random.key(1), bert=True)
    batches = _batches(config, 3)
    one, _ = _train(config, _mesh(ONE), batches, stand_in.objective(config, bert=True), params)
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    two, _ = _train(parts, mesh, batches, stand_in.objective(parts, bert=True), params)
    same_path(config, one.params, two.params, 3)


def _five_real_steps(config, batches, params, shape):
    """The gradients of the first step, the parameters after five, and the program, with the network of GLIP."""
    mesh, gradients = _mesh(shape), None
    state = initial_state(jax.tree.map(jnp.array, params), config)
    state = jax.device_put(state, shardings(state, mesh))
    step: Any = make_step(config, mesh, glip_objective(config), state, NAMES)
    compiled = step.lower(state, place_batch(batches[0], mesh)).compile()
    for number, batch in enumerate(batches):
        state, _ = compiled(state, place_batch(batch, mesh))
        if number == 0:  # Adam's first moment after a step is a tenth of the (clipped) gradient.
            gradients = jax.tree.map(lambda m: np.asarray(m) / 0.1, state.optimizer.mu)
    return gradients, jax.device_get(state.params), compiled


@pytest.mark.slow
def test_eight_devices_equal_one_with_the_real_network(sources):
    """Split over all axes. Beside `_traffic`, the program sends the sums of the layers split over tensor, and nothing else."""
    config, shape = tiny_run.config(sources), MeshConfig(data=2, fsdp=2, tensor=2)
    batches, params = _batches(config, 5), tiny_run.parameters(config.model)
    gradients, one, _ = _five_real_steps(config, batches, params, ONE)
    found, eight, compiled = _five_real_steps(config, batches, params, shape)
    _close(gradients, found, tolerance=2e-5)
    same_path(config, one, eight, 5)
    layers = config.model.text.layers + config.model.head.blocks
    over_tensor = _sums_over_tensor(config, _mesh(shape), layers, (64, 64))
    _check_traffic(compiled, params, _mesh(shape), config, min_share=0.98, over_tensor=over_tensor)


@pytest.mark.tpu
def test_the_compiler_for_tpus_adds_no_collectives(sources, tmp_path):
    """Without `per_shard` it splits fusion, the attention of Swin and the dynamic convolutions over tensor too."""
    config, chips = tiny_run.config(sources), topology("v5e:2x4")
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    compile_step(config, chips, (64, 64), "tpu", None, print, program_path=tmp_path / "step.txt")
    mesh = _mesh(config.mesh)
    over_tensor = _sums_over_tensor(config, mesh, config.model.text.layers + config.model.head.blocks, (64, 64))
    text = (tmp_path / "step.txt").read_text()
    _check_traffic(text, abstract_state(config, mesh).params, mesh, config, min_share=0.98, over_tensor=over_tensor)


@pytest.mark.slow
def test_four_micro_batches_equal_one(sources):
    """Without dropout. The images have different numbers of boxes, so means of means would differ."""
    config = tiny_run.config(sources, dropout=0.0)
    four = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulate=4))
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    batches = _batches(config, 3)
    params = stand_in.parameters(config, jax.random.key(1))
    single, split = (
        jax.device_get(first_gradients(params, batches[0], c, mesh, stand_in.objective(c))) for c in (config, four)
    )
    _close(single, split, tolerance=1e-5)
    (one, metrics), (other, other_metrics) = (_train(c, mesh, batches) for c in (config, four))
    same_path(config, one.params, other.params, 3)
    for name, value in metrics[-1].items():
        np.testing.assert_allclose(value, other_metrics[-1][name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(("ramp", "decays"), [(False, (0.9, 0.9)), (True, (1 / 10, 2 / 11))])
def test_the_average_equals_its_formula(sources, ramp, decays):
    config = tiny_run.replace(tiny_run.config(sources), "optimizer", ema_ramp=ramp)
    batches = _batches(config, 2)
    start = stand_in.parameters(config, jax.random.key(1))["head"]["box"]["kernel"]
    first, _ = _train(config, _mesh(ONE), batches[:1])
    second, _ = _train(config, _mesh(ONE), batches)
    kernel = [np.asarray(state.params["head"]["box"]["kernel"]) for state in (first, second)]
    one, two = decays
    expected = two * (one * np.asarray(start) + (1 - one) * kernel[0]) + (1 - two) * kernel[1]
    np.testing.assert_allclose(second.ema["head"]["box"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_no_averages_are_kept_without_a_decay(sources):
    config = tiny_run.config(sources)
    batches = _batches(config, 1)
    off = tiny_run.replace(config, "optimizer", ema_decay=0.0)
    assert _train(off, _mesh(ONE), batches[:1])[0].ema == {}


def test_frozen_parameters_stay_and_have_no_state(sources):
    config = tiny_run.config(sources)
    text: TextConfig = dataclasses.replace(config.model.text, frozen=True)
    config = tiny_run.replace(config, "model", text=text)
    params = stand_in.parameters(config, jax.random.key(1))
    state, _ = _train(config, _mesh(ONE), _batches(config, 2))
    np.testing.assert_array_equal(state.params["text"]["embeddings"]["word"], params["text"]["embeddings"]["word"])
    assert "text" not in state.ema and "text" not in state.optimizer.mu
    assert np.abs(state.params["head"]["box"]["kernel"] - params["head"]["box"]["kernel"]).max() > 0


def test_dropout_depends_on_seed_and_step_alone(sources):
    config = tiny_run.config(sources, dropout=0.5)
    batches = _batches(config, 1) * 2
    (_, once), (_, again) = (_train(config, _mesh(ONE), batches) for _ in range(2))
    assert once[0]["loss"] == again[0]["loss"] and once[1]["loss"] == again[1]["loss"]
    _, other = _train(tiny_run.replace(config, "train", seed=5), _mesh(ONE), batches)
    assert other[0]["loss"] != once[0]["loss"]


def test_counts_and_losses_of_each_source(sources):
    config = tiny_run.config(sources, dropout=0.0)
    (batch,) = _batches(config, 1)
    batch.valid[0] = False
    batch.dropped[1, 0] = 3
    _, (metrics,) = _train(config, _mesh(ONE), [batch])
    assert metrics["examples"] == 8 and metrics["corrupt"] == 1 and metrics["dropped/boxes_over_limit"] == 3
    assert sum(metrics[f"source/{name}/examples"] for name in NAMES) == 8
    assert sum(metrics[f"source/{name}/positives"] for name in NAMES) == metrics["positives"] > 0
    assert sum(metrics[f"source/{name}/dropped"] for name in NAMES) == 3
    name = NAMES[int(batch.source[1])]
    assert metrics[f"source/{name}/dropped/boxes_over_limit"] == metrics[f"source/{name}/dropped"] == 3
    assert metrics["invalid"].tolist() == [True] + [False] * 7 and metrics["unknown_tokens"] == 0
    assert metrics["loss"] == pytest.approx(sum(metrics[f"loss/{p}"] for p in ("token", "box", "centerness")), rel=1e-6)
    # The loss of a source equals the loss of a batch that holds it alone.
    chosen = batch._replace(valid=batch.valid & (batch.source == 0))
    _, (alone,) = _train(config, _mesh(ONE), [chosen])
    assert metrics["source/boxes/loss/token"] == pytest.approx(float(alone["loss/token"]), rel=1e-5)


@pytest.mark.slow
def test_the_share_of_clamped_offsets_is_a_metric(sources):
    config = tiny_run.config(sources, dropout=0.0)
    head = dataclasses.replace(config.model.head, offset_bound=2)
    config = tiny_run.replace(config, "model", head=head)
    (batch,) = _batches(config, 1)
    objective = glip_objective(config)
    inputs = (
        jax.eval_shape(lambda: fresh_parameters(config, _mesh(ONE))),
        batch,
        jax.eval_shape(objective.targets, batch),
        jax.random.key(0),
    )
    assert jax.eval_shape(objective.sums, *inputs).offsets_clamped.shape == (8,)
    # The stand-in has no offsets: the shares are given.
    objective = stand_in.objective(config)
    shares = jnp.linspace(0, 0.7, 8)
    with_shares = objective._replace(sums=lambda *a: objective.sums(*a)._replace(offsets_clamped=shares))
    batch.valid[7] = False
    _, (metrics,) = _train(config, _mesh(ONE), [batch], with_shares)
    assert metrics["offsets_clamped"] == pytest.approx(0.3) and not metrics["bad"].any()
    assert "offsets_clamped" not in _train(config, _mesh(ONE), [batch])[1][0]


def test_a_loss_that_is_not_finite_is_flagged_with_its_examples(sources):
    config = tiny_run.config(sources)
    (batch,) = _batches(config, 1)
    params = stand_in.parameters(config, jax.random.key(1))
    used = int(batch.tokens[3][batch.token_mask[3]][1])
    params["text"]["embeddings"]["word"] = params["text"]["embeddings"]["word"].at[used].set(jnp.nan)
    _, (metrics,) = _train(config, _mesh(ONE), [batch], params=params)
    assert not metrics["finite"] and metrics["bad"][3]
    expected = [used in row[mask] for row, mask in zip(batch.tokens, batch.token_mask)]
    assert metrics["bad"].tolist() == expected


def test_a_batch_without_a_positive_in_any_source_teaches_absence(sources):
    config = tiny_run.config(sources, dropout=0.0)
    (batch,) = _batches(config, 1)
    nothing = batch._replace(box_mask=np.zeros_like(batch.box_mask), positive_map=np.zeros_like(batch.positive_map))
    _, (before, after) = _train(config, _mesh(ONE), [nothing, nothing])
    assert before["finite"] and not before["bad"].any() and before["positives"] == 0
    assert before["loss/box"] == before["loss/centerness"] == 0 and before["loss"] == before["loss/token"] > 0
    assert np.isfinite(before["gradient_norm"]) and before["gradient_norm"] > 0
    assert after["loss/token"] < before["loss/token"]
