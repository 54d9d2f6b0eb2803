"""The negative dictionary: what is known to be absent is drawn from all sources, by frequency or by meaning; the rest stays unknown."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glip_jax.config import CaptionConfig, ConfigError, SourceConfig, validate
from glip_jax.data import shards
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.mixture import Mixture
from glip_jax.data.negatives.choice import LikenessOfMeaning, NameVectors
from glip_jax.data.negatives.dictionary import Dictionary, dictionary, stems
from glip_jax.data.shards import Shards
from tests.data.negatives.test_choice import NAMES, TOKENIZER, detection, grounding
from tests.data.test_mixture import config, draw

FOREIGN = ("zebra", "red dog", "persons", "old table", "bus", "two zebra9")


def listed(names: tuple[str, ...] = (*NAMES, *FOREIGN), weights: Any = None) -> Dictionary:
    return Dictionary(names, np.ones(len(names), np.float32) if weights is None else weights)


def captioner(complete: bool = True, more: tuple[str, ...] = (), vectors: Any = None, names: Any = NAMES, **fields: Any) -> Captioner:  # fmt: skip
    words = fields.pop("listed", listed())
    settings = dataclasses.replace(CaptionConfig(), **({"dictionary": 1.0, "full_probability": 1.0} | fields))
    return Captioner(names, TOKENIZER, settings, 128, more, None, words, complete, vectors)


def drawn(make: Captioner, record: Any, times: int = 30) -> Counter[str]:
    """Names of the prompts of a record."""
    return Counter(name for i in range(times) for name in make(record, rng_of(0, i)).prompt.caption.split(". ") if name)


@pytest.mark.parametrize(
    "one, other",
    [("Two red apples", "the red apple"), ("knives", "knife"), ("berries", "berry"), ("cookies", "a cookie"), ("flies", "fly"),
     ("boxes", "box"), ("women", "woman"), ("steam locomotives", "steam_locomotive"), ("buses", "bus"), ("cats (animal)", "cat")],
)  # fmt: skip
def test_a_plural_is_its_singular(one: str, other: str) -> None:
    assert stems(one) == stems(other) != frozenset()


def test_names_with_the_words_of_a_text_are_alike() -> None:
    words = listed(("cat", "black cat", "cats", "dog", "hot dog", "traffic light", "light"))
    assert [n for n, alike in zip(words.names, words.alike(["the cat"])) if alike] == ["cat", "black cat", "cats"]
    assert [n for n, alike in zip(words.names, words.alike(["a small black cat"])) if alike] == [
        "cat",
        "black cat",
        "cats",
    ]
    assert not words.alike(["zebra", ""]).any()


def write(folder: Path, records: list[Any], names: tuple[str, ...] = ()) -> Shards:
    shards.write([dataclasses.replace(r, id=str(i)) for i, r in enumerate(records)], folder, name="x", names=names)
    return Shards(folder)


def test_the_dictionary_has_the_names_and_phrases_of_all_sources_by_frequency(tmp_path: Path) -> None:
    boxes = write(tmp_path / "boxes", [detection([0, 1, 1]), detection([1])], NAMES)
    text = "the old tables near a bus , it and a man who holds the red phone"
    texts = write(
        tmp_path / "texts",
        [grounding(text, "the old tables", "a bus", "it", "a man who holds the red phone")] * 2
        + [grounding("two dogs and a 斑马", "two dogs", "斑马"), grounding("a bus", "a bus")],
    )
    found = dictionary((boxes, texts), TOKENIZER, ". ", 64)
    weights = dict(zip(found.names, found.weights.tolist()))
    assert set(weights) == {*NAMES, "old tables", "bus"}, "two dogs are a dog; three words at most, no pronoun"
    squares = {name: round(weight**2) for name, weight in weights.items()}
    assert squares == dict.fromkeys(NAMES, 1) | {"person": 2, "dog": 1 + 3 + 1, "bus": 1 + 3, "old tables": 1 + 2}
    assert found.left_out == 3, "it, a man who ..., and a name that the vocabulary cannot read"


def test_names_of_other_sources_are_drawn_only_where_labels_are_complete() -> None:
    record = detection([1])
    own = drawn(captioner(complete=False), record)
    assert {*own} == {*NAMES} and own["dog"] == 30
    every = drawn(captioner(), record)
    assert {*every} == {*NAMES, *FOREIGN} - {"red dog"}, (
        "a red dog may be the dog; of dog house the source knows that it is absent"
    )
    assert "dog house" not in drawn(captioner(max_negatives=4), record), (
        "the dictionary has it only where nothing is alike"
    )
    guaranteed = drawn(captioner(complete=False, more=("bus",)), record)
    assert {*guaranteed} == {*own, "bus"}
    stated = drawn(captioner(), detection([1], known_absent=("zebra", "table", "unheard")))
    assert {*stated} == {"dog", "zebra", "table"}, "a record that says what is absent says it all"
    unlabelled = drawn(captioner(), detection([1], not_exhaustive=("bus", "table")))
    assert not {"bus", "table", "old table"} & {*unlabelled}


def test_the_share_and_the_frequencies_are_those_of_the_settings() -> None:
    weights = np.array([1.0] * len(NAMES) + [50.0, 1, 1, 1, 1, 1], np.float32)
    words = listed(weights=weights)
    one: dict[str, Any] = {"listed": words, "max_negatives": 1}
    counts = drawn(captioner(**one), detection([4]), 400)
    assert 0.65 < counts["zebra"] / 400 < 0.92, "50 of 60"
    counts = drawn(captioner(dictionary=0.3, **one), detection([4]), 400)
    assert 0.3 * 0.6 < counts["zebra"] / 400 < 0.3
    assert set(counts) == {*NAMES, *words.names} - {"old table"}


def test_a_dictionary_of_one_source_has_its_names() -> None:
    make = captioner(complete=False, listed=listed(NAMES), dictionary=0.5)
    assert {*drawn(make, detection([4]))} == {*NAMES}
    budget = make(detection([4]), rng_of(0, 0))
    assert budget.negatives == len(NAMES) - 1 and budget.token_loss_mask.all()


def test_captions_take_the_dictionary_where_their_source_is_complete() -> None:
    record = grounding("two dogs by a bus", "two dogs", kind="grounding")
    fields: dict[str, Any] = {"names": (), "empty_probability": 1.0}
    whole = captioner(**fields)
    assert {*drawn(whole, record)} == {*NAMES, *FOREIGN} - {"dog", "dog house", "red dog", "bus"}
    assert not whole(record, rng_of(0, 0)).keep.any()
    assert captioner(False, **fields)(record, rng_of(0, 0)).prompt.caption == record.caption, "nothing is known"
    given = captioner(False, more=("zebra", "bus"), **fields)
    assert {*drawn(given, record)} == {"zebra"}
    half = captioner(more=("zebra", "table"), dictionary=0.5, **fields)
    assert {len(half(record, rng_of(0, i)).prompt.spans) for i in range(20)} <= {2, 3, 4}, "as many again"


# Likeness by meaning.


def vectors(**by_name: tuple[float, ...]) -> NameVectors:
    states = {"person": (1, 0, 0), "zebra": (0.95, 0.3, 0), "bus": (0, 1, 0), "table": (0, 0.9, 0.4)} | by_name
    names = (*NAMES, *FOREIGN)
    found = np.array([states.get(name, (0, -0.2, 1)) for name in names], np.float32)
    return NameVectors(names, np.round(found / np.linalg.norm(found, axis=1, keepdims=True) * 1024).astype(np.float32))


def test_cosines_are_exact_whatever_the_order_of_the_sum() -> None:
    names = tuple(f"n{i}" for i in range(40))
    states = np.random.default_rng(0).normal(size=(40, 768)) + 3
    made = NameVectors.of(names, states)
    order = np.random.default_rng(1).permutation(768)
    shuffled = NameVectors(names, made.vectors[:, order])
    for text in names[:5]:
        one, other = (LikenessOfMeaning(names, each)([text]) for each in (made, shuffled))
        assert one.tobytes() == other.tobytes()
    centered = states - states.mean(0)
    wanted = centered @ centered[0] / np.linalg.norm(centered, axis=1) / np.linalg.norm(centered[0])
    np.testing.assert_allclose(LikenessOfMeaning(names, made)(["n0"]), np.maximum(wanted, 0), atol=2e-3)
    assert not LikenessOfMeaning(names, made)(["unheard"]).any()


def test_hard_negatives_by_meaning_are_no_synonyms_of_other_sources() -> None:
    one: dict[str, Any] = {"hard_share": 1.0, "hard_by": "meaning", "max_negatives": 1}
    near = captioner(vectors=vectors(), synonym_cosine=1.0, **one)
    assert drawn(near, detection([0]))["zebra"] == 30, "the nearest in meaning"
    apart = captioner(vectors=vectors(), synonym_cosine=0.9, **one)
    assert "zebra" not in drawn(apart, detection([0])), "not known to be absent: it may be another name of a person"
    own = captioner(vectors=vectors(person=(0, 0.92, 0.38)), synonym_cosine=0.9, dictionary=0.5, **one)
    nearest = drawn(own, detection([0]))
    assert nearest["table"] > 5 and not nearest["bus"], "of its own names the source knows that they are absent"
    letters = captioner(**{**one, "hard_by": "letters"})
    assert "zebra" not in drawn(letters, detection([5]), 10)


# The mixture and its settings.


def with_captions(folders: dict[str, Path], complete: Any = "own", **fields: Any) -> Any:
    captions = dataclasses.replace(CaptionConfig(), **fields)
    named = {name: SourceConfig(str(folders[name]), complete=complete) for name in ("boxes", "captions")}
    return config(named, captions=captions)


def test_a_mixture_takes_vectors_for_the_names_of_its_dictionary(folders: dict[str, Path]) -> None:
    made = Mixture(with_captions(folders, "all", dictionary=0.5, hard_share=0.5, hard_by="meaning"))
    assert {"person", "cat", "man", "old"} <= {word for text in made.texts for word in text.split()}
    assert any("the dictionary of 2 sources has" in note for note in made.notes)
    with pytest.raises(ConfigError, match="hard_by is meaning, and this caller gave no vectors"):
        made.batches()
    made.use_vectors(np.random.default_rng(0).normal(size=(len(made.texts), 8)).astype(np.float32))
    assert draw(made, 1)[0].valid.all()
    plain = Mixture(with_captions(folders))
    assert plain.texts == () and plain.captioners[0].dictionary is None


@pytest.mark.parametrize(
    "complete, fields, message",
    [
        ("some", {}, r"data.sources.boxes.complete is 'some': expected own or all"),
        ("own", {"dictionary": 1.5}, r"data.captions.dictionary is 1.5: expected 0 to 1"),
        ("own", {"hard_by": "sound"}, r"data.captions.hard_by is 'sound': expected letters or meaning"),
        ("own", {"hard_by": "meaning"}, r"hard_by is meaning, hard_share 0.0 and dictionary 0.0: nothing uses it"),
        ("own", {"dictionary": 0.5, "mode": "all_names"}, r"dictionary is 0.5, and mode all_names"),
        ("own", {"look_alikes": -1.0}, r"data.captions.look_alikes is -1.0: expected 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    folders: dict[str, Path], complete: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(with_captions(folders, complete, **fields))


def test_images_without_a_box_in_every_source_are_examples_without_a_positive(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("boxes", "captions"):
        opened = Shards(folders[name])
        bare = [
            dataclasses.replace(
                opened[i], boxes=opened[i].boxes[: i == 0], categories=opened[i].categories[: i == 0], spans=opened[i].spans[: i == 0]
            )
            for i in range(len(opened))
        ]  # fmt: skip
        shards.write(bare, tmp_path / name, name=name, names=opened.manifest.names)
    made = Mixture(
        with_captions({n: tmp_path / n for n in ("boxes", "captions")}, "all", dictionary=0.5, empty_probability=0.5, look_alikes=1.0)
    )  # fmt: skip
    batches = draw(made, 6)
    assert all(batch.valid.all() for batch in batches)
    assert sum(batch.box_mask.any(1).sum() for batch in batches) <= 6
    assert all((batch.token_mask.sum(1) > 2).all() for batch in batches), "every prompt still asks for something"
