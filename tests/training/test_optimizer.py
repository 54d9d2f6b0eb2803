"""The optimizer: groups by path, AdamW against torch's formula written out, other optimizers, schedule, clipping, average."""

import dataclasses
import functools
import tarfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glip_jax.config import (  # fmt: skip
    BackboneConfig,
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    unflatten,
    validate,
)
from glip_jax.distributed.mesh import make_mesh, shardings
from glip_jax.io.checkpoint import Checkpoints, Saved, open_checkpoint
from glip_jax.io.checkpoint_reader import note_on_averages, share_of_start
from glip_jax.models.glip import GLIP
from glip_jax.training import optimizer as optim
from glip_jax.training.state import abstract_state, initial_state

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "old_run" / "old_run.tar.xz"
CONFIG = OptimizerConfig(rate=1e-3, text_rate=1e-4, decay=0.05, warmup_steps=4, warmup_factor=0.1)


def _shapes(model: ModelConfig):
    def init(key):
        inputs = (jnp.zeros((1, 128, 128, 3)), jnp.full((1, 2), 128), jnp.zeros((1, 8), int), jnp.ones((1, 8), bool))
        return GLIP(model, train=False).init(key, *inputs)["params"]

    return jax.eval_shape(init, jax.random.key(0))


@pytest.fixture(scope="module")
def glip_t():
    return _shapes(ModelConfig())


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("path", "rate", "decay"),
    [
        ("text/layers/query/kernel", 1e-4, 0.05),
        ("text/layers/query/bias", 2e-4, 0.0),
        ("text/embeddings/norm/scale", 1e-4, 0.05),
        ("head/tower/text/query/kernel", 1e-3, 0.05),
        ("head/tower/fusion/visual_gamma", 1e-3, 0.05),
        ("head/tower/fusion/text_key_bias", 2e-3, 0.0),
        ("head/bias_text", 2e-3, 0.0),
        ("head/bias0", 2e-3, 0.0),
        ("head/log_scale", 1e-3, 0.05),
        ("head/scales", 1e-3, 0.05),
        ("backbone/stage1/pairs/plain/bias_table", 1e-3, 0.0),
        ("backbone/stage1/pairs/plain/qkv/kernel", 5e-4, 0.05),
        ("pyramid/lateral3/kernel", 1e-3, 0.05),
    ],
)
def test_groups_follow_the_original_rules(glip_t, path, rate, decay):
    config = dataclasses.replace(CONFIG, backbone_rate_factor=0.5)
    assert optim.groups(glip_t, ModelConfig(), config)[path] == pytest.approx((rate, decay))


@pytest.mark.compiles
def test_frozen_swin_stage_has_the_tensors_of_the_original(glip_t):
    """GLIP-L freezes patch embedding (4) and first stage with its downsample (29): glip-reference 1.3 [run]."""
    model = ModelConfig(backbone=BackboneConfig(frozen_stages=1))
    _, frozen = optim.split(glip_t, model)
    paths = set(optim.flat(frozen))
    blocks = {path for path in paths if path.startswith("backbone/stage1/")}
    assert len(paths - blocks) == 4 + 3
    assert len(blocks) == 2 * 13  # the scanned pair's two blocks
    assert "backbone/norm1/scale" not in paths
    assert {"backbone/patch_norm/bias", "backbone/merge1/reduction/kernel"} <= paths


@pytest.mark.compiles
def test_frozen_encoders_have_no_moments_and_rate_zero(glip_t):
    model = ModelConfig(text=TextConfig(frozen=True))
    trainable, frozen = optim.split(glip_t, model)
    assert "text" not in trainable and set(frozen) == {"text"}
    assert "text" not in jax.eval_shape(optim.make_optimizer({}, 1, CONFIG).init, trainable).mu
    group = optim.groups(glip_t, model, CONFIG)
    assert all(group[path] == (0, 0) for path in group if path.startswith("text/"))
    assert jax.tree.structure(optim.merge(frozen, trainable)) == jax.tree.structure(glip_t)


@pytest.mark.compiles
def test_frozen_stages_of_efficientnet_and_its_norms_which_always_are():
    shapes = _shapes(ModelConfig(backbone=BackboneConfig(kind="efficientnet_lite0")))
    for stages, stem, stage3 in ((0, False, False), (3, True, True), (2, True, False)):
        model = ModelConfig(backbone=BackboneConfig(kind="efficientnet_lite0", frozen_stages=stages))
        frozen = set(optim.flat(optim.split(shapes, model)[1]))
        assert ("backbone/stem/kernel" in frozen) == stem
        assert ("backbone/stage3/block1/expand/kernel" in frozen) == stage3
        assert "backbone/stage7/block1/expand_norm/frozen_scale" in frozen
    whole = ModelConfig(backbone=BackboneConfig(kind="efficientnet_lite0", frozen_stages=7))
    # The norms of the outputs belong to no stage, as in Swin.
    assert set(optim.split(shapes, whole)[0]["backbone"]) == {"norm1", "norm2", "norm3"}


