"""Descriptions in training prompts: a share of them, the token budget, and notes on names without."""

import json
from pathlib import Path

import numpy as np
import pytest

from glip_jax.config import CaptionConfig, Config, ConfigError, DescriptionsConfig, validate
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.mixture import Mixture
from glip_jax.data.records import Record, boxes_array
from glip_jax.structures.descriptions import Descriptions
from glip_jax.structures.prompts import load_tokenizer
from tests import tiny_run

TOKENIZER = load_tokenizer(tiny_run.VOCABULARY)
NAMES = ("cat", "dog", "person", "bottle", "cup", "tree")
DESCRIPTIONS = Descriptions({name: ["a red car"] for name in NAMES if name != "tree"})


def _captioner(max_tokens: int = 64, use: str = "prompt", probability: float = 1.0, empty: float = 0.0) -> Captioner:
    settings = DescriptionsConfig("x.json", use, probability)  # type: ignore[arg-type]
    captions = CaptionConfig(full_probability=1.0, descriptions=settings, empty_probability=empty)
    return Captioner(NAMES, TOKENIZER, captions, max_tokens, descriptions=DESCRIPTIONS)


def _record(**fields: object) -> Record:
    boxes = boxes_array([(0, 0, 2, 5), (1, 0, 3, 5)])
    return Record("r", "detection", b"x", 10, 100, boxes, (0, 5), **fields)  # type: ignore[arg-type]


def test_described_names_stand_in_a_share_of_the_prompts() -> None:
    def described(probability: float) -> list[bool]:
        captions = [_captioner(probability=probability)(_record(), rng_of(0, i)).prompt.caption for i in range(200)]
        for caption in captions:
            assert caption.count(", a red car") in (0, 5) and "tree, " not in caption
        return [", a red car" in caption for caption in captions]

    assert not any(described(0.0)) and all(described(1.0)) and 70 < sum(described(0.5)) < 130


def test_boxes_keep_the_tokens_of_their_names() -> None:
    found = _captioner()(_record(), rng_of(0, 1))
    tokens = TOKENIZER.encode(found.prompt.caption).tokens
    assert [[tokens[t] for t in np.flatnonzero(row)] for row in found.positive_map] == [["cat"], ["tree"]]
    assert found.described is not None
    assert [DESCRIPTIONS.names[row - 1] for row in found.described[found.described > 0]] == [
        name for name in (token for token in tokens) if name in DESCRIPTIONS.names
    ]


def test_the_token_budget_holds_fewer_described_names() -> None:
    bare, full = (_captioner(20, probability=p)(_record(), rng_of(0, 2)) for p in (0.0, 1.0))
    assert len(bare.prompt.spans) == 6 and len(full.prompt.spans) == 3
    assert full.over_budget == 0 and full.keep.all() and full.mask.sum() <= 20
    # A prompt of absent names, of a record with a caption, is made by the same rule.
    spans = (((0, 3),), ((0, 3),))
    record = Record("g", "grounding", b"x", 10, 100, _record().boxes, (), "red", spans, known_absent=NAMES)
    empty = _captioner(20, empty=1.0)(record, rng_of(0, 3))
    assert ", a red car" in empty.prompt.caption and empty.mask.sum() <= 20 and empty.over_budget == 0


def test_without_them_captions_are_those_of_before() -> None:
    plain = Captioner(NAMES, TOKENIZER, CaptionConfig(), 64)
    for use in ("none", "mean"):
        for i in range(20):
            found, wanted = _captioner(use=use), plain
            found = Captioner(NAMES, TOKENIZER, CaptionConfig(descriptions=found.config.descriptions), 64)
            assert found(_record(), rng_of(0, i)).prompt == wanted(_record(), rng_of(0, i)).prompt


def _config(folder: Path, texts: dict[str, str], use: str = "prompt") -> Config:
    folder.mkdir(exist_ok=True)
    path = folder / "descriptions.json"
    path.write_text(json.dumps(texts))
    config = tiny_run.config(tiny_run.write_sources(folder))
    settings = CaptionConfig(descriptions=DescriptionsConfig(str(path), use))  # type: ignore[arg-type]
    return tiny_run.replace(config, "data", captions=settings)


def test_names_that_no_source_has_and_bare_names_are_said(tmp_path: Path) -> None:
    notes = Mixture(_config(tmp_path, {"cat": "a car", "zebra": "a car", "tree": "a car"})).notes
    assert "data.sources.boxes: 2 of 3 names have no description and are used bare: 'dog', 'person'" in notes
    assert [
        note for note in notes if note.startswith("data.captions.descriptions.file: 2 of its 3 names are of no source")
    ]


def test_a_bad_file_or_a_long_text_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.captions.descriptions.file: .* hold dict of 0"):
        Mixture(_config(tmp_path, {}))
    with pytest.raises(ConfigError, match="'cat' with its description takes .* model.text.max_tokens is 16"):
        Mixture(_config(tmp_path / "long", {"cat": "a red car " * 6}))
    config = tiny_run.replace(
        tiny_run.config(), "data", captions=CaptionConfig(descriptions=DescriptionsConfig("", "mean"))
    )
    with pytest.raises(ConfigError, match="use is 'mean', and data.captions.descriptions.file is empty"):
        validate(config)
