"""One training step: a pure function of state and batch, jitted over the mesh with the state donated.

Losses are sums over the global batch divided by global counts, which depend on the assignment alone. So all
micro-batches are assigned first, and a step of 4 micro-batches equals one of the whole batch (up to dropout).
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import Config
from glip_jax.models.glip import GLIP, normalize
from glip_jax.parallel import batch_sharding, replicated, shardings
from glip_jax.structures import DROPS, Batch, Targets
from glip_jax.training import optimizer as adamw
from glip_jax.training.assignment import assign
from glip_jax.training.losses import Denominators, LossSums, denominators, loss_sums, total_loss

__all__ = ["Objective", "State", "StepFunction", "first_gradients", "glip_objective", "initial_state", "make_step"]


class State(NamedTuple):
    """Everything that training changes."""

    params: Any
    """Nested dict of float32 arrays, frozen ones included."""
    optimizer: Any
    """Adam's moments of the trainable parameters."""
    ema: Any
    """Moving averages of the trainable parameters; {} when off."""
    step: Any
    """Int32[]: completed steps."""


class Objective(NamedTuple):
    """What is minimised, in the parts that accumulation and sharding need apart."""

    targets: Callable[[Batch], Targets]
    """Assignment of a micro-batch; no gradient passes through it."""
    sums: Callable[[Any, Batch, Targets, Array], LossSums]
    """(params, batch, targets, dropout key) to loss sums per image, zero where the example is not valid."""


Metrics: TypeAlias = dict[str, Array]
StepFunction = Callable[[State, Batch], tuple[State, Metrics]]


def glip_objective(config: Config, train: bool = True) -> Objective:
    """GLIP's losses; `train` False switches every dropout off."""
    model = GLIP(config.model, train=train)

    def targets(batch: Batch) -> Targets:
        canvas = batch.image.shape[1:3]
        return assign(batch.boxes, batch.box_mask, batch.extent, canvas, config.model, config.loss)

    def sums(params: Any, batch: Batch, targets: Targets, key: Array) -> LossSums:
        image = normalize(batch.image, batch.size, config.model.input)
        inputs = (image, batch.extent, batch.tokens, batch.token_mask)
        counted = ["intermediates"] if config.model.head.offset_bound else False
        found: Any = model.apply({"params": params}, *inputs, rngs={"dropout": key} if train else None, mutable=counted)
        predictions, seen = found if counted else (found, {})
        result = loss_sums(predictions, targets, batch, batch.image.shape[1:3], config)
        # One array of blocks x images, of the only thing that is counted inside the network.
        shares = [share.mean(0) for share in jax.tree.leaves(seen)]
        return result._replace(offsets_clamped=shares[0]) if counted else result

    return Objective(targets, sums)


def initial_state(params: Any, config: Config) -> State:
    """The state before the first step: zero moments, averages equal to the parameters (copies: the step donates)."""
    trainable, _ = adamw.split(params, config.model)
    ema = jax.tree.map(jnp.copy, trainable) if config.optimizer.ema_decay else {}
    return State(params, adamw.init(trainable, config.optimizer), ema, jnp.zeros((), jnp.int32))


def make_step(
    config: Config, mesh: Mesh, objective: Objective, state: State, names: tuple[str, ...] = ()
) -> StepFunction:
    """The jitted step on `mesh`. `state` gives the shapes; it is donated at each call. `names`: sources, in order.

    The step returns (state, metrics). Scalars: `loss`, `loss/PART`, `gradient_norm` (before clipping), `rate`,
    `text_rate`, `positives`, `examples`, `corrupt`, `dropped/REASON`, `finite`, with a bound on offsets `offsets_clamped`
    (the share of deformable offsets beyond it, over blocks and images), and for each source
    `source/NAME/{loss/PART, examples, positives, dropped, dropped/REASON}`. For messages, per example: `bad` (its loss is
    not finite), `invalid` (it is corrupt), `source`, `record`.
    """
    group = adamw.groups(state.params, config.model, config.optimizer)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        gradients, metrics = _gradients(state.params, batch, key, config, mesh, objective, names)
        trainable, held = adamw.split(state.params, config.model)
        gradients, norm = adamw.clip(gradients, config.optimizer.clip_norm)
        scale = adamw.rate_multiplier(state.step, config.train.steps, config.optimizer)
        trainable, moments = adamw.apply_gradients(
            gradients,
            state.optimizer,
            trainable,
            scale,
            adamw.decay_multiplier(state.step, config.train.steps, config.optimizer),
            group,
            config.optimizer,
        )
        ema = adamw.average(state.ema, trainable, config.optimizer.ema_decay) if state.ema else state.ema
        metrics |= {
            "gradient_norm": norm,
            "rate": scale * config.optimizer.rate,
            "text_rate": scale * config.optimizer.text_rate,
            "finite": jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm),
        }
        return State(adamw.merge(held, trainable), moments, ema, state.step + 1), metrics

    layout = shardings(state, mesh)
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(layout, batch_sharding(mesh)),
        out_shardings=(layout, everywhere),
        donate_argnums=0,
    )


