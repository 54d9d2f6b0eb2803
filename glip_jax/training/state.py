"""The training state as one pytree: shapes and shardings, random initial values, the parameters to evaluate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glip_jax.config import Config
from glip_jax.distributed.mesh import abstract, shardings
from glip_jax.models.glip import GLIP
from glip_jax.training import optimizer as optim

__all__ = ["State", "abstract_state", "evaluation_parameters", "fresh_parameters", "fresh_state", "initial_state"]


class State(NamedTuple):
    """Everything that training changes."""

    params: Any
    """Nested dict of float32 arrays, frozen ones included."""
    optimizer: Any
    """State of the optimizer for the trainable parameters (AdamW: its moments and the step count)."""
    ema: Any
    """Moving averages of the trainable parameters; {} when off."""
    step: Any
    """Int32[]: completed steps."""


def fresh_parameters(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Parameters at random initial values, created with their shardings."""
    shapes, init = _initializer(config)
    return jax.jit(init, out_shardings=shardings(shapes, mesh))(jax.random.key(config.train.seed))


def _initializer(config: Config) -> tuple[dict[str, Any], Callable[[jax.Array], dict[str, Any]]]:
    model = GLIP(config.model, train=False)
    side, tokens = 2 * config.model.pyramid.strides[-1], config.model.text.max_tokens
    inputs = (
        jnp.zeros((1, side, side, 3)),
        jnp.full((1, 2), side, jnp.int32),
        jnp.zeros((1, tokens), jnp.int32),
        jnp.ones((1, tokens), bool),
    )

    def init(key: jax.Array) -> dict[str, Any]:
        params: Any = model.init(key, *inputs)["params"]
        if config.loss.description_weight:
            # Beside the network, which has no such layer: its parameters are the same without.
            shape = (config.model.pyramid.channels, config.model.text.width)
            kernel = jax.nn.initializers.lecun_normal()(jax.random.fold_in(key, 1), shape)
            params = params | {"head": params["head"] | {"description": {"kernel": kernel}}}
        return params

    return jax.eval_shape(init, jax.random.key(0)), init


def abstract_state(config: Config, mesh: Mesh) -> State:
    """Shapes and shardings of the training state, without allocating it."""
    shapes, _ = _initializer(config)
    return abstract(jax.eval_shape(lambda params: initial_state(params, config), shapes), mesh)


def evaluation_parameters(state: State, config: Config) -> dict[str, Any]:
    """The parameters that `evaluation.parameters` names; the raw ones where no average is kept."""
    return optim.merge(state.params, state.ema) if config.evaluation.parameters == "ema" else state.params


def initial_state(params: Any, config: Config) -> State:
    """The state before the first step: zero moments, averages equal to the parameters (copies, because the step donates them)."""
    trainable, _ = optim.split(params, config.model)
    ema = jax.tree.map(jnp.copy, trainable) if config.optimizer.ema_decay else {}
    group = optim.groups(params, config.model, config.optimizer)
    optimizer = optim.make_optimizer(group, config.train.steps, config.optimizer)
    return State(params, optimizer.init(trainable), ema, jnp.zeros((), jnp.int32))


def fresh_state(params: Any, config: Config, mesh: Mesh) -> State:
    """`initial_state`, placed on `mesh`.

    One program makes moments and averages where they belong: operation by operation there is one for each shape.
    """
    placed = shardings(jax.eval_shape(lambda params: initial_state(params, config), params), mesh)
    made = jax.jit(
        lambda params: initial_state(params, config)._replace(params={}), out_shardings=placed._replace(params={})
    )
    return made(params)._replace(params=jax.device_put(params, placed.params))
