"""A second judge of labels, scripted or a file of detections: what is vetoed, what is kept, and what it is asked."""

import json

import numpy as np
import pytest

from glip_jax.data import shards
from glip_jax.labeling.outside import open_detections
from glip_jax.labeling.phrases.finders import phrase_finder
from glip_jax.labeling.pseudo import Labeler, Rules
from glip_jax.labeling.statistics import LabelStatistics, summary
from glip_jax.labeling.teacher import DetectorTeacher, ImageQueries, View
from glip_jax.labeling.verifier import PhraseTeacher, Verifier
from tests.labeling.test_outside import files, row
from tests.labeling.test_teacher import ScriptedDetector, png, record, words

CAPTION = "a cat and a red car under a tree"
TEACHER = {"a cat": [((10, 10, 40, 40), 0.9), ((60, 10, 90, 40), 0.6)], "a red car": [((1, 1, 30, 30), 0.75)]}


def scripted(boxes):
    return ScriptedDetector(lambda _, phrase: boxes.get(phrase, []))


def judge(boxes, threshold=0.3, iou=0.0, alone=True):
    detector = scripted(boxes)
    network = DetectorTeacher([View(detector, False)], 0.6, threshold)
    return Verifier(PhraseTeacher(network) if alone else network, threshold, iou), detector


def label(tmp_path, records, verifier, boxes=TEACHER, rules=None):
    shards.write(iter(records), tmp_path / "cc", name="cc")
    source, rules = shards.Shards(tmp_path / "cc"), rules or Rules()
    teacher = DetectorTeacher([View(scripted(boxes), False)], 0.6, 0.5)
    labeler = Labeler(teacher, phrase_finder("lexicon"), rules, {}, "abc", 2, verifier)
    written = []
    statistics = labeler.label(source, 0, len(source), written.append, lambda _: None)
    return {own.id: own for own in written}, statistics


def test_a_vetoed_phrase_loses_its_boxes_and_becomes_unknown(tmp_path):
    verifier, detector = judge({"a cat": [((0, 0, 5, 5), 0.31)], "a red car": [((1, 1, 30, 30), 0.3)]})
    labeled, statistics = label(tmp_path, [record("r", CAPTION)], verifier)
    own = labeled["r"]
    assert words(own, own.spans) == ["a cat", "a cat"] and own.scores == pytest.approx((0.9, 0.6))
    assert words(own, own.unknown) == ["a red car", "a tree"], "0.3 is not above the threshold"
    assert (statistics.judged, statistics.vetoed, statistics.not_judged) == (2, 1, 0)
    assert statistics.report.noted["phrase: vetoed by the verifier, which finds it nowhere"] == 1
    assert statistics.report.dropped["box: vetoed by the verifier"] == 1
    assert statistics.phrases_with_boxes == 1 and statistics.best[37] == 1, "its score stays in the histogram"
    # Each phrase is a prompt of its own, and only those with boxes are asked.
    assert [prompts for call in detector.calls for _, prompts in call] == [["a cat", "a red car"]]
    total = LabelStatistics()
    total.add(LabelStatistics.from_json(json.loads(json.dumps(statistics.as_json()))))
    counts = summary(total)
    assert [counts[f"phrases_{name}"] for name in ("judged", "vetoed", "not_judged")] == [2, 1, 0]


def test_a_caption_may_be_asked_as_a_whole(tmp_path):
    verifier, detector = judge({"a cat": [((0, 0, 5, 5), 0.9)]}, alone=False)
    labeled, statistics = label(tmp_path, [record("r", CAPTION)], verifier)
    assert words(labeled["r"], labeled["r"].unknown) == ["a red car", "a tree"] and statistics.vetoed == 1
    assert [prompts for call in detector.calls for _, prompts in call] == [[CAPTION]]


