"""Captions: each box is mapped to the tokens of its name, the token budget holds, equal generators give equal captions."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_jax.config import CaptionConfig
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.records import Record, boxes_array
from glip_jax.structures.prompts import clean_name, load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "fixtures" / "vocab_tiny1.txt")
NAMES = (
    "person", "dog", "traffic light", "cell phone", "cat_(animal)", "cat_(toy)", "table", "potted plant", "Éclair",
    "zebra9", "dog house", "red",
)  # fmt: skip


def captioner(max_tokens: int = 256, **settings: object) -> Captioner:
    return Captioner(NAMES, TOKENIZER, dataclasses.replace(CaptionConfig(), **settings), max_tokens)  # type: ignore[arg-type]


def detection(labels: list[int], absent: tuple[str, ...] | None = None) -> Record:
    boxes = boxes_array([(i, 0, i + 2, 5) for i in range(len(labels))])
    return Record("r", "detection", b"x", 10, 100, boxes, tuple(labels), known_absent=absent)


labels = st.lists(st.integers(0, len(NAMES) - 1), max_size=9)


@settings(deadline=None)
@given(labels, st.integers(0, 2**40), st.integers(14, 60), st.integers(0, 12), st.booleans())
def test_detection_captions(present: list[int], element: int, budget: int, negatives: int, shuffle: bool) -> None:
    make = captioner(budget, max_negatives=negatives, shuffle=shuffle)
    result = make(detection(present), rng_of(3, element))
    again = make(detection(present), rng_of(3, element))
    assert result.prompt == again.prompt
    assert np.array_equal(result.positive_map, again.positive_map)
    words = [result.prompt.caption[b:e] for ((b, e),) in result.prompt.spans]
    assert result.prompt.caption == ". ".join(words)
    # Negatives never fill the whole budget: the last slot is padding unless positives alone fill it.
    assert result.mask.sum() <= budget
    assert result.mask.sum() == len(TOKENIZER.encode(result.prompt.caption).ids)
    kept = {label for label, keep in zip(present, result.keep) if keep}
    assert result.over_budget == len(set(present) - kept)
    assert result.without_token == 0
    for label, keep, row in zip(present, result.keep, result.positive_map):
        alone = TOKENIZER.encode(clean_name(NAMES[label])).ids[1:-1]
        assert result.tokens[row].tolist() == (alone if keep else [])
    negative = len(words) - len(kept)
    assert 0 <= negative <= negatives
    # No negative equals the name of a positive: the caption does not contradict itself.
    for label in kept:
        same = [other for other in kept if clean_name(NAMES[other]) == clean_name(NAMES[label])]
        assert words.count(clean_name(NAMES[label])) == len(same)


def test_a_large_budget_holds_all_positives_and_negatives() -> None:
    result = captioner(full_probability=1.0)(detection([1, 1, 4]), rng_of(0, 0))
    # Of 12 names, two are positive, and cat_(toy) equals one of them after cleaning.
    assert len(result.prompt.spans) == 11
    assert result.keep.all()
    counts = [
        len(captioner(full_probability=0.0, max_negatives=5)(detection([1]), rng_of(0, i)).prompt.spans) - 1
        for i in range(200)
    ]
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    assert max(np.bincount(counts)) < 100


def test_half_of_the_captions_are_full() -> None:
    most = [len(captioner()(detection([11]), rng_of(0, i)).prompt.spans) == len(NAMES) for i in range(300)]
    # Probability 0.5, or a uniform number of 1 to 12 (85, but there are no more names) that is 12: 0.5 + 0.5 / 12.
    assert 0.45 < np.mean(most) < 0.63


def test_negatives_are_restricted_to_known_absent_names() -> None:
    for element in range(20):
        result = captioner()(detection([1], ("table", "red", "not in the list")), rng_of(0, element))
        words = result.prompt.caption.split(". ")
        assert "dog" in words
        assert set(words) <= {"dog", "table", "red"}
    assert captioner()(detection([], ()), rng_of(0, 0)).prompt.caption == ""


def test_labels_beyond_the_budget_are_counted_and_their_boxes_dropped() -> None:
    result = captioner(8)(detection([0, 2, 3, 7, 7]), rng_of(0, 1))
    assert result.over_budget == 4 - len(result.prompt.spans)
    assert result.over_budget > 0
    assert not result.keep.all()


def test_order_is_random_only_with_shuffle() -> None:
    captions = {captioner()(detection([0, 1, 2, 3]), rng_of(0, i)).prompt.caption for i in range(20)}
    assert len(captions) > 10
    fixed = {
        captioner(shuffle=False, full_probability=1.0)(detection([3, 1]), rng_of(0, i)).prompt.caption for i in range(9)
    }
    assert len(fixed) == 1
    assert fixed.pop().startswith("person. dog. traffic light. cell phone")


def test_grounding_keeps_its_caption_and_counts_truncated_phrases() -> None:
    caption = "a small red dog and a table"
    spans = (((8, 15),), ((22, 27),), ((8, 15),), ((15, 16),))
    record = Record(
        "g", "grounding", b"x", 10, 100, boxes_array([(i, 0, i + 2, 5) for i in range(4)]), (), caption, spans
    )
    result = captioner()(record, rng_of(0, 0))
    assert result.prompt.caption == caption
    assert result.keep.all()
    one = TOKENIZER.encode("red dog").ids[1:-1]
    assert [result.tokens[row].tolist() for row in result.positive_map] == [
        one, TOKENIZER.encode("table").ids[1:-1], one, [],
    ]  # fmt: skip
    assert (result.over_budget, result.without_token) == (0, 1)
    short = captioner(7)(record, rng_of(0, 0))
    assert short.mask.all()
    # "table" is truncated; its box is kept for the box losses, without tokens.
    assert (short.over_budget, short.without_token) == (1, 1)
    assert short.keep.all()
    assert short.positive_map.any(1).tolist() == [True, False, True, False]


def test_names_of_different_seeds_and_elements_differ() -> None:
    draws = {(seed, i): rng_of(seed, i).integers(2**60) for seed in range(3) for i in range(5)}
    assert len(set(draws.values())) == len(draws)
    assert rng_of(1, 2).integers(2**60) == draws[1, 2]


@pytest.mark.parametrize("field", ["tokens", "mask", "positive_map"])
def test_shapes(field: str) -> None:
    result = captioner(40)(detection([]), rng_of(0, 0))
    assert getattr(result, field).shape == {"tokens": (40,), "mask": (40,), "positive_map": (0, 40)}[field]
