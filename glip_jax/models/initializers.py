"""Initializers that the original inherits from the defaults of PyTorch's layers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["kaiming_uniform", "small_normal", "torch_dense", "uniform", "xavier_uniform"]


def uniform(bound: float) -> Any:
    """The initializer U(-bound, bound)."""

    def initialize(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return initialize


kaiming_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
"""PyTorch's kaiming_uniform_(a=1): U(+-sqrt(3 / fan in))."""
xavier_uniform = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.01)


def torch_dense(features: int, fan_in: int, dtype: Any, name: str, **kwargs: Any) -> nn.Dense:
    """A dense layer with the initial values of torch.nn.Linear, U(+-1/sqrt(fan in)); `kwargs`: further fields of nn.Dense."""
    start = uniform(1 / math.sqrt(fan_in))
    return nn.Dense(features, dtype=dtype, kernel_init=start, bias_init=start, name=name, **kwargs)
