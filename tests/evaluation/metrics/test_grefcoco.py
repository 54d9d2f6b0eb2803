"""Generalized referring expressions: the official numbers, one-to-one matching, the threshold."""

import json
from pathlib import Path

import pytest

from glip_jax.evaluation.metrics import grefcoco
from glip_jax.evaluation.metrics.files import MetricError
from tests.evaluation.metrics.test_refexp import FAR, TARGET, _write

MADE = Path(__file__).parents[2] / "fixtures/eval_parity/grefcoco_made"


@pytest.mark.parametrize(("overlap", "name"), [("giou", "official_giou"), ("iou", "same_evaluator_with_iou")])
def test_official_numbers(overlap, name):
    for threshold, numbers in json.loads((MADE / "expected.json").read_text())[name].items():
        found = grefcoco.score(
            str(MADE / "annotations.json"), str(MADE / "predictions.json"), overlap=overlap, threshold=float(threshold)
        )
        assert found.pop("counts") == {"expressions": 64, "without_target": 20}
        assert found == numbers


def _right(folder, targets, rows, **options):
    """Whether the one expression is right."""
    return grefcoco.score(*_write(folder, {1: targets}, {"1": rows}), **options)["F1_score"] == 1


def test_an_expression_is_right_if_all_boxes_are_partners(tmp_path):
    other = [300, 300, 100, 100]
    both = [(0.9, [0, 0, 100, 100]), (0.8, FAR)]
    assert _right(tmp_path, [TARGET, other], both)
    assert not _right(tmp_path, [TARGET, other], both[1:])  # the first target is missed
    assert not _right(tmp_path, [TARGET], [both[0], (0.71, [0, 0, 100, 99])])  # a duplicate is a false box
    assert _right(tmp_path, [TARGET], [both[0], (0.69, [0, 0, 100, 99])])  # below the threshold
    # The pair of highest overlap first: by score, the first box would take the first target from the second box.
    shifted = [(0.9, [0, 0, 100, 80]), (0.8, [0, 0, 100, 100])]
    assert _right(tmp_path, [[0, 0, 100, 100], [0, 0, 100, 50]], shifted)
    assert _right(tmp_path, [[0, 0, 100, 100]], [(0.9, [0, 0, 100, 50])])  # exactly 0.5


@pytest.mark.parametrize(("lower", "right"), [([0, 0, 100, 50], True), ([0, 50, 100, 100], False)])
def test_equal_overlaps_are_taken_as_torch_takes_them(tmp_path, lower, right):
    """The first box overlaps both targets by 0.8, the second only one by 0.5. Numbers of the official evaluator with PyTorch.

    The first box gets the second target, so an expression is right where the second box has the first one.
    """
    targets = [[0, 0, 100, 80], [0, 20, 100, 80]]
    assert _right(tmp_path, targets, [(0.9, [0, 0, 100, 100]), (0.8, lower)]) == right


def test_expressions_without_a_target(tmp_path):
    paths = _write(tmp_path, {1: [None], 2: [None], 3: [None]}, {
        "1": [], "2": [(0.69, TARGET)], "3": [(0.7000001, [0, 0, 0, 0])],
    })  # fmt: skip
    found = grefcoco.score(*paths)
    assert (found["F1_score"], found["N_acc"], found["T_acc"]) == (2 / 3, 2 / 3, None)
    assert grefcoco.score(*_write(tmp_path, {1: [TARGET]}, {"1": []}))["N_acc"] is None


def test_scores_are_compared_as_float32(tmp_path):
    """0.7 is 0.69999999 in float32, 0.6 is 0.60000002: what the official evaluator keeps of its tensors."""
    assert not _right(tmp_path, [TARGET], [(0.7, TARGET)], threshold=0.7)
    assert _right(tmp_path, [TARGET], [(0.6, TARGET)], threshold=0.6)


def test_a_threshold_that_is_no_number(tmp_path):
    with pytest.raises(MetricError, match="threshold is nan"):
        _right(tmp_path, [TARGET], [], threshold=float("nan"))
