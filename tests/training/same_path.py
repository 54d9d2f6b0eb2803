"""Whether two runs of one config went the same way, up to what other orders of sums do to Adam's steps."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from glip_jax.config import Config
from glip_jax.training import optimizer as adamw


def same_path(config: Config, one: Mapping[str, Any], other: Mapping[str, Any], steps: int) -> None:
    """Asserts that each parameter is within 1 % of its own learning rate, summed over the steps.

    But for the biases of attention's keys: they add the same to all logits of a softmax, so their gradient is rounding
    alone, of which Adam makes whole steps.
    """
    multiplier = sum(float(adamw.rate_multiplier(step, config.train.steps, config.optimizer)) for step in range(steps))
    groups, flat = adamw.groups(dict(one), config.model, config.optimizer), adamw.flat(dict(other))
    worst = {}
    for path, leaf in adamw.flat(dict(one)).items():
        difference = np.abs(leaf - flat[path])
        if path.endswith("/key/bias"):
            continue
        if path.endswith("/qkv/bias"):
            difference = np.delete(difference.reshape(*leaf.shape[:-1], 3, -1), 1, axis=-2)
        allowed = 0.01 * multiplier * groups[path].rate
        if not difference.max() <= allowed:  # not a number neither
            worst[path] = float(difference.max() / allowed)
    assert not worst, f"times what is allowed: {worst}"
