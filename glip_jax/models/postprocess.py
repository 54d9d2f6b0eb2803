"""From predictions to detections: scores, boxes, non-maximum suppression."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import DetectionConfig, ModelConfig
from glip_jax.models.extents import level_size, valid_mask
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import Detections, Predictions

__all__ = ["detect"]


def _suppress(
    boxes: Float[Array, "M 4"], scores: Float[Array, " M"], phrases: Int[Array, " M"], config: DetectionConfig
) -> tuple[Int[Array, " D"], Bool[Array, " D"]]:
    """The best detections in order, each suppressing what overlaps it under the same phrase.

    Greedy from the best on, so the first `max_detections` survivors are those of a full suppression. Ties: lowest
    index. Returns indices and which of them are real.
    """

    def body(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        alive, chosen, real = state
        best = jnp.argmax(alive)
        same = phrases == phrases[best]
        gone = same & (box.iou(boxes, boxes[best][None]) > config.nms_iou)
        real = real.at[i].set(alive[best] > 0)
        alive = jnp.where(gone, 0.0, alive).at[best].set(0.0)
        return alive, chosen.at[i].set(best), real

    count = min(config.max_detections, scores.shape[0])
    start = (scores, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
    _, chosen, real = jax.lax.fori_loop(0, count, body, start)
    return chosen, real


def detect(
    predictions: Predictions,
    phrase_map: Bool[Array, "B P T"],
    size: Int[Array, "B 2"],
    extent: Int[Array, "B 2"],
    canvas: tuple[int, int],
    model: ModelConfig,
    config: DetectionConfig,
) -> Detections:
    """Scores, decodes, clips and suppresses (glip-reference 2.10), exact and of fixed shape.

    A phrase's alignment at a location is the mean probability of its tokens; the score is the root of that times
    the centerness. Boxes are in pixels of the resized image, clipped to `size`; rows that hold nothing have phrase -1.
    """
    anchors = box.anchors(canvas, model.pyramid.strides, model.anchors.sizes)
    share = phrase_map / jnp.maximum(phrase_map.sum(-1, keepdims=True), 1)

    def one(part: Predictions, share: Array, size: Array, extent: Array) -> Detections:
        phrases, found, begin = share.shape[0], [], 0
        for stride in model.pyramid.strides:
            height, width = box.level_shape(canvas, stride)
            end = begin + height * width
            own = valid_mask(level_size(extent[None], stride), height, width).reshape(-1)
            aligned = jnp.matmul(jax.nn.sigmoid(part.logits[begin:end]), share.T, precision=jax.lax.Precision.HIGHEST)
            candidate = (aligned > config.threshold) & own[:, None]
            score = aligned * jax.nn.sigmoid(part.centerness[begin:end, None])
            score = jnp.where(candidate, score, 0.0).reshape(-1)
            best, index = jax.lax.top_k(score, min(config.candidates_per_level, score.shape[0]))
            found.append((jnp.sqrt(best), index // phrases + begin, index % phrases, aligned.reshape(-1)[index]))
            begin = end
        scores, where, phrase, alignment = (jnp.concatenate(parts) for parts in zip(*found))
        boxes = box.decode(part.deltas[where], jnp.asarray(anchors)[where])
        boxes = box.clip(boxes, size.astype(jnp.float32)[None])
        chosen, real = _suppress(boxes, scores, phrase, config)
        return Detections(
            jnp.where(real[:, None], boxes[chosen], 0.0),
            jnp.where(real, scores[chosen], 0.0),
            jnp.where(real, phrase[chosen], -1).astype(jnp.int32),
            jnp.where(real, alignment[chosen], 0.0),
            jnp.where(real, jax.nn.sigmoid(part.centerness[where[chosen]]), 0.0),
        )

    return jax.vmap(one)(predictions, share, size, extent)
