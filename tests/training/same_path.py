"""Compares the parameters of two runs of one config, up to what another order of sums does to the steps of Adam."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from glip_jax.config import Config
from glip_jax.training import optimizer as optim


def same_path(config: Config, one: Mapping[str, Any], other: Mapping[str, Any], steps: int) -> None:
    """Asserts that each parameter differs by at most 1 % of its learning rate, summed over the steps.

    The biases of the keys of attention are left out: they add the same value to all logits of a softmax, so their gradient is
    rounding alone, and Adam amplifies it to whole steps.
    """
    multiplier = sum(float(optim.rate_multiplier(step, config.train.steps, config.optimizer)) for step in range(steps))
    groups, flat = optim.groups(dict(one), config.model, config.optimizer), optim.flat(dict(other))
    worst = {}
    for path, leaf in optim.flat(dict(one)).items():
        difference = np.abs(leaf - flat[path])
        if path.endswith("/key/bias"):
            continue
        if path.endswith("/qkv/bias"):
            difference = np.delete(difference.reshape(*leaf.shape[:-1], 3, -1), 1, axis=-2)
        allowed = 0.01 * multiplier * groups[path].rate
        if not difference.max() <= allowed:  # false for NaN too
            worst[path] = float(difference.max() / allowed)
    assert not worst, f"differences in units of what is allowed: {worst}"
