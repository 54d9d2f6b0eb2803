"""Descriptions: what a file may hold, how names are found, and how they stand in a prompt."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glip_jax.io.assets import resolve
from glip_jax.structures.descriptions import Descriptions, read_descriptions
from glip_jax.structures.prompts import (
    JoinedNames,
    PromptError,
    load_tokenizer,
    prompt_from_categories,
    tokenize,
)

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "fixtures" / "vocab_tiny1.txt")


def _written(folder: Path, content: Any) -> str:
    path = folder / "descriptions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_names_are_found_as_the_model_reads_them(tmp_path: Path) -> None:
    found = read_descriptions(_written(tmp_path, {"red_car": " a  car.\n", "dog": ["an animal", "a pet"]}))
    assert found.in_prompt("Red car (toy)") == "a car" and found.in_prompt("dog") == "an animal"
    assert found.in_prompt("cat") == "" and [found.row(name) for name in ("red car", "DOG", "cat")] == [1, 2, 0]
    assert found.unknown(["dog", "cat"]) == ["red_car"]
    assert found.notes("source", ["dog", "cat"]) == [
        "source: 1 of 2 names have no description and are used bare: 'cat'"
    ]
    assert found.notes("source", ["dog"]) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "no JSON in UTF-8"),
        ([1], "hold list"),
        ({}, "hold dict"),
        ({"dog": 3}, r"'dog' has 3: expected \{"),
        ({"dog": []}, "'dog' has"),
        ({"dog": ["a pet", " . "]}, "'dog' has"),
        ({"dog": "a pet", "Dog": "an animal"}, "'Dog' and 'dog' are the same name"),
    ],
)
def test_another_file_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_descriptions(_written(tmp_path, content))


def test_the_bundled_descriptions_leave_the_name_out() -> None:
    path = resolve("package:glip_jax/gcs/sample/descriptions.json")
    names = {entry["name"] for entry in json.loads((path.parent / "pictures" / "names.json").read_text()).values()}
    found = read_descriptions(str(path))
    assert set(found.names) <= names and len(found.names) > 0.9 * len(names)
    assert found.in_prompt("zebra") == "animal stripe"
    assert not [name for name in found.names if set(name.split()) & set(found.in_prompt(name).split())]


def test_the_span_of_a_described_name_is_the_name() -> None:
    names, texts = ["red car", "dog", "cat"], ["a toy", "", "a dog, or not"]
    prompt = prompt_from_categories(names, ". ", texts)
    assert prompt.caption == "red car, a toy. dog. cat, a dog, or not"
    assert [prompt.caption[b:e] for ((b, e),) in prompt.spans] == names
    assert prompt_from_categories(names).caption == "red car. dog. cat"


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1]])
def test_joined_names_are_tokenized_as_the_whole_prompt(order: list[int]) -> None:
    names, texts = ["red car", "dog", "cat"], ["a toy", "", "a dog, or not"]
    prompt, tokenized, lost = JoinedNames(names, TOKENIZER, ". ", texts).tokenize(order, 64)
    whole = prompt_from_categories([names[i] for i in order], ". ", [texts[i] for i in order])
    assert prompt == whole and lost == (0, 0)
    for found, wanted in zip(tokenized, tokenize(whole, TOKENIZER, 64)):
        np.testing.assert_array_equal(found, wanted)


def test_rows_stand_at_the_tokens_of_described_names_alone() -> None:
    descriptions = Descriptions({"cat": ["a pet"], "red car": ["a toy"]})
    prompt = prompt_from_categories(["dog", "red car", "cat"], ". ", ["", "a toy", ""])
    tokenized = tokenize(prompt, TOKENIZER, 32)
    rows = descriptions.token_rows(prompt, tokenized)
    assert [int(row) for row in [rows[covered].max() for covered in tokenized.phrase_map]] == [0, 2, 1]
    assert (rows[tokenized.phrase_map[1]] == 2).all() and not rows[~tokenized.phrase_map.any(0)].any()
