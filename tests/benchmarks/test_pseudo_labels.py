"""`benchmarks.pseudo_labels` on constructed records: correct boxes, and records that are not judged."""

import numpy as np
import pytest

from benchmarks.absent_captions import mixed_captions
from benchmarks.pseudo_labels import Judged, _saying, by_class, compared, judge, measured, named_truth
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


def test_precision_and_recall_by_threshold():
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
    assert "| 0.55 | 1 | 4 | 0.500 | 0.667 | 1 | 1.000 | 1.000 |" in measured(judged)
    assert "| 0.50 |" not in measured(judged), "no box is that low: nothing is known of what lies there"


def test_labels_are_compared_with_those_without_a_verifier_at_equal_thresholds_and_at_equal_recall():
    before = Judged(4, [0.95, 0.9, 0.8, 0.7, 0.6], [True, False, True, False, True], list("aabbc"))
    after = Judged(4, [0.95, 0.8, 0.7], [True, True, False], list("abb"))
    lines = compared(before, after).splitlines()
    # The recall of 0.5 takes three boxes without the verifier, of which two are right.
    assert "| 0.60 | 2 | 4 | 0.500 | 0.500 | 2 | 3 | 0.667 | 0.500 | 0.667 |" in lines
    assert "| 0.55 | 3 | 5 | 0.600 | 0.750 | 2 | 3 | 0.667 | 0.500 | 0.667 |" in lines
    assert "| 0.80 | 1 | 2 | 0.500 | 0.250 | 1 | 1 | 1.000 | 0.250 | 1.000 |" in lines
    assert np.isnan(before.precision_at_recall(0.9)) and np.isnan(before.precision_at_recall(0.0))


def test_captions_hold_names_that_are_not_there():
    boxes = [{"image_id": 1, "category_id": c} for c in (1, 7)] + [{"image_id": 2, "category_id": 9}]
    names = [{"id": number, "name": name} for number, name in NAMES.items()]
    images = [{"id": 1}, {"id": 2, "known_absent": ["cup"]}, {"id": 3}]
    made = mixed_captions({"images": images, "annotations": boxes, "categories": names}, 1, 2, seed=0)
    one, two = (note["caption"] for note in made["annotations"])
    assert [note["image_id"] for note in made["annotations"]] == [1, 2], "nothing is known of the third"
    assert "a teddy bear" in one and one.count("a ") == 2 == two.count("a ") + two.count("an ")
    assert {"a teddy bear", "a cup"} == set(two.split(" and "))


def test_captions_are_matched_by_text_and_equal_ones_by_id():
    found = [
        record((50, 50, (21, 28), 0.6), identity="2#9"),
        record((50, 50, (21, 28), 0.6), identity="7#1", caption="other"),
    ]
    judged, left_out = judge(found, [image(1), image(2), image(3, "unlabelled")], EVERY)
    assert judged["plain"].at(0) == (1, 1.0, pytest.approx(1 / 3))
    assert left_out["captions without ground truth"] == 1
    assert left_out["captions without a record (nothing was found)"] == 2


def test_a_phrase_matches_the_longest_name():
    says = _saying(["apple", "glass of milk"], ["green apple", "pen"])
    assert says("two apples", "") and says("three glasses of milk", "") and says("a big Apple", "")
    assert not says("a green apple", "") and not says("a pineapple", "") and not says("a pen", "")


NAMES = {1: "apple", 7: "cup", 9: "teddy bear"}


def note(picture, category, x, y, crowd=0):
    return {"image_id": picture, "category_id": category, "bbox": [x, y, 20, 20], "iscrowd": crowd}


def test_phrases_are_judged_by_the_class_of_their_head_noun():
    found = record(
        (0, 0, (0, 14), 0.9), (100, 0, (0, 14), 0.8), (0, 0, (0, 14), 0.7),  # apples; there are two
        (50, 50, (23, 28), 0.6), (0, 0, (23, 28), 0.5),  # a cup, and an apple as one
    )  # fmt: skip
    # An apple of another image and a bear without a phrase do not count.
    notes = [
        note(1, 1, 0, 0),
        note(1, 1, 100, 0),
        note(1, 7, 50, 50),
        note(1, 7, 90, 90),
        note(2, 1, 0, 0),
        note(1, 9, 5, 5),
    ]
    images, counts = named_truth([found], NAMES, notes)
    assert [(phrase.spans, len(phrase.boxes), phrase.kind) for phrase in images[0].phrases] == [
        (((0, 14),), 2, "several"),
        (((23, 28),), 2, "one of several"),
    ]
    assert +counts == {'judged phrases: "several"': 1, 'judged phrases: "one of several"': 1}
    judged, left_out = judge([found], images, EVERY)
    assert judged["all"].right == [True, True, False, True, False] and judged["all"].true == 4 and not +left_out
    classes = by_class([found], images, list(NAMES.values()))
    assert {name: own.at(0) for name, own in classes.items()} == {
        "apple": (3, pytest.approx(2 / 3), 1.0),
        "cup": (2, 0.5, 0.5),
    }


@pytest.mark.parametrize(
    ("caption", "spans", "notes", "judged", "counted"),
    [
        ("a cup", [(0, 5)], [], [("one", 0)], "judged phrases: no true box of their class"),
        ("a cup", [(0, 5)], [note(1, 7, 0, 0), note(1, 7, 0, 0, crowd=1)], [], "phrases whose class has a crowd box"),
        ("a bear", [(0, 6)], [note(1, 9, 0, 0)], [], "phrases that name no class"),
        ("a cup, red cups", [(0, 5), (7, 15)], [note(1, 7, 0, 0)], [], "phrases that share their class with another"),
    ],
)
def test_phrases_without_ground_truth_are_counted(caption, spans, notes, judged, counted):
    found = record(*((0, 0, span, 0.5) for span in spans), caption=caption)
    images, counts = named_truth([found], NAMES, notes)
    assert [(phrase.kind, len(phrase.boxes)) for phrase in images[0].phrases] == judged
    assert counts[counted] == len(spans)
    results, left_out = judge([found], images, EVERY)
    assert results["all"].right == [False] * len(judged)
    assert left_out["captions without ground truth"] == (not judged)
