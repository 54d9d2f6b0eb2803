"""Noun phrases: the original's examples, spans in any text, and what must not crash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glip_jax.labeling.phrases import LexiconPhraseFinder, PhraseFinder, find_phrases

FINDER = LexiconPhraseFinder()


def _words(caption):
    return [caption[begin:end] for begin, end in FINDER.find(caption).spans]


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a man in a blue shirt is riding a brown horse", ["a man", "a blue shirt", "a brown horse"]),
        ("a small green book left of two red apples", ["a small green book", "two red apples"]),
        ("Two small  green books.", ["Two small  green books"]),
        ("3 large pizzas, 2.5 cats", ["3 large pizzas", "2.5 cats"]),
        ("a dog and a dog and a dog", ["a dog", "a dog", "a dog"]),
        ("the café table", ["the café table"]),
        ("the cafe\u0301 table", ["the cafe\u0301 table"]),
        ("A man's hat isn’t on the man’s head", ["A man", "hat", "the man", "head"]),
        ("A bus can´t be missed", ["A bus"]),
        ("(a black-and-white cat)", ["a black-and-white cat"]),
        ("a dog\na cat\nbird", ["a dog", "a cat", "bird"]),
        ("dog\ncat", ["dog", "cat"]),
        ("a_dog_", ["a", "dog"][1:]),
        ("the red one, the , a !", []),
        ("it and they and she", []),
        ("they're running", []),
        ("🙂 — … '' 's", []),
        ("", []),
        (" \t\n", []),
    ],
)
def test_phrases(caption, phrases):
    assert _words(caption) == phrases


text = st.text(max_size=60) | st.lists(
    st.sampled_from(["a", "two", "red", "dog", "dogs", "dog's", "don't", "T-shirt", "é", "🙂", ".", ",", "  ", "\n", "<NN>", "{", "it"])
).map(" ".join)  # fmt: skip


@given(text)
def test_spans_are_ordered_apart_and_inside_any_text(caption):
    end_before = 0
    for begin, end in FINDER.find(caption).spans:
        assert end_before <= begin < end <= len(caption)
        assert not caption[begin].isspace() and not caption[end - 1].isspace()
        assert "\n" not in caption[begin:end]
        end_before = end


@given(st.lists(st.sampled_from(["a dog", "two small cats", "the red cup", "1 man"]), min_size=1, max_size=6),
       st.sampled_from([" and ", "  near ", " , ", ". ", "\n", " 🙂 "]))  # fmt: skip
def test_every_occurrence_has_its_own_span(phrases, separator):
    caption = separator.join(phrases)
    assert _words(caption) == phrases


@given(text)
def test_the_same_caption_gets_the_same_spans(caption):
    assert find_phrases(caption) == list(FINDER.find(caption).spans)


def test_it_is_a_finder_and_says_which():
    assert isinstance(FINDER, PhraseFinder)
    assert FINDER.name == "lexicon" and "textblob" in FINDER.version and "nltk" in FINDER.version