def test_schedule_by_hand():
    """base w(t) 0.1^#{milestones <= t}; of 100 steps 67 and 89; w from factor at t = 0 to 1 at 4."""
    expected = {0: 0.1, 1: 0.1 * 0.75 + 0.25, 3: 0.1 * 0.25 + 0.75, 4: 1, 66: 1, 67: 0.1, 88: 0.1, 89: 0.01, 99: 0.01}
    for step, value in expected.items():
        assert float(optim.rate_multiplier(step, 100, CONFIG)) == pytest.approx(value, rel=1e-6)
        assert float(jax.jit(lambda t: optim.rate_multiplier(t, 100, CONFIG))(step)) == pytest.approx(value, rel=1e-6)
    assert float(optim.rate_multiplier(0, 100, dataclasses.replace(CONFIG, warmup_steps=0))) == 1
    assert optim.milestone_steps(50, CONFIG) == [34, 44]  # 33.5 and 44.5 round half to even, as Python's round


def test_the_decay_of_glip_l_falls_before_its_rate():
    large = OptimizerConfig(decay=0.01, decay_milestone_factor=0.1)
    for step, value in ((0, 1), (446_889, 1), (446_890, 0.1), (593_629, 0.1), (593_630, 0.01), (10**6, 0.01)):
        assert float(optim.decay_multiplier(step, 10**6, large)) == pytest.approx(value, rel=1e-6)
        assert float(jax.jit(lambda t: optim.decay_multiplier(t, 10**6, large))(step)) == pytest.approx(value, rel=1e-6)
    assert float(optim.decay_multiplier(10**6, 10**6, OptimizerConfig())) == 1
    optimizer: Any = optim.make_optimizer({"kernel": optim.Group(0.5, 0.2)}, 10**6, large)
    ones = {"kernel": jnp.ones(1)}
    updates, _ = optimizer.update({"kernel": jnp.zeros(1)}, optimizer.init(ones), ones, step=446_890)
    assert float(updates["kernel"][0]) == pytest.approx(-0.5 * 0.2 * 0.1)


@pytest.mark.parametrize("cut", [None, (0.1, 1.5e-4)])
def test_three_steps_equal_torch_formula(cut):
    """torch.optim.AdamW: p *= 1 - lr wd; p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps), in float64.

    The cut takes a tenth of the rate of biases, 2e-3, and of the others, 1e-3, what the floor leaves.
    """
    factors = {"kernel": 0.15, "bias": 0.1} if cut else {"kernel": 1.0, "bias": 1.0}
    given = {"cut": jnp.float32(cut)} if cut else {}
    rng = np.random.default_rng(0)
    params = {"head": {"box": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}}}
    params = jax.tree.map(jnp.float32, params)
    group = optim.groups(params, ModelConfig(), CONFIG)
    config = dataclasses.replace(CONFIG, warmup_steps=0, milestones=(0.0,), milestone_factor=0.5)
    optimizer: Any = optim.make_optimizer(group, 100, config)
    state, ours = optimizer.init(params), params
    theirs = {path: np.float64(leaf) for path, leaf in optim.flat(params).items()}
    m = dict.fromkeys(theirs, 0.0)
    v = dict.fromkeys(theirs, 0.0)
    for t in range(1, 4):
        gradients = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
        updates, state = optimizer.update(gradients, state, ours, step=t, **given)
        ours: Any = optax.apply_updates(ours, updates)
        for path, g in optim.flat(gradients).items():
            g, lr = np.float64(g), 0.5 * group[path].rate * factors[path.rsplit("/", 1)[-1]]
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            theirs[path] = theirs[path] * (1 - lr * group[path].decay)
            denominator = np.sqrt(v[path]) / np.sqrt(1 - 0.999**t) + 1e-8
            theirs[path] = theirs[path] - lr / (1 - 0.9**t) * m[path] / denominator
    for path, leaf in optim.flat(ours).items():
        # Differences in units of the learning rate: what a step moves.
        np.testing.assert_allclose((np.float64(leaf) - theirs[path]) / CONFIG.rate, 0, atol=1e-3)
    assert group["head/box/bias"].decay == 0 and group["head/box/kernel"].decay == 0.05


def _formula(gradients, moments, params, group, step, steps, config):
    """The step as earlier versions wrote it: rates and decays by hand around optax.scale_by_adam."""
    directions: Any
    directions, moments = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon).update(gradients, moments)
    scale = optim.rate_multiplier(step, steps, config)
    decay = optim.decay_multiplier(step, steps, config)
    moved, directions = {}, optim.flat(directions)
    for path, leaf in optim.flat(params).items():
        moved[path] = leaf - scale * group[path].rate * (directions[path] + decay * group[path].decay * leaf)
    return optim.nested(moved), moments


