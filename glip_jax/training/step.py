"""One training step: a pure function of state and batch, jitted over the mesh with the state donated.

Losses are sums over the global batch divided by global counts, which depend on the assignment alone. So all
micro-batches are assigned first, and a step of 4 micro-batches equals one of the whole batch (up to dropout).

Each device runs the network on its local examples. Once a step, devices along data and fsdp exchange the sharded parameters
(all-gather), the gradients (sum), the two counts and a few values per image for the metrics; then the squares for the
gradient norm. Devices along tensor exchange the partial sums of the layers that are split there
(`glip_jax.models.tensor_parallel`).
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from glip_jax.config import Config, ConfigError
from glip_jax.distributed.mesh import (
    batch_axes,
    batch_sharding,
    gather_parameters,
    parameter_specs,
    per_shard,
    reduce_gradients,
    replicated,
    shardings,
)  # fmt: skip
from glip_jax.models.descriptions import with_described_names
from glip_jax.models.glip import GLIP, normalize
from glip_jax.structures.batch import BATCH_AXES, DROPS, Batch, Predictions, Targets
from glip_jax.structures.descriptions import DescriptionTable
from glip_jax.training import optimizer as optim
from glip_jax.training.assignment import assign
from glip_jax.training.losses import (
    Denominators,
    ImageWeights,
    LossSums,
    denominators,
    description_sums,
    image_weights,
    loss_sums,
    total_loss,
)  # fmt: skip
from glip_jax.training.state import State

__all__ = ["Objective", "StepFunction", "first_gradients", "glip_objective", "make_step"]


class Objective(NamedTuple):
    """The objective, in the two parts that accumulation and sharding call separately."""

    targets: Callable[[Batch], Targets]
    """Assignment of a micro-batch; no gradient flows through it."""
    sums: Callable[[Any, Batch, Targets, Array], LossSums]
    """(params, batch, targets, dropout key) to loss sums per image, zero where the example is not valid."""


Forward: TypeAlias = Callable[[GLIP, Batch], Predictions]
Metrics: TypeAlias = dict[str, Array]
StepFunction = Callable[..., tuple[State, Metrics]]
"""(state, batch) to the state after the step and its metrics; with `cuts` of `make_step` (state, batch, Float32[2])."""


class _Images(NamedTuple):
    """What the metrics need of each image."""

    sums: LossSums
    weights: ImageWeights
    positives: Int32[Array, " B"]
    valid: Bool[Array, " B"]
    source: Int32[Array, " B"]
    record: Int32[Array, " B"]
    unknown_tokens: Int32[Array, " B"]
    dropped: Int32[Array, "B reasons"]


def glip_objective(
    config: Config, train: bool = True, forward: Forward | None = None, canvas: tuple[int, int] | None = None,
    descriptions: DescriptionTable | None = None,
) -> Objective:  # fmt: skip
    """The losses of GLIP; `train` False turns off every dropout.

    `descriptions`: where the settings use their vectors; ConfigError without. `forward` and `canvas` (height, width): the network on a batch whose `image` holds something else than pixels, and their canvas.
    """
    model, averages = GLIP(config.model, train=train), config.data.captions.descriptions.use == "mean"
    if config.reads_descriptions and (descriptions is None or (averages and (forward or not config.model.text.frozen))):
        raise ConfigError(
            "data.captions.descriptions.use=mean and loss.description_weight are for the job `train`, mean with model.text.frozen: set them to "
            "none and 0 (evaluation and prediction may use mean)"
        )

    def of_pixels(model: GLIP, batch: Batch) -> Predictions:
        image = normalize(batch.image, batch.size, config.model.input)
        if averages and descriptions is not None:
            return with_described_names(model, image, batch, descriptions)
        return model(image, batch.extent, batch.tokens, batch.token_mask)

    def targets(batch: Batch) -> Targets:
        return assign(batch.boxes, batch.box_mask, batch.extent, canvas or batch.canvas, config.model, config.loss)

    def sums(params: Any, batch: Batch, targets: Targets, key: Array) -> LossSums:
        counted = ["intermediates"] * bool(config.model.head.offset_bound) + ["visual"] * bool(
            config.loss.description_weight
        )
        outputs: Any = model.apply(
            {"params": params}, batch, rngs={"dropout": key} if train else None, mutable=counted or False, method=forward or of_pixels
        )  # fmt: skip
        predictions, sown = outputs if counted else (outputs, {})
        result = loss_sums(predictions, targets, batch, canvas or batch.canvas, config)
        # The network sows one array only, of blocks x images.
        shares = [share.mean(0) for share in jax.tree.leaves(sown.get("intermediates", {}))]
        if descriptions is not None and "visual" in sown:
            (visual,), kernel = jax.tree.leaves(sown["visual"]), params["head"]["description"]["kernel"]
            result = result._replace(
                description=description_sums(visual, kernel, jnp.asarray(descriptions.vectors), targets, batch)
            )
        return result._replace(offsets_clamped=shares[0]) if shares else result

    return Objective(targets, sums)


def make_step(
    config: Config, mesh: Mesh, objective: Objective, state: State, names: tuple[str, ...] = (), cuts: bool = False
) -> StepFunction:
    """The jitted step on `mesh`. `state` gives the shapes; the argument is donated at each call. `names`: sources, in order.

    `cuts`: the step takes a third argument, which cuts the learning rates: `optimizer.cut_multiplier`.

    The step returns (state, metrics). Scalars: `loss`, `loss/PART`, `gradient_norm` (before clipping), `rate`,
    `text_rate`, `positives`, `examples`, `corrupt`, `unknown_tokens`, `dropped/REASON`, `finite`, with a bound on offsets `offsets_clamped`
    (the share of deformable offsets beyond it, over blocks and images), and for each source
    `source/NAME/{loss/PART, examples, positives, dropped, dropped/REASON}`. Per example, for messages: `bad` (its loss is
    not finite), `invalid` (it is corrupt), `source`, `record`.
    """
    group = optim.groups(state.params, config.model, config.optimizer)
    optimizer = optim.make_optimizer(group, config.train.steps, config.optimizer)

    def step(state: State, batch: Batch, *cut: Array) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        gradients, metrics = _gradients(state.params, batch, key, config, mesh, objective, names)
        trainable, frozen = optim.split(state.params, config.model)
        gradients, norm = optim.clip(gradients, config.optimizer.clip_norm)
        given = {"cut": cut[0]} if cuts else {}
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trainable, step=state.step, **given)
        trainable: Any = optax.apply_updates(trainable, updates)
        decay = optim.average_decay(state.step, config.optimizer)
        ema = optim.average(state.ema, trainable, decay) if state.ema else state.ema
        scale = optim.rate_multiplier(state.step, config.train.steps, config.optimizer)
        rates = {name: getattr(config.optimizer, name) for name in ("rate", "text_rate")}
        metrics |= {
            "gradient_norm": norm,
            **{name: scale * rate for name, rate in rates.items()},
            "finite": jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm),
        }
        if cuts:
            metrics |= {name: metrics[name] * optim.cut_multiplier(rate, cut[0]) for name, rate in rates.items()}
        return State(optim.merge(frozen, trainable), optimizer_state, ema, state.step + 1), metrics

    state_shardings = shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh), *([replicated(mesh)] if cuts else [])),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def first_gradients(params: Any, batch: Batch, config: Config, mesh: Mesh, objective: Objective) -> dict[str, Array]:
    """Unclipped gradients (path to array) of the trainable parameters at step 0, and `loss`, as `make_step` computes them."""

    def gradients(params: Any, batch: Batch) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
        tree, metrics = _gradients(params, batch, key, config, mesh, objective, ())
        return {**optim.flat(tree), "loss": metrics["loss"]}

    inputs = (shardings(params, mesh), batch_sharding(mesh))
    return jax.jit(gradients, in_shardings=inputs, out_shardings=replicated(mesh))(params, batch)


def _gradients(
    params: Any, batch: Batch, key: Array, config: Config, mesh: Mesh, objective: Objective, names: tuple[str, ...]
) -> tuple[Any, Metrics]:
    """Gradients of the loss of the whole batch by the trainable parameters, and the metrics of the forward pass."""
    whole: Any = PartitionSpec()
    examples, specs = PartitionSpec(BATCH_AXES), parameter_specs(params, mesh)
    trainable_specs, _ = optim.split(specs, config.model)

    def local(params: Any, batch: Batch, key: Array) -> tuple[Any, Denominators, _Images]:
        params = gather_parameters(params, specs, mesh)
        gradients, counts, images = _local_gradients(params, batch, key, config, mesh, objective)
        return reduce_gradients(gradients, trainable_specs, mesh), counts, _gathered_images(images, mesh)

    outputs = (trainable_specs, Denominators(whole, whole), _image_specs(whole, config))
    gradients, counts, images = per_shard(local, mesh, (specs, examples, whole), outputs)(params, batch, key)
    return gradients, _metrics(images, counts, config, names)


def _local_gradients(
    params: Any, batch: Batch, key: Array, config: Config, mesh: Mesh, objective: Objective
) -> tuple[Any, Denominators, _Images]:
    """On one device (`glip_jax.distributed.mesh.per_shard`): what the local part of the batch adds to the gradients."""
    parts = config.optimizer.accumulate
    micro = jax.tree.map(lambda array: _split(array, parts), batch)
    # One micro-batch at a time: for the whole batch the table of anchors x boxes does not fit into memory.
    targets = jax.lax.map(objective.targets, micro)
    joined = jax.tree.map(_join, targets)
    weights = image_weights(joined, batch.box_weight)
    counts = _over_devices(jax.lax.psum, denominators(weights, batch.valid, 0.0), mesh)
    counts = counts._replace(positives=jnp.maximum(counts.positives, config.loss.positives_floor))
    trainable, frozen = optim.split(params, config.model)

    def loss(trainable: Any, batch: Batch, targets: Targets, key: Array) -> tuple[Float[Array, ""], LossSums]:
        # Bounded offsets call a kernel that reads the mesh from the context; `per_shard` sets it on several devices only.
        context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        with context if config.model.head.offset_bound and mesh.size == 1 else contextlib.nullcontext():
            sums = objective.sums(optim.merge(frozen, trainable), batch, targets, key)
        return total_loss(sums, counts, config.loss)[0], sums

    differentiate = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, sums = differentiate(trainable, batch, joined, key)
    else:

        def body(total: Any, inputs: tuple[Batch, Targets, Int[Array, ""]]) -> tuple[Any, LossSums]:
            batch, targets, index = inputs
            gradients, sums = differentiate(trainable, batch, targets, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, gradients), sums

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        gradients, sums = jax.lax.scan(body, zeros, (micro, targets, jnp.arange(parts)))
        sums = jax.tree.map(_join, sums)
    positives = jnp.sum(joined.positive & batch.valid[:, None], axis=1, dtype=jnp.int32)
    unknown = jnp.sum(~batch.token_loss_mask, axis=1, dtype=jnp.int32)
    images = _Images(sums, weights, positives, batch.valid, batch.source, batch.record, unknown, batch.dropped)
    return gradients, counts, images


def _over_devices(collective: Callable[[Any, tuple[str, ...]], Any], tree: Any, mesh: Mesh) -> Any:
    """`collective` of `tree` along the axes that split the batch; `tree` itself where no axis does."""
    axes = batch_axes(mesh)
    return collective(tree, axes) if axes else tree


def _image_specs(spec: Any, config: Config) -> _Images:
    """`spec` for every field that there is."""
    head = config.model.head
    more = [spec if there else () for there in (head.offset_bound, head.presence, config.loss.description_weight)]
    return _Images(LossSums(spec, spec, spec, *more), ImageWeights(spec, spec), *(spec,) * 6)


def _gathered_images(images: _Images, mesh: Mesh) -> _Images:
    """The images of all devices, in the order of the batch: two arrays are sent, one of float32 and one of int32."""
    leaves, tree = jax.tree.flatten(images)
    columns = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
    result: list[Any] = [None] * len(leaves)
    for kind in (jnp.float32, jnp.int32):
        chosen = [i for i, leaf in enumerate(leaves) if (leaf.dtype == jnp.float32) == (kind == jnp.float32)]
        table = jnp.concatenate([columns[i].astype(kind) for i in chosen], 1)
        table = _over_devices(lambda local, axes: jax.lax.all_gather(local, axes, tiled=True), table, mesh)
        begin = 0
        for i in chosen:
            end = begin + columns[i].shape[1]
            result[i] = table[:, begin:end].reshape(-1, *leaves[i].shape[1:]).astype(leaves[i].dtype)
            begin = end
    return jax.tree.unflatten(tree, result)


def _split(array: Array, parts: int) -> Array:
    """[B ...] to [parts B/parts ...]; micro-batch m takes rows m, m + parts, ..., on every device."""
    return array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1)


def _join(array: Array) -> Array:
    """Inverse of `_split`."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])


