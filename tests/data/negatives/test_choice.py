"""Negatives: number of names, likeness, packed texts, and phrases that are neither present nor absent."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_jax.config import CaptionConfig, PackingConfig
from glip_jax.data.captions import Captioner, CropResult, rng_of, says_side
from glip_jax.data.negatives.choice import Likeness, choose, number_of_names, number_of_texts, pack
from glip_jax.data.records import Record, boxes_array
from glip_jax.structures.prompts import load_tokenizer

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "fixtures" / "vocab_tiny1.txt")
NAMES = ("person", "dog", "traffic light", "cell phone", "table", "dog house", "red", "traffic sign")
CAPTIONS = ("a red dog", "two cell phones on a table.", "a person", "the traffic light and a man", "old red table")


def captioner(max_tokens: int = 64, more: tuple[str, ...] = (), others: object = None, **fields: object) -> Captioner:
    return Captioner(NAMES, TOKENIZER, dataclasses.replace(CaptionConfig(), **fields), max_tokens, more, others)  # type: ignore[arg-type]


def detection(labels: list[int], **fields: object) -> Record:
    boxes = boxes_array([(i, 0, i + 2, 5) for i in range(len(labels))])
    return Record("r", "detection", b"x", 10, 100, boxes, tuple(labels), **fields)  # type: ignore[arg-type]


def grounding(caption: str, *phrases: str, kind: str = "pseudo", **fields: object) -> Record:
    spans = tuple(((caption.index(phrase), caption.index(phrase) + len(phrase)),) for phrase in phrases)
    boxes = boxes_array([(i, 0, i + 2, 5) for i in range(len(phrases))])
    scores = (0.9,) * len(phrases) if kind == "pseudo" else ()
    return Record("g", kind, b"x", 10, 100, boxes, (), caption, spans, scores, **fields)  # type: ignore[arg-type]


class Reading:
    """A sequence of records like `Shards`, which counts reads."""

    def __init__(self, captions: tuple[str, ...] = CAPTIONS) -> None:
        self.records = [grounding(caption, caption.split()[-1].strip(".")) for caption in captions]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Record:
        self.reads += 1
        return self.records[index]


def unknown_words(result) -> str:
    """The text of the tokens that are excluded by the loss mask."""
    tokens = result.tokens[~result.token_loss_mask]
    return TOKENIZER.decode(tokens.tolist()) if len(tokens) else ""  # type: ignore[attr-defined]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids[1:-1]


# Number of negatives.


def test_number_of_names_follows_the_probabilities() -> None:
    config = CaptionConfig(
        max_negatives=10, full_probability=0.3, one_negative_probability=0.2, one_positive_probability=0.1
    )
    drawn = Counter(number_of_names(50, config, rng_of(0, i)) for i in range(4000))
    random = 0.4 / 10
    wanted = {0: 0.1, 1: 0.2 + random, 10: 0.3 + random} | {n: random for n in range(2, 10)}
    assert set(drawn) == set(wanted)
    for count, share in wanted.items():
        assert drawn[count] / 4000 == pytest.approx(share, abs=0.025), count
    few = {number_of_names(3, CaptionConfig(), rng_of(0, i)) for i in range(100)}
    assert few == {1, 2, 3}, "no more than there are, at random among these"
    assert number_of_names(0, CaptionConfig(), rng_of(0, 0)) == 0


def test_the_number_of_packed_texts_is_that_of_glip_l() -> None:
    config = PackingConfig(number=20)
    drawn = Counter(number_of_texts(config, rng_of(0, i)) for i in range(4000))
    assert drawn[20] / 4000 == pytest.approx(0.6 * 0.5, abs=0.025)
    assert drawn[0] / 4000 == pytest.approx(0.4 + 0.3 / 20, abs=0.025)
    assert max(drawn) == 20 and set(drawn) == set(range(21))
    assert number_of_texts(PackingConfig(), rng_of(0, 0)) == 0, "GLIP-T packs nothing"


def test_positives_can_be_dropped_with_their_boxes() -> None:
    make = captioner(drop_positive_probability=1.0, max_negatives=0)
    counts = set()
    for i in range(60):
        result = make(detection([0, 1, 2, 2]), rng_of(0, i))
        counts.add(len(result.prompt.spans))
        assert result.over_budget == 0
        assert result.positive_map.any(1).tolist() == result.keep.tolist()
    assert counts == {1, 2, 3}


# Choice of negatives.


def test_likeness_by_words_and_trigrams() -> None:
    found = Likeness(("traffic sign", "trafficker", "dog"))(["traffic light", "cat"])
    assert found[0] > found[1] > found[2] == 0
    assert Likeness(("Dog_house",))(["dog"])[0] > 0.5


@given(st.integers(0, 12), st.integers(0, 12), st.floats(0, 1), st.integers(0, 999))
def test_chosen_indices_are_distinct_and_as_many_as_available(
    available: int, count: int, share: float, seed: int
) -> None:
    likeness = np.random.default_rng(seed).integers(0, 3, available).astype(np.float32)
    chosen = choose(likeness, available, count, share, rng_of(0, seed))
    assert len(set(chosen)) == len(chosen) == min(available, count)
    assert set(chosen) <= set(range(available))


def test_hard_negatives_are_similar_names() -> None:
    make = captioner(hard_share=1.0, max_negatives=1, full_probability=1.0)
    for i in range(10):
        (name,) = {*make(detection([2]), rng_of(0, i)).prompt.caption.split(". ")} - {"traffic light"}
        assert name == "traffic sign"
    half = captioner(hard_share=0.5, max_negatives=2, full_probability=1.0)
    drawn = [{*half(detection([2]), rng_of(0, i)).prompt.caption.split(". ")} for i in range(40)]
    assert all("traffic sign" in words for words in drawn)
    assert len({frozenset(words) for words in drawn}) > 4, "the other half is drawn from all"


def test_additional_negatives_never_equal_a_positive() -> None:
    make = captioner(more=("zebra", "dog_(animal)", "dog", "zebra"), full_probability=1.0)
    words = make(detection([0]), rng_of(0, 0)).prompt.caption.split(". ")
    assert sorted(words) == sorted([*NAMES, "zebra"]), "dog_(animal) reads like a name of the source"
    only = make(detection([0], known_absent=("table",)), rng_of(0, 0)).prompt.caption.split(". ")
    assert sorted(only) == ["person", "table", "zebra"]


def test_mode_all_names_keeps_the_order() -> None:
    make = captioner(mode="all_names", shuffle=False)
    result = make(detection([4, 1]), rng_of(0, 0))
    assert result.prompt.caption == ". ".join(NAMES)
    assert result.keep.all() and result.token_loss_mask.all() and result.negatives == 6
    assert result.tokens[result.positive_map[0]].tolist() == ids("table")
    shuffled = {captioner(mode="all_names")(detection([1]), rng_of(0, i)).prompt.caption for i in range(5)}
    assert len(shuffled) == 5 and {len(text) for text in shuffled} == {len(result.prompt.caption)}


# Packed texts.


@settings(deadline=None)
@given(st.lists(st.sampled_from(CAPTIONS), max_size=6), st.integers(10, 40), st.integers(0, 99))
def test_packed_text_fits_and_keeps_the_caption(texts: list[str], budget: int, seed: int) -> None:
    caption = "a man near the old red table"
    packed, begin, number = pack(caption, texts, TOKENIZER, budget, rng_of(0, seed))
    assert packed[begin : begin + len(caption)] == caption
    length = len(TOKENIZER.encode(caption).ids)
    assert len(TOKENIZER.encode(packed).ids) <= max(budget, length)
    assert packed == caption if number == 0 else packed.count(". ") == number + 1
    if budget == 40 and texts:
        assert number > 0


def test_packed_captions_shift_spans_and_are_negative() -> None:
    others = Reading()
    make = captioner(others=others, packing=PackingConfig(10, 0.0, 1.0))
    record = grounding("two small dogs by the table", "two small dogs", "table")
    places = set()
    for i in range(20):
        result = make(record, rng_of(0, i))
        words = [result.prompt.caption[b:e] for ((b, e),) in result.prompt.spans]
        assert words == ["two small dogs", "table"], "spans move with the caption"
        assert result.tokens[result.positive_map[0]].tolist() == ids("two small dogs")
        assert result.negatives >= 3 and result.token_loss_mask.all()
        assert result.mask.sum() <= 64 and result.keep.all() and result.over_budget == 0
        assert result.prompt == make(record, rng_of(0, i)).prompt, "the example's numbers decide"
        places.add(result.prompt.spans[0][0][0])
    assert len(places) > 4 and others.reads == 400
    assert make(grounding("a man", "man", kind="grounding"), rng_of(0, 0)).prompt.caption == "a man"
    assert others.reads == 400, "grounding captions are packed only if `kinds` contains them"


def test_a_caption_is_never_its_own_negative() -> None:
    make = captioner(others=Reading(("A red dog",) * 3), packing=PackingConfig(5, 0.0, 1.0))
    assert make(grounding("a red dog", "dog"), rng_of(0, 0)).prompt.caption == "a red dog"


@pytest.mark.parametrize("take", ["phrases", "names"])
def test_phrases_and_names_as_negatives_of_captions(take: str) -> None:
    packing = PackingConfig(3, 0.0, 1.0, take, ("pseudo", "grounding"))  # type: ignore[arg-type]
    make = captioner(others=Reading(), more=("zebra", "person", "man"), packing=packing)
    record = grounding("a man with a phone", "man", kind="grounding", known_absent=("red",))
    for i in range(10):
        result = make(record, rng_of(0, i))
        parts = [part.strip() for part in result.prompt.caption.split(".") if part.strip()]
        pool = {"zebra", "person", "red"} if take == "names" else {"dog", "table", "person", "light"}
        assert set(parts) - {"a man with a phone"} <= pool, "man stands in the caption"
        assert result.negatives == len(parts) - 1
    assert result.negatives == 3 or take == "phrases"


# Unlabelled phrases.


def test_not_exhaustive_names_are_unlabelled() -> None:
    result = captioner(full_probability=1.0)(detection([1, 4], not_exhaustive=("dog",)), rng_of(0, 0))
    assert unknown_words(result) == "dog"
    assert result.tokens[result.positive_map[0]].tolist() == ids("dog"), "the box still has its word"
    assert captioner()(detection([1, 4]), rng_of(0, 0)).token_loss_mask.all()
    text = captioner()(grounding("a man and a dog", "man", "dog", not_exhaustive=("Dog",)), rng_of(0, 0))
    assert unknown_words(text) == "dog"


def test_phrases_without_a_box_are_unlabelled() -> None:
    record = grounding("a man and a dog on a red chair", "man", unknown=(((13, 15),), ((22, 30),)))
    make = captioner(others=Reading(), packing=PackingConfig(9, 0.0, 1.0))
    for maker in (captioner(), make):
        result = maker(record, rng_of(0, 1))
        assert unknown_words(result) == "dog red chair"
        assert result.positive_map.shape[0] == 1 and result.tokens[result.positive_map[0]].tolist() == ids("man")


def test_names_of_a_federated_source_are_absent_only_if_the_record_lists_them() -> None:
    make = captioner(mode="all_names", shuffle=False)
    result = make(detection([1], known_absent=("table", "red")), rng_of(0, 0))
    assert unknown_words(result) == "person traffic light cell phone dog house traffic sign"


def test_words_in_no_phrase_can_be_unlabelled() -> None:
    record = grounding("a man near the old red table .", "old red table", kind="grounding")
    assert captioner()(record, rng_of(0, 0)).token_loss_mask.all(), "negative, as in the original"
    make = captioner(words_without_box="unknown")
    result = make(record, rng_of(0, 0))
    assert unknown_words(result) == "a man near the"
    assert result.token_loss_mask[[0, *range(int(result.mask.sum()) - 2, 64)]].all(), "marks and padding are no words"
    short = captioner(5, words_without_box="unknown")(record, rng_of(0, 0))
    assert short.token_loss_mask.shape == (5,)
    packed = captioner(others=Reading(), words_without_box="unknown", packing=PackingConfig(9, 0.0, 1.0))
    both = packed(grounding("a man near the old red table .", "old red table"), rng_of(0, 1))
    assert unknown_words(both) == "a man near the", "packed text is negative"


def test_removed_boxes_are_unlabelled_or_not_in_the_caption() -> None:
    record = grounding("a man near a dog", "man", "dog", "dog")
    view = CropResult(np.array([False, True, True]), np.array([False, False, False]))
    gone = captioner()(record, rng_of(0, 0), view)
    assert unknown_words(gone) == "man" and gone.keep.tolist() == [False, True, True]
    assert not gone.positive_map[0].any()
    half = captioner()(record, rng_of(0, 0), CropResult(np.array([True, True, False]), np.array([False, False, True])))
    assert unknown_words(half) == "dog", "something of a dog without a box is left"
    half = captioner()(record, rng_of(0, 0), CropResult(np.array([True, True, False]), np.array([False, False, False])))
    assert half.token_loss_mask.all(), "the other dog is wholly out of view"
    boxes = captioner(full_probability=1.0)(
        detection([1, 4, 4]), rng_of(0, 0), CropResult(np.array([False, True, False]), np.array([True, False, True]))
    )
    assert "dog" not in boxes.prompt.caption.split(". ") and unknown_words(boxes) == "table"
    assert boxes.keep.tolist() == [False, True, False] and boxes.over_budget == 0


@pytest.mark.parametrize(
    "text", ["the Left dog", "a left-hand glove", "rightmost", "turning rightwards", "to the right."]
)
def test_texts_with_left_or_right(text: str) -> None:
    assert says_side(text)


@pytest.mark.parametrize("text", ["bright", "upright", "leftover food", "copyright", ""])
def test_texts_without_left_or_right(text: str) -> None:
    assert not says_side(text)


def test_left_and_right_in_records() -> None:
    make = Captioner(("left shoe", "hat"), TOKENIZER, CaptionConfig(), 64)
    assert make.says_side(detection([0])) and not make.says_side(detection([1]))
    assert make.says_side(grounding("the dog on the left", "dog"))


# Prompts that name nothing of the image.


def test_an_empty_prompt_has_negatives_alone_and_no_box() -> None:
    make = captioner(empty_probability=1.0, one_positive_probability=1.0, full_probability=0.0)
    for i in range(20):
        result = make(detection([0, 1, 2, 2]), rng_of(0, i))
        assert not result.keep.any() and not result.positive_map.any()
        assert result.token_loss_mask.all() and result.over_budget == 0
        names = result.prompt.caption.split(". ")
        assert result.negatives == len(names) == 1, "the settings ask for none; one is the least"
        assert not {*names} & {NAMES[0], NAMES[1], NAMES[2]}
    partly = captioner(empty_probability=0.3)
    drawn = [partly(detection([0, 1]), rng_of(0, i)).keep.any() for i in range(600)]
    assert sum(drawn) / 600 == pytest.approx(0.7, abs=0.06)


def test_hard_negatives_of_an_empty_prompt_are_like_the_names_of_the_image() -> None:
    make = captioner(empty_probability=1.0, hard_share=1.0, max_negatives=1, full_probability=1.0)
    assert {make(detection([2]), rng_of(0, i)).prompt.caption for i in range(10)} == {"traffic sign"}


def test_what_is_unknown_is_in_no_empty_prompt() -> None:
    make = captioner(empty_probability=1.0)
    # All names but one are unknown; where all are, the prompt is the usual one.
    only = make(detection([0], known_absent=("table",)), rng_of(0, 0))
    assert only.prompt.caption == "table" and not only.keep.any()
    nothing_known = make(detection([0], known_absent=()), rng_of(0, 0))
    assert nothing_known.prompt.caption == NAMES[0] and nothing_known.keep.all()
    record = grounding("a man with a phone", "man", kind="grounding", known_absent=("red", "man", "cell_phone"))
    for i in range(10):
        found = make(record, rng_of(0, i))
        names = found.prompt.caption.split(". ")
        assert {*names} <= {"red", "cell phone"} and found.negatives == len(names) > 0
        assert not found.keep.any() and found.token_loss_mask.all()
    assert make(grounding("a man", "man", kind="grounding"), rng_of(0, 0)).keep.all()
    budget = captioner(8, tuple(f"red table {n}" for n in "abcdefgh"), empty_probability=1.0)
    tight = budget(grounding("a man", "man"), rng_of(0, 0))
    assert tight.mask.sum() <= 8 and tight.over_budget == 0 and tight.negatives == len(tight.prompt.spans) == 1


def test_without_empty_prompts_the_random_numbers_are_those_of_before() -> None:
    make = captioner()
    for record in (detection([0, 1, 2]), grounding("a man with a phone", "man")):
        rng, other = rng_of(0, 1), rng_of(0, 1)
        make(record, rng)
        if record.kind == "detection":
            make.sample([0, 1, 2], None, other)
        assert rng.random() == other.random()
