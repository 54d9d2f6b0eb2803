"""The activation of Swin's and BERT's feed-forward layers: GELU (arXiv 1606.08415) by the error function, as in the original."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["gelu"]

_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """X times the normal distribution's cumulative probability at x; of bfloat16 with `_probability`, in about half the operations."""
    return _gelu16(x) if x.dtype == jnp.bfloat16 else jax.nn.gelu(x, approximate=False)


def _probability(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(cumulative probability, density) of the normal distribution, float32, to 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    z = jnp.abs(x) * math.sqrt(0.5)
    power = jnp.exp(-z * z)
    t = 1.0 / (1.0 + 0.3275911 * z)
    sum_ = jnp.zeros_like(t)
    for coefficient in _COEFFICIENTS:
        sum_ = (sum_ + coefficient) * t
    tail = 0.5 * sum_ * power
    return jnp.where(x < 0, tail, 1.0 - tail), power * (2 * math.pi) ** -0.5


@jax.custom_jvp
def _gelu16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    wide = x.astype(jnp.float32)
    return (wide * _probability(wide)[0]).astype(x.dtype)


@_gelu16.defjvp
def _gelu16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.float32)
    cumulative, density = _probability(wide)
    return (wide * cumulative).astype(x.dtype), (cumulative + wide * density).astype(x.dtype) * dx
