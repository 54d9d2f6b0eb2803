"""The three losses against their formulas, and their weights."""

import dataclasses

import jax
import numpy as np

from glip_jax.config import AnchorConfig, Config, LossConfig, ModelConfig, PyramidConfig
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import DROPS, Batch, Predictions, Targets
from glip_jax.training.losses import Denominators, LossSums, denominators, image_weights, loss_sums, total_loss

CANVAS, TOKENS = (64, 96), 5
MODEL = ModelConfig(pyramid=PyramidConfig(strides=(16, 32)), anchors=AnchorConfig((32, 64)))
ANCHORS = box.anchors(CANVAS, (16, 32), (32, 64))


def _case(seed: int = 0) -> tuple[Predictions, Targets, Batch]:
    rng, count = np.random.default_rng(seed), len(ANCHORS)
    positive = np.zeros((2, count), bool)
    positive[0, [3, 7, 25]] = True
    index = np.where(positive, rng.integers(0, 2, (2, count)), 0).astype(np.int32)
    boxes = np.array([[[5, 5, 40, 50], [30, 10, 80, 60]]] * 2, np.float32)
    target = np.where(positive[..., None], np.take_along_axis(boxes, index[..., None], 1), 0).astype(np.float32)
    batch = Batch(
        image=np.zeros((2, *CANVAS, 3), np.uint8), size=np.array([CANVAS, (40, 50)], np.int32),
        extent=np.array([CANVAS, (64, 64)], np.int32), tokens=np.zeros((2, TOKENS), np.int32),
        token_mask=np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool), boxes=boxes, box_mask=positive[:, :2] | True,
        box_weight=np.ones((2, 2), np.float32),
        positive_map=rng.uniform(size=(2, 2, TOKENS)) < 0.5, token_loss_mask=np.ones((2, TOKENS), bool), valid=np.array([True, True]),
        source=np.zeros(2, np.int32), record=np.zeros(2, np.int32), dropped=np.zeros((2, len(DROPS)), np.int32),
    )  # fmt: skip
    predictions = Predictions(
        rng.normal(size=(2, count, TOKENS)).astype(np.float32) * 3,
        rng.normal(size=(2, count, 4)).astype(np.float32),
        rng.normal(size=(2, count)).astype(np.float32),
    )
    centerness = np.where(positive, rng.uniform(0.2, 0.9, (2, count)), 0).astype(np.float32)
    return predictions, Targets(positive, index, target, centerness), batch


def _sums(
    predictions: Predictions, targets: Targets, batch: Batch, loss: LossConfig | None = None, model: ModelConfig = MODEL
) -> LossSums:
    config = Config(model=model, loss=loss or LossConfig())
    found, wanted, given = jax.tree.map(jax.numpy.asarray, (predictions, targets, batch))
    return jax.tree.map(np.asarray, loss_sums(found, wanted, given, CANVAS, config))


def _counted(targets: Targets, batch: Batch) -> Denominators:
    wanted, weight, valid = jax.tree.map(jax.numpy.asarray, (targets, batch.box_weight, batch.valid))
    return denominators(image_weights(wanted, weight), valid, 1.0)


def test_token_loss_is_the_focal_loss_of_valid_tokens_inside_the_extent() -> None:
    predictions, targets, batch = _case()
    wanted = np.zeros(2)
    inside = np.ones((2, len(ANCHORS)), bool)
    inside[1] = (ANCHORS[:, 0] + ANCHORS[:, 2]) / 2 < 64  # the second image's extent is 64 wide
    for image, place, token in np.ndindex(2, len(ANCHORS), TOKENS):
        if not (inside[image, place] and batch.token_mask[image, token]):
            continue
        row = batch.positive_map[image, targets.box_index[image, place]]
        target = float(row[token] and targets.positive[image, place])
        p = 1 / (1 + np.exp(-float(predictions.logits[image, place, token])))
        p_t = p * target + (1 - p) * (1 - target)
        wanted[image] += (0.25 * target + 0.75 * (1 - target)) * (1 - p_t) ** 2 * -np.log(p_t)
    np.testing.assert_allclose(_sums(predictions, targets, batch).token, wanted, rtol=1e-5)


def test_unlabelled_tokens_count_for_positive_anchors_only() -> None:
    predictions, targets, batch = _case()
    batch = batch._replace(token_mask=np.ones((2, TOKENS), bool))
    known = np.ones((2, TOKENS), bool)
    known[:, 2] = False
    whole, part = (_sums(predictions, targets, batch._replace(token_loss_mask=mask)) for mask in (known | True, known))
    p = 1 / (1 + np.exp(-predictions.logits[:, :, 2].astype(np.float64)))
    lost = np.where(targets.positive, 0, 0.75 * p**2 * -np.log(1 - p))
    lost[1, (ANCHORS[:, 0] + ANCHORS[:, 2]) / 2 > 64] = 0  # beyond the second image's extent
    np.testing.assert_allclose(whole.token - part.token, lost.sum(1), rtol=1e-4)
    np.testing.assert_array_equal(whole.box, part.box)
    np.testing.assert_array_equal(whole.centerness, part.centerness)
    # Logits of these tokens matter at positive anchors only.
    there = np.where(targets.positive, 0, 5).astype(np.float32)
    for change, matters in ((there, False), (5 - there, True)):
        logits = predictions.logits.copy()
        logits[:, :, 2] += change
        moved = _sums(predictions._replace(logits=logits), targets, batch._replace(token_loss_mask=known))
        assert (moved.token[0] != part.token[0]) == matters


