"""A network of four matrices that replaces GLIP: it compiles in a second, and its losses are those of GLIP.

Its parameters have paths of GLIP, so the rules of parameter groups and of the mesh apply to them.
"""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp

from glip_jax.config import Config
from glip_jax.distributed.mesh import make_mesh
from glip_jax.models.bert import Bert
from glip_jax.models.dropout import bernoulli
from glip_jax.structures.batch import Batch, Predictions, Targets
from glip_jax.structures.canvas import pixels_of
from glip_jax.training import loop, state
from glip_jax.training.losses import LossSums, loss_sums
from glip_jax.training.step import Objective, glip_objective, make_step

WIDTH = 16


def parameters(config: Config, key: Any, bert: bool = False) -> dict[str, Any]:
    """Random values. `bert`: the text encoder of GLIP, whose layers are split over tensor, instead of a table."""
    keys = iter(jax.random.split(key, 8))
    text = config.model.text

    def normal(*shape: int) -> Any:
        return 0.3 * jax.random.normal(next(keys), shape)

    table: Any = {"embeddings": {"word": normal(text.vocabulary_size, WIDTH)}}
    if bert:
        tokens = jnp.zeros((1, text.max_tokens), jnp.int32)
        table = Bert(text, lora=config.model.lora).init(next(keys), tokens, tokens == 0)["params"]
        for name in fnmatch.filter(table["layers"], "*_lora_b"):  # zero at the start
            table["layers"][name] = 0.3 * jax.random.normal(
                jax.random.fold_in(key, len(name)), table["layers"][name].shape
            )
    return {
        "backbone": {"patch_norm": {"scale": normal(3)}},
        "head": {
            "projection": {"kernel": normal(8, WIDTH), "bias": normal(WIDTH)},
            "box": {"kernel": normal(WIDTH, 4)},
            "centerness": {"kernel": normal(WIDTH, 1)},
        },
        "text": table,
    }


def objective(config: Config, train: bool = True, bert: bool = False) -> Objective:
    """Each anchor gets the mean color of its cell; dropout while training.

    `bert`: as in `parameters`, with the rematerialisation of `config.model.remat`.
    """
    rate = config.model.text.dropout if train else 0.0

    def sums(params: Any, batch: Batch, targets: Targets, key: Any) -> LossSums:
        # The channels of patches are in the order of the network; this one treats all alike.
        pixels = batch.image if batch.image.shape[-1] == 3 else pixels_of(batch.image)
        image = pixels.astype(jnp.float32) / 255 * params["backbone"]["patch_norm"]["scale"]
        b, height, width, _ = image.shape
        cells = [
            image.reshape(b, height // s, s, width // s, s, 3).mean((2, 4)).reshape(b, -1, 3)
            for s in config.model.pyramid.strides
        ]
        x = jnp.concatenate(cells, axis=1)
        x = jnp.concatenate([x, jnp.square(x), jnp.ones_like(x[..., :2])], axis=-1)
        head = params["head"]
        x = jnp.tanh(x @ head["projection"]["kernel"] + head["projection"]["bias"])
        x = x * bernoulli(key, 1 - rate, x.shape)
        if bert:
            rngs = {"dropout": jax.random.fold_in(key, 1)}
            text = Bert(config.model.text, train, remat=config.model.remat, lora=config.model.lora).apply(
                {"params": params["text"]}, batch.tokens, batch.token_mask, rngs=rngs
            )
        else:
            text = params["text"]["embeddings"]["word"][batch.tokens]
        logits = jnp.einsum("bac,btc->bat", x, text)
        centerness = (x @ head["centerness"]["kernel"])[..., 0]
        predictions = Predictions(logits, x @ head["box"]["kernel"], centerness)
        return loss_sums(predictions, targets, batch, (height, width), config)

    return Objective(glip_objective(config).targets, sums)


def initializer(config: Config) -> tuple[Any, Any]:
    """Replaces `state._initializer`."""

    def init(key: Any) -> dict[str, Any]:
        return parameters(config, key)

    return jax.eval_shape(init, jax.random.key(0)), init


_STEPS: dict[str, Any] = {}


def _shared_step(
    config: Config, mesh: Any, objective: Objective, state: Any, names: tuple[str, ...], cuts: bool
) -> Any:
    """`make_step`, once for all runs of one process that have the same step."""
    # Tests install other objectives too.
    parts = (
        config.model,
        config.loss,
        config.optimizer,
        config.train.seed,
        config.train.steps,
        mesh,
        names,
        cuts,
        loop.glip_objective,
    )
    key = repr((*parts, jax.tree.map(lambda array: (array.shape, array.sharding), state)))
    if key not in _STEPS:
        _STEPS[key] = make_step(config, mesh, objective, state, names, cuts)
    return _STEPS[key]


def install(monkeypatch: Any, devices: int = 1) -> None:
    """Installs the network in the training loop, on one device by default: most tests of the loop need no second one."""
    monkeypatch.setattr(state, "_initializer", initializer)
    monkeypatch.setattr(loop, "make_step", _shared_step)
    monkeypatch.setattr(loop, "glip_objective", objective)
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:devices]))
