"""The optimizer: groups by path, AdamW against torch's formula written out, schedule, clipping, average."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import BackboneConfig, ModelConfig, OptimizerConfig, TextConfig
from glip_jax.models.glip import GLIP
from glip_jax.training import optimizer as adamw

CONFIG = OptimizerConfig(rate=1e-3, text_rate=1e-4, decay=0.05, warmup_steps=4, warmup_factor=0.1)


def _shapes(model: ModelConfig):
    def init(key):
        inputs = (jnp.zeros((1, 128, 128, 3)), jnp.full((1, 2), 128), jnp.zeros((1, 8), int), jnp.ones((1, 8), bool))
        return GLIP(model, train=False).init(key, *inputs)["params"]

    return jax.eval_shape(init, jax.random.key(0))


@pytest.fixture(scope="module")
def glip_t():
    return _shapes(ModelConfig())


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
    assert adamw.groups(glip_t, ModelConfig(), config)[path] == pytest.approx((rate, decay))


def test_frozen_swin_stage_has_the_tensors_of_the_original(glip_t):
    """GLIP-L freezes patch embedding (4) and first stage with its downsample (29): glip-reference 1.3 [run]."""
    model = ModelConfig(backbone=BackboneConfig(frozen_stages=1))
    _, frozen = adamw.split(glip_t, model)
    paths = set(adamw.flat(frozen))
    blocks = {path for path in paths if path.startswith("backbone/stage1/")}
    assert len(paths - blocks) == 4 + 3
    assert len(blocks) == 2 * 13  # the scanned pair's two blocks
    assert "backbone/norm1/scale" not in paths
    assert {"backbone/patch_norm/bias", "backbone/merge1/reduction/kernel"} <= paths


def test_frozen_encoders_have_no_moments_and_rate_zero(glip_t):
    model = ModelConfig(text=TextConfig(frozen=True))
    trainable, frozen = adamw.split(glip_t, model)
    assert "text" not in trainable and set(frozen) == {"text"}
    assert "text" not in jax.eval_shape(lambda t: adamw.init(t, CONFIG), trainable).mu
    group = adamw.groups(glip_t, model, CONFIG)
    assert all(group[path] == (0, 0) for path in group if path.startswith("text/"))
    assert jax.tree.structure(adamw.merge(frozen, trainable)) == jax.tree.structure(glip_t)


def test_frozen_stages_of_efficientnet_and_its_norms_which_always_are():
    shapes = _shapes(ModelConfig(backbone=BackboneConfig(kind="efficientnet_lite0")))
    for stages, stem, stage3 in ((0, False, False), (3, True, True), (2, True, False)):
        model = ModelConfig(backbone=BackboneConfig(kind="efficientnet_lite0", frozen_stages=stages))
        frozen = set(adamw.flat(adamw.split(shapes, model)[1]))
        assert ("backbone/stem/kernel" in frozen) == stem
        assert ("backbone/stage3/block1/expand/kernel" in frozen) == stage3
        assert "backbone/stage7/block1/expand_norm/frozen_scale" in frozen
    whole = ModelConfig(backbone=BackboneConfig(kind="efficientnet_lite0", frozen_stages=7))
    # The norms of the outputs belong to no stage, as in Swin.
    assert set(adamw.split(shapes, whole)[0]["backbone"]) == {"norm1", "norm2", "norm3"}


def test_schedule_by_hand():
    """base w(t) 0.1^#{milestones <= t}; of 100 steps 67 and 89; w from factor at t = 0 to 1 at 4."""
    expected = {0: 0.1, 1: 0.1 * 0.75 + 0.25, 3: 0.1 * 0.25 + 0.75, 4: 1, 66: 1, 67: 0.1, 88: 0.1, 89: 0.01, 99: 0.01}
    for step, value in expected.items():
        assert float(adamw.rate_multiplier(step, 100, CONFIG)) == pytest.approx(value, rel=1e-6)
        assert float(jax.jit(lambda t: adamw.rate_multiplier(t, 100, CONFIG))(step)) == pytest.approx(value, rel=1e-6)
    assert float(adamw.rate_multiplier(0, 100, dataclasses.replace(CONFIG, warmup_steps=0))) == 1
    assert adamw.milestone_steps(50, CONFIG) == [34, 44]  # 33.5 and 44.5 round half to even, as Python's round


