"""`benchmarks.pseudo_labels` on made records: what counts as right, and what cannot be judged."""

import numpy as np
import pytest

from benchmarks.pseudo_labels import _saying, judge, measured
from glip_jax.data.records import Record
from glip_jax.evaluation.recall import CaptionedImage, Phrase

CAPTION = "two red apples left of a cup"


def image(number=1, caption=CAPTION):
    """Apples at 0 and 100, a cup at 50; corners are plain."""
    apples = Phrase(((0, 14),), np.array([[0, 0, 20, 20], [100, 0, 120, 20]], np.float32), "relational")
    cup = Phrase(((23, 28),), np.array([[50, 50, 70, 70]], np.float32), "plain")
    return CaptionedImage(number, {"id": number}, caption, (apples, cup))


def record(*boxes, identity="1#5", caption=CAPTION):
    """Pseudo boxes as (left edge, top edge, span, score), 20 pixels wide; corners are inclusive pixels."""
    corners = np.array([[x, y, x + 19, y + 19] for x, y, _, _ in boxes], np.float32)
    return Record(identity, "pseudo", b"x", 200, 200, corners, caption=caption, spans=tuple((span,) for _, _, span, _ in boxes),
                  scores=tuple(score for *_, score in boxes))  # fmt: skip


EVERY = {"all": lambda words, kind: True, "plain": lambda words, kind: kind == "plain"}


def test_right_boxes_by_threshold():
    found = record(
        (0, 0, (0, 14), 0.9), (2, 0, (4, 14), 0.8),  # the same apple twice: the second is wrong, though its span is shorter
        (50, 50, (0, 14), 0.7),  # a cup as an apple
        (50, 50, (21, 28), 0.6),  # the cup with its article
        (0, 0, (15, 19), 0.5),  # of "left", which is no true phrase
    )  # fmt: skip
    judged, left_out = judge([found], [image()], EVERY)
    assert judged["all"].true == 3 and judged["plain"].true == 1
    assert list(zip(judged["all"].scores, judged["all"].right)) == [
        (0.9, True),
        (0.8, False),
        (0.7, False),
        (0.6, True),
    ]
    assert judged["all"].at(0.5) == (4, 0.5, pytest.approx(2 / 3))
    assert judged["all"].at(0.85) == (1, 1.0, pytest.approx(1 / 3))
    assert judged["all"].at(0.95) == (0, pytest.approx(float("nan"), nan_ok=True), 0.0)
    assert judged["plain"].at(0.5) == (1, 1.0, 1.0)
    assert left_out["boxes of phrases that touch no true phrase"] == 1
    assert "| 0.50 | 4 | 0.500 | 0.667 | 1 | 1.000 | 1.000 |" in measured(judged)


def test_captions_are_found_by_their_words_and_equal_ones_by_id():
    found = [
        record((50, 50, (21, 28), 0.6), identity="2#9"),
        record((50, 50, (21, 28), 0.6), identity="7#1", caption="other"),
    ]
    judged, left_out = judge(found, [image(1), image(2), image(3, "unlabelled")], EVERY)
    assert judged["plain"].at(0) == (1, 1.0, pytest.approx(1 / 3))
    assert left_out["captions without a truth of their own"] == 1
    assert left_out["captions without a record (nothing was found)"] == 2


def test_the_longest_name_is_what_a_phrase_says():
    says = _saying(["apple", "glass of milk"], ["green apple", "pen"])
    assert says("two apples", "") and says("three glasses of milk", "") and says("a big Apple", "")
    assert not says("a green apple", "") and not says("a pineapple", "") and not says("a pen", "")
