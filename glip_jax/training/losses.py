"""Token focal loss, GIoU and centerness, as sums per image and denominators over the whole batch.

Sums are per image, denominators are global (glip-reference 3.4, 3.5), so a batch can be split into micro-batches or over
devices without changing the loss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from glip_jax.config import Config, LossConfig
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import Batch, Predictions, Targets
from glip_jax.structures.prompts import segment_ids
from glip_jax.training.assignment import anchors_inside

__all__ = [
    "Denominators",
    "ImageWeights",
    "LossSums",
    "denominators",
    "description_sums",
    "image_weights",
    "loss_sums",
    "total_loss",
]


class LossSums(NamedTuple):
    """Losses before division, and a statistic of the network; leading axis: images."""

    token: Float[Array, " B"]
    box: Float[Array, " B"]
    centerness: Float[Array, " B"]
    offsets_clamped: Any = ()
    """Share of each image's deformable offsets that were beyond `head.offset_bound`, mean over blocks; () without a bound."""
    presence: Any = ()
    """Cross-entropy of the presence of each phrase, sum over the phrases; () without `head.presence`."""
    description: Any = ()
    """Side loss on descriptions; () without."""


class Denominators(NamedTuple):
    """Divisors of the loss sums."""

    positives: Float[Array, ""]
    """Positive anchors of the whole batch, weighted by `Batch.box_weight`, at least the floor."""
    centerness: Float[Array, ""]
    """Sum of their centerness targets, with the same weights."""


class ImageWeights(NamedTuple):
    """Contributions of each image to the denominators; leading axis: images."""

    positives: Float[Array, " B"]
    centerness: Float[Array, " B"]


def image_weights(targets: Targets, box_weight: Float[Array, "B N"]) -> ImageWeights:
    """From the targets of the images and their `Batch.box_weight`."""
    weight = _anchor_weights(targets, box_weight)
    return ImageWeights(weight.sum(1), (weight * targets.centerness).sum(1))


def denominators(weights: ImageWeights, valid: Bool[Array, " B"], floor: float) -> Denominators:
    """From the weights of the whole batch; examples that are not `valid` are left out."""
    positives, boxes = (jnp.where(valid, part, 0.0).sum() for part in weights)
    return Denominators(jnp.maximum(positives, floor), boxes)


def _anchor_weights(targets: Targets, box_weight: Float[Array, "B N"]) -> Float[Array, "B A"]:
    """Weight of each positive anchor, which is that of its box; 0 for the others."""
    return jnp.where(targets.positive, jnp.take_along_axis(box_weight, targets.box_index, axis=1), 0.0)


def _focal(logits: Float[Array, "B A T"], target: Bool[Array, "B A T"], config: LossConfig) -> Float[Array, "B A T"]:
    """Focal loss (arXiv 1708.02002) of each location and token."""
    # With x signed towards its target, cross-entropy is softplus(-x) and p_t is sigmoid(x).
    signed = jnp.where(target, logits, -logits)
    weight = jnp.where(target, config.focal_alpha, 1.0 - config.focal_alpha)
    return weight * jax.nn.sigmoid(-signed) ** config.focal_gamma * jax.nn.softplus(-signed)


def loss_sums(
    predictions: Predictions, targets: Targets, batch: Batch, canvas: tuple[int, int], config: Config
) -> LossSums:
    """Loss sums of each image, float32; zero for examples that are not valid.

    Positive anchors have the weight of their box. The denominators use the same weights, so the losses are weighted means. The
    original has weights of 1. Anchors without a box have weight 1.
    """
    model, weight = config.model, _anchor_weights(targets, batch.box_weight)
    inside = anchors_inside(batch.extent, canvas, model.pyramid.strides)
    rows = jnp.take_along_axis(batch.positive_map, targets.box_index[:, :, None], axis=1)
    target = rows & targets.positive[:, :, None]
    if not config.loss.last_token_negative:
        target |= ~targets.positive[:, :, None] & (jnp.arange(batch.tokens.shape[1]) == batch.tokens.shape[1] - 1)
    # Unlabelled is not absent: where it is unknown whether the image shows what a token names, only positive anchors count.
    known = batch.token_loss_mask[:, None, :] | targets.positive[:, :, None]
    counted = inside[:, :, None] & batch.token_mask[:, None, :] & known
    token = jnp.where(counted, _focal(predictions.logits, target, config.loss), 0.0).sum(2)
    token = jnp.where(targets.positive, token * weight, token).sum(1)

    anchors = jnp.asarray(box.anchors(canvas, model.pyramid.strides, model.anchors.sizes))
    deltas = jnp.where(targets.positive[:, :, None], predictions.deltas, 0.0)
    distance = 1.0 - box.giou(box.decode(deltas, anchors), targets.boxes)
    boxes = jnp.where(targets.positive, distance * targets.centerness * weight, 0.0).sum(1)
    cross_entropy = jax.nn.softplus(predictions.centerness) - predictions.centerness * targets.centerness
    centerness = jnp.where(targets.positive, cross_entropy * weight, 0.0).sum(1)
    sums = LossSums(token, boxes, centerness)
    if model.head.presence:
        sums = sums._replace(presence=_presence_sums(predictions.presence, batch, model.text.separators))
    return jax.tree.map(lambda part: jnp.where(batch.valid, part, 0.0), sums)