def test_the_decay_of_glip_l_falls_before_its_rate():
    large = OptimizerConfig(decay=0.01, decay_milestone_factor=0.1)
    for step, value in ((0, 1), (446_889, 1), (446_890, 0.1), (593_629, 0.1), (593_630, 0.01), (10**6, 0.01)):
        assert float(adamw.decay_multiplier(step, 10**6, large)) == pytest.approx(value, rel=1e-6)
        assert float(jax.jit(lambda t: adamw.decay_multiplier(t, 10**6, large))(step)) == pytest.approx(value, rel=1e-6)
    assert float(adamw.decay_multiplier(10**6, 10**6, OptimizerConfig())) == 1
    moments = adamw.init({"kernel": jnp.ones(1)}, large)
    group = {"kernel": adamw.Group(0.5, 0.2)}
    ones = {"kernel": jnp.ones(1)}
    moved, _ = adamw.apply_gradients({"kernel": jnp.zeros(1)}, moments, ones, jnp.float32(1), 0.1, group, large)
    assert float(moved["kernel"][0]) == pytest.approx(1 - 0.5 * 0.2 * 0.1)


def test_three_steps_equal_torch_formula():
    """torch.optim.AdamW: p *= 1 - lr wd; p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps), in float64."""
    rng = np.random.default_rng(0)
    params = {"head": {"box": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}}}
    params = jax.tree.map(jnp.float32, params)
    group = adamw.groups(params, ModelConfig(), CONFIG)
    state, ours = adamw.init(params, CONFIG), params
    theirs = {path: np.float64(leaf) for path, leaf in adamw.flat(params).items()}
    m = dict.fromkeys(theirs, 0.0)
    v = dict.fromkeys(theirs, 0.0)
    for t in range(1, 4):
        gradients = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
        scale = jnp.float32(0.5)
        ours, state = adamw.apply_gradients(gradients, state, ours, scale, 1.0, group, CONFIG)
        for path, g in adamw.flat(gradients).items():
            g, lr = np.float64(g), 0.5 * group[path].rate
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            theirs[path] = theirs[path] * (1 - lr * group[path].decay)
            denominator = np.sqrt(v[path]) / np.sqrt(1 - 0.999**t) + 1e-8
            theirs[path] = theirs[path] - lr / (1 - 0.9**t) * m[path] / denominator
    for path, leaf in adamw.flat(ours).items():
        # Differences in units of the learning rate: what a step moves.
        np.testing.assert_allclose((np.float64(leaf) - theirs[path]) / CONFIG.rate, 0, atol=1e-3)
    assert group["head/box/bias"].decay == 0 and group["head/box/kernel"].decay == 0.05


@pytest.mark.parametrize("bound", [0.0, 1.0, 100.0])
def test_clip_is_torch_formula(bound):
    gradients = {"a": jnp.full((4,), 3.0), "b": {"c": jnp.full((4,), 4.0)}}
    clipped, norm = adamw.clip(gradients, bound)
    assert float(norm) == pytest.approx(10.0)
    factor = min(1.0, bound / (10.0 + 1e-6)) if bound else 1.0
    np.testing.assert_allclose(clipped["a"], 3.0 * factor, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"]["c"], 4.0 * factor, rtol=1e-6)


def test_average():
    average = adamw.average({"a": jnp.float32([1.0])}, {"a": jnp.float32([2.0])}, 0.9)
    np.testing.assert_allclose(average["a"], 1.1, rtol=1e-6)
