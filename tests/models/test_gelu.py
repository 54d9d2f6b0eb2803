"""GELU of float32 is that of JAX; of bfloat16 it is that of float32, rounded; so are their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np

from glip_jax.models.gelu import _probability, gelu


def test_the_probability_is_that_of_the_error_function() -> None:
    x = jnp.linspace(-8, 8, 40_001)
    exact = 0.5 * (1.0 + jax.lax.erf(x.astype(jnp.float32) / np.sqrt(2.0)))
    assert np.abs(_probability(x, narrow=True)[0] - exact).max() < 4e-7


def test_bfloat16_is_float32_rounded() -> None:
    # Every bfloat16 of moderate size.
    x = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16).view(jnp.bfloat16)
    x = x[np.isfinite(np.asarray(x, np.float32)) & (np.abs(np.asarray(x, np.float32)) < 1e4)]
    wide = x.astype(jnp.float32)
    exact = (
        jax.nn.gelu(wide, approximate=False),
        jax.vmap(jax.grad(lambda v: jax.nn.gelu(v, approximate=False)))(wide),
    )
    for found, wanted in zip((gelu(x), jax.vmap(jax.grad(gelu))(x)), exact):
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        assert found.dtype == np.float32 and np.abs(found - wanted).max() / 1e4 < 2**-8
        assert (np.abs(found - wanted) <= 2**-8 * np.abs(wanted) + 1e-6).all()


def test_float32_is_that_of_jax() -> None:
    x = jnp.linspace(-12, 12, 10_001)
    exact = jax.nn.gelu(x, approximate=False), jax.vmap(jax.grad(lambda v: jax.nn.gelu(v, approximate=False)))(x)
    for found, wanted in zip((gelu(x), jax.vmap(jax.grad(gelu))(x)), exact):
        # 1 + erf is rounded to 6e-8, as in PyTorch; that is multiplied by up to 12.
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_backward_pass_stores_one_array() -> None:
    stored = jax.eval_shape(lambda x: jax.vjp(gelu, x)[1], jax.ShapeDtypeStruct((40, 30), jnp.float32))
    assert [x.shape for x in jax.tree.leaves(stored) if x.size > 1] == [(40, 30)]