def first_gradients(params: Any, batch: Batch, config: Config, mesh: Mesh, objective: Objective) -> dict[str, Array]:
    """Gradients (unclipped, path to array) and `loss` of the trainable parameters at step 0, as `make_step` sees them."""

    def gradients(params: Any, batch: Batch) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
        tree, metrics = _gradients(params, batch, key, config, mesh, objective, ())
        return {**adamw.flat(tree), "loss": metrics["loss"]}

    layout = (shardings(params, mesh), batch_sharding(mesh))
    return jax.jit(gradients, in_shardings=layout, out_shardings=replicated(mesh))(params, batch)


def _gradients(
    params: Any, batch: Batch, key: Array, config: Config, mesh: Mesh, objective: Objective, names: tuple[str, ...]
) -> tuple[Any, Metrics]:
    """Gradients of the whole batch's loss by the trainable parameters, and the metrics of the forward pass."""
    parts = config.optimizer.accumulate
    micro = jax.tree.map(lambda array: _split(array, parts, mesh), batch)
    # One micro-batch after another: the table of all anchors x all boxes would not fit for the whole batch.
    targets = jax.lax.map(objective.targets, micro)
    joined = jax.tree.map(_join, targets)
    whole = jax.tree.map(_join, micro)
    counts = denominators(joined, whole.box_weight, whole.valid, config.loss.positives_floor)
    trainable, held = adamw.split(params, config.model)

    def loss(trainable: Any, batch: Batch, targets: Targets, key: Array) -> tuple[Float[Array, ""], LossSums]:
        # With bounded offsets a kernel is called that must know how the images are split.
        known = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        with known if config.model.head.offset_bound else contextlib.nullcontext():
            sums = objective.sums(adamw.merge(held, trainable), batch, targets, key)
        return total_loss(sums, counts, config.loss)[0], sums

    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, sums = differentiate(trainable, whole, joined, key)
    else:

        def body(total: Any, inputs: tuple[Batch, Targets, Int[Array, ""]]) -> tuple[Any, LossSums]:
            batch, targets, index = inputs
            gradients, sums = differentiate(trainable, batch, targets, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, gradients), sums

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        gradients, sums = jax.lax.scan(body, zeros, (micro, targets, jnp.arange(parts)))
        sums = jax.tree.map(_join, sums)
    return gradients, _metrics(sums, joined, whole, counts, config, names)


def _split(array: Array, parts: int, mesh: Mesh) -> Array:
    """[B ...] to [parts B/parts ...]; micro-batch m takes rows m, m + parts, ..., so that no device sends a row."""
    split = array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(split, batch_sharding(mesh, leading=1))


def _join(array: Array) -> Array:
    """Inverse of `_split`."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])


def _metrics(
    sums: LossSums, targets: Targets, batch: Batch, counts: Denominators, config: Config, names: tuple[str, ...]
) -> Metrics:
    total, parts = total_loss(sums, counts, config.loss)
    positives = jnp.sum(targets.positive & batch.valid[:, None], axis=1)
    bad = ~jnp.all(jnp.stack([jnp.isfinite(part) for part in jax.tree.leaves(sums)]), axis=0)
    metrics: Metrics = {"loss": total, "positives": positives.sum(), "examples": jnp.int32(batch.valid.shape[0])}
    metrics |= {f"loss/{name}": value for name, value in parts.items()}
    metrics |= {"corrupt": jnp.sum(~batch.valid), "unknown_tokens": jnp.sum(~batch.token_loss_mask)}
    metrics |= {"bad": bad, "invalid": ~batch.valid, "source": batch.source, "record": batch.record}
    metrics |= {f"dropped/{reason}": batch.dropped[:, column].sum() for column, reason in enumerate(DROPS)}
    for share in jax.tree.leaves(sums.offsets_clamped):
        metrics["offsets_clamped"] = jnp.where(batch.valid, share, 0.0).sum() / jnp.maximum(batch.valid.sum(), 1)
    for index, name in enumerate(names):
        metrics |= _of_source(name, batch.source == index, sums, targets, batch, positives, config)
    return metrics


def _of_source(
    name: str,
    mine: Bool[Array, " B"],
    sums: LossSums,
    targets: Targets,
    batch: Batch,
    positives: Int[Array, " B"],
    config: Config,
) -> Metrics:
    """Losses of one source as if the batch held it alone: its sums over its own counts, comparable between steps."""
    own = denominators(targets, batch.box_weight, batch.valid & mine, config.loss.positives_floor)
    _, parts = total_loss(jax.tree.map(lambda part: jnp.where(mine, part, 0.0), sums), own, config.loss)
    metrics = {f"source/{name}/loss/{part}": value for part, value in parts.items()}
    lost = jnp.where(mine[:, None], batch.dropped, 0).sum(0)
    metrics |= {f"source/{name}/dropped/{reason}": lost[column] for column, reason in enumerate(DROPS)}
    return metrics | {
        f"source/{name}/examples": mine.sum(),
        f"source/{name}/positives": jnp.where(mine, positives, 0).sum(),
        f"source/{name}/dropped": lost.sum(),
    }
