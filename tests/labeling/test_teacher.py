"""From captions to pseudo records with a scripted detector: prompts, thresholds, views, unlabelled phrases."""

import dataclasses
import io
import json
import random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from glip_jax.config import Config, DetectionConfig
from glip_jax.data import shards
from glip_jax.data.records import Record, boxes_array
from glip_jax.labeling.phrases.finders import phrase_finder
from glip_jax.labeling.phrases.language import PERHAPS_FOREIGN
from glip_jax.labeling.pseudo import Labeler, Rules
from glip_jax.labeling.statistics import LabelStatistics, summary
from glip_jax.labeling.teacher import (
    DetectorTeacher,
    PhraseDetections,
    View,
    fuse,
    plan_prompts,
    select_boxes,
    teacher_config,
)
from glip_jax.structures.batch import Detections
from glip_jax.structures.prompts import load_tokenizer, tokenize
from tests import tiny_run

TOKENIZER = load_tokenizer(tiny_run.VOCABULARY)
CONFIG = teacher_config(
    tiny_run.replace(tiny_run.config(), "evaluation", short_side=64, long_side=128, batch_size=2), 0.5, 0.6
)


class ScriptedDetector:
    """A detector that returns what `find(image, text)` gives for each phrase: pairs of a box in a 100 x 50 image and a score."""

    tokenizer, group_size = TOKENIZER, 2

    def __init__(self, find, config: Config = CONFIG):
        self.find, self.config, self.calls = find, config, []

    def detect_async(self, images, prompts_):
        self.calls.append(
            [(image.shape[:2], [prompt.caption for prompt in own]) for image, own in zip(images, prompts_)]
        )
        found = [[self._one(image, prompt) for prompt in own] for image, own in zip(images, prompts_)]
        return lambda: found

    def _one(self, image, prompt):
        tokenize(prompt, self.tokenizer, self.config.model.text.max_tokens)  # raises where a Detector would
        rows = [
            (box, score, number)
            for number, ((begin, end),) in enumerate(prompt.spans)
            for box, score in self.find(image, prompt.caption[begin:end])
        ]
        rows.sort(key=lambda row: -row[1])
        boxes, scores, numbers = zip(*rows) if rows else ((), (), ())
        return Detections(boxes_array(boxes), np.asarray(scores, np.float32), np.asarray(numbers, np.int32))


