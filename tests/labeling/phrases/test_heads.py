"""Head nouns of phrases, and their singulars."""

import pytest

from glip_jax.labeling.phrases import heads as phrase_heads
from glip_jax.labeling.phrases.finders import head, head_word
from glip_jax.labeling.phrases.heads import singular


@pytest.mark.parametrize(
    ("phrase", "place", "word"),
    [
        ("two men", "men", "man"),
        ("The Buses", "Buses", "bus"),
        ("three wine glasses", "glasses", "glasses"),
        ("a cup of tea", "cup", "cup"),
        ("slices of pizza of the day", "slices", "slice"),
        ("of dogs", "dogs", "dog"),
        ("bus 42", "bus", "bus"),
        ("bus number 4.2", "number", "number"),
        ("42", "42", "42"),
        ("red T-shirts", "T-shirts", "t-shirt"),
        ("the cafe\u0301", "cafe\u0301", "cafe\u0301"),
        ("a dog 🙂!", "dog", "dog"),
        ("🙂", "🙂", "🙂"),
        ("", "", ""),
    ],
)
def test_heads(phrase, place, word):
    for before, after in (("", ""), ("a man, ", " of stone"), ("x of ", "s")):
        caption, span = before + phrase + after, (len(before), len(before) + len(phrase))
        begin, end = head(caption, span)
        assert caption[begin:end] == place and span[0] <= begin <= end <= span[1]
        assert head_word(caption, span) == word


SAME = """bus dress grass glass glasses sheep scissors lens canvas gas tennis moss mattress waitress octopus cactus walrus
hippopotamus asparagus news series fish deer aircraft police pants jeans trousers tongs clothes binoculars sunglasses christmas
cheese goose vase house mouse dog man person iris oasis virus campus platypus hummus"""
PLURALS = """dogs:dog men:man women:woman children:child people:person buses:bus dishes:dish knives:knife wolves:wolf geese:goose
mice:mouse teeth:tooth feet:foot leaves:leaf loaves:loaf shelves:shelf zebras:zebra potatoes:potato ties:tie pies:pie
cookies:cookie brownies:brownie shoes:shoe toes:toe canoes:canoe horses:horse vases:vase lenses:lens cacti:cactus boxes:box
scarves:scarf hooves:hoof skis:ski taxis:taxi kiwis:kiwi gloves:glove olives:olive curves:curve benches:bench dresses:dress
toothbrushes:toothbrush cherries:cherry monkeys:monkey mattresses:mattress hoodies:hoodie t-shirts:t-shirt axes:axe"""


@pytest.mark.parametrize("word", SAME.split())
def test_singulars_are_unchanged(word):
    assert singular(word) == word


@pytest.mark.parametrize("pair", PLURALS.split())
def test_plurals(pair):
    plural, expected = pair.split(":")
    assert singular(plural) == expected


def test_the_table_of_singulars_has_no_entry_that_the_library_handles(monkeypatch):
    table = dict(phrase_heads._SINGULARS)
    monkeypatch.setattr(phrase_heads, "_SINGULARS", {})
    singular.cache_clear()
    known = [plural for plural, one in table.items() if singular(plural) == one]
    singular.cache_clear()
    assert not known
