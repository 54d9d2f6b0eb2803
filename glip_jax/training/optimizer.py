"""AdamW with GLIP's parameter groups, its schedule, global-norm clipping and the moving average.

Parameters are nested dicts; a parameter's path is its keys joined by "/" (`text/encoder/.../kernel`). Which group a
parameter belongs to is read from its path alone (glip-reference 1.6: solver/build.py of the original), so that
`groups` can be compared name by name with a fixture of the original.
"""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Float32, Int

from glip_jax.config import ModelConfig, OptimizerConfig

__all__ = [
    "Group",
    "apply_gradients",
    "average",
    "clip",
    "decay_multiplier",
    "flat",
    "frozen",
    "groups",
    "init",
    "merge",
    "milestone_steps",
    "nested",
    "rate_multiplier",
    "split",
]

Params: TypeAlias = Mapping[str, Any]

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


class Group(NamedTuple):
    """What AdamW does to one parameter before the schedule: its rate and its decoupled decay; both 0 when frozen."""

    rate: float
    decay: float


def flat(params: Params) -> dict[str, Any]:
    """Path to leaf of a nested dict."""
    return dict(traverse_util.flatten_dict(params, sep="/"))  # pyright: ignore[reportArgumentType]


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flat`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def frozen(path: str, model: ModelConfig) -> bool:
    """Whether a parameter is never trained: a frozen text tower, the backbone's stem and its first frozen stages.

    The EfficientNet's folded BatchNorm is always frozen. Stages count from 1 (`stage1`); a Swin stage ends with its
    `merge`; its output norm belongs to no stage, as in the original.
    """
    if path.startswith("text/"):
        return model.text.frozen
    if not path.startswith("backbone/"):
        return False
    if path.rsplit("/", 1)[-1] in ("frozen_scale", "frozen_shift"):
        return True
    stages = model.backbone.frozen_stages
    if match := re.match(r"backbone/(?:stage|merge)(\d+)/", path):
        return int(match[1]) <= stages
    return stages > 0 and path.startswith(("backbone/stem", "backbone/patch"))


def groups(params: Params, model: ModelConfig, optimizer: OptimizerConfig) -> dict[str, Group]:
    """Rate and decay of every parameter path, by the original's ordered rules (glip-reference 1.6).

    Text tower: `text_rate`; backbone: `rate` x `backbone_rate_factor`; then any bias (position tables and the
    head's scalar biases included): rate x `bias_rate_factor` and `bias_decay`. The BERT layers inside the head take
    the base rate (x `head_text_rate_factor`, which the original does not have). Norm scales are decayed like kernels.
    """
    result = {}
    for path in flat(params):
        rate, decay = optimizer.rate, optimizer.decay
        if path.startswith("text/"):
            rate = optimizer.text_rate
        elif path.startswith("backbone/"):
            rate = optimizer.rate * optimizer.backbone_rate_factor
        elif path.startswith("head/tower/text/"):
            rate = optimizer.rate * optimizer.head_text_rate_factor
        if "bias" in path.rsplit("/", 1)[-1]:  # bias, bias_table, bias_text, bias0, *_bias
            rate, decay = rate * optimizer.bias_rate_factor, optimizer.bias_decay
        result[path] = Group(0.0, 0.0) if frozen(path, model) else Group(rate, decay)
    return result


def split(params: Params, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) parameters as two nested dicts without common leaves; `merge` is the inverse."""
    leaves = flat(params)
    trained = {path: leaf for path, leaf in leaves.items() if not frozen(path, model)}
    held = {path: leaf for path, leaf in leaves.items() if frozen(path, model)}
    return nested(trained), nested(held)


def merge(first: Params, second: Params) -> dict[str, Any]:
    """One nested dict of both; where a leaf is in both, `second` wins (so `merge(params, ema)` are the averages)."""
    return nested({**flat(first), **flat(second)})


def milestone_steps(steps: int, optimizer: OptimizerConfig) -> list[int]:
    """Steps at which the rate falls: the fractions of `steps`, rounded half to even as Python's round does."""
    return sorted(round(fraction * steps) for fraction in optimizer.milestones)


def rate_multiplier(step: Int[Array, ""] | int, steps: int, optimizer: OptimizerConfig) -> Float[Array, ""]:
    """What every group's rate is multiplied by at the 0-based `step` of `steps`.

    w(t) 0.1^#{milestones <= t}; w rises linearly from `warmup_factor` at t = 0 to 1 at `warmup_steps`.
    """
    passed = _passed(step, milestone_steps(steps, optimizer))
    done = jnp.float32(step) / max(optimizer.warmup_steps, 1)
    warm = jnp.where(step < optimizer.warmup_steps, optimizer.warmup_factor * (1 - done) + done, 1.0)
    return (warm * jnp.float32(optimizer.milestone_factor) ** passed).astype(jnp.float32)


def decay_multiplier(step: Int[Array, ""] | int, steps: int, optimizer: OptimizerConfig) -> Float[Array, ""]:
    """What every group's decay is multiplied by at the 0-based `step` of `steps`: GLIP-L's schedule of its own.

    `decay_milestone_factor` at step t for each milestone m with t >= `decay_milestone_share` m (glip-reference 1.6).
    """
    falls = [math.ceil(optimizer.decay_milestone_share * m) for m in milestone_steps(steps, optimizer)]
    return (jnp.float32(optimizer.decay_milestone_factor) ** _passed(step, falls)).astype(jnp.float32)


def _passed(step: Int[Array, ""] | int, at: Sequence[int]) -> Any:
    """How many of the ascending steps `at` have been reached."""
    if isinstance(step, int):
        return bisect.bisect_right(at, step)
    return jnp.sum(jnp.asarray(at, jnp.int32) <= step)


def init(trainable: Params, optimizer: OptimizerConfig) -> optax.ScaleByAdamState:
    """Zero moments of the trainable parameters."""
    return _adam(optimizer).init(trainable)  # pyright: ignore[reportReturnType]


def clip(gradients: Params, bound: float) -> tuple[Any, Float32[Array, ""]]:
    """(clipped gradients, global norm before clipping); torch's coefficient min(1, bound / (norm + 1e-6))."""
    norm = optax.global_norm(gradients).astype(jnp.float32)
    if bound == 0:
        return gradients, norm
    coefficient = jnp.minimum(1.0, bound / (norm + _CLIP_EPSILON))
    return jax.tree.map(lambda g: g * coefficient, gradients), norm


def apply_gradients(
    gradients: Params,
    moments: optax.ScaleByAdamState,
    trainable: Params,
    multiplier: Float[Array, ""],
    decay_multiplier: Float[Array, ""] | float,
    group: Mapping[str, Group],
    optimizer: OptimizerConfig,
) -> tuple[dict[str, Any], optax.ScaleByAdamState]:
    """One AdamW step as torch.optim.AdamW makes it: p - r d p - r m̂ / (√v̂ + ε), r and d the group's, multiplied.

    `gradients` are already clipped. Returns (new parameters, new moments), both of the trainable parameters only.
    """
    directions, moments = _adam(optimizer).update(gradients, moments)  # pyright: ignore[reportAssignmentType, reportArgumentType]
    flat_directions = flat(directions)  # pyright: ignore[reportArgumentType]

    def moved(path: str, parameter: Float32[Array, "..."]) -> Float32[Array, "..."]:
        rate, decay = group[path]
        return parameter - multiplier * rate * (flat_directions[path] + decay_multiplier * decay * parameter)

    leaves = {path: moved(path, leaf) for path, leaf in flat(trainable).items()}
    return nested(leaves), moments


def average(ema: Params, trainable: Params, decay: float) -> Any:
    """Moving average e <- decay e + (1 - decay) p, without warm-up (glip-reference 1.6)."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trainable)


def _adam(optimizer: OptimizerConfig) -> optax.GradientTransformation:
    # eps is added outside the root, after bias correction: the same formula as torch's.
    return optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)