def png(shade=0, height=50, width=100, corrupt=False):
    stream = io.BytesIO()
    pixels = np.full((height, width, 3), shade, np.uint8)
    pixels[:, : width // 2] = 255  # the left half is white
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()[: 60 if corrupt else None]


def record(name, caption, image=None, height=50, width=100):
    return Record(name, "caption", image or png(), height, width, boxes_array(()), caption=caption)


def label(tmp_path, records, find, rules=None, views=None, name="cc"):
    shards.write(iter(records), tmp_path / name, name=name)
    source = shards.Shards(tmp_path / name)
    rules = rules or Rules()
    detector = ScriptedDetector(find)
    teacher = DetectorTeacher(
        views(detector) if views else [View(detector, False)], rules.nms_iou, rules.min_threshold([name])
    )
    labeler = Labeler(teacher, phrase_finder("lexicon"), rules, {"teacher": "t"}, "abc", 2)
    written, labeled = [], []
    statistics = labeler.label(source, 0, len(source), written.append, labeled.append)
    assert sum(labeled) == len(records)
    return {own.id: own for own in written}, statistics, detector


def words(own, spans):
    return [own.caption[begin:end] for ((begin, end),) in spans]


def nothing(*_):
    return []


def test_boxes_above_the_threshold_are_kept_and_phrases_without_one_are_unlabelled(tmp_path):
    boxes = {
        "a cat": [((10, 10, 40, 40), 0.91), ((50, 5, 90, 45), 0.6), ((12, 10, 42, 40), 0.7), ((0, 0, 5, 5), 0.5)],
        "a red car": [((1, 1, 30, 30), 0.49)],
    }
    labeled, statistics, _ = label(
        tmp_path, [record("r", "a cat and a red car under a tree")], lambda _, w: boxes.get(w, [])
    )
    (own,) = labeled.values()
    assert own.kind == "pseudo" and words(own, own.spans) == ["a cat", "a cat"]
    assert own.boxes.tolist() == [[10, 10, 40, 40], [50, 5, 90, 45]], (
        "one is suppressed, one has the score of the threshold"
    )
    assert own.scores == pytest.approx((0.91, 0.6)) and words(own, own.unknown) == ["a red car", "a tree"]
    assert json.loads(own.provenance) == {"teacher": "t", "threshold": 0.5, "code": "abc"}
    assert (
        statistics.captions,
        statistics.kept,
        statistics.phrases,
        statistics.phrases_with_boxes,
        statistics.boxes,
    ) == (1, 1, 3, 1, 2)
    assert (
        statistics.boxes_of == {2: 1, 0: 2}
        and statistics.best[45] == statistics.best[24] == 1
        and sum(statistics.best) == 2
    )
    assert statistics.concepts == {"cat": [1, 1, 2], "car": [1, 0, 0], "tree": [1, 0, 0]}


def test_boxes_beyond_max_boxes_are_dropped_and_counted(tmp_path):
    five = [((20 * k, 0, 20 * k + 15, 20), 0.9 - k / 100) for k in range(5)]
    labeled, statistics, _ = label(tmp_path, [record("r", "a cat")], lambda *_: five, Rules(max_boxes=3))
    assert (
        labeled["r"].scores == pytest.approx((0.9, 0.89, 0.88))
        and statistics.report.dropped["box: more than the maximum of a phrase"] == 2
    )


def test_the_next_batch_is_started_before_the_previous_one_is_written(tmp_path):
    class RecordingDetector(ScriptedDetector):
        events: ClassVar[list[str]] = []

        def detect_async(self, images, prompts_):
            finish = super().detect_async(images, prompts_)
            self.events.append("started")
            return lambda: (self.events.append("waited"), finish())[1]

    records = [record(str(n), "a cat", png(n)) for n in range(6)]
    detector = RecordingDetector(lambda *_: [((0, 0, 9, 9), 0.9)])
    shards.write(iter(records), tmp_path / "cc", name="cc")
    labeler = Labeler(DetectorTeacher([View(detector, False)], 0.6, 0.5), phrase_finder("lexicon"), Rules(), {}, "", 2)
    written = []
    labeler.label(shards.Shards(tmp_path / "cc"), 0, 6, written.append, lambda _: None)
    assert RecordingDetector.events == ["started", "started", "waited", "started", "waited", "waited"], (
        "three batches of two"
    )
    assert [own.id for own in written] == list("012345")


def test_a_source_has_its_own_threshold(tmp_path):
    def one(*_):
        return [((0, 0, 9, 9), 0.45)]

    rules = Rules(thresholds={"noisy": 0.4})
    labeled, statistics, _ = label(tmp_path, [record("r", "a cat")], one, rules, name="clean")
    assert not labeled and statistics.report.dropped == {"caption: no box above the threshold": 1}
    labeled, _, _ = label(tmp_path, [record("r", "a cat")], one, rules, name="noisy")
    assert json.loads(labeled["r"].provenance)["threshold"] == 0.4


def test_skipped_captions_are_counted_by_reason_with_an_example(tmp_path):
    records = [
        record("no noun", "and so on"),
        record("corrupt", "a cat", png(corrupt=True)),
        record("size", "a cat", height=51),
        record("narrow", "a cat", png(height=4, width=600), 4, 600),
        record("nothing", "a dog"),
        record("fine", "a cat"),
        record("japanese", "犬が公園で走っている"),
        record("russian", "собака на траве"),
    ]
    # The detector finds every phrase except "a dog".
    labeled, statistics, _ = label(tmp_path, records, lambda _, w: [] if w == "a dog" else [((0, 0, 9, 9), 0.9)])
    assert set(labeled) == {"fine"} and statistics.captions == 8
    dropped = statistics.report.dropped
    assert dropped["caption: no noun phrase"] == 1 and dropped["image: cannot be decoded"] == 2
    assert dropped["caption: not in Latin letters"] == 2
    assert dropped["image: too long and narrow"] == 1 and sum(dropped.values()) == 7
    assert "record 'corrupt', field image" in statistics.report.first["image: cannot be decoded"]
    assert statistics.report.first["caption: no noun phrase"] == "no noun: 'and so on'"


def test_captions_that_may_not_be_english_are_labelled_and_noted(tmp_path):
    records = [record("french", "deux chiens jouent dans la neige"), record("fine", "three party poppers")]
    labeled, statistics, _ = label(tmp_path, records, lambda *_: [((0, 0, 9, 9), 0.9)])
    assert set(labeled) == {"french", "fine"}
    assert statistics.report.noted[f"caption: {PERHAPS_FOREIGN}"] == 1
    assert statistics.report.first[f"caption: {PERHAPS_FOREIGN}"] == "french: 'deux chiens jouent dans la neige'"


def test_surplus_phrases_are_unlabelled_and_not_absent(tmp_path):
    records = [record("r", "a cat and a dog near a red car")]
    shards.write(iter(records), tmp_path / "cc", name="cc")
    teacher = DetectorTeacher([View(ScriptedDetector(lambda *_: [((0, 0, 9, 9), 0.9)]), False)], 0.6, 0.5)
    written = []
    labeler = Labeler(teacher, phrase_finder("lexicon", 1), Rules(), {}, "", 2)
    statistics = labeler.label(shards.Shards(tmp_path / "cc"), 0, 1, written.append, lambda _: None)
    (own,) = written
    assert words(own, own.spans) == ["a cat"] and words(own, own.unknown) == ["a dog", "a red car"]
    assert statistics.report.dropped["phrase: surplus"] == 2


def test_boxes_are_clipped_to_the_image_and_those_without_area_are_counted(tmp_path):
    boxes = [((-5, -5, 120, 60), 0.9), ((100, 10, 130, 20), 0.8)]
    labeled, statistics, _ = label(tmp_path, [record("r", "a cat")], lambda *_: boxes)
    assert labeled["r"].boxes.tolist() == [[0, 0, 99, 49]]
    assert statistics.report.dropped["box: no area inside the image"] == 1


def test_captions_of_an_image_share_it_and_batches_hold_one_canvas_size(tmp_path):
    tall = png(7, 100, 50)
    records = [record(f"{i}.{k}", f"a cat number {k}", png(i)) for i in range(3) for k in range(2)]
    records.insert(1, record("tall", "a cat", tall, 100, 50))
    labeled, _, detector = label(tmp_path, records, lambda *_: [((0, 0, 9, 9), 0.9)])
    assert len(labeled) == 7
    sizes = [[(size, len(texts)) for size, texts in call] for call in detector.calls]
    assert sizes == [[((50, 100), 2), ((50, 100), 2)], [((50, 100), 2)], [((100, 50), 1)]]


CAPTION = "a cat and the dog near a person with a dog by the person on a cat of a dog then the person"


def test_a_caption_beyond_the_text_limit_is_split_into_several_prompts(tmp_path):
    budget = CONFIG.model.text.max_tokens
    assert len(TOKENIZER.encode(CAPTION).ids) > budget

    seen = []
    labeled, statistics, detector = label(
        tmp_path, [record("long", CAPTION)], lambda _, w: seen.append(w) or [((len(seen), 0, len(seen) + 9, 9), 0.9)]
    )
    own = labeled["long"]
    assert words(own, own.spans) == seen and own.unknown == () and len(seen) == 8
    ((_, prompts),) = detector.calls[0]
    assert len(prompts) > 1 and all(len(TOKENIZER.encode(text).ids) <= budget and text in CAPTION for text in prompts)
    assert " ".join(prompts) == CAPTION
    assert statistics.report.noted["caption: longer than the teacher's text limit, split into several prompts"] == 1


def test_a_caption_of_ten_thousand_characters(tmp_path):
    caption = " ".join(
        random.Random(0).choices(["a cat", "and", "the red dog", "under", "extraordinarily", "x" * 300], k=800)
    )
    labeled, statistics, _ = label(tmp_path, [record("long", caption)], lambda *_: [((0, 0, 9, 9), 0.9)])
    report = statistics.report
    assert len(caption) > 10_000 and report.dropped["phrase: surplus"] > 100
    assert len(labeled["long"].spans) + report.noted["phrase: no word that the vocabulary knows"] == 32


@given(
    st.lists(
        st.sampled_from(["a cat", "dog", "zq9w", "Éa", "犬", ". ", "the red-haired person", " ", "unbelievably"]),
        max_size=40,
    )
)
def test_the_prompts_of_a_plan_hold_every_phrase_once(pieces):
    caption, spans = "", []
    for piece in pieces:
        if piece.strip(". "):
            spans.append((len(caption), len(caption) + len(piece)))
        caption += piece + " "
    plan = plan_prompts(caption, spans, TOKENIZER, 12)
    found = {}
    for prompt, phrases in zip(plan.prompts, plan.phrases, strict=True):
        assert phrases
        tokenize(prompt, TOKENIZER, 12)  # fits, and every phrase has a token
        for ((begin, end),), phrase in zip(prompt.spans, phrases, strict=True):
            assert phrase not in found
            found[phrase] = prompt.caption[begin:end]
    assert found.keys().isdisjoint(plan.skipped) and {*found, *plan.skipped} == set(range(len(spans)))
    for phrase, text in found.items():
        assert text == caption[slice(*spans[phrase])]


def test_a_phrase_of_which_the_vocabulary_knows_nothing_is_not_asked():
    plan = plan_prompts("a cat, 犬 and a 犬 dog", [(0, 5), (7, 8), (13, 20)], TOKENIZER, 12)
    assert plan.skipped == {1: "no word that the vocabulary knows"} and plan.phrases == ((0, 2),)


def test_a_phrase_longer_than_the_text_limit_is_unlabelled_and_noted(tmp_path):
    caption = "a cat on the " + "red " * 20 + "dog"
    labeled, statistics, _ = label(tmp_path, [record("r", caption)], lambda *_: [((0, 0, 9, 9), 0.9)])
    assert words(labeled["r"], labeled["r"].spans) == ["a cat"] and len(labeled["r"].unknown) == 1
    assert statistics.report.noted["phrase: more tokens than the teacher's text limit"] == 1


def _sees_white(image, text):
    """Finds "a cat" in the white half of the image, and another phrase only if that half is the left one."""
    left = image[0, 0, 0] == 255
    return (
        [((0, 0, 49, 49) if left else (50, 0, 99, 49), 0.8)]
        if text == "a cat"
        else [((0, 0, 20, 20), 0.9)]
        if left
        else []
    )


def _with_mirror(detector):
    return [View(detector, False), View(detector, True)]


def test_a_mirrored_view_is_averaged(tmp_path):
    records = [record("r", "a cat and a dog"), record("side", "a cat left of a dog", png(3))]
    labeled, _, _ = label(tmp_path, records, _sees_white, Rules(threshold=0.4), _with_mirror)
    # Only one of the two views finds the dog.
    assert labeled["r"].scores == pytest.approx((0.8, 0.45)) and labeled["r"].boxes[0].tolist() == [0, 0, 49, 49]
    assert labeled["side"].scores == pytest.approx((0.8, 0.9)), (
        "the mirrored view is skipped where the caption names a side"
    )


def test_fusion_is_the_weighted_mean_and_a_view_without_a_match_counts_as_zero():
    one = PhraseDetections(boxes_array([(0, 0, 10, 10), (50, 50, 60, 60)]), np.array([0.9, 0.6], np.float32))
    other = PhraseDetections(boxes_array([(0, 0, 12, 10), (0, 0, 14, 10)]), np.array([0.3, 0.28], np.float32))
    fused = fuse([one, other], 0.25, 0.5)
    np.testing.assert_allclose(fused.boxes[0], [0, 0, 10.5, 10], atol=1e-5)
    np.testing.assert_allclose(fused.scores, [0.6, 0.3, 0.14], atol=1e-6)
    assert len(fuse([], 0.2, 0.5).scores) == len(fuse([other], 0.3, 0.5).scores) == 0


def test_suppression_uses_the_iou_of_inclusive_pixels():
    found = PhraseDetections(
        boxes_array([(0, 0, 9, 9), (0, 0, 9, 19), (0, 0, 9, 4)]), np.array([0.9, 0.8, 0.7], np.float32)
    )
    assert select_boxes(found, 0.5, 0.5, 9)[0].scores.tolist() == pytest.approx([0.9, 0.8, 0.7]), (
        "an IoU equal to the limit does not suppress"
    )
    assert select_boxes(found, 0.75, 0.49, 9)[0].scores.tolist() == pytest.approx([0.9])
    kept, beyond = select_boxes(found, 0.5, 0.5, 1)
    assert len(kept.scores) == 1 and beyond == 2


def test_the_detectors_threshold_is_low_enough_for_the_rules():
    config = tiny_run.config()
    for threshold, views, expected in ((0.5, 1, 0.05), (0.1, 1, 0.01), (0.2, 2, 0.01)):
        own = teacher_config(config, threshold, 0.7, views=views).detection
        assert own.threshold == pytest.approx(expected, rel=1e-3) and own.threshold <= expected
        assert own.nms_iou == 0.7 and own.max_detections == 300
    kept = dataclasses.replace(config, detection=DetectionConfig(max_detections=500))
    assert teacher_config(kept, 0.5, 0.6).detection.max_detections == 500
    assert teacher_config(config, 0.5, 0.6, 400).evaluation.short_side == 400


def test_statistics_round_trip_through_json_and_add_up(tmp_path):
    boxes = {"a cat": [((0, 0, 9, 9), 0.9)]}
    records = [record("1", "a cat and a dog"), record("2", "two cats"), record("3", "and so")]
    _, statistics, _ = label(tmp_path, records, lambda _, w: boxes.get(w, []))
    again = LabelStatistics.from_json(json.loads(json.dumps(statistics.as_json())))
    assert again == statistics
    again.add(statistics)
    report = summary(again)
    assert (report["captions"], report["kept"], report["boxes"]) == (6, 2, 2) and report["kept_share"] == pytest.approx(
        1 / 3
    )
    assert report["frequent_concepts"] == [["cat", 2]] == report["rarest_concepts"]
    assert report["most_asked_phrases_never_found"] == [["a dog", 2], ["two cats", 2]]
    assert report["most_asked_concepts_never_found"] == [["dog", 2]]
    assert report["drops"]["caption: no noun phrase"] == {"count": 2, "first": "3: 'and so'"}
