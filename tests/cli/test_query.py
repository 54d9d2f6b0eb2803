"""Queries are asked as they are typed: what is split, left out or read in part is said, in every way of asking."""

import dataclasses

import pytest

from glip_jax.cli.query import QueryError, read_query
from glip_jax.inference import sentence_spans
from glip_jax.structures import prompts
from tests import tiny_run

CONFIG = tiny_run.config()
CONFIG = dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, text=dataclasses.replace(CONFIG.model.text, max_tokens=24))
)


def _asked(**given):
    query = read_query(**{"text": "", "names": "", "names_file": "", "config": CONFIG} | given)
    return [phrase.text for phrase in query.phrases], query


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ('"cat, dog",St. B', ["cat, dog", "St. B"]),
        (" Red Cup , 5-tree", ["Red Cup", "5-tree"]),
        ("a . b,cat.", ["a . b", "cat."]),
        ("traffic_light,no-entry sign", ["traffic light", "no-entry sign"]),
    ],
)
def test_names_are_asked_as_they_are_typed(names, asked):
    found, query = _asked(names=names)
    assert found == asked and len(query.prompts) == 1
    assert query.notes == (f"asked: 2 phrases in one prompt: {prompts.listed(asked)}",)


def test_what_is_not_asked_as_it_was_typed_is_said():
    _, query = _asked(names="cup (red),dog 斑马,person,tree,bottle,chair")
    parentheses, unknown, asked = sorted(query.notes, key=lambda note: "cup (red) -> cup" not in note)
    assert "asked without what stands in parentheses" in parentheses and "does not know all of 'dog 斑马'" in unknown
    assert asked.startswith("asked: 6 phrases in one prompt: 'cup', 'dog 斑马', 'person'")
    _, query = _asked(
        names=",".join(f"red {name}" for name in ("cat", "dog", "cup", "tree", "car", "bottle", "chair", "plant"))
    )
    assert "in 2 prompts, because one does not hold all" in query.notes[-1]


def test_a_file_has_a_name_a_line(tmp_path):
    (tmp_path / "names.txt").write_bytes('\ufeffcat, dog\r\n\r\nno\u2028tree\n "x" \n'.encode())
    assert _asked(names_file=str(tmp_path / "names.txt"))[0] == ["cat, dog", "no\u2028tree", '"x"']


def test_sentences_name_what_they_leave_out():
    found, query = _asked(text="A view of a red cup. Two dogs and a dog.")
    assert found == ["a red cup", "Two dogs", "a dog"]
    assert query.notes[0] == "note: left out of the sentence's phrases: 'A view' (abstract)"
    with pytest.raises(QueryError, match="'斑马 长颈鹿' has no word or character"):
        _asked(text="a cat . 斑马 长颈鹿")


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("a cat. a dog.", ["a cat", "a dog"]),
        ("a cat . St. Bernard .", ["a cat", "St. Bernard"]),
        ("a red cup", ["a red cup"]),
        ("one.two. three", ["one.two", "three"]),
        (" . ", []),
    ],
)
def test_phrases_stand_between_full_stops(text, asked):
    assert [text[begin:end] for begin, end in sentence_spans(text)] == asked