def test_compat_adds_a_positive_on_the_last_slot() -> None:
    predictions, targets, batch = _case()
    batch = batch._replace(token_mask=np.ones((2, TOKENS), bool))
    ours = _sums(predictions, targets, batch)
    original = _sums(predictions, targets, batch, LossConfig(last_token_negative=False))
    assert abs(original.token - ours.token).min() > 1


def test_box_and_centerness_losses_by_hand() -> None:
    predictions, targets, batch = _case()
    found = _sums(predictions, targets, batch)
    wanted_box = wanted_center = 0.0
    for place in np.flatnonzero(targets.positive[0]):
        a = box.decode(predictions.deltas[0, place].astype(np.float64), ANCHORS[place].astype(np.float64))
        b = targets.boxes[0, place].astype(np.float64)
        overlap = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
        union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap
        hull = np.prod(np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2]))
        wanted_box += targets.centerness[0, place] * (1 - (overlap / union - (hull - union) / hull))
        p, t = 1 / (1 + np.exp(-float(predictions.centerness[0, place]))), targets.centerness[0, place]
        wanted_center -= t * np.log(p) + (1 - t) * np.log(1 - p)
    np.testing.assert_allclose(found.box, [wanted_box, 0], rtol=1e-4)
    np.testing.assert_allclose(found.centerness, [wanted_center, 0], rtol=1e-4)


def test_presence_is_the_cross_entropy_of_what_the_image_shows() -> None:
    predictions, targets, batch = _case()
    logits = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)
    # [CLS] a b . c . d [SEP], of which a b has two boxes and d is unknown; [CLS] a . b c [SEP], padded, shows nothing.
    tokens = np.array([[101, 1, 2, 1012, 3, 1012, 4, 102], [101, 1, 1012, 2, 3, 102, 0, 0]], np.int32)
    known = np.ones((2, 8), bool)
    known[0, 6] = False
    boxes = np.zeros((2, 3, 8), bool)
    boxes[0, :, 1:3] = True  # the third slot is not in use, nor are those of the second image
    batch = batch._replace(
        tokens=tokens, token_mask=tokens > 0, token_loss_mask=known, positive_map=boxes,
        box_mask=np.array([[1, 1, 0], [0, 0, 0]], bool), box_weight=np.ones((2, 3), np.float32),
    )  # fmt: skip
    model = dataclasses.replace(MODEL, head=dataclasses.replace(MODEL.head, presence=True))
    wide = np.zeros((*predictions.logits.shape[:2], 8), np.float32)
    found = _sums(predictions._replace(logits=wide, presence=logits), targets, batch, model=model)

    def absence(*own: float) -> float:
        return float(np.log1p(np.exp(np.mean(own, dtype=np.float64))))

    a, b = logits
    wanted = [absence(*-a[1:3]) + absence(a[4]), absence(b[1]) + absence(*b[3:5])]
    np.testing.assert_allclose(found.presence, wanted, rtol=1e-5)
    found = jax.tree.map(jax.numpy.asarray, found)
    counted = Denominators(jax.numpy.asarray(4.0), jax.numpy.asarray(1.0))
    totals = [total_loss(found, counted, LossConfig(presence_weight=weight))[0] for weight in (0.0, 0.5)]
    np.testing.assert_allclose(totals[1] - totals[0], 0.5 * sum(wanted) / 4, rtol=1e-4)


def test_an_invalid_example_changes_nothing() -> None:
    predictions, targets, batch = _case()
    masked = batch._replace(valid=np.array([False, True]))
    found = _sums(predictions, targets, masked)
    assert found.token[0] == found.box[0] == found.centerness[0] == 0
    counted = _counted(targets, masked)
    assert (float(counted.positives), float(counted.centerness)) == (1.0, 0.0)


def test_losses_are_weighted_by_box() -> None:
    predictions, targets, batch = _case()
    second = targets.positive & (np.arange(len(ANCHORS)) == 7)  # the others are the first box's
    targets = targets._replace(box_index=second.astype(np.int32))

    def weighing(weight: float) -> LossSums:
        weights = np.array([[weight, 1.0], [1.0, 1.0]], np.float32)
        return _sums(predictions, targets, batch._replace(box_weight=weights))

    # The three losses; no offsets are clamped here.
    for none, part, whole in zip(weighing(0.0)[:3], weighing(0.25)[:3], weighing(1.0)[:3]):
        assert whole[0] > none[0] > 0 and whole[1] == part[1] == none[1]
        np.testing.assert_allclose(part[0], none[0] + 0.25 * (whole[0] - none[0]), rtol=1e-5)
    counted = _counted(targets, batch._replace(box_weight=np.array([[0.25, 1.0], [1.0, 1.0]], np.float32)))
    at = targets.centerness[0]
    np.testing.assert_allclose(counted, [1.5, at[7] + 0.25 * (at[3] + at[25])], rtol=1e-6)


def test_no_box_weight_gives_no_box_loss_and_no_nan() -> None:
    sums = LossSums(*(jax.numpy.asarray([2.0, 4.0]),) * 3)
    loss, parts = total_loss(sums, Denominators(jax.numpy.float32(3.0), jax.numpy.float32(0.0)), LossConfig())
    assert float(parts["box"]) == 0 and float(parts["token"]) == 2 and float(loss) == 4
    loss, parts = total_loss(sums, Denominators(jax.numpy.float32(3.0), jax.numpy.float32(12.0)), LossConfig())
    assert float(parts["box"]) == 1 and float(loss) == 5
