"""The activation of Swin's and BERT's feed-forward layers: GELU (arXiv 1606.08415) by the error function, as in the original."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["gelu"]

_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _probability(x: Float[Array, "..."], narrow: bool) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(cumulative probability, density) of the normal distribution of float32; `narrow`: to 1e-7, with what the density needs anyway."""
    z = jnp.abs(x) * math.sqrt(0.5)
    power = jnp.exp(-z * z)
    density = power * (2 * math.pi) ** -0.5
    if not narrow:
        return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))), density
    # Abramowitz and Stegun, 7.1.26
    t = 1.0 / (1.0 + 0.3275911 * z)
    sum_ = jnp.zeros_like(t)
    for coefficient in _COEFFICIENTS:
        sum_ = (sum_ + coefficient) * t
    tail = 0.5 * sum_ * power
    return jnp.where(x < 0, tail, 1.0 - tail), density


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """X times the normal distribution's cumulative probability at x, in float32; its backward pass stores one array, the derivative."""
    wide = x.astype(jnp.float32)
    return (wide * _probability(wide, x.dtype == jnp.bfloat16)[0]).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    wide = x.astype(jnp.float32)
    cumulative, density = _probability(wide, x.dtype == jnp.bfloat16)
    return (wide * cumulative).astype(x.dtype), (cumulative + wide * density).astype(x.dtype) * dx
