"""The folded fusion equals the plain one, with dropout as well, and never stores the whole attention map."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import FusionConfig
from glip_jax.models import fusion
from glip_jax.models.dropout import words_of
from glip_jax.models.fusion import Fusion
from glip_jax.models.kernels import blockwise

pytestmark = pytest.mark.compiles

IMAGES, LOCATIONS, TOKENS, CHANNELS, TEXT = 2, 40, 9, 16, 12
CONFIG = FusionConfig(width=24, heads=3, dropout=0.25)


def _plain(params: Any, visual: Any, text: Any, valid: Any, mask: Any, drop: Any) -> tuple[Any, Any]:
    """Fusion with six dense layers, as in glip-reference 2.5; `drop`: two dropout factors per head."""
    p = {k: v for k, v in params.items() if not isinstance(v, dict)}
    depth = CONFIG.width // CONFIG.heads

    def norm(x: Any, name: str) -> Any:
        y = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        return y.apply({"params": params[name]}, x)

    def dense(x: Any, name: str) -> Any:
        return x @ p[f"{name}_kernel"] + p[f"{name}_bias"]

    def split(x: Any) -> Any:
        return x.reshape(*x.shape[:2], CONFIG.heads, depth).transpose(0, 2, 1, 3)

    v0, l0 = norm(visual, "visual_norm"), norm(text, "text_norm")
    query, key = split(dense(v0, "visual_query") * depth**-0.5), split(dense(l0, "text_key"))
    visual_value, text_value = split(dense(v0, "visual_value")), split(dense(l0, "text_value"))
    logits = jnp.einsum("bhad,bhtd->bhat", query, key)
    over_text = jax.nn.softmax(jnp.where(mask[:, None, None, :], logits + 1.0, -9e15), -1) * drop[0]
    over_image = jax.nn.softmax(jnp.where(valid[:, None, :, None], logits, -9e15), 2) * drop[1]
    for_image = jnp.einsum("bhat,bhtd->bahd", over_text, text_value).reshape(*visual.shape[:2], -1)
    for_text = jnp.einsum("bhat,bhad->bthd", over_image, visual_value).reshape(*text.shape[:2], -1)
    return (
        v0 + p["visual_gamma"] * dense(for_image, "visual_output"),
        l0 + p["text_gamma"] * dense(for_text, "text_output"),
    )


def _inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    valid, mask = np.ones((IMAGES, LOCATIONS), bool), np.ones((IMAGES, TOKENS), bool)
    valid[0, 30:], mask[1, 5:] = False, False
    return (
        jnp.asarray(rng.normal(size=(IMAGES, LOCATIONS, CHANNELS)), jnp.float32),
        jnp.asarray(rng.normal(size=(IMAGES, TOKENS, TEXT)), jnp.float32),
        jnp.asarray(valid),
        jnp.asarray(mask),
    )


def _params(module: Fusion) -> Any:
    shapes = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *_inputs())["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


def _set_sizes(monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    if parts == "blocks":  # of 14 locations; two rows fill the last one
        monkeypatch.setattr(fusion, "_CACHED_LOGITS_BYTES", 4 * TOKENS * 14)
    if parts == "images":
        monkeypatch.setattr(fusion, "_MAX_LOGITS_BYTES", 0)


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["whole", "images", "blocks"])
def test_folded_equals_plain_forward_and_backward(monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    _set_sizes(monkeypatch, parts)
    module = Fusion(CONFIG, train=False, dtype=jnp.float32)
    params, inputs = _params(module), _inputs()
    ones = (jnp.ones(()), jnp.ones(()))
    rng = np.random.default_rng(2)
    weights = [rng.normal(size=x.shape) for x in inputs[:2]]

    def loss(run: Any, params: Any, visual: Any, text: Any) -> Any:
        outs = run(params, visual, text)
        return sum((out * w).sum() for out, w in zip(outs, weights)), outs

    folded = jax.value_and_grad(
        lambda *a: loss(lambda p, v, t: module.apply({"params": p}, v, t, *inputs[2:]), *a), (0, 1, 2), has_aux=True
    )
    plain = jax.value_and_grad(
        lambda *a: loss(lambda p, v, t: _plain(p, v, t, *inputs[2:], ones), *a), (0, 1, 2), has_aux=True
    )
    found, wanted = folded(params, *inputs[:2]), plain(params, *inputs[:2])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("parts", ["whole", "images", "blocks"])
def test_folded_equals_plain_under_dropout(monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    """With the same weights dropped, which tests the scaling of the bias of the value; with gradients, whose formulas are written out."""
    _set_sizes(monkeypatch, parts)
    rng = np.random.default_rng(3)
    factors = (rng.uniform(size=(CONFIG.heads, 2, IMAGES, LOCATIONS, TOKENS)) > 0.25) / 0.75
    module = Fusion(CONFIG, train=True, dtype=jnp.float32)
    params, inputs = _params(Fusion(CONFIG, train=False, dtype=jnp.float32)), _inputs()
    # The module makes a key per head and image; these replacements use their indices instead.
    monkeypatch.setattr(fusion.jax.random, "split", lambda *_: jnp.arange(CONFIG.heads))
    monkeypatch.setattr(fusion, "example_keys", lambda head, images: IMAGES * head + jnp.arange(images))
    monkeypatch.setattr(fusion, "words_of", lambda key: jnp.stack([key, key]).astype(jnp.uint32))
    table = jnp.asarray(factors, bool).swapaxes(1, 2).reshape(-1, 2, LOCATIONS, TOKENS)
    table = jnp.pad(table, ((0, 0), (0, 0), (0, LOCATIONS), (0, 0)))

    def kept(words: Any, shape: Any, rate: float, begin: Any) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(table[words[:, 0]], begin, shape[1], axis=2)
        return rows[:, 0], rows[:, 1]

    monkeypatch.setattr(blockwise, "_kept", kept)
    per_image = jnp.asarray(factors.transpose(1, 2, 0, 3, 4))
    weights = [rng.normal(size=x.shape) for x in inputs[:2]]

    def folded(params: Any, visual: Any, text: Any) -> Any:
        return module.apply({"params": params}, visual, text, *inputs[2:], rngs={"dropout": jax.random.key(0)})

    def plain(params: Any, visual: Any, text: Any) -> Any:
        return _plain(params, visual, text, *inputs[2:], per_image)

    (found, backward), (wanted, plain_backward) = (jax.vjp(f, params, *inputs[:2]) for f in (folded, plain))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    gradients = (jax.tree.leaves(f(tuple(map(jnp.float32, weights)))) for f in (backward, plain_backward))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1.0, float(jnp.abs(b).max())))


def test_dropout_keeps_the_mean() -> None:
    weights = jnp.ones((4, 100, 100))
    both = blockwise._kept(jax.vmap(words_of)(jax.random.split(jax.random.key(0), 4)), weights.shape, 0.1)
    for kept in both:
        dropped = blockwise._dropped(kept, weights, 0.1)
        assert abs(float(dropped.mean()) - 1) < 0.01
        assert abs(float((dropped == 0).mean()) - 0.1) < 0.01
    # The directions drop independently: both keep 0.9 x 0.9.
    assert both[0] is not None and both[1] is not None
    assert abs(float((both[0] & both[1]).mean()) - 0.81) < 0.01


def test_peak_memory_is_of_one_head_not_of_all() -> None:
    """Six layers, forward and backward: temporaries stay below what the eight heads' maps alone would take."""
    config, locations, tokens, channels = FusionConfig(width=256, heads=8, dropout=0.0), 2048, 64, 32
    module = Fusion(config, train=False, dtype=jnp.float32)
    shapes = (
        jax.ShapeDtypeStruct((1, locations, channels), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens, channels), jnp.float32),
        jax.ShapeDtypeStruct((1, locations), jnp.bool_),
        jax.ShapeDtypeStruct((1, tokens), jnp.bool_),
    )
    params = jax.eval_shape(module.init, jax.random.key(0), *shapes)["params"]

    def loss(params: Any, visual: Any, text: Any, valid: Any, mask: Any) -> Any:
        def layer(state: Any, _: None) -> Any:
            return module.apply({"params": params}, *state, valid, mask), None

        (visual, text), _ = jax.lax.scan(layer, (visual, text), None, length=6)
        return visual.sum() + text.sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, *shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    maps_of_all_layers = 6 * 8 * locations * tokens * 4
    maps_of_one_head = locations * tokens * 4
    assert memory.temp_size_in_bytes < 0.8 * maps_of_all_layers
    assert memory.temp_size_in_bytes > maps_of_one_head  # the bound is about something


def test_drop_path_keeps_whole_examples_or_nothing() -> None:
    config = dataclasses.replace(CONFIG, dropout=0.0, drop_path=0.5)
    params, (visual, text, valid, mask) = _params(Fusion(CONFIG, train=False, dtype=jnp.float32)), _inputs()
    visual, text, valid, mask = (jnp.concatenate([x[:1]] * 16) for x in (visual, text, valid, mask))

    def run(train: bool, config: FusionConfig) -> Any:
        module = Fusion(config, train=train, dtype=jnp.float32)
        return module.apply({"params": params}, visual, text, valid, mask, rngs={"dropout": jax.random.key(3)})

    plain: Any = run(False, config)
    np.testing.assert_array_equal(plain[0], run(False, CONFIG)[0])
    for found, whole, norm, x in zip(run(True, config), plain, ("visual_norm", "text_norm"), (visual, text)):
        start = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply({"params": params[norm]}, x)
        change, wanted = np.asarray(found - start), np.asarray(whole - start)
        kept = np.abs(change).max((1, 2)) > 0
        assert 2 < kept.sum() < 14
        np.testing.assert_allclose(change[kept], 2 * wanted[kept], atol=1e-5)