def _presence_sums(presence: Float[Array, "B T"], batch: Batch, separators: Sequence[int]) -> Float[Array, " B"]:
    """Cross-entropy of the presence of each phrase, whose logit is the mean of its tokens', as `inference.postprocess` pools it.

    Phrases that the image shows are those of the boxes, each once; those that it does not are the names between separators without a token of
    a box. A name with a token whose loss is masked is unknown.
    """
    boxes = batch.positive_map & batch.box_mask[:, :, None]
    common, sizes = jnp.einsum("bnt,bmt->bnm", boxes, boxes, preferred_element_type=jnp.int32), boxes.sum(2)
    same = (common == sizes[:, :, None]) & (common == sizes[:, None])
    first = ~jnp.any(same & jnp.tri(sizes.shape[1], k=-1, dtype=bool), 2) & (sizes > 0)
    segments = segment_ids(batch.tokens, batch.token_mask, separators)
    between = jnp.isin(batch.tokens, jnp.asarray(separators))
    names = (segments[:, None] == jnp.arange(2, 2 + segments.shape[1])[:, None]) & ~between[:, None]
    out = boxes.any(1) | ~batch.token_loss_mask
    absent = names.any(2) & ~(names & out[:, None]).any(2)

    def pooled(phrases: Bool[Array, "B P T"]) -> Float[Array, "B P"]:
        return jnp.where(phrases, presence[:, None], 0.0).sum(2) / jnp.maximum(phrases.sum(2), 1)

    shown = jnp.where(first, jax.nn.softplus(-pooled(boxes)), 0.0).sum(1)
    return shown + jnp.where(absent, jax.nn.softplus(pooled(names)), 0.0).sum(1)


def description_sums(
    visual: Float[Array, "B A C"],
    kernel: Float[Array, "C D"],
    vectors: Float[Array, "R D"],
    targets: Targets,
    batch: Batch,
) -> Float[Array, " B"]:
    """Sum over the positive anchors of described names of 1 - cosine(visual kernel, vector of the name), with the weight of their box.

    The products are taken per image feature, so that nothing of anchors x D is stored: x W v = x (W v), |x W|^2 = x (W W^T) x.
    """
    exact = jax.lax.Precision.HIGHEST
    rows = jnp.where(batch.positive_map, batch.described[:, None], 0).max(2)
    length = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    wanted = jnp.einsum("rd,cd->rc", vectors / jnp.maximum(length, 1e-6), kernel, precision=exact)[rows]
    wanted = jnp.take_along_axis(wanted, targets.box_index[:, :, None], axis=1)
    features, gram = visual.astype(jnp.float32), jnp.dot(kernel, kernel.T, precision=exact)
    square = jnp.einsum("bac,cd,bad->ba", features, gram, features, precision=exact)
    cosine = jnp.sum(features * wanted, axis=2) * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
    weight = jnp.where(
        jnp.take_along_axis(rows, targets.box_index, axis=1) > 0, _anchor_weights(targets, batch.box_weight), 0.0
    )
    return jnp.where(batch.valid, jnp.sum(weight * (1.0 - cosine), axis=1), 0.0)


def total_loss(
    sums: LossSums, over: Denominators, config: LossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss and its parts: `token`, `centerness`, and times their weights `box`, `presence` and `description`. If the sum of the centerness targets is 0, so is the
    box loss.
    """
    inverse = jnp.where(over.centerness > 0, 1.0 / jnp.where(over.centerness > 0, over.centerness, 1.0), 0.0)
    parts = {
        "token": sums.token.sum() / over.positives,
        "box": config.box_weight * sums.box.sum() * inverse,
        "centerness": sums.centerness.sum() / over.positives,
    }
    if jax.tree.leaves(sums.presence):
        parts["presence"] = config.presence_weight * sums.presence.sum() / over.positives
    if config.description_weight:
        parts["description"] = config.description_weight * sums.description.sum() / over.positives
    return sum(parts.values(), jnp.float32(0)), parts
