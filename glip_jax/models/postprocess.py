"""Post-processing: scores, boxes and non-maximum suppression."""

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
    """Greedy non-maximum suppression per phrase, in order of descending score; ties go to the lowest index.

    Stops after `max_detections`, which gives the same detections as a full suppression. Returns indices, and which of them are
    used.
    """

    def body(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        remaining, chosen, used = state
        best = jnp.argmax(remaining)
        suppressed = (phrases == phrases[best]) & (box.iou(boxes, boxes[best][None]) > config.nms_iou)
        used = used.at[i].set(remaining[best] > 0)
        remaining = jnp.where(suppressed, 0.0, remaining).at[best].set(0.0)
        return remaining, chosen.at[i].set(best), used

    count = min(config.max_detections, scores.shape[0])
    start = (scores, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
    _, chosen, used = jax.lax.fori_loop(0, count, body, start)
    return chosen, used


def detect(
    predictions: Predictions,
    phrase_map: Bool[Array, "B P T"],
    size: Int[Array, "B 2"],
    extent: Int[Array, "B 2"],
    canvas: tuple[int, int],
    model: ModelConfig,
    config: DetectionConfig,
) -> Detections:
    """Detections of fixed shape from predictions: scores, decoding, clipping, suppression (glip-reference 2.10).

    The alignment of a phrase at a location is the mean or maximum probability of its tokens (`config.token_scores`), the score
    the square root of alignment times centerness. Boxes: pixels of the resized image, clipped to `size`; unused: phrase -1.
    """
    anchors = box.anchors(canvas, model.pyramid.strides, model.anchors.sizes)
    weights = phrase_map / jnp.maximum(phrase_map.sum(-1, keepdims=True), 1)

    def one(part: Predictions, weights: Array, size: Array, extent: Array) -> Detections:
        phrases, candidates, begin = weights.shape[0], [], 0
        for stride in model.pyramid.strides:
            height, width = box.level_shape(canvas, stride)
            end = begin + height * width
            valid = valid_mask(level_size(extent[None], stride), height, width).reshape(-1)
            tokens = jax.nn.sigmoid(part.logits[begin:end])
            if config.token_scores == "mean":
                aligned = jnp.matmul(tokens, weights.T, precision=jax.lax.Precision.HIGHEST)
            else:  # phrase by phrase, for the memory
                aligned = jax.lax.map(lambda own, tokens=tokens: jnp.where(own > 0, tokens, 0.0).max(-1), weights).T
            candidate = (aligned > config.threshold) & valid[:, None]
            score = aligned * jax.nn.sigmoid(part.centerness[begin:end, None])
            score = jnp.where(candidate, score, 0.0).reshape(-1)
            best, index = jax.lax.top_k(score, min(config.candidates_per_level, score.shape[0]))
            candidates.append((jnp.sqrt(best), index // phrases + begin, index % phrases, aligned.reshape(-1)[index]))
            begin = end
        scores, anchor, phrase, alignment = (jnp.concatenate(parts) for parts in zip(*candidates))
        boxes = box.decode(part.deltas[anchor], jnp.asarray(anchors)[anchor])
        boxes = box.clip(boxes, size.astype(jnp.float32)[None])
        chosen, used = _suppress(boxes, scores, phrase, config)
        return Detections(
            jnp.where(used[:, None], boxes[chosen], 0.0),
            jnp.where(used, scores[chosen], 0.0),
            jnp.where(used, phrase[chosen], -1).astype(jnp.int32),
            jnp.where(used, alignment[chosen], 0.0),
            jnp.where(used, jax.nn.sigmoid(part.centerness[anchor[chosen]]), 0.0),
        )

    return jax.vmap(one)(predictions, weights, size, extent)