def test_captions_of_one_image_ask_a_phrase_once_and_groups_keep_their_verdicts(tmp_path):
    image = png(7)
    captions = ["a cat", "a red car and a cat", "the cat"]
    records = [record(f"r{n}", caption, image) for n, caption in enumerate(captions)]
    records += [record(f"s{n}", "a red car" if n % 2 else "a cat", png(n)) for n in range(6)]
    verifier, detector = judge({"a cat": [((0, 0, 5, 5), 0.9)]})
    labeled, statistics = label(tmp_path, records, verifier, TEACHER | {"the cat": TEACHER["a cat"]})
    asked = [prompts for call in detector.calls for _, prompts in call]
    assert asked[0] == ["a cat", "a red car", "the cat"]
    assert {name: words(own, own.spans) for name, own in labeled.items()} == {
        "r0": ["a cat"] * 2, "r1": ["a cat"] * 2, "s0": ["a cat"] * 2, "s2": ["a cat"] * 2, "s4": ["a cat"] * 2,
    }  # fmt: skip
    assert statistics.report.dropped["caption: every box vetoed by the verifier"] == 4
    assert statistics.judged == 10 and statistics.vetoed == 5


def test_boxes_that_lie_elsewhere_are_dropped_with_an_iou(tmp_path):
    found = {"a cat": [((12, 10, 42, 40), 0.9)], "a red car": [((50, 20, 90, 45), 0.9)]}
    labeled, statistics = label(tmp_path, [record("r", CAPTION)], judge(found, iou=0.5)[0])
    own = labeled["r"]
    assert own.boxes.tolist() == [[10, 10, 40, 40]] and words(own, own.unknown) == ["a red car", "a tree"]
    assert statistics.report.dropped["box: vetoed by the verifier"] == 2 and statistics.vetoed == 1
    assert statistics.report.noted["phrase: vetoed by the verifier, which finds it elsewhere"] == 1


def outside(tmp_path, *rows, **extra):
    (tmp_path / "judge").mkdir()
    return Verifier(open_detections(*files(tmp_path / "judge", rows, **extra), 0.3, shared=True), 0.3)


def test_a_phrase_that_the_file_knows_nothing_of_is_kept_and_counted(tmp_path):
    boxes = {"a dog": TEACHER["a cat"], "a person": TEACHER["a red car"], "a cat": TEACHER["a cat"]}
    records = [record("9#1", "a dog and a person and a cat"), record("11#1", "a dog"), record("10#1", "a dog", png(3))]
    labeled, statistics = label(tmp_path, records, outside(tmp_path, row(9, 5, [0, 0, 9, 9], 0.9)), boxes)
    assert words(labeled["9#1"], labeled["9#1"].unknown) == ["a person"]
    assert set(words(labeled["9#1"], labeled["9#1"].spans)) == {"a dog", "a cat"}
    assert "11#1" in labeled, "an image that the file does not have"
    assert "10#1" not in labeled, "an image that it lists without a detection"
    assert (statistics.judged, statistics.vetoed, statistics.not_judged) == (3, 2, 2)
    noted = statistics.report.noted
    assert noted["phrase: not judged by the verifier, names no category of the detections"] == 1
    assert noted["phrase: not judged by the verifier, image: not among the detections"] == 1


def test_phrases_of_one_category_share_its_verdict(tmp_path):
    boxes = {"a black dog": TEACHER["a cat"], "a white dog": TEACHER["a red car"]}
    records = [record("9#1", "a black dog and a white dog")]
    labeled, statistics = label(tmp_path, records, outside(tmp_path, row(9, 5, [0, 0, 9, 9], 0.9)), boxes)
    assert not labeled["9#1"].unknown and statistics.judged == 2


def test_what_a_network_cannot_be_asked_is_not_judged(tmp_path):
    verifier, detector = judge({})
    teacher = open_detections(*files(tmp_path, [row(9, 5, [0, 0, 20, 20], 0.9)]), 0.5)
    caption = "a dog and a \u732b"
    query = teacher.make_query("9#1", caption, ((0, 5), (12, 13)))

    def verdict(size):
        return verifier.verify_async([ImageQueries(np.zeros((*size, 3), np.uint8), [query])], [[[0, 1]]])()[0][0]

    assert verdict((4, 600)).not_judged == dict.fromkeys((0, 1), "image too long and narrow") and detector.calls == [
        [((4, 600), [])]
    ]
    judged = verdict((50, 100))
    assert judged.not_judged == {1: "no word that the vocabulary knows"} and not len(judged.found[0].scores)
