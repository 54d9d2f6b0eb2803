"""Look-alikes: a phrase with another attribute is a negative text, unless the image may show it."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from glip_jax.config import CaptionConfig
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.negatives.look_alikes import look_alike
from tests.data.negatives.test_choice import TOKENIZER, grounding, ids, unknown_words


def changed(caption: str, *phrases: str, sides: bool = True, beside: Any = None, times: int = 60) -> set[str]:
    """All look-alikes that are drawn of a caption."""
    beside = beside or [()] * len(phrases)
    found = [look_alike(caption, phrases, range(len(phrases)), beside, sides, rng_of(0, i)) for i in range(times)]
    return {each.text for each in found if each is not None}


@pytest.mark.parametrize(
    "phrase, wanted",
    [
        ("a red apple", {"a yellow apple", "a green apple", "a blue apple", "a black apple", "a white apple", "a gray apple"}),
        ("A small dog", {"A big dog", "A large dog"}),
        ("an old man", {"a young man"}),
        ("a young man", {"an old man"}),
        ("the left dog", {"the right dog"}),
        ("the dog on the right", {"the dog on the left"}),
        ("the bigger of two dogs", set()),
        ("an orange on a plate", set()),
        ("a man who left the room", set()),
        ("a dog", set()),
    ],
)  # fmt: skip
def test_one_attribute_is_changed(phrase: str, wanted: set[str]) -> None:
    assert changed(phrase, phrase) == wanted


def test_what_the_image_may_show_is_no_look_alike() -> None:
    both = changed("a red apple and a yellow apple", "a red apple", "a yellow apple")
    assert both and "a yellow apple" not in both and "a red apple" not in both
    assert "a small yellow apple" not in changed(
        "a small red apple , a yellow apple", "a small red apple", "a yellow apple"
    )
    assert changed("a red apple and an apple", "a red apple", "an apple") == set(), "the other may have any color"
    assert "a yellow apple" not in changed("a red apple that is yellow below", "a red apple")
    assert "a yellow car" in changed("a red car and a yellow dog", "a red car", "a yellow dog"), "bound to another noun"
    same = changed("a red car , the yellow thing", "a red car", "the yellow thing", beside=[("the yellow thing",), ()])
    assert "a yellow car" not in same, "both phrases name one box"
    assert changed("the left dog", "the left dog", sides=False) == set()


def captioner(complete: bool = False, **fields: Any) -> Captioner:
    settings = dataclasses.replace(CaptionConfig(), **({"look_alikes": 1.0} | fields))
    return Captioner((), TOKENIZER, settings, 64, complete=complete)


def test_a_look_alike_is_packed_as_a_negative_text() -> None:
    record = grounding("a red dog by the table", "a red dog", "the table", kind="grounding")
    begins = set()
    for i in range(20):
        result = captioner()(record, rng_of(0, i))
        words = [result.prompt.caption[b:e] for ((b, e),) in result.prompt.spans]
        assert words == ["a red dog", "the table"] and result.keep.all() and result.negatives == 1
        (other,) = {part.strip() for part in result.prompt.caption.split(".")} - {"a red dog by the table", ""}
        assert other.endswith(" dog") and other != "a red dog"
        assert result.tokens[result.positive_map[0]].tolist() == ids("a red dog"), "no token of the other text"
        # Nothing is known of the rest of the image: loss at the caption's boxes alone.
        assert unknown_words(result) == TOKENIZER.decode(ids(other))  # type: ignore[attr-defined]
        begins.add(result.prompt.spans[0][0][0] > 0)
        assert captioner(complete=True)(record, rng_of(0, i)).token_loss_mask.all()
    assert begins == {True, False}
    size = grounding("a small dog", "a small dog", kind="grounding")
    assert unknown_words(captioner(complete=True)(size, rng_of(0, 0))), "a bigger one may be there without a box"


def test_only_phrases_with_a_box_are_changed_and_boxes_decide_what_is_one_thing() -> None:
    record = grounding("a red dog and a blue table", "a blue table", unknown=(((0, 9),),))
    made = {captioner()(record, rng_of(0, i)).prompt.caption for i in range(20)}
    assert all("dog." not in text.replace("a red dog and", "") for text in made) and len(made) > 3
    one = grounding("a red dog , the blue thing", "a red dog", "the blue thing", kind="grounding")
    one = dataclasses.replace(one, boxes=np.repeat(one.boxes[:1], 2, 0))
    assert not any("blue dog" in captioner()(one, rng_of(0, i)).prompt.caption for i in range(40))


def test_the_probability_is_that_of_the_setting_and_captions_without_an_attribute_stay() -> None:
    record = grounding("a red dog", "a red dog")
    times = sum(captioner(look_alikes=0.3)(record, rng_of(0, i)).negatives for i in range(500))
    assert times / 500 == pytest.approx(0.3, abs=0.06)
    plain = grounding("a dog", "a dog")
    assert captioner()(plain, rng_of(0, 0)).prompt.caption == "a dog"
    tight = Captioner((), TOKENIZER, dataclasses.replace(CaptionConfig(), look_alikes=1.0), 6)
    assert tight(record, rng_of(0, 0)).prompt.caption == "a red dog", "no room for another text"