def test_the_chain_equals_the_formula_of_earlier_versions():
    """All groups, through warm-up and both milestones; gradients of every size, some 0; clipped."""
    rng = np.random.default_rng(0)
    config = OptimizerConfig(
        rate=1e-3, text_rate=1e-4, backbone_rate_factor=0.3, head_text_rate_factor=0.7, decay=0.05, bias_decay=0.01,
        decay_milestone_factor=0.1, warmup_steps=3, milestones=(0.5, 0.75), clip_norm=2.0,
    )  # fmt: skip
    paths = (
        "text/layers/query/kernel", "text/layers/query/bias", "backbone/stage1/last/qkv/kernel", "backbone/norm1/scale",
        "backbone/stage4/last/qkv/bias", "head/tower/text/query/kernel", "head/tower/text/query/bias", "head/box/kernel", "head/box/bias",
    )  # fmt: skip
    whole = optim.nested({path: jnp.float32(rng.normal(size=(5, 7))) for path in paths})
    model, steps = ModelConfig(backbone=BackboneConfig(frozen_stages=1)), 12
    params, frozen = optim.split(whole, model)
    assert optim.flat(frozen).keys() == {"backbone/stage1/last/qkv/kernel"}
    group = optim.groups(whole, model, config)
    assert len(set(group.values())) == 9
    optimizer: Any = optim.make_optimizer(group, steps, config)

    @jax.jit
    def new_step(gradients, state, params, step):
        updates, state = optimizer.update(gradients, state, params, step=step)
        return optax.apply_updates(params, updates), state

    old_step = jax.jit(lambda g, m, p, step: _formula(g, m, p, group, step, steps, config))
    new, state = params, optimizer.init(params)
    old, moments = params, optax.scale_by_adam().init(params)
    assert jax.tree.structure(state) == jax.tree.structure(moments), "what a checkpoint holds is as before"
    for step in range(steps):
        sizes = 10.0 ** rng.uniform(-12, 2, (5, 7)) * rng.integers(-1, 2, (5, 7))
        gradients = jax.tree.map(lambda p, s=sizes: jnp.float32(rng.normal(size=p.shape) * s), params)
        gradients, _ = optim.clip(gradients, config.clip_norm)
        new, state = new_step(gradients, state, new, jnp.int32(step))
        old, moments = old_step(gradients, moments, old, jnp.int32(step))
        was = optim.flat(old)
        for path, leaf in optim.flat(new).items():
            assert np.abs(leaf - was[path]).max() <= 1e-6 * group[path].rate, (step, path)
    assert np.abs(new["head"]["box"]["kernel"] - params["head"]["box"]["kernel"]).max() > 1e-3
    for leaf, earlier in zip(jax.tree.leaves(state), jax.tree.leaves(moments), strict=True):
        np.testing.assert_array_equal(leaf, earlier)


@pytest.mark.slow
def test_a_run_saved_by_the_earlier_code_continues(tmp_path):
    """The checkpoint was written by commit 016e015, whose optimizer was scale_by_adam alone."""
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = str(tmp_path / "run")
    config = unflatten(open_checkpoint(workdir).settings)
    like = abstract_state(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    with Checkpoints(workdir, 1) as checkpoints:
        saved = checkpoints.restore(2, Saved(like.params, like.optimizer, like.ema))
    params, _ = optim.split(saved.params, config.model)
    gradients = jax.tree.map(lambda p: 0.01 * jnp.cos(jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params)
    group = optim.groups(saved.params, config.model, config.optimizer)
    steps = 10
    optimizer: Any = optim.make_optimizer(group, steps, config.optimizer)
    updates, state = optimizer.update(gradients, saved.optimizer, params, step=2)
    moved, moments = _formula(gradients, saved.optimizer, params, group, 2, steps, config.optimizer)
    assert int(state.count) == 3 and np.any(jax.tree.leaves(saved.optimizer.nu)[0])
    for one, other in ((optax.apply_updates(params, updates), moved), (state, moments)):
        for leaf, earlier in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(leaf, earlier)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("lion", {"b2": 0.95}),
        ("adafactor", {"min_dim_size_to_factor": 4}),
        ("contrib.muon", {}),
    ],
)
def test_any_optimizer_of_optax_gets_rates_and_decays(name, arguments):
    config = dataclasses.replace(CONFIG, name=name, arguments=arguments, warmup_steps=0)
    params = {
        "head": {"box": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}},
        "text": {"embeddings": {"word": jnp.ones((8, 8))}},
    }
    group = optim.groups(params, ModelConfig(), config)
    optimizer: Any = optim.make_optimizer(group, 100, config)
    state = optimizer.init(params)
    gradients = jax.tree.map(lambda p: jnp.linspace(-1, 1, p.size).reshape(p.shape), params)
    updates, new = optimizer.update(gradients, state, params, step=0)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.leaves(state), "a checkpoint without a state of the optimizer is one of imported weights"
    function: Any = functools.reduce(getattr, name.split("."), optax)
    decays = {"weight_decay": 0.0} if name in ("lion", "contrib.muon") else {}
    plain = function(1.0, **arguments, **decays)
    directions, _ = plain.update(gradients, plain.init(params), params)
    directions, updates = optim.flat(directions), optim.flat(updates)
    for path, (rate, decay) in group.items():
        np.testing.assert_allclose(updates[path], rate * (directions[path] - decay), rtol=1e-5, atol=1e-12)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["adafactor", "contrib.muon"])
