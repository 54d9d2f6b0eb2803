"""Post-processing: scores, boxes and non-maximum suppression."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from glip_jax.config import DetectionConfig, ModelConfig
from glip_jax.models.extents import level_size, valid_mask
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import Detections, Predictions

__all__ = ["compete", "detect"]


def _suppress(
    boxes: Float[Array, "M 4"], scores: Float[Array, " M"], phrases: Int[Array, " M"], config: DetectionConfig
) -> tuple[Int[Array, " D"], Bool[Array, " D"]]:
    """Greedy non-maximum suppression per phrase, in order of descending score; ties go to the lowest index.

    Stops after `max_detections`, which gives the same detections as a full suppression, or when nothing is left. Returns
    `max_detections` indices, and which of them are used.
    """

    def body(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        i, best, remaining, chosen, used = state
        suppressed = (phrases == phrases[best]) & (box.iou(boxes, boxes[best][None]) > config.nms_iou)
        remaining = jnp.where(suppressed, 0.0, remaining).at[best].set(0.0)
        return i + 1, jnp.argmax(remaining), remaining, chosen.at[i].set(best), used.at[i].set(True)

    def more(state: tuple[Array, Array, Array, Array, Array]) -> Array:
        i, best, remaining, *_ = state
        return (i < config.max_detections) & (remaining[best] > 0)

    nothing = jnp.zeros(config.max_detections, jnp.int32)
    start = (jnp.int32(0), jnp.argmax(scores), scores, nothing, nothing > 0)
    *_, chosen, used = jax.lax.while_loop(more, body, start)
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
    the square root of alignment times centerness. The last `config.sinks` tokens belong to no phrase; locations that they fit better
    than every phrase are left out. With `head.presence` the alignment has the probability that the image shows the phrase as a factor, which
    `threshold` does not see. Boxes: pixels of the resized image, clipped to `size`; unused: phrase -1.
    """
    anchors = box.anchors(canvas, model.pyramid.strides, model.anchors.sizes)
    weights = phrase_map / jnp.maximum(phrase_map.sum(-1, keepdims=True), 1)

    def one(part: Predictions, weights: Array, size: Array, extent: Array) -> Detections:
        phrases, candidates, begin = weights.shape[0], [], 0
        shown = jax.nn.sigmoid((weights * part.presence).sum(-1)) if model.head.presence else None
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
            if config.sinks:
                candidate &= aligned.max(1, keepdims=True) >= tokens[:, -config.sinks :].max(1, keepdims=True)
            # After the threshold: a name that is nowhere likely keeps the order of its boxes.
            aligned = aligned if shown is None else aligned * shown
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


def compete(found: Detections, config: DetectionConfig) -> Detections:
    """Detections of a list of names (numpy) in order of descending score, after `config.name_decay`; without those of rivals (phrase -1).

    A score is multiplied by (own / highest)^name_decay: the highest of the boxes of other names whose IoU with it is above `name_decay_iou`,
    if that is higher; all scores are those of before. The alignment takes the square of that factor, so that a score stays the root of alignment
    times centerness. As Soft-NMS (arXiv 1704.04503) between classes, by scores instead of the overlap.
    """
    scores, phrases, alignment = found.scores, found.phrases, found.alignment
    if config.name_decay and len(scores):
        other = phrases[:, None] != phrases
        # Exclusive corners: the same for the pixels of any size of the image. A box without area is in no place.
        with np.errstate(invalid="ignore"):
            near = other & (box.iou(found.boxes[:, None], found.boxes, plus_one=False) > config.name_decay_iou)
        highest = np.maximum(np.where(near, scores, 0.0).max(1), scores)
        factor = np.divide(scores, highest, where=highest > 0, out=np.ones_like(scores)) ** config.name_decay
        scores = (scores * factor).astype(np.float32)
        alignment = None if alignment is None else (alignment * factor**2).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    order = order[phrases[order] >= 0]
    found = found._replace(scores=scores, alignment=alignment)
    return Detections(*(None if field is None else field[order] for field in found))
