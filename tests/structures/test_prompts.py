"""Prompts: cleaning, spans, tokens and chunks, against rules, a fixture of the original, and random captions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_jax.inference import chunk
from glip_jax.structures import prompts
from glip_jax.structures.batch import Prompt
from glip_jax.structures.prompts import PromptError

VOCABULARY = Path(__file__).parents[1] / "fixtures" / "vocab_tiny1.txt"
TOKENIZER = prompts.load_tokenizer(VOCABULARY)

# Ids and maps that the original GLIP (with transformers' BertTokenizerFast) produced for this vocabulary.
NAMES = ["person", "bicycle", "traffic light", "dog", "cell phone", "potted plant"]
NAMES_IDS = [6, 95, 9, 111, 9, 108, 109, 9, 99, 9, 112, 113, 9, 114, 115, 7]
NAMES_MAP = [[1], [3], [5, 6], [8], [10, 11], [13, 14]]
CAPTION = "a man in a red shirt is holding two small dogs near the old wooden bridge"
CAPTION_IDS = [6, 14, 96, 139, 14, 121, 132, 137, 143, 147, 126, 99, 68, 141, 146, 128, 130, 134, 7]


def test_clean_name_is_greedy_and_keeps_edges() -> None:
    cases = {
        "bow_(decorative_ribbons)": "bow ",
        "__background__": " background ",
        "a(b)c(d)e": "ae",
        "a    b": "a  b",
        "(all gone)": "",
        "Red_Blood": "Red Blood",
        "open ( only": "open ( only",
    }
    assert {name: prompts.clean_name(name) for name in cases} == cases


def test_fixture_of_the_original() -> None:
    prompt = prompts.prompt_from_categories(NAMES)
    assert prompt.caption == "person. bicycle. traffic light. dog. cell phone. potted plant"
    tokenized = prompts.tokenize(prompt, TOKENIZER, 256)
    assert tokenized.tokens.dtype == np.int32
    assert tokenized.tokens.shape == (256,)
    assert tokenized.tokens[tokenized.mask].tolist() == NAMES_IDS
    assert [np.flatnonzero(row).tolist() for row in tokenized.phrase_map] == NAMES_MAP
    assert not tokenized.tokens[~tokenized.mask].any()


def test_fixture_caption_of_the_original() -> None:
    spans = (((2, 5),), ((40, 45), (46, 50)))
    tokenized = prompts.tokenize(Prompt(CAPTION, spans), TOKENIZER, 256)
    assert tokenized.tokens[tokenized.mask].tolist() == CAPTION_IDS
    words = [CAPTION_IDS[i] for i in np.flatnonzero(tokenized.phrase_map[0])]
    assert words == [96]


def test_fallback_reaches_at_most_two_characters() -> None:
    caption = "dog    cat"
    rows = prompts.tokenize(
        Prompt(caption, (((5, 10),), ((4, 10),), ((0, 5),), ((0, 7),))), TOKENIZER, 8, truncate=True
    )
    assert [np.flatnonzero(row).tolist() for row in rows[0].phrase_map] == [[2], [], [1], []]
    assert rows[1] == prompts.Truncation(cut=0, without_token=2)


def test_prompts_over_the_budget_are_refused() -> None:
    with pytest.raises(PromptError, match=r"16 tokens .* budget is 11; .* 4 \('cell phone'\)"):
        prompts.tokenize(prompts.prompt_from_categories(NAMES), TOKENIZER, 11)


def test_truncation_equals_the_original_and_is_counted() -> None:
    tokenized, losses = prompts.tokenize(prompts.prompt_from_categories(NAMES), TOKENIZER, 12, truncate=True)
    assert tokenized.tokens.tolist() == [*NAMES_IDS[:11], 7]
    # "cell phone" is truncated after "cell": its last three characters have no token, so the span has none.
    assert losses == prompts.Truncation(cut=2, without_token=0)
    assert [np.flatnonzero(row).tolist() for row in tokenized.phrase_map] == [*NAMES_MAP[:4], [], []]


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (0, 99), (2, 1)])
def test_spans_outside_the_caption_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(PromptError, match=r"phrase 0 has the span"):
        prompts.tokenize(Prompt("a dog", ((span,),)), TOKENIZER, 8, truncate=True)


def test_names_without_letters_are_refused() -> None:
    with pytest.raises(PromptError, match="category 1"):
        prompts.prompt_from_categories(["dog", "_(x)_"])
    with pytest.raises(PromptError, match="no token"):
        prompts.tokenize(prompts.prompt_from_categories(["dog", "\x01"]), TOKENIZER, 8)


def test_a_single_name_over_the_budget_is_refused() -> None:
    with pytest.raises(PromptError, match=r"category 1 \('traffic light'\) alone takes 4"):
        chunk(["dog", "traffic light"], TOKENIZER, 3)


def test_invalid_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"absent.txt"):
        prompts.load_tokenizer(tmp_path / "absent.txt")
    (tmp_path / "bad.txt").write_text("[PAD]\nfoo\n")
    with pytest.raises(PromptError, match=r"lacks \[UNK\], \[CLS\]"):
        prompts.load_tokenizer(tmp_path / "bad.txt")


letters = st.sampled_from(
    ["dog", "cat", "dogs", "traffic light", "zebra9", "Éclair", "中文", "x-y", "naïve", "🙂", "한글"]
)
texts = st.lists(letters, min_size=1, max_size=12)


@given(texts, st.sampled_from([". ", " ", ", ", " . "]))
def test_every_name_has_exactly_its_tokens(names: list[str], separator: str) -> None:
    """Also for repeated words, sub-words and Unicode: each span is mapped to its own position."""
    prompt = prompts.prompt_from_categories(names, separator)
    for name, ((begin, end),) in zip(names, prompt.spans):
        assert prompt.caption[begin:end] == name
    tokenized = prompts.tokenize(prompt, TOKENIZER, 256)
    assert (tokenized.phrase_map.sum(0) <= 1).all()
    for name, row in zip(names, tokenized.phrase_map):
        alone = TOKENIZER.encode(name).ids[1:-1]
        assert tokenized.tokens[row].tolist() == alone[: row.sum()]
        assert row.any()
        assert row.sum() == len(alone) or name == "한글"


@given(texts, st.randoms(use_true_random=False))
def test_permuted_names_have_permuted_tokens(names: list[str], random: object) -> None:
    order = list(range(len(names)))
    random.shuffle(order)  # type: ignore[attr-defined]
    before = prompts.tokenize(prompts.prompt_from_categories(names), TOKENIZER, 256)
    after = prompts.tokenize(prompts.prompt_from_categories([names[i] for i in order]), TOKENIZER, 256)
    for new, old in enumerate(order):
        assert after.tokens[after.phrase_map[new]].tolist() == before.tokens[before.phrase_map[old]].tolist()


@given(st.text(max_size=40), st.data())
def test_span_map_equals_the_lookup_of_the_tokenizer(caption: str, data: st.DataObject) -> None:
    """The original uses char_to_token of the library; positive_map uses offsets and must agree for any text."""
    encoding = TOKENIZER.encode(caption)
    if not caption:
        return
    begin = data.draw(st.integers(0, len(caption) - 1))
    end = data.draw(st.integers(begin + 1, len(caption)))

    def lookup(candidates: list[int]) -> int | None:
        found = [encoding.char_to_token(c) for c in candidates if c >= 0]
        return next((token for token in found if token is not None), None)

    first, last = lookup([begin, begin + 1, begin + 2]), lookup([end - 1, end - 2, end - 3])
    expected = list(range(first, last + 1)) if first is not None and last is not None else []
    offsets = np.asarray(encoding.offsets, np.int32)
    assert np.flatnonzero(prompts.positive_map(offsets, [[(begin, end)]])[0]).tolist() == expected


@settings(deadline=None)
@given(st.lists(letters, max_size=30), st.integers(12, 40), st.integers(0, 5))
def test_chunks_are_ordered_complete_and_as_long_as_possible(names: list[str], budget: int, limit: int) -> None:
    chunks = chunk(names, TOKENIZER, budget, limit=limit)
    assert [i for indices in chunks for i in indices] == list(range(len(names)))
    for indices in chunks:
        prompts.tokenize(prompts.prompt_from_categories([names[i] for i in indices]), TOKENIZER, budget)
        assert limit == 0 or len(indices) <= limit
    for one, following in zip(chunks, chunks[1:]):
        longer = prompts.prompt_from_categories([names[i] for i in [*one, following[0]]])
        assert len(one) == limit or len(TOKENIZER.encode(longer.caption).ids) > budget


# Any text at all, also with characters that the tokenizer drops, splits off, takes apart or does not know.
pieces = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("aé \u0301\u200d.中"), min_size=1, max_size=12
)


@given(st.lists(letters | pieces, min_size=1, max_size=8), st.sampled_from([". ", " . ", ", "]))
def test_a_phrase_has_exactly_the_tokens_that_it_overlaps(names: list[str], separator: str) -> None:
    """Spans of arbitrary text: white space and dropped characters at the edge of a phrase belong to no token."""
    caption, spans = "", []
    for name in names:
        spans.append(((len(caption), len(caption) + len(name)),))
        caption += name + separator
    tokenized, _ = prompts.tokenize(Prompt(caption, tuple(spans)), TOKENIZER, 512, truncate=True)
    offsets = TOKENIZER.encode(caption).offsets
    for row, ((begin, end),) in enumerate(spans):
        touching = {i for i, (b, e) in enumerate(offsets) if b < e and b < end and e > begin}
        own = set(np.flatnonzero(tokenized.phrase_map[row]).tolist())
        assert own <= touching, "a token beyond the phrase"
        reachable = any(c in range(b, e) for b, e in offsets for c in range(begin, min(begin + 3, end)))
        reachable &= any(c in range(b, e) for b, e in offsets for c in range(max(begin, end - 3), end))
        if reachable:
            assert own == touching, "a token of the phrase is missing"


@given(texts, st.integers(0, 11))
def test_a_repeated_word_is_a_separate_phrase(names: list[str], index: int) -> None:
    """Equal words at different positions are different phrases."""
    names = [*names, names[index % len(names)]]
    tokenized = prompts.tokenize(prompts.prompt_from_categories(names), TOKENIZER, 256)
    first, last = tokenized.phrase_map[index % (len(names) - 1)], tokenized.phrase_map[-1]
    assert not (first & last).any()
    assert tokenized.tokens[first].tolist() == tokenized.tokens[last].tolist()


ODD_NAMES = st.one_of(
    st.text(min_size=1, max_size=8),
    st.sampled_from(["traffic light", "bow_(decorative_ribbons)", "x", "é", "\u0301a", "\u200b", "a.b", "dog ", " cat", "日本", "T-shirt", "e\u0301", "ﬁ", "."]),
)  # fmt: skip


@given(st.lists(ODD_NAMES, min_size=1, max_size=6), st.sampled_from([". ", ", ", ".", " ", "x", "\u0301 "]), st.data())
@settings(max_examples=300, deadline=None)
def test_joined_names_equal_the_tokenized_caption(names, separator, data) -> None:
    order = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=8))
    budget = data.draw(st.integers(4, 40))
    joined = prompts.JoinedNames(names, TOKENIZER, separator)
    try:
        prompt = prompts.prompt_from_categories([names[i] for i in order], separator)
    except PromptError:
        with pytest.raises(PromptError):
            joined.tokenize(order, budget)
        return
    expected, losses = prompts.tokenize(prompt, TOKENIZER, budget, truncate=True)
    for _ in range(2):  # first from the tokenizer, then from the cache
        found = joined.tokenize(order, budget)
        assert found[0] == prompt and found[2] == losses
        for mine, theirs in zip(found[1], expected):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype


class _Counting:
    """A tokenizer that counts its calls."""

    def __init__(self) -> None:
        self.asked = 0

    def encode(self, sequence: str):
        self.asked += 1
        return TOKENIZER.encode(sequence)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return TOKENIZER.get_vocab_size(with_added_tokens)


def test_names_are_tokenized_once() -> None:
    tokenizer = _Counting()
    joined = prompts.JoinedNames(NAMES, tokenizer)
    joined.tokenize(range(len(NAMES)), 64)
    asked = tokenizer.asked
    _, tokenized, _ = joined.tokenize([5, 0, 3], 64)
    assert tokenizer.asked == asked
    assert tokenized.tokens[tokenized.mask].tolist() == [6, 114, 115, 9, 95, 9, 99, 7]
    assert [np.flatnonzero(row).tolist() for row in tokenized.phrase_map] == [[1, 2], [4], [6]]
