"""Cases for each rule; both finders must give the same result."""

import pytest

from glip_jax.labeling.phrases.rules import REASONS, PhraseRules, Word
from tests.labeling.phrases.finders import finder, phrases

CASES = {
    "determiners and quantities stay": [
        ("a dog and the cats near some cows", ["a dog", "the cats", "some cows"]),
        ("this man with that dog", ["this man", "that dog"]),
        ("two small apples", ["two small apples"]),
        ("several dogs and many cats", ["several dogs", "many cats"]),
    ],
    "of two determiners the last": [("all the people", ["the people"]), ("both the dogs", ["the dogs"])],
    "how many": [("how many dogs", ["dogs"])],
    "possessives go": [
        ("a boy holds his hat", ["a boy", "hat"]),
        ("all his dogs", ["dogs"]),
        ("a man's hat", ["a man", "hat"]),
        ("the dogs' bowls", ["the dogs", "bowls"]),
    ],
    "coordinated nouns": [
        ("a laptop and desktop computer", ["a laptop", "desktop computer"]),
        ("a man and woman", ["a man", "woman"]),
        ("salt and pepper", ["salt", "pepper"]),
        ("a cup, a plate and a fork", ["a cup", "a plate", "a fork"]),
    ],
    "coordinated adjectives": [
        ("a black and white cat", ["a black and white cat"]),
        ("a red, white and blue kite", ["a red, white and blue kite"]),
    ],
    "a verb is no noun": [
        ("a seaplane lands on a lake", ["a seaplane", "a lake"]),
        ("a firefighter sprays water", ["a firefighter", "water"]),
        ("a baby hippopotamus in the water", ["a baby hippopotamus", "the water"]),
        ("a surfer riding waves", ["a surfer", "waves"]),
        ("a tile living room floor", ["a tile living room floor"]),
    ],
}
DROPPED = {
    "pronoun": [
        ("someone is riding a horse", ["a horse"]),
        ("something on the bench", ["the bench"]),
        ("a dog looks at others", ["a dog"]),
    ],
    "absent": [
        ("a street with no cars", ["a street"]),
        ("a man without a shirt", ["a man"]),
    ],
    "quantity": [
        ("a couple of dogs", ["dogs"]),
        ("a lot of cars on a bridge", ["cars", "a bridge"]),
        ("a bunch of bananas", ["bananas"]),
        ("lots of kites", ["kites"]),
        ("a variety of fruit", ["fruit"]),
        ("a pair of skis", ["skis"]),
        ("a large group of people", ["people"]),
    ],
    "abstract": [
        ("a view of a street", ["a street"]),
        ("a closeup of a clock", ["a clock"]),
        ("a close up of a pizza", ["a pizza"]),
        ("a close-up of a dog", ["a dog"]),
        ("a picture of a cat", ["a cat"]),
        ("a black and white photo of a train", ["a train"]),
        ("this image shows a vase", ["a vase"]),
        ("a man taking a picture of a bird", ["a man", "a bird"]),
        ("a man looks at the camera", ["a man"]),
        ("a car in front of a house", ["a car", "a house"]),
        ("a dog in the background", ["a dog"]),
        ("the left side of the road", ["the road"]),
        ("the other side of the street", ["the street"]),
        ("a dog on a sunny day", ["a dog"]),
        ("a jet in the air", ["a jet"]),
        ("bikes in a row", ["bikes"]),
        ("people playing tennis", ["people"]),
        ("a boy playing baseball", ["a boy"]),
    ],
}  # fmt: skip
KEPT = [
    ("a group in a park", ["a group", "a park"]),
    ("a picture on the wall", ["a picture", "the wall"]),
    ("a wall with a picture of a dog", ["a wall", "a picture", "a dog"]),
    ("a man in a red top", ["a man", "a red top"]),
    ("the top shelf", ["the top shelf"]),
    ("a boy with a baseball", ["a boy", "a baseball"]),
    ("a man holding the camera", ["a man", "the camera"]),
    ("a parking lot", ["a parking lot"]),
    ("a cup of tea", ["a cup", "tea"]),
]

both = pytest.mark.parametrize("name", ["lexicon", pytest.param("spacy", marks=pytest.mark.long)])


@both
@pytest.mark.parametrize(("rule", "caption", "expected"), [(rule, *case) for rule in CASES for case in CASES[rule]])
def test_words_of_a_phrase(name, rule, caption, expected):
    assert phrases(name, caption) == expected, rule
    assert finder(name).find(caption).dropped == {}


@both
@pytest.mark.parametrize(("reason", "caption", "expected"), [(why, *case) for why in DROPPED for case in DROPPED[why]])
def test_phrases_that_name_no_object_are_dropped_and_counted(name, reason, caption, expected):
    assert phrases(name, caption) == expected
    assert finder(name).find(caption).dropped == {reason: 1}


@both
@pytest.mark.parametrize(("caption", "expected"), KEPT)
def test_similar_phrases_that_name_an_object_are_kept(name, caption, expected):
    assert phrases(name, caption) == expected
    assert finder(name).find(caption).dropped == {}


def test_every_reason_has_cases():
    assert {*DROPPED, "surplus"} == {*REASONS}


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT cup/NN ,/, tea/NN plate/NN and/CC fork/NN", ["a cup", "tea plate", "fork"]),
        ("a/DT silver/NN and/CC green/JJ train/NN", ["a silver and green train"]),
        ("a/DT silver/NN and/CC gold/NN", ["a silver", "gold"]),
        ("a/DT tile/NN living/VBG room/NN", ["a tile living room"]),
        ("a/DT man/NN eating/VBG rice/NN", ["a man", "rice"]),
        ("all/PDT the/DT dogs/NNS", ["the dogs"]),
        ("-/HYPH a/DT dog/NN !/.", ["a dog"]),
        ("and/CC dogs/NNS", ["dogs"]),
        ("whose/WP$ dog/NN 's/POS bowl/NN", ["dog", "bowl"]),
    ],
)
def test_chunks_as_taggers_produce_them(tagged, expected):
    texts, tags = zip(*(word.split("/") for word in tagged.split()))
    begins = [sum(len(text) + 1 for text in texts[:number]) for number in range(len(texts))]
    words = [Word(text, (begin, begin + len(text)), tag) for text, begin, tag in zip(texts, begins, tags)]
    caption = " ".join(texts)
    spans = PhraseRules().apply(words, [(0, len(words))]).spans
    assert [caption[begin:end] for begin, end in spans] == expected


def test_rules_work_without_a_finder():
    words = [
        Word("the", (0, 3), "DT"),
        Word("dog", (5, 8), "NN"),
        Word("'s", (8, 10), "POS"),
        Word("it", (11, 13), "PRP"),
    ]
    found = PhraseRules().apply(words, [(0, 4)])
    assert found.spans == ((0, 8),) and found.dropped == {"pronoun": 1}
    assert PhraseRules().apply([], []).spans == ()
    without_noun = [Word("the", (0, 3), "DT"), Word("red", (4, 7), "JJ"), Word("two", (8, 11), "CD")]
    assert PhraseRules().apply(without_noun, [(0, 2), (2, 3)])[:2] == ((), {"pronoun": 2})
