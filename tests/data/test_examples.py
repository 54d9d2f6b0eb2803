"""Preprocessing: crop, color jitter, flip and limits change pixels, boxes and phrases consistently, from one generator."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from glip_jax.config import (
    Config,
    CropConfig,
    DataConfig,
    JitterConfig,
    ModelConfig,
    PackingConfig,
    SourceConfig,
    TextConfig,
)
from glip_jax.data import shards, transforms
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.examples import Examples
from glip_jax.data.records import Record, boxes_array
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.structures.prompts import load_tokenizer

VOCABULARY = Path(__file__).parents[1] / "fixtures" / "vocab_tiny1.txt"
TOKENIZER = load_tokenizer(VOCABULARY)
NAMES = ("person", "dog", "table")


def picture(boxes: list[tuple[int, int, int, int]], height: int = 60, width: int = 80) -> bytes:
    """A grey image in which box i (inclusive corners) has the red value 60 + 40 i."""
    pixels = np.full((height, width, 3), 30, np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1 : y2 + 1, x1 : x2 + 1, 0] = 60 + 40 * i
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


BOXES = [(2, 3, 20, 30), (40, 10, 70, 50), (25, 40, 35, 58)]


def _records() -> list[Record]:
    common: dict[str, Any] = {"image": picture(BOXES), "height": 60, "width": 80, "boxes": boxes_array(BOXES)}
    captions = ("the dog on the left by a red table", "a dog a man and a red table")
    spans = [
        tuple(((c.index(word), c.index(word) + len(word)),) for word in ("dog", "red table", "table")) for c in captions
    ]
    return [
        Record("d", "detection", categories=(0, 1, 1), **common),
        *(Record(f"g{i}", "grounding", caption=c, spans=s, **common) for i, (c, s) in enumerate(zip(captions, spans))),
        Record("p", "pseudo", caption=captions[0], spans=spans[0], scores=(0.9, 0.6, 0.75), **common),
    ]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> shards.Shards:
    """Records 0 (detection), 1 (a caption with the word left) and 2 (one without)."""
    folder = tmp_path_factory.mktemp("examples") / "made"
    shards.write(_records(), folder, name="made", names=NAMES)
    return shards.Shards(folder)


def examples(opened: shards.Shards, max_tokens: int = 32, **data: Any) -> Examples:
    config = Config(
        model=ModelConfig(text=TextConfig(vocabulary=str(VOCABULARY), vocabulary_size=512, max_tokens=max_tokens)),
        data=DataConfig(
            **{
                "sources": {"made": SourceConfig(str(opened.path))},
                "short_sides": (60,),
                "long_side": 96,
                "max_boxes": 5,
                "flip": 0.0,
                **data,
            }
        ),
    )
    captioner = Captioner(NAMES, TOKENIZER, config.data.captions, max_tokens, (), opened)
    return Examples(config, (opened,), (captioner,))


def make(opened: shards.Shards, index: int, element: int = 0, **data: Any) -> Batch:
    return examples(opened, **data)(0, index, 60, np.full((64, 96, 3), 99, np.uint8), rng_of(0, element))


def text_of(batch: Batch, chosen: np.ndarray) -> str:
    return TOKENIZER.decode(batch.tokens[chosen].tolist())  # type: ignore[attr-defined]


def test_one_generator_determines_the_example(opened: shards.Shards) -> None:
    settings: dict[str, Any] = {
        "crop": CropConfig(0.9),
        "jitter": JitterConfig(0.9),
        "flip": 0.5,
        "flip_captions": "safe",
    }
    for index in range(3):
        for element in range(4):
            one, again = (make(opened, index, element, **settings) for _ in range(2))
            assert all(np.array_equal(a, b) for a, b in zip(one, again))
    plain = make(opened, 0)
    assert np.array_equal(plain.image[:60, :80], make(opened, 0, crop=CropConfig(0.0)).image[:60, :80])
    assert plain.size.tolist() == [60, 80] and plain.token_loss_mask.all()


def test_captions_with_left_or_right_are_not_flipped_with_safe(opened: shards.Shards) -> None:
    whole = [make(opened, index).image for index in range(3)]
    for index, says in ((0, False), (1, True), (2, False)):
        safe, as_is = (make(opened, index, flip=1.0, flip_captions=how).image for how in ("safe", "as_is"))
        assert np.array_equal(safe, whole[index]) == says
        assert not np.array_equal(as_is, whole[index])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 70), st.integers(2, 90), st.floats(0.05, 1))
def test_crop_windows_are_inside_and_visible_fractions_are_right(
    element: int, height: int, width: int, min_side: float
) -> None:
    top, left, h, w = window = transforms.crop_window(height, width, CropConfig(1.0, min_side), rng_of(1, element))
    assert 0 <= top and 0 <= left and top + h <= height and left + w <= width
    assert h >= max(1, min_side * height - 0.5) and w >= max(1, min_side * width - 0.5)
    rng = np.random.default_rng(element)
    corner = rng.integers(0, [width - 1, height - 1], (6, 2))
    far = np.minimum(corner + rng.integers(1, 30, (6, 2)), [width - 1, height - 1])
    boxes = np.concatenate([corner, far], 1).astype(np.float32)
    cut, kept, visible = transforms.crop_boxes(boxes, window, 0.4)
    for i, (x1, y1, x2, y2) in enumerate(boxes.astype(int).tolist()):
        mask = np.zeros((height, width), bool)
        mask[y1 : y2 + 1, x1 : x2 + 1] = True
        seen = mask[top : top + h, left : left + w]
        assert visible[i] == pytest.approx(seen.sum() / mask.sum(), abs=1e-6)
        if kept[i]:
            ys, xs = np.nonzero(seen)
            assert cut[i].tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
            assert visible[i] >= 0.4 and xs.max() > xs.min() and ys.max() > ys.min()


def test_crops_keep_boxes_on_their_pixels_and_phrases_on_their_boxes(opened: shards.Shards) -> None:
    maker = examples(opened, crop=CropConfig(1.0, 0.4, 0.5))
    gone = unknown = 0
    for element in range(80):
        batch = maker(0, 2, 60, np.empty((64, 96, 3), np.uint8), rng_of(0, element))
        h, w = batch.size
        assert h <= 64 and w <= 96 and not batch.image[h:].any() and not batch.image[:, w:].any()
        count = int(batch.box_mask.sum())
        lost = int(batch.dropped[DROPS.index("boxes_out_of_view")])
        assert count + lost == 3
        gone += lost
        for box, row in zip(batch.boxes[:count], batch.positive_map[:count]):
            color = {"dog": 60, "red table": 100, "table": 140}[text_of(batch, row)]
            x, y = (box[:2] + box[2:]) / 2
            assert abs(int(batch.image[round(float(y)), round(float(x)), 0]) - color) <= 1
        named = text_of(batch, batch.positive_map[:count].any(0))
        blank = text_of(batch, ~batch.token_loss_mask)
        unknown += bool(blank)
        if "dog" not in named:
            assert "dog" in blank, "a phrase without its last box is unlabelled"
        else:
            assert "dog" not in blank
    assert gone > 30 and unknown > 20
    assert make(opened, 2).dropped.sum() == 0


def test_a_partly_visible_removed_box_makes_its_name_unlabelled(opened: shards.Shards) -> None:
    """Record 0 has two dogs, at (40, 10, 70, 50) and (25, 40, 35, 58)."""
    maker = examples(opened, crop=CropConfig(1.0, 0.4, 0.9))
    seen = set()
    for element in range(60):
        rng = rng_of(0, element)
        rng.random()
        window = transforms.crop_window(60, 80, CropConfig(1.0, 0.4, 0.9), rng)
        _, kept, visible = transforms.crop_boxes(boxes_array(BOXES), window, 0.9)
        batch = maker(0, 0, 60, np.empty((64, 96, 3), np.uint8), rng_of(0, element))
        assert batch.box_mask.sum() == kept.sum()
        if kept[1:].any():
            trace = bool((~kept[1:] & (visible[1:] > 0)).any())
            assert ("dog" in text_of(batch, ~batch.token_loss_mask)) == trace
            seen.add(trace)
    assert seen == {True, False}


def test_a_phrase_that_lost_a_box_to_the_limit_is_unlabelled(opened: shards.Shards) -> None:
    batch = make(opened, 0, max_boxes=2)
    assert text_of(batch, ~batch.token_loss_mask) == "dog" and batch.dropped[0] == 1
    assert make(opened, 0, max_boxes=3).token_loss_mask.all()


def test_jitter_changes_colors_within_bounds() -> None:
    image = np.tile(np.arange(0, 250, 10, dtype=np.uint8)[:, None, None], (1, 20, 3))
    image[..., 1] //= 2
    same = transforms.jitter(image, JitterConfig(1.0, 0.0, 0.0, 0.0, 0.0), rng_of(0, 0))
    assert np.array_equal(same, image)
    for only in ("brightness", "contrast", "saturation", "hue"):
        config = dataclasses.replace(JitterConfig(1.0, 0.0, 0.0, 0.0, 0.0), **{only: 0.3})
        drawn = [transforms.jitter(image, config, rng_of(0, i)) for i in range(6)]
        assert np.array_equal(drawn[0], transforms.jitter(image, config, rng_of(0, 0)))
        assert len({d.tobytes() for d in drawn}) > 3 and all(d.shape == image.shape for d in drawn)
    bright = [transforms.jitter(image, JitterConfig(1.0, 0.2, 0.0, 0.0, 0.0), rng_of(0, i)) / 1.0 for i in range(30)]
    ratios = np.array([(b[10:20].sum() / image[10:20].sum()) for b in bright])
    assert 0.78 < ratios.min() < 0.9 and 1.1 < ratios.max() < 1.22


def test_packing_reads_other_records_of_the_source(opened: shards.Shards) -> None:
    captions = dataclasses.replace(
        DataConfig().captions, packing=PackingConfig(2, 0.0, 1.0, "captions", ("grounding",))
    )
    seen = set()
    for element in range(20):
        batch = make(opened, 1, element, captions=captions)
        seen.add(text_of(batch, batch.token_mask))
        assert text_of(batch, batch.positive_map[1]) == "red table" and batch.token_loss_mask.all()
    own, other = "the dog on the left by a red table", "a dog a man and a red table"
    # Detection records have no caption, and a caption is never packed with itself.
    assert {own, f"{own}. {other}.", f"{other}. {own}."} <= {text.replace(" .", ".") for text in seen}


def test_box_weights_are_scores_of_the_teacher(opened: shards.Shards) -> None:
    ones = [1.0, 1.0, 1.0, 0.0, 0.0]
    for index in (1, 3):
        assert make(opened, index).box_weight.tolist() == ones
    sources = {"made": SourceConfig(str(opened.path), box_weight="score")}
    assert make(opened, 1, sources=sources).box_weight.tolist() == ones, "boxes of grounding records have no score"
    np.testing.assert_allclose(make(opened, 3, sources=sources).box_weight, [0.9, 0.6, 0.75, 0, 0])
    limited = make(opened, 3, sources=sources, max_boxes=2)
    np.testing.assert_allclose(limited.box_weight, [0.9, 0.6])
    corrupt = examples(opened, sources=sources)._corrupt(0, 3, np.empty((64, 96, 3), np.uint8))
    assert not corrupt.box_weight.any()


def test_boxes_below_the_threshold_are_dropped_and_their_phrases_unlabelled(opened: shards.Shards) -> None:
    sources = {"made": SourceConfig(str(opened.path), threshold=0.75)}
    whole, confident = make(opened, 3), make(opened, 3, sources=sources)
    assert whole.box_mask.sum() == 3 and whole.token_loss_mask.all()
    assert confident.box_mask.sum() == 1 and confident.dropped[DROPS.index("boxes_below_threshold")] == 2
    assert text_of(confident, confident.positive_map[0]) == "dog"
    tokens = whole.positive_map[1] | whole.positive_map[2]  # red table, table
    np.testing.assert_array_equal(~confident.token_loss_mask, tokens)
    annotated = make(opened, 1, sources=sources)
    assert annotated.box_mask.sum() == 3 and not annotated.dropped.any()
