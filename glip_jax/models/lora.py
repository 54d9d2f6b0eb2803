"""Low-rank deltas of matrix products (LoRA, arXiv 2106.09685): W + scale A B with A [in, rank] and B [rank, out].

B is zero at the start, so the network is the base bit for bit. Parameters lie beside those of the layer: `query_lora_a` and
`query_lora_b` beside `query`.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glip_jax.config import LoraConfig
from glip_jax.models.initializers import uniform
from glip_jax.models.tensor_parallel import column_parallel_input, row_parallel_dot_general

__all__ = ["low_rank_product", "with_low_rank_delta"]


def _factors(layer: nn.Module, name: str, inputs: int, outputs: int, lora: LoraConfig) -> tuple[Array, Array]:
    start = uniform(1 / math.sqrt(inputs))
    first = layer.param(f"{name}_lora_a", start, (inputs, lora.rank))
    return first, layer.param(f"{name}_lora_b", nn.initializers.zeros, (lora.rank, outputs))


def low_rank_product(
    layer: nn.Module, name: str, x: Float[Array, "*batch I"], outputs: int, lora: LoraConfig, dtype: Any,
    parallel: Literal["columns", "rows"],
) -> Float[Array, "*batch O"]:  # fmt: skip
    """The product scale x A B with parameters of `layer`, to be added to the output of its dense layer `name`.

    `parallel`: how the dense layer is split over `tensor` (`glip_jax.models.tensor_parallel`). `x` and `outputs` are the local ones.
    """
    first, second = (factor.astype(dtype) for factor in _factors(layer, name, x.shape[-1], outputs, lora))
    if parallel == "columns":
        # Every shard multiplies the whole A by its own columns of B.
        inner = jnp.dot(x, column_parallel_input(first))
    else:
        inner = row_parallel_dot_general(x, first, (((x.ndim - 1,), (0,)), ((), ())))
    return jnp.dot(inner, second) * jnp.asarray(lora.scale, dtype)


def with_low_rank_delta(
    layer: nn.Module, name: str, kernel: Float[Array, "I O"], lora: LoraConfig
) -> Float[Array, "I O"]:
    """W + scale A B, float32; `kernel` itself where there is no delta."""
    if not lora.rank:
        return kernel
    first, second = _factors(layer, name, kernel.shape[0], kernel.shape[1], lora)
    return kernel + lora.scale * jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)
