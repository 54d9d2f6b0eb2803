"""A network of four matrices in GLIP's place: it compiles in a second, and its losses are the real ones.

Its parameters bear names of the real ones, so the rules of groups and meshes hold for them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from glip_jax.config import Config
from glip_jax.parallel import make_mesh
from glip_jax.structures import Batch, Predictions, Targets
from glip_jax.training import loop
from glip_jax.training.losses import LossSums, loss_sums
from glip_jax.training.step import Objective, glip_objective

WIDTH = 16


def parameters(config: Config, key: Any) -> dict[str, Any]:
    """Random values."""
    keys = iter(jax.random.split(key, 8))
    text = config.model.text

    def normal(*shape: int) -> Any:
        return 0.3 * jax.random.normal(next(keys), shape)

    return {
        "backbone": {"patch_norm": {"scale": normal(3)}},
        "head": {
            "projection": {"kernel": normal(4, WIDTH), "bias": normal(WIDTH)},
            "box": {"kernel": normal(WIDTH, 4)},
            "centerness": {"kernel": normal(WIDTH, 1)},
        },
        "text": {"embeddings": {"word": normal(text.vocabulary_size, WIDTH)}},
    }


def objective(config: Config, train: bool = True) -> Objective:
    """Each anchor sees the mean colour of its cell; dropout of half the features while training."""
    rate = config.model.text.dropout if train else 0.0

    def sums(params: Any, batch: Batch, targets: Targets, key: Any) -> LossSums:
        image = batch.image.astype(jnp.float32) / 255 * params["backbone"]["patch_norm"]["scale"]
        b, height, width, _ = image.shape
        cells = [
            image.reshape(b, height // s, s, width // s, s, 3).mean((2, 4)).reshape(b, -1, 3)
            for s in config.model.pyramid.strides
        ]
        x = jnp.concatenate(cells, axis=1)
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        head = params["head"]
        x = jnp.tanh(x @ head["projection"]["kernel"] + head["projection"]["bias"])
        x = x * jax.random.bernoulli(key, 1 - rate, x.shape)
        logits = jnp.einsum("bac,btc->bat", x, params["text"]["embeddings"]["word"][batch.tokens])
        centerness = (x @ head["centerness"]["kernel"])[..., 0]
        predictions = Predictions(logits, x @ head["box"]["kernel"], centerness)
        return loss_sums(predictions, targets, batch, (height, width), config)

    return Objective(glip_objective(config).targets, sums)


def install(monkeypatch: Any) -> None:
    """Puts it into the training loop, on one device: tests of the loop need no second, and compile in less time."""

    def initializer(config: Config) -> tuple[Any, Any]:
        def init(key: Any) -> dict[str, Any]:
            return parameters(config, key)

        return jax.eval_shape(init, jax.random.key(0)), init

    monkeypatch.setattr(loop, "_initializer", initializer)
    monkeypatch.setattr(loop, "glip_objective", objective)
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
