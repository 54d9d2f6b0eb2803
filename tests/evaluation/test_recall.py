"""Phrase recall: reading of annotations, captions within a token budget, hits by rank."""

import json

import numpy as np
import pytest

from glip_jax.config import Config, ConfigError, EvaluationConfig, EvaluationSet, validate
from glip_jax.evaluation.average_precision import GroundTruthError
from glip_jax.evaluation.recall import (
    CaptionedImage,
    Phrase,
    fit_caption,
    load_grounding,
    merged,
    overlaps,
    phrase_hits,
    phrase_recall,
)
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections
from tests.tiny_run import VOCABULARY

CAPTION = "a cat left of two dogs"
TRUTH = {
    "images": [
        {"id": 4, "file_name": "a.png", "height": 40, "width": 60, "caption": CAPTION,
         "phrases": [{"span": [0, 5], "kind": "plain"}, {"span": [14, 22], "kind": "relational"}]},
    ],
    "annotations": [
        {"id": 1, "image_id": 4, "bbox": [0, 0, 10, 10], "tokens_positive": [[0, 5]]},
        {"id": 2, "image_id": 4, "bbox": [20, 0, 10, 10], "tokens_positive": [[14, 22]]},
        {"id": 3, "image_id": 4, "bbox": [40, 0, 10, 20], "tokens_positive": [[14, 22]]},
    ],
}  # fmt: skip


def _found(*rows):
    """Detections from (phrase, score, box)."""
    return Detections(
        np.array([box for _, _, box in rows], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float32),
        np.array([phrase for phrase, _, _ in rows], np.int32),
    )


def _phrase(*boxes, kind=""):
    return Phrase(((0, 1),), np.array(boxes, np.float32), kind)


def _load(tmp_path, content):
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return load_grounding(str(tmp_path / "truth.json"))


def test_phrases_with_their_boxes_and_kinds(tmp_path):
    truth = _load(tmp_path, TRUTH)
    (image,) = truth.images
    assert [(phrase.spans, phrase.kind) for phrase in image.phrases] == [
        (((0, 5),), "plain"), (((14, 22),), "relational")
    ]  # fmt: skip
    np.testing.assert_array_equal(image.phrases[1].boxes, [[20, 0, 30, 10], [40, 0, 50, 20]])
    assert truth.left_out == {}


def test_without_a_list_the_phrases_are_those_of_the_annotations(tmp_path):
    content = json.loads(json.dumps(TRUTH))
    del content["images"][0]["phrases"]
    content["annotations"][2]["tokens_positive"] = [[14, 22], [0, 5]]
    (image,) = _load(tmp_path, content).images
    # Without a list, two spans of one box are one phrase of two spans; its box belongs to the phrases of either span too.
    assert [phrase.spans for phrase in image.phrases] == [((0, 5),), ((0, 5), (14, 22)), ((14, 22),)]
    assert [len(phrase.boxes) for phrase in image.phrases] == [2, 1, 2]


def test_the_list_of_phrases_of_flickr_is_used(tmp_path):
    content = json.loads(json.dumps(TRUTH))
    content["images"][0]["tokens_positive_eval"] = [[[0, 5]], [[6, 10]], [[14, 22]]]
    content["annotations"][2]["tokens_positive"] = [[14, 22], [0, 5]]
    truth = _load(tmp_path, content)
    assert [len(phrase.boxes) for phrase in truth.images[0].phrases] == [2, 2]
    assert truth.left_out == {"phrases without a box": 1}


def test_what_is_left_out_is_counted(tmp_path):
    content = json.loads(json.dumps(TRUTH))
    content["images"].append({**content["images"][0], "id": 5})
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["bbox"] = [20, 0, 0, 10]
    content["annotations"].append({"id": 9, "image_id": 4, "bbox": [0, 0, 9, 9], "tokens_positive": [[6, 10]]})
    truth = _load(tmp_path, content)
    assert truth.left_out == {
        "box: crowd": 1, "box: no area": 1, "boxes of no listed phrase": 1, "phrases without a box": 3,
        "captions without a phrase that has a box": 1,
    }  # fmt: skip