def test_the_state_of_any_optimizer_lies_on_the_mesh(glip_t, name):
    """As its parameter where it has the shape of that, else whole on every device."""
    config = Config(optimizer=OptimizerConfig(name=name))
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    state = jax.eval_shape(lambda params: initial_state(params, config), glip_t)
    places = shardings(state, mesh)
    split = [
        (leaf.shape, place.spec)
        for leaf, place in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(places.optimizer), strict=True)
        if any(place.spec)
    ]
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert split and all(shape in shapes for shape, _ in split)
    assert places.params == shardings(glip_t, mesh)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adafacter", {}, "optimizer.name is 'adafacter': expected .* did you mean adafactor?"),
        ("chain", {}, "optimizer.name is 'chain': expected adamw"),
        ("no.such", {}, "optimizer.name is 'no.such'"),
        ("sgd", {"b1": 0.9}, r"optimizer.arguments has b1: expected arguments of optax.sgd \(momentum, "),
        ("lion", {"weight_decay": 0.1}, "has weight_decay: .*; weight_decay is optimizer.decay"),
    ],
)
def test_unknown_optimizers_and_arguments_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        optim.make_optimizer({}, 100, OptimizerConfig(name=name, arguments=arguments))


def test_settings_of_adamw_are_refused_for_other_optimizers():
    with pytest.raises(ConfigError, match=r"beta1, beta2 and epsilon are of adamw, optimizer.name is 'lion'"):
        validate(Config(optimizer=OptimizerConfig(name="lion", beta2=0.95)))


@pytest.mark.parametrize("bound", [0.0, 1.0, 100.0])
def test_clip_is_torch_formula(bound):
    gradients = {"a": jnp.full((4,), 3.0), "b": {"c": jnp.full((4,), 4.0)}}
    clipped, norm = optim.clip(gradients, bound)
    assert float(norm) == pytest.approx(10.0)
    factor = min(1.0, bound / (10.0 + 1e-6)) if bound else 1.0
    np.testing.assert_allclose(clipped["a"], 3.0 * factor, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"]["c"], 4.0 * factor, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"ema_ramp": False}, {}, {"ema_decay": 0.05}, {"ema_decay": 0.5}])
def test_the_start_has_the_share_of_the_averages_that_the_note_says(settings):
    optimizer, start, share = OptimizerConfig(**{"ema_decay": 0.99, **settings}), {"a": jnp.float32([1.0])}, []
    for step in range(40):
        start = optim.average(start, {"a": jnp.float32([0.0])}, optim.average_decay(step, optimizer))
        share.append(float(start["a"][0]))
    said = [share_of_start(step, optimizer) for step in range(1, 41)]
    np.testing.assert_allclose(share, said, rtol=1e-4, atol=1e-12)
    assert share_of_start(0, optimizer) == 1 and share_of_start(10**9, optimizer) == pytest.approx(0, abs=1e-9)
    assert share_of_start(10, OptimizerConfig(ema_decay=0.0)) == 0
    notes = [note_on_averages(step, optimizer) for step in range(1, 41)]
    assert [bool(note) for note in notes] == [value > 0.1 + 1e-6 for value in share]


def test_the_averages_of_a_short_run_are_worth_something():
    """The public report: 60 steps with the defaults, and 94 % of what every job takes was the random head."""
    assert share_of_start(60, OptimizerConfig()) < 1e-9 and not note_on_averages(60, OptimizerConfig())
    note = note_on_averages(60, OptimizerConfig(ema_ramp=False))
    assert "94% those of step 0" in note and "evaluation.parameters=raw" in note


def test_average():
    average = optim.average({"a": jnp.float32([1.0])}, {"a": jnp.float32([2.0])}, 0.9)
    np.testing.assert_allclose(average["a"], 1.1, rtol=1e-6)
