"""Rematerialization: what a block stores for its backward pass, and how many images an attention processes at once."""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from glip_jax.config import Remat

__all__ = ["save_activation", "images_at_once", "rematerialized"]

_SAVED = "save_activation"


def save_activation(x: Any) -> Any:
    """Marks the result of an expensive operation other than a matrix product, so that "elementwise" and "kernels" store it."""
    return checkpoint_name(x, _SAVED)


def rematerialized(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The class of a block with the policy `remat`.

    "none" stores everything. "elementwise" stores matrix products and what is marked with `save_activation`, and recomputes norms,
    activations and dropout. "kernels" stores the inputs of a block and what is marked. "blocks" stores only the inputs of a block.
    """
    policies = jax.checkpoint_policies
    marked = policies.save_only_these_names(_SAVED)
    match remat:
        case "none":
            return block
        case "elementwise":
            policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, marked)
            return nn.remat(block, prevent_cse=False, policy=policy)
        case "kernels":
            return nn.remat(block, prevent_cse=False, policy=marked)
        case "blocks":
            return nn.remat(block, prevent_cse=False)


def images_at_once(images: int, bytes_per_image: int, max_bytes: int) -> int:
    """The largest divisor of `images` for which arrays of `bytes_per_image` fit into `max_bytes`; at least 1.

    Limits how much of a batch an attention processes at once, so that its logits fit into the on-chip memory of a TPU.
    """
    sizes = [size for size in range(1, images + 1) if images % size == 0]
    return max(size for size in sizes if size == 1 or size * bytes_per_image <= max_bytes)
