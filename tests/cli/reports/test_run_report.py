import dataclasses
import json
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image

from glip_jax.cli.reports.card import text_pieces
from glip_jax.cli.reports.run_cards import cards
from glip_jax.cli.reports.run_report import render, table
from glip_jax.evaluation.absent_names import absence
from glip_jax.evaluation.average_precision import NUMBERS, AveragePrecision, ListedNames, load_ground_truth
from glip_jax.evaluation.evaluate import Evaluated, EvaluationError, Grounded
from glip_jax.evaluation.recall import load_grounding, match, phrase_recall
from glip_jax.structures.batch import Detections

CAPTION = "a <b>cat</b> & two dogs"


def _found(*rows):
    """Detections from (number, score, box)."""
    return Detections(
        np.array([box for *_, box in rows], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float32),
        np.array([number for number, *_ in rows], np.int32),
    )


@pytest.fixture
def detection(tmp_path):
    """Two pictures; on the first a cell is found and a <WBC> is called a cell, on the second a cell is missed."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / name)
    content = {
        "images": [{"id": 4, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 9, "name": "<WBC>"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 7, "bbox": [1, 2, 20, 10]},
            {"id": 2, "image_id": 4, "category_id": 9, "bbox": [30, 20, 20, 10]},
            {"id": 3, "image_id": 2, "category_id": 7, "bbox": [1, 2, 20, 10]},
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    found = {
        4: _found((0, 0.8, [1, 2, 20, 11]), (0, 0.6, [30, 20, 49, 29]), (1, 0.2, [0, 0, 5, 5])),
        2: _found((-1, 0.0, [0, 0, 0, 0])),
    }
    precision = AveragePrecision(
        dict.fromkeys(NUMBERS, 0.25) | {"AP50": 0.5}, {"cell": 0.5, "<WBC>": -1.0}, {"cell": 0.75, "<WBC>": -1.0}
    )
    truth = load_ground_truth(str(tmp_path / "truth.json"))
    return Evaluated(truth, ("cell", "<WBC>"), (4, 2), found, precision, 0.125), epath.Path(tmp_path)


@pytest.fixture
def grounding(tmp_path):
    """A caption with two phrases: the first found second best, the second not asked for."""
    Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "a.png")
    spans = [[0, 12], [15, 23]]
    content = {
        "images": [{"id": "x", "file_name": "a.png", "caption": CAPTION, "phrases": [
            {"span": spans[0], "kind": "plain"}, {"span": spans[1], "kind": "relational"}]}],
        "annotations": [
            {"id": p, "image_id": "x", "bbox": [20 * p, 0, 10, 10], "tokens_positive": [span]} for p, span in enumerate(spans)
        ],
    }  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(content))
    truth = load_grounding(str(tmp_path / "captions.json"))
    found = _found((0, 0.9, [40, 20, 50, 30]), (0, 0.7, [0, 0, 10, 10]))
    recall = phrase_recall([(truth.images[0].phrases, found)])
    return Grounded(truth, ("x",), {"x": found}, recall, {"x": (1,)}, {"captions": 1}), epath.Path(tmp_path)


def test_a_true_box_is_met_once_and_only_by_its_name():
    true = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    found = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 4]], np.float32)
    met = match(found, np.array([0, 0, 1, 0]), true, np.array([0, 0]))
    assert met.tolist() == [0, -1, -1, -1]
    assert match(found[2:], np.array([0, 0]), true, np.array([0, 0])).tolist() == [1, -1]


def test_a_card_says_what_is_right_wrong_and_missed(detection):
    drawn, threshold = cards(*detection, limit=5, threshold=0.5)
    assert threshold == 0.5 and [card.file for card in drawn] == ["a.png", "b.png"]
    assert [(chip.text, chip.state, chip.score) for chip in drawn[0].chips] == [
        ("cell", "right", "0.80"), ("cell", "wrong", "0.60"), ("<WBC>", "missed", "")
    ]  # fmt: skip
    assert [box.true for box in drawn[0].boxes] == [True, True, False, False]
    assert [box.text for box in drawn[0].boxes if not box.true] == ["✗ cell", "cell"], "the best stands on top"
    assert drawn[1].chips[0].state == "missed"
    # 60 pixels are 360 units wide; found boxes are inclusive pixels, so these two fall together.
    true, best = drawn[0].boxes[0], drawn[0].boxes[-1]
    assert (true.x, true.y, true.width, true.height) == (6, 12, 120, 60)
    assert (best.x, best.y, best.width, best.height) == (6, 12, 120, 60)


def test_the_score_to_draw_from_is_chosen_over_the_set(detection):
    _, threshold = cards(*detection, limit=1, threshold=None)
    assert threshold == pytest.approx(0.8)


def test_a_card_of_a_caption(grounding):
    (card,), _ = cards(*grounding, limit=5, threshold=0.95)
    assert "".join(piece.text for piece in card.caption) == CAPTION
    first, between, second = card.caption
    assert (first.text, between.text, second.text) == (CAPTION[:12], CAPTION[12:15], CAPTION[15:])
    assert between.color == "" and (first.state, second.state) == ("", "unasked")
    assert [(chip.text, chip.state, chip.kind) for chip in card.chips] == [
        (CAPTION[:12], "wrong", "plain"), (CAPTION[15:], "missed", "relational")
    ]  # fmt: skip
    assert {box.color for box in card.boxes if not box.true} == {first.color} == {card.chips[0].color}
    assert len([box for box in card.boxes if not box.true]) == 1, "below the score only the best of a phrase is drawn"


def test_a_phrase_is_colored_where_no_shorter_one_is():
    spans = [((0, 9),), ((2, 5),), ((7, 8), (11, 13))]
    cut = text_pieces("0123456789abcd", spans, ["red", "green", "blue"])
    assert [piece.text for piece in cut] == ["01", "234", "56", "7", "8", "9a", "bc", "d"]
    colors = [piece.color for piece in cut]
    assert colors[0] == colors[2] == colors[4] != colors[1]
    assert colors[3] == colors[6] and colors[5] == colors[7] == ""
    assert text_pieces("", [], []) == ()
    outside = text_pieces("ab", [((0, 1),)], ["red"], outside="negative")
    assert [piece.state for piece in outside] == ["", "negative"]


def test_a_large_photograph_is_made_smaller(tmp_path, detection):
    result, folder = detection
    Image.new("RGB", (3000, 2000)).save(tmp_path / "a.png")
    (card,), _ = cards(result, folder, limit=1, threshold=0.5)
    assert len(card.uri) < 40_000 and (card.width, card.height) == (360, 240)


def test_a_picture_that_is_gone_is_named(tmp_path, detection):
    (tmp_path / "b.png").unlink()
    with pytest.raises(EvaluationError, match=r"b.png does not exist"):
        cards(*detection, limit=5, threshold=None)


SUMMARY = {
    "date": "2030", "workdir": "w", "step": 3, "parameters": "ema", "versions": {"jax": "1.2"},
    "settings": {"detection.nms_iou": 0.6, "data.captions.separator": ". ", "model.text.max_tokens": 16, "model.dtype": "f"},
    "hashes": {"checkpoint": "abc123", "code": {"commit": "def456"}},
    "sets": {
        "cells": {"hashes": {"annotations": "a1"}, "chunks": [["cell", "<WBC>"], ["third"]],
                  "chunking": [{"asked": "names shuffled", "AP50": 0.5, "difference": -0.0125}]},
        "x": {"hashes": {"annotations": "b2"}},
    },
}  # fmt: skip


def test_the_report_needs_no_other_file_and_escapes_all_text(detection, grounding):
    curves = {"loss": {"loss": ([1, 2], [2.0, 1.0])}, "empty": {}}
    page = render("run <1>", {"cells": detection, "x": grounding}, curves, ["a <note>"], summary=SUMMARY)
    assert page.count("data:image/svg+xml;base64,") == 1 and page.count("data:image/jpeg;base64,") == 3
    assert "http" not in page and "<script" not in page and "<link" not in page
    for text in ("&lt;WBC&gt;", "run &lt;1&gt;", "a &lt;note&gt;", "&lt;b&gt;cat&lt;/b&gt;"):
        assert text in page
    assert "<WBC>" not in page and "<b>cat" not in page
    assert 'name="viewport"' in page


def test_the_report_lists_what_the_numbers_depend_on(detection, grounding):
    page = render("run", {"cells": detection, "x": grounding}, {}, summary=SUMMARY)
    for text in (
        "4.0 × chance (0.1250)",
        "0.6",
        "abc123",
        "def456",
        "a1",
        "b2",
        "jax 1.2",
        "cell. &lt;WBC&gt;",
        "-0.0125",
    ):
        assert text in page
    assert "plain 0.000" in page and "relational 0.000" in page


def test_a_report_without_an_evaluation_has_its_curves():
    page = render("run", {}, {"loss": {"loss": ([1, 2], [2.0, 1.0])}})
    assert page.count("data:image") == 1 and "What these numbers depend on" not in page


def test_a_table_for_the_terminal(detection, grounding):
    lines = table({"cells": detection[0], "x": grounding[0]}).splitlines()
    assert lines[0].split()[:6] == ["set", "images", "AP", "AP50", "permuted", "ratio"]
    assert lines[1].split()[:6] == ["cells", "2", "0.2500", "0.5000", "0.1250", "4.0"]
    assert len(lines[0]) == len(lines[1]) and lines[2] == ""
    assert lines[3].split()[:4] == ["set", "captions", "phrases", "R@1"]
    assert lines[4].split() == ["x", "1", "2", "0.0000", "0.5000", "0.5000", "0.0000", "0.5000", "0.5000", "1"]
    assert lines[5].split()[:4] == ["plain", "1", "0.0000", "1.0000"]
    assert lines[6].split()[:4] == ["relational", "1", "0.0000", "0.0000"]


def test_where_there_is_no_chance_there_is_no_ratio(detection):
    result, _ = detection
    assert table({"x": result._replace(permuted=-1.0)}).splitlines()[1].split()[4:6] == ["-", "-"]
    assert table({"x": result._replace(permuted=0.0)}).splitlines()[1].split()[4:6] == ["0.0000", "∞"]
    none = result.precision._replace(numbers={**result.precision.numbers, "AP50": 0.0})
    nothing = result._replace(permuted=0.0, precision=none)
    assert table({"x": nothing}).splitlines()[1].split()[4:6] == ["0.0000", "-"]


def test_absent_names_have_a_column_and_two_tables(detection):
    """A <WBC> is known to be absent from the second picture, where a box of 0.4 has that name; asked alone its score is 0.9."""
    result, folder = detection
    truth = dataclasses.replace(result.truth, listed={2: ListedNames((1,), (1,), ())})
    found = {**result.detections, 2: _found((1, 0.4, [0, 0, 5, 5]))}
    measured = absence(truth, found, result.image_ids)
    alone = absence(truth, {**found, 2: _found((1, 0.9, [0, 0, 5, 5]))}, result.image_ids)
    assert measured is not None
    shown = result._replace(truth=truth, detections=found, absence=measured | {"alone": alone})
    rows = [re.split(r" {2,}", line.strip()) for line in table({"x": shown}).splitlines()]
    assert rows[0][6] == "alarms" and rows[1][6] == "1.0000"
    named = {row[0]: row[1:] for row in rows[3:]}
    assert named["look-alikes"][:4] == ["1", "1.0000", "1.0000", "-"] and named["look-alikes"][5] == "0.0000"
    assert named["one name a prompt"][5] == "1.0000" == named["look-alikes, one a prompt"][5]
    assert named["x"][1] == "0.400" and named["false alarms at most"][1] == "0.01: from"
    text = render("t", {"x": (shown, folder)}, {})
    assert "<h2>Absent names</h2>" in text and "look-alikes, one a prompt" in text and "0.05: from" in text
    assert "<h2>Absent names</h2>" not in render("t", {"x": (result, folder)}, {})
