"""Captions are parsed and checked against the scene: names, numbers, colors, sizes and relations."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glip_jax.data.scenes.captions import describe, relation_holds
from glip_jax.data.scenes.draw import SceneStyle, draw_scene
from glip_jax.data.scenes.nouns import plural, says_color
from glip_jax.data.scenes.pictures import COLORS, Picture, load_pictures

pytestmark = pytest.mark.long

BUNDLED = Path(__file__).resolve().parents[3] / "gcs" / "sample" / "pictures"
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
SIDES = (40.0, 110.0)


@pytest.fixture(scope="module")
def scenes():
    pictures = load_pictures(BUNDLED, ["fluent", "noto"], ["detection", "grounding"], 90)
    return [(draw_scene(pictures, 7, index), pictures) for index in range(150)]


def centres(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def longest(boxes):
    return np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])


def test_every_phrase_ends_with_the_name_of_its_boxes(scenes):
    for scene, _ in scenes:
        assert scene.phrases and scene.caption
        for phrase in scene.phrases:
            words = scene.caption[slice(*phrase.span)]
            (name,) = {scene.names[i] for i in phrase.boxes}
            assert words.endswith((name, plural(name))), words
            assert not words.startswith(" ") and not words.endswith(" ")
            of_name = {i for i, other in enumerate(scene.names) if other == name}
            if phrase.kind == "plain":
                assert set(phrase.boxes) == of_name, scene.caption
            else:
                assert set(phrase.boxes) < of_name, scene.caption


def test_counts_are_correct(scenes):
    count = 0
    for scene, _ in scenes:
        for phrase in scene.phrases:
            words = scene.caption[slice(*phrase.span)].split(" ")
            number = next((NUMBERS[word] for word in words[:2] if word in NUMBERS), None)
            if number is not None:
                count += 1
                assert number == len(phrase.boxes), scene.caption
            elif words[0] == "the" and plural(words[-1]) != words[-1] and "some" not in words:
                # "the snail" is one; plural words without a number are those that have no singular.
                singular = scene.caption[slice(*phrase.span)].endswith(scene.names[phrase.boxes[0]])
                assert not singular or len(phrase.boxes) == 1 or plural(words[-1]) == words[-1], scene.caption
    assert count > 200


def test_relations_hold_for_all_boxes_and_no_other_of_the_name(scenes):
    """Checks centres only; the phrase before a relation is its subject, the one after it its object."""
    checked = selected = 0
    pattern = re.compile(r" (?:to the )?(left of|right of|above|below|under) $")
    for scene, _ in scenes:
        for first, second in zip(scene.phrases, scene.phrases[1:]):
            found = pattern.match(scene.caption[first.span[1] : second.span[0]])
            if not found:
                continue
            axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1)}.get(found[1], (1, -1))
            a, b = (sign * centres(scene.boxes[list(p.boxes)])[:, axis] for p in (first, second))
            assert a.max() < b.min() - 15.9, scene.caption
            checked += 1
            sized = re.search(r"\b(small|big)", scene.caption[slice(*first.span)])
            if first.kind == "relational" and not sized:
                name = scene.names[first.boxes[0]]
                rest = [i for i, n in enumerate(scene.names) if n == name and i not in first.boxes]
                assert (sign * centres(scene.boxes[rest])[:, axis]).min() > b.max() + 15.9, scene.caption
                selected += 1
    assert checked > 60 and selected > 30


def test_size_words_are_correct(scenes):
    plain = relational = 0
    for scene, _ in scenes:
        for phrase in scene.phrases:
            words = scene.caption[slice(*phrase.span)].split(" ")
            lengths = longest(scene.boxes[list(phrase.boxes)])
            word = next((w for w in words[:3] if re.match(r"small|big|large|little", w)), None)
            if word is None:
                continue
            if phrase.kind == "plain":
                plain += 1
                assert lengths.max() <= 57.5 if word in ("small", "little") else lengths.min() >= 92.5, scene.caption
                continue
            relational += 1
            name = scene.names[phrase.boxes[0]]
            members = [i for i, n in enumerate(scene.names) if n == name]
            rest = longest(scene.boxes[[i for i in members if i not in phrase.boxes]])
            if word.startswith("small"):
                assert lengths.max() * 1.5 <= rest.min() + 1e-3, scene.caption
            else:
                assert lengths.min() >= rest.max() * 1.5 - 1e-3, scene.caption
            assert not word.endswith("er") or len(members) == 2
            assert not word.endswith("est") or (len(members) > 2 and len(phrase.boxes) == 1)
    assert plain > 10 and relational > 10


def test_colors_match_the_pictures_and_names_with_a_color_get_none(scenes):
    count = 0
    for scene, pictures in scenes:
        for phrase in scene.phrases:
            name = scene.names[phrase.boxes[0]]
            words = scene.caption[slice(*phrase.span)]
            before = words.removesuffix(plural(name)).removesuffix(name).split()
            colors = [word for word in before if word in COLORS]
            if not colors:
                continue
            assert not says_color(name)
            for box in phrase.boxes:
                pixels = np.asarray(pictures[scene.pictures[box]].image).reshape(-1, 4)
                red, green, blue = (float(v) for v in pixels[pixels[:, 3] > 200][:, :3].mean(0))
                match colors[0]:
                    case "red" | "pink" | "orange" | "brown" | "yellow":
                        assert red > blue and red >= green, words
                    case "green":
                        assert green > red and green > blue, words
                    case "blue":
                        assert blue > red, words
                    case "purple":
                        assert blue > green and red > green, words
            count += 1
    assert count > 20


def test_about_half_of_the_captions_have_a_relational_phrase(scenes):
    share = np.mean([any(p.kind == "relational" for p in scene.phrases) for scene, _ in scenes])
    assert 0.4 <= share <= 0.65, share


@pytest.mark.parametrize("captioned", [True, False])
def test_no_scene_shows_conflicting_names(captioned):
    image = Image.new("RGBA", (32, 32), (200, 30, 30, 255))
    pictures = [
        Picture(name, "detection", "plain", image) for name in ("computer mouse", "mouse", "mouse trap", "snail")
    ]
    together = set()
    for index in range(30):
        shown = set(draw_scene(pictures, 0, index, captioned=captioned).names)
        assert "mouse" not in shown or not shown & {"computer mouse", "mouse trap"}
        together.add(frozenset(shown))
    assert len(together) > 3


def test_relations_need_a_clear_distance():
    still = np.array([[0, 0, 20, 20]], np.float32)
    moved = [np.array([[x, y, x + 20, y + 20]], np.float32) for x, y in ((50, 0), (10, 0), (50, 120))]
    assert [bool(relation_holds("left", still, other)[0, 0]) for other in moved] == [True, False, False]
    assert [bool(relation_holds("above", still, other)[0, 0]) for other in moved] == [False, False, True]
    assert not relation_holds("right", still, moved[0]).any()


def test_an_object_between_two_anchors_prevents_the_phrase():
    """Of three snails one is left of both apples, one right, one between: no left or right can pick."""
    names = ["snail", "snail", "snail", "red apple", "red apple"]
    boxes = np.array([[x, 40, x + 20, 60] for x in (0, 200, 100, 60, 140)], np.float32)
    for seed in range(60):
        caption, phrases = describe(np.random.default_rng(seed), names, [""] * 5, boxes, SIDES)
        snails = [p for p in phrases if "snail" in caption[slice(*p.span)]]
        assert all(p.kind == "plain" for p in snails), caption


def test_selection_by_relation_and_by_size():
    names = ["snail", "snail", "red apple", "red apple"]
    boxes = np.array([[0, 40, 20, 60], [200, 40, 260, 100], [80, 0, 120, 40], [80, 80, 120, 120]], np.float32)
    seen = set()
    for seed in range(120):
        caption, phrases = describe(np.random.default_rng(seed), names, [""] * 4, boxes, SIDES)
        for phrase in phrases:
            if phrase.kind == "relational":
                seen.add((re.sub("^(the|a|there is a) ", "", caption[slice(*phrase.span)]), phrase.boxes))
    assert {
        ("snail", (0,)),
        ("snail", (1,)),
        ("small snail", (0,)),
        ("smaller snail", (0,)),
        ("bigger snail", (1,)),
    } <= seen
    assert all(boxes in ((0,), (1,)) for words, boxes in seen if "snail" in words)


def test_a_color_is_mentioned_only_if_all_objects_have_it():
    boxes = np.array([[0, 40, 20, 60], [100, 40, 120, 60]], np.float32)
    captions = {
        both: {describe(np.random.default_rng(seed), ["snail"] * 2, both, boxes, SIDES)[0] for seed in range(40)}
        for both in (("red", "blue"), ("red", "red"))
    }
    assert not any("red" in caption or "blue" in caption for caption in captions["red", "blue"])
    assert any("red snails" in caption for caption in captions["red", "red"])


def test_an_empty_scene_has_an_empty_caption():
    assert describe(np.random.default_rng(0), [], [], np.zeros((0, 4), np.float32), SIDES) == ("", ())


def test_uncaptioned_scenes_have_no_caption():
    pictures = load_pictures(BUNDLED, limit=5)
    scene = draw_scene(pictures, 0, 0, SceneStyle(), captioned=False)
    assert (scene.caption, scene.phrases) == ("", ()) and len(scene.boxes)