def _metrics(images: _Images, counts: Denominators, config: Config, names: tuple[str, ...]) -> Metrics:
    total, parts = total_loss(images.sums, counts, config.loss)
    bad = ~jnp.all(jnp.stack([jnp.isfinite(part) for part in jax.tree.leaves(images.sums)]), axis=0)
    metrics: Metrics = {"loss": total, "positives": images.positives.sum()}
    metrics["examples"] = jnp.int32(images.valid.shape[0])
    metrics |= {f"loss/{name}": value for name, value in parts.items()}
    metrics |= {"corrupt": jnp.sum(~images.valid), "unknown_tokens": images.unknown_tokens.sum()}
    metrics |= {"bad": bad, "invalid": ~images.valid, "source": images.source, "record": images.record}
    metrics |= {f"dropped/{reason}": images.dropped[:, column].sum() for column, reason in enumerate(DROPS)}
    for share in jax.tree.leaves(images.sums.offsets_clamped):
        metrics["offsets_clamped"] = jnp.where(images.valid, share, 0.0).sum() / jnp.maximum(images.valid.sum(), 1)
    for index, name in enumerate(names):
        metrics |= _source_metrics(name, images.source == index, images, config)
    return metrics


def _source_metrics(name: str, of_source: Bool[Array, " B"], images: _Images, config: Config) -> Metrics:
    """Losses of one source as if the batch held it alone: its sums over its counts, comparable between steps."""
    counts = denominators(images.weights, images.valid & of_source, config.loss.positives_floor)
    _, parts = total_loss(jax.tree.map(lambda part: jnp.where(of_source, part, 0.0), images.sums), counts, config.loss)
    metrics = {f"source/{name}/loss/{part}": value for part, value in parts.items()}
    dropped = jnp.where(of_source[:, None], images.dropped, 0).sum(0)
    metrics |= {f"source/{name}/dropped/{reason}": dropped[column] for column, reason in enumerate(DROPS)}
    return metrics | {
        f"source/{name}/examples": of_source.sum(),
        f"source/{name}/positives": jnp.where(of_source, images.positives, 0).sum(),
        f"source/{name}/dropped": dropped.sum(),
    }
