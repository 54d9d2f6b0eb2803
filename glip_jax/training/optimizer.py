"""The optimizer: an optax chain with GLIP's parameter groups and schedule; global-norm clipping and the moving average.

Parameters are nested dicts; a parameter's path is its keys joined by "/" (`text/encoder/.../kernel`). Which group a
parameter belongs to is read from its path alone (glip-reference 1.6: solver/build.py of the original), so that
`groups` can be compared name by name with a fixture of the original.
"""

import bisect
import difflib
import fnmatch
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Float32, Int

from glip_jax.config import ConfigError, ModelConfig, OptimizerConfig

__all__ = [
    "Group", "average", "average_decay", "clip", "cut_multiplier", "decay_multiplier", "flat", "frozen", "groups", "make_optimizer",
    "merge", "milestone_steps", "nested", "rate_multiplier", "split",
]  # fmt: skip

_UNSUITABLE = (
    "fromage", "lbfgs", "rprop", "contrib.cocob", "contrib.dadapt_adamw", "contrib.dog", "contrib.dowg", "contrib.momo",
    "contrib.momo_adam", "contrib.prodigy", "contrib.sophia",
)  # fmt: skip
"""Optimizers of optax that need more than gradients, choose their own rate, or whose update is not proportional to it."""

Params: TypeAlias = Mapping[str, Any]

_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_
_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")
"""Arguments of optimizers in optax that set a weight decay."""


class Group(NamedTuple):
    """Learning rate and decoupled weight decay of one parameter before the schedule; both 0 when frozen."""

    rate: float
    decay: float


