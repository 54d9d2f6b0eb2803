import pytest

from glip_jax.data.scenes.nouns import conflict, noun_phrase, plural, recolored, says_color, without_color


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("ant", 1, "an ant"), ("red apple", 2, "two red apples"), ("jeans", 3, "some jeans"), ("mouse", 4, "four mice"),
        ("bus", 2, "two buses"), ("cherries", 1, "some cherries"), ("lady", 2, "two ladies"), ("key", 12, "12 keys"),
        ("unicorn", 1, "a unicorn"), ("x-ray", 1, "an x-ray"), ("hourglass", 1, "an hourglass"),
        ("glass of milk", 2, "two glasses of milk"), ("snowman", 2, "two snowmen"), ("wolf", 2, "two wolves"),
        ("meat on the bone", 2, "some meat on the bone"), ("bowl with a spoon", 2, "two bowls with a spoon"),
        ("bow and arrow", 2, "two bows and arrows"), ("kitchen knife", 2, "two kitchen knives"),
        ("maple leaf", 2, "two maple leaves"), ("shaved ice", 1, "some shaved ice"), ("tooth", 3, "three teeth"),
    ],
)  # fmt: skip
def test_noun_phrases(name, count, words):
    assert noun_phrase(name, count) == words


def test_adjectives_and_the_definite_article():
    assert noun_phrase("snail", 1, "big", "orange") == "a big orange snail"
    assert noun_phrase("snail", 1, "", "orange") == "an orange snail"
    assert noun_phrase("snail", 2, "small", definite=True) == "the two small snails"
    assert noun_phrase("jeans", 1, "small", "blue", definite=True) == "the small blue jeans"


def test_plural_inflects_the_head():
    assert plural("ball of yarn") == "balls of yarn"
    assert plural("heart with an arrow") == "hearts with an arrow"


def test_colors_in_names():
    assert says_color("red apple") and says_color("gold medal") and says_color("blueberries")
    assert not says_color("apple")


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ("car", "police car", True), ("cat", "cat", True), ("mouse", "mouse trap", True), ("fish", "tropical fish", True),
        ("bat", "cricket bat", True), ("cricket", "cricket bat", True), ("car", "carrot", False), ("ear", "bear", False),
    ],
)  # fmt: skip
def test_conflicting_names(first, second, answer):
    assert conflict(first, second) == conflict(second, first) == answer


def test_names_in_another_color():
    assert recolored("red apple", "") == "yellow apple" and recolored("bucket", "blue") == "orange bucket"
    assert recolored("rainbow", "red") == "" == recolored("camera", "")
    assert without_color("yellow apple") == "apple" and without_color("bucket") == "bucket"
