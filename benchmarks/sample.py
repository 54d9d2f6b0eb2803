"""Random parameters and a generated batch in the sizes of the benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs.glip_tiny import get_config
from glip_jax.config import Config
from glip_jax.models.glip import GLIP
from glip_jax.structures.batch import DROPS, Batch

__all__ = ["abstract_params", "made_batch", "tiny", "with_head_blocks"]


def tiny(dtype: str = "float32", remat: str = "none") -> Config:
    """GLIP-T at full size."""
    config = get_config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype, remat=remat))


def with_head_blocks(config: Config, blocks: int) -> Config:
    """`config` with another number of head blocks."""
    head = dataclasses.replace(config.model.head, blocks=blocks)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, head=head))


def abstract_params(config: Config) -> tuple:
    """(the model's init as a function of a key, the shapes of its result)."""
    model = GLIP(config.model)
    tokens = jnp.zeros((1, config.model.text.max_tokens), jnp.int32)
    inputs = (jnp.zeros((1, 256, 256, 3)), jnp.full((1, 2), 256, jnp.int32), tokens, tokens == 0)

    def init(key: jax.Array) -> dict:
        return dict(model.init(key, *inputs)["params"])

    return init, jax.eval_shape(init, jax.random.key(0))


def made_batch(config: Config, height: int, width: int, images: int = 1, boxes: int = 10) -> Batch:
    """A batch of noise with boxes at random positions; box i belongs to token 2 i + 1 of a prompt that fills the token budget."""
    rng = np.random.default_rng(0)
    slots, length = config.data.max_boxes, config.model.text.max_tokens
    corner = rng.uniform(0, 0.7, (images, slots, 2))
    sides = rng.uniform(0.05, 0.3, (images, slots, 2))
    corners = np.concatenate([corner, corner + sides], -1) * [width, height, width, height]
    positive_map = np.zeros((images, slots, length), bool)
    positive_map[:, np.arange(slots), (2 * np.arange(slots) + 1) % length] = True
    size = np.tile(np.array([height, width], np.int32), (images, 1))
    return Batch(
        image=rng.integers(0, 256, (images, height, width, 3), dtype=np.uint8),
        size=size,
        extent=size,
        tokens=rng.integers(1000, config.model.text.vocabulary_size, (images, length)).astype(np.int32),
        token_mask=np.ones((images, length), bool),
        boxes=corners.astype(np.float32),
        box_mask=np.arange(slots)[None] < np.full((images, 1), boxes),
        box_weight=np.ones((images, slots), np.float32),
        positive_map=positive_map,
        token_loss_mask=np.ones((images, length), bool),
        valid=np.ones(images, bool),
        source=np.zeros(images, np.int32),
        record=np.zeros(images, np.int32),
        dropped=np.zeros((images, len(DROPS)), np.int32),
    )