def _corrupt(**changes):
    content = json.loads(json.dumps(TRUTH))
    content["annotations"][0] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_id": 7}, "box: image not listed"),
        ({"bbox": [1, 2]}, "box: not four numbers"),
        ({"bbox": [1, 2, float("nan"), 3]}, "box: not finite"),
        ({"tokens_positive": [[0, 99]]}, "box: no span left"),
        ({"tokens_positive": []}, "box: no span"),
        ({"iscrowd": "x"}, "box: iscrowd neither 0 nor 1"),
    ],
)
def test_a_box_that_the_import_drops_is_left_out(tmp_path, change, reason):
    truth = _load(tmp_path, json.loads(_corrupt(**change)))
    assert truth.left_out[reason] == 1 and sum(len(p.boxes) for p in truth.images[0].phrases) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, expected an object with images"),
        (json.dumps({"images": TRUTH["images"]}), "expected a list under 'annotations', found nothing"),
        (json.dumps({**TRUTH, "images": TRUTH["images"] * 2}), "the id 4 occurs twice"),
        (json.dumps({**TRUTH, "images": [{"id": 4, "file_name": "a.png"}]}), "lacks caption"),
        (
            json.dumps({**TRUTH, "images": [TRUTH["images"][0] | {"caption": None}]}),
            "none of 3 boxes is kept.*caption no text",
        ),
        (json.dumps({**TRUTH, "annotations": []}), "no caption has a phrase with a box"),
        (
            json.dumps({**TRUTH, "images": [TRUTH["images"][0] | {"phrases": [{"span": [0, 99]}]}]}),
            r"\[0, 99\] in a caption of 22",
        ),
        (json.dumps({**TRUTH, "images": [TRUTH["images"][0] | {"phrases": 5}]}), "phrases 5: expected a list"),
    ],
)
def test_bad_files_give_one_message(tmp_path, content, message):
    (tmp_path / "truth.json").write_text(content)
    with pytest.raises(GroundTruthError, match=message):
        load_grounding(str(tmp_path / "truth.json"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GroundTruthError, match=r"nothing.json does not exist"):
        load_grounding(str(tmp_path / "nothing.json"))


def test_iou_of_plain_corners():
    a = np.array([[0, 0, 10, 10], [3, 3, 3, 3]], np.float32)
    b = np.array([[0, 0, 10, 5], [5, 5, 15, 15], [3, 3, 3, 3]], np.float32)
    # With COCO's "+1" the first would be 66 / 121.
    np.testing.assert_allclose(overlaps(a, b), [[0.5, 25 / 175, 0], [0, 0, 0]])


def test_any_box_and_merged_box():
    true = _phrase([0, 0, 10, 10], [20, 0, 30, 10])
    np.testing.assert_array_equal(merged(true.boxes), [[0, 0, 30, 10]])
    single, around = _found((0, 0.9, [20, 0, 30, 10])), _found((0, 0.9, [0, 0, 30, 10]))
    assert phrase_hits([true], single)[:, 0].tolist() == [[True] * 3, [False] * 3]
    assert phrase_hits([true], around)[:, 0].tolist() == [[False] * 3, [True] * 3]


def test_an_iou_of_exactly_half_is_a_hit():
    assert phrase_hits([_phrase([0, 0, 10, 10])], _found((0, 0.5, [0, 0, 10, 5]))).all()
    assert not phrase_hits([_phrase([0, 0, 10, 10])], _found((0, 0.5, [0, 0, 10, 4.9]))).any()


@pytest.mark.parametrize(
    ("rank", "hits"), [(1, [1, 1, 1]), (2, [0, 1, 1]), (5, [0, 1, 1]), (6, [0, 0, 1]), (11, [0] * 3)]
)
def test_the_rank_is_counted_within_the_phrase(rank, hits):
    # Another phrase has boxes of higher scores; the rows are in any order.
    rows = [(1, 0.99, [0, 0, 10, 10])] * 4 + [(0, 0.9 - 0.05 * i, [50, 50, 60, 60]) for i in range(rank - 1)]
    rows.append((0, 0.9 - 0.05 * (rank - 1), [0, 0, 10, 10]))
    found = phrase_hits([_phrase([0, 0, 10, 10]), _phrase([0, 0, 10, 10])], _found(*rows[::-1]))
    assert found[0, 0].tolist() == [bool(hit) for hit in hits]
    assert found[0, 1].all()


def test_recall_over_all_phrases_and_by_kind():
    right, wrong = [0, 0, 10, 10], [50, 50, 60, 60]
    images = [
        ([_phrase(right, kind="plain"), _phrase(right, kind="relational")], _found((0, 0.9, right), (1, 0.9, wrong))),
        ([_phrase(right, kind="relational"), _phrase(right)], _found((0, 0.9, wrong), (0, 0.8, right), (-1, 0, wrong))),
    ]
    numbers, phrases = phrase_recall(images)
    assert phrases == {"": 4, "plain": 1, "relational": 2}
    assert numbers["recall@1"] == pytest.approx(1 / 4)
    assert numbers["recall@5"] == numbers["recall@10"] == numbers["merged_recall@5"] == pytest.approx(2 / 4)
    assert numbers["plain/recall@1"] == 1 and numbers["relational/recall@1"] == 0
    assert numbers["relational/recall@5"] == pytest.approx(1 / 2)
    assert len(numbers) == 3 * 2 * 3


def test_without_phrases_there_are_no_metrics():
    assert phrase_recall([]) == ({}, {"": 0})


@pytest.fixture(scope="module")
def tokenizer():
    return prompts.load_tokenizer(VOCABULARY)


def _image(caption, *words):
    spans = [((caption.index(word), caption.index(word) + len(word)),) for word in words]
    return CaptionedImage(1, {}, caption, tuple(Phrase(span, np.ones((1, 4), np.float32)) for span in spans))


def test_a_caption_that_fits_is_the_prompt(tokenizer):
    image = _image("a cat, a dog.", "a cat", "a dog")
    fitted = fit_caption(image, tokenizer, 256)
    assert fitted.prompt == ("a cat, a dog.", (((0, 5),), ((7, 12),)))
    assert (fitted.included, fitted.over_budget, fitted.without_token) == ((0, 1), (), ())


def test_a_caption_beyond_the_budget_is_cut_at_the_last_phrase_end_that_fits(tokenizer):
    image = _image("a dog. and a cat, then a person; the end", "a person", "a dog", "a cat")
    for budget in range(3, 40):
        fitted = fit_caption(image, tokenizer, budget)
        assert sorted([*fitted.included, *fitted.over_budget]) == [0, 1, 2]
        if fitted.prompt is None:
            assert fitted.included == ()
            continue
        tokens = prompts.tokenize(fitted.prompt, tokenizer, budget)
        assert tokens.phrase_map.any(1).all()
        assert image.caption.startswith(fitted.prompt.caption)
        words = [fitted.prompt.caption[b:e] for ((b, e),) in fitted.prompt.spans]
        assert words == [["a person", "a dog", "a cat"][i] for i in fitted.included]
        longer = image.caption[: max(e for p in image.phrases for _, e in p.spans if e <= 16)]
        if len(tokenizer.encode(longer).ids) <= budget:
            assert {1, 2} <= set(fitted.included), "more fits"


def test_a_phrase_without_a_token_is_listed(tokenizer):
    image = CaptionedImage(
        1, {}, "a     dog", tuple(Phrase((span,), np.ones((1, 4), np.float32)) for span in [(1, 6), (6, 9)])
    )
    fitted = fit_caption(image, tokenizer, 256)
    assert (fitted.included, fitted.over_budget, fitted.without_token) == ((1,), (), (0,))


def test_settings_of_a_set():
    named = EvaluationSet("a", "b", {"RBC": "cell"}, "grounding")
    with pytest.raises(ConfigError, match=r"sets.x.names has 1 entries, its kind is grounding"):
        validate(Config(evaluation=EvaluationConfig(sets={"x": named})))
    misspelt = EvaluationSet("a", "b")
    # The types are not checked in a config file.
    object.__setattr__(misspelt, "kind", "grounded")
    with pytest.raises(ConfigError, match=r"sets.x.kind is 'grounded': expected detection or grounding"):
        validate(Config(evaluation=EvaluationConfig(sets={"x": misspelt})))
