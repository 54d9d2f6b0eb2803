"""What a block keeps for its backward pass, and what it computes again (rematerialisation)."""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from glip_jax.config import Remat

__all__ = ["save_activation", "images_at_once", "rematerialized"]

_SAVED = "save_activation"


def save_activation(x: Any) -> Any:
    """Marks the result of something expensive that is not a plain matrix product: `remat="elementwise"` keeps it."""
    return checkpoint_name(x, _SAVED)


def rematerialized(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The class of a block that stores what `remat` says.

    "none" keeps everything, "elementwise" keeps matrix products and what is marked `save_activation` and computes norms,
    activations and dropout again, "blocks" keeps a block's inputs only.
    """
    match remat:
        case "none":
            return block
        case "elementwise":
            policies = jax.checkpoint_policies
            kept = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(_SAVED)
            )
            return nn.remat(block, prevent_cse=False, policy=kept)
        case "blocks":
            return nn.remat(block, prevent_cse=False)


# How much of a batch goes through an attention at once, so that its logits stay in a TPU's on-chip memory.


def images_at_once(images: int, each: int, most: int) -> int:
    """The largest divisor of `images` of whose arrays, `each` bytes an image, no more than `most` bytes are there; at least 1."""
    return max(size for size in range(1, images + 1) if images % size == 0 and (size == 1 or size * each <= most))
