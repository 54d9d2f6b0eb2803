"""Descriptions in the prompts of names: fewer names a prompt, and a name too long with its description is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from glip_jax.config import CaptionConfig, Config, DescriptionsConfig
from glip_jax.inference import category_prompts
from glip_jax.structures.prompts import PromptError, load_tokenizer
from tests import tiny_run

TOKENIZER = load_tokenizer(tiny_run.VOCABULARY)
NAMES = ["cat", "dog", "person", "red car"]


def _config(folder: Path, use: str, text: str = "a small cup") -> Config:
    folder.mkdir(exist_ok=True)
    path = folder / "descriptions.json"
    path.write_text(json.dumps({"dog": [text, "a horse"], "red car": text}))
    config = tiny_run.config()
    captions = CaptionConfig(descriptions=DescriptionsConfig(str(path), use))  # type: ignore[arg-type]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, captions=captions))


def test_names_are_asked_with_their_descriptions_as_far_as_the_budget_goes(tmp_path: Path) -> None:
    bare, asked = (category_prompts(NAMES, TOKENIZER, _config(tmp_path, use)) for use in ("mean", "prompt"))
    assert [indices for _, indices in bare] == [(0, 1, 2, 3)] and bare[0][0].caption == "cat. dog. person. red car"
    assert [(prompt.caption, indices) for prompt, indices in asked] == [
        ("cat. dog, a small cup. person", (0, 1, 2)),
        ("red car, a small cup", (3,)),
    ]
    assert [prompt.caption[b:e] for prompt, _ in asked for ((b, e),) in prompt.spans] == NAMES


def test_a_name_beyond_the_budget_with_its_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"category 0 \('dog'\) with its description takes .* the budget is 16"):
        category_prompts(["dog"], TOKENIZER, _config(tmp_path / "long", "prompt", "a small cup " * 5))