def flat(params: Params) -> dict[str, Any]:
    """Path to leaf of a nested dict."""
    return dict(traverse_util.flatten_dict(params, sep="/"))  # pyright: ignore[reportArgumentType]


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flat`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def frozen(path: str, model: ModelConfig) -> bool:
    """Whether a parameter is not trained: not in `model.trainable`, a frozen text encoder, the backbone's stem and first frozen stages.

    The EfficientNet's folded BatchNorm and the states that tuned prompts start from are always frozen. Stages count from 1
    (`stage1`); a Swin stage ends with its `merge`; its output norm belongs to no stage, as in the original.
    """
    if not any(fnmatch.fnmatchcase(path, pattern) for pattern in model.trainable):
        return True
    if path in ("prompts/tokens", "prompts/embeddings"):
        return True
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

    Text encoder: `text_rate`; backbone: `rate` x `backbone_rate_factor`; then any bias (position tables and the
    head's scalar biases included): rate x `bias_rate_factor` and `bias_decay`. The BERT layers inside the head take
    the base rate (x `head_text_rate_factor`, which the original does not have). Norm scales are decayed like kernels.

    Raises ConfigError for a pattern of `model.trainable` that matches no parameter, and where none is trained.
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
    for pattern in model.trainable:
        if not fnmatch.filter(result, pattern):
            near = difflib.get_close_matches(pattern, result, 1, 0.4)
            raise ConfigError(
                f"model.trainable has {pattern!r}, which matches no parameter: expected paths with * for any run of characters, "
                f"e.g. head/tower/fusion/*{f'; near: {near[0]}' if near else ''}"
            )
    if all(frozen(path, model) for path in result):
        raise ConfigError(
            f"model.trainable is {', '.join(model.trainable) or 'empty'}: no parameter is left to be trained"
        )
    return result


def split(params: Params, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) parameters as two nested dicts without common leaves; `merge` is the inverse."""
    leaves = flat(params)
    trained = {path: leaf for path, leaf in leaves.items() if not frozen(path, model)}
    fixed = {path: leaf for path, leaf in leaves.items() if frozen(path, model)}
    return nested(trained), nested(fixed)


def merge(first: Params, second: Params) -> dict[str, Any]:
    """One nested dict of both; where a leaf is in both, `second` wins (so `merge(params, ema)` are the averages)."""
    return nested({**flat(first), **flat(second)})


def milestone_steps(steps: int, optimizer: OptimizerConfig) -> list[int]:
    """Steps at which the rate falls: the fractions of `steps`, rounded half to even as Python's round does."""
    return sorted(round(fraction * steps) for fraction in optimizer.milestones)


def rate_multiplier(step: Int[Array, ""] | int, steps: int, optimizer: OptimizerConfig) -> Float[Array, ""]:
    """Multiplier of the rate of every group at the 0-based `step` of `steps`.

    w(t) 0.1^#{milestones <= t}; w rises linearly from `warmup_factor` at t = 0 to 1 at `warmup_steps`.
    """
    passed = _passed(step, milestone_steps(steps, optimizer))
    done = jnp.float32(step) / max(optimizer.warmup_steps, 1)
    warm = jnp.where(step < optimizer.warmup_steps, optimizer.warmup_factor * (1 - done) + done, 1.0)
    return (warm * jnp.float32(optimizer.milestone_factor) ** passed).astype(jnp.float32)


def cut_multiplier(rate: float, cut: Float32[Array, "2"]) -> Float[Array, ""]:
    """Multiplier of a group's `rate` after cuts. `cut`: the factor on all rates, and the rate below which none is cut.

    The last is `min_lr` of torch's ReduceLROnPlateau: a group that reaches it stays there, one below it is not cut.
    """
    return jnp.minimum(1.0, jnp.maximum(cut[0], cut[1] / rate)) if rate else jnp.float32(1)


def decay_multiplier(step: Int[Array, ""] | int, steps: int, optimizer: OptimizerConfig) -> Float[Array, ""]:
    """Multiplier of the decay of every group at the 0-based `step` of `steps`: a schedule of GLIP-L.

    `decay_milestone_factor` at step t for each milestone m with t >= `decay_milestone_share` m (glip-reference 1.6).
    """
    falls = [math.ceil(optimizer.decay_milestone_share * m) for m in milestone_steps(steps, optimizer)]
    return (jnp.float32(optimizer.decay_milestone_factor) ** _passed(step, falls)).astype(jnp.float32)


def _passed(step: Int[Array, ""] | int, at: Sequence[int]) -> Any:
    """How many of the ascending steps `at` have been reached."""
    if isinstance(step, int):
        return bisect.bisect_right(at, step)
    return jnp.sum(jnp.asarray(at, jnp.int32) <= step)


def clip(gradients: Params, bound: float) -> tuple[Any, Float32[Array, ""]]:
    """(clipped gradients, global norm before clipping); torch's coefficient min(1, bound / (norm + 1e-6))."""
    norm = optax.global_norm(gradients).astype(jnp.float32)
    if bound == 0:
        return gradients, norm
    coefficient = jnp.minimum(1.0, bound / (norm + _CLIP_EPSILON))
    return jax.tree.map(lambda g: g * coefficient, gradients), norm


def make_optimizer(
    group: Mapping[str, Group], steps: int, config: OptimizerConfig
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run of `steps` steps, for trainable parameters with the paths of `group`.

    A chain of three: `config.name` of optax at rate 1 and without decay, the decoupled decay of each group, the rate of each
    group. So AdamW's step is p - r (m̂ / (√v̂ + ε) + d p), as in torch.optim.AdamW, with rate r and decay d by group and step.

    Only for optimizers whose update is proportional to the learning rate. The state is that of the optimizer alone: of AdamW an
    optax.ScaleByAdamState, as in checkpoints written before there was a chain, so these resume.

    `update(gradients, state, parameters, step=step)` takes clipped gradients and the 0-based step of the run, which the schedules
    depend on; `cut`, if it is given, cuts the rates of the groups (`cut_multiplier`).

    Raises:
        ConfigError: `config.name` is no optimizer of optax, or does not take `config.arguments`.
    """

    def add_decay(updates: Any, state: Any, params: Any = None, *, step: Any = 0, **_: Any) -> tuple[Any, Any]:
        multiplier, leaves = decay_multiplier(step, steps, config), flat(params)
        decayed = {path: u - multiplier * group[path].decay * leaves[path] for path, u in flat(updates).items()}
        return nested(decayed), state

    def scale_by_rate(
        updates: Any, state: Any, params: Any = None, *, step: Any = 0, cut: Any = None, **_: Any
    ) -> tuple[Any, Any]:
        del params
        multiplier = rate_multiplier(step, steps, config)
        scaled = {path: multiplier * group[path].rate * u for path, u in flat(updates).items()}
        if cut is not None:
            scaled = {path: cut_multiplier(group[path].rate, cut) * u for path, u in scaled.items()}
        return nested(scaled), state

    chain = optax.chain(
        _unit_rate_optimizer(config),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, add_decay),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, scale_by_rate),
    )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        structure = jax.tree.structure(jax.eval_shape(chain.init, params))
        updates, new = chain.update(updates, jax.tree.unflatten(structure, jax.tree.leaves(state)), params, **extra)
        return updates, _without_empty(new)

    return optax.GradientTransformationExtraArgs(lambda params: _without_empty(chain.init(params)), update)


def _without_empty(state: Any) -> Any:
    """The state of a chain without its empty parts; a part that is the only one stands for the whole."""
    if type(state) is not tuple:
        return state
    parts = [part for part in map(_without_empty, state) if jax.tree.leaves(part)]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _optimizers(prefix: str, module: Any) -> dict[str, Any]:
    """The optimizers of a module of optax by name: functions of a learning rate, except those that need more than gradients."""
    functions = {f"{prefix}{name}": getattr(module, name) for name in dir(module) if not name.startswith("_")}
    return {
        name: function
        for name, function in functions.items()
        if inspect.isfunction(function)
        and "learning_rate" in inspect.signature(function).parameters
        and not name.removeprefix("contrib.").startswith(("scale_by_", "schedule_free"))
        and name not in _UNSUITABLE
    }


def _unit_rate_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """`config.name` of optax with learning rate 1 and no weight decay."""
    known = {**_optimizers("", optax), **_optimizers("contrib.", optax.contrib)}
    arguments: dict[str, Any] = dict(config.arguments)
    if config.name not in known:
        near = difflib.get_close_matches(config.name, known, 1)
        raise ConfigError(
            f"optimizer.name is {config.name!r}: expected adamw or another optimizer of optax, such as sgd, lion, adafactor "
            f"or contrib.muon{f'; did you mean {near[0]}?' if near else ''}"
        )
    # Without decay: that is added by group.
    function = optax.adam if config.name == "adamw" else known[config.name]
    elsewhere = {"learning_rate": "rate", **dict.fromkeys(_DECAYS, "decay")}
    if config.name == "adamw":
        elsewhere |= {"b1": "beta1", "b2": "beta2", "eps": "epsilon"}
    parameters = inspect.signature(function).parameters
    taken = [name for name in parameters if name not in elsewhere]
    unknown = sorted(set(arguments) - set(taken))
    if unknown:
        hints = "".join(f"; {name} is optimizer.{elsewhere[name]}" for name in unknown if name in elsewhere)
        raise ConfigError(
            f"optimizer.arguments has {', '.join(unknown)}: expected arguments of optax.{config.name} "
            f"({', '.join(taken)}){hints}"
        )
    if config.name == "adamw":
        # optax adds epsilon outside the root, after bias correction, as torch does.
        arguments |= {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
    arguments |= {name: 0.0 for name in _DECAYS if name in parameters}
    result = function(learning_rate=1.0, **arguments)
    if not jax.tree.leaves(jax.eval_shape(result.init, {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)})):
        # A checkpoint cannot hold an empty state, so a step counter is added.
        result = optax.chain(result, optax.scale_by_schedule(lambda _: 1.0))
    return result


def average_decay(step: Int[Array, ""] | int, optimizer: OptimizerConfig) -> Float[Array, ""] | float:
    """Decay of the moving average at the 0-based `step`: `ema_decay`, with the ramp at most (1 + step) / (10 + step)."""
    n = jnp.float32(step)
    return jnp.minimum(optimizer.ema_decay, (1 + n) / (10 + n)) if optimizer.ema_ramp else optimizer.ema_decay


def average(ema: Params, trainable: Params, decay: Float[Array, ""] | float) -> Any:
    """Moving average e <- decay e + (1 - decay) p; in the original with the same decay at every step (glip-reference 1.6)."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, trainable)
