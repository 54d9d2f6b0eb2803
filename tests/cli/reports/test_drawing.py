import io

import numpy as np
import pytest
from PIL import Image

from glip_jax.cli.reports.drawing import (
    Mark,
    color,
    contact_sheet,
    draw_batch,
    draw_boxes,
    draw_curves,
    draw_groups,
    phrase_text,
    png,
)
from glip_jax.structures.batch import DROPS, Batch

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "a", "red", "apple", "##s", "."]


def _batch():
    image = np.full((2, 64, 64, 3), 200, np.uint8)
    image[0, 48:] = 0
    tokens = np.array([[1, 3, 4, 5, 6, 7, 2, 0], [1, 5, 2, 0, 0, 0, 0, 0]], np.int32)
    positive = np.zeros((2, 3, 8), bool)
    positive[0, 0, [2, 3, 4]] = True
    return Batch(
        image=image, size=np.array([[48, 64], [64, 64]], np.int32), extent=np.array([[64, 64]] * 2, np.int32),
        tokens=tokens, token_mask=tokens > 0, boxes=np.tile(np.array([10, 12, 30, 40], np.float32), (2, 3, 1)),
        box_mask=np.array([[True, False, False], [False] * 3]), box_weight=np.ones((2, 3), np.float32), positive_map=positive, token_loss_mask=np.ones_like(tokens, bool), valid=np.array([True, False]),
        source=np.zeros(2, np.int32), record=np.zeros(2, np.int32), dropped=np.zeros((2, len(DROPS)), np.int32),
    )  # fmt: skip


def test_boxes_are_drawn_where_they_are():
    image = np.zeros((100, 200, 3), np.uint8)
    drawn = np.asarray(draw_boxes(image, [Mark((20, 40, 60, 80), "", (255, 0, 0))]))
    rows, columns = np.nonzero(drawn[..., 0] == 255)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (20, 40, 60, 80)
    assert not drawn[45:75, 25:55].any()
    assert not image.any(), "the given image was changed"


def test_a_scale_moves_boxes_with_the_pixels():
    drawn = draw_boxes(np.zeros((50, 100, 3), np.uint8), [Mark((20, 10, 60, 30), "", (255, 0, 0))], scale=2.0)
    assert drawn.size == (200, 100)
    rows, columns = np.nonzero(np.asarray(drawn)[..., 0] == 255)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (40, 20, 120, 60)


@pytest.mark.parametrize("box", [(5, 5, 5, 20), (np.nan, 0, 5, 5), (30, 5, 10, 20), (500, 500, 600, 600)])
def test_what_is_no_box_is_not_drawn(box):
    assert not np.asarray(draw_boxes(np.zeros((40, 40, 3), np.uint8), [Mark(box, "x")])).any()


@pytest.mark.parametrize("text", ["a\nsnail", "Schnecke – ß", "蝸牛 🐌", "\x00\u200b", "long " * 40])
def test_any_text_can_be_written_and_stay_inside(text):
    drawn = draw_boxes(np.zeros((60, 80, 3), np.uint8), [Mark((50, 2, 78, 20), text), Mark((-9, -9, 99, 99), text)])
    assert drawn.size == (80, 60)
    assert np.asarray(drawn).any()


def test_neighbouring_colors_differ():
    for index in range(30):
        a, b = np.array(color(index)), np.array(color(index + 1))
        assert np.abs(a - b).sum() > 100


def test_white_text_can_be_read_on_every_color():
    for index in range(200):
        channels = np.array(color(index)) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3, color(index)


def test_a_sheet_has_room_for_all():
    pictures = [Image.new("RGB", (30, 20 + i), (255, 0, 0)) for i in range(5)]
    sheet = contact_sheet(pictures, ["", "short", "some words that need lines", "word " * 200, ""], columns=2)
    assert (np.asarray(sheet) == (255, 0, 0)).all(-1).sum() == sum(p.width * p.height for p in pictures)
    with pytest.raises(ValueError, match="5 pictures and 1 captions"):
        contact_sheet(pictures, [""])


def test_phrase_text_join_pieces_and_show_gaps():
    tokens = np.array([1, 3, 4, 5, 6, 99], np.int32)
    assert phrase_text(tokens, np.array([0, 0, 1, 1, 1, 0], bool), VOCABULARY) == "red apples"
    assert phrase_text(tokens, np.array([0, 1, 0, 1, 0, 1], bool), VOCABULARY) == "a ... apple ... [99]"
    assert phrase_text(tokens, np.zeros(6, bool), VOCABULARY) == ""


def test_a_batch_is_drawn_as_the_network_sees_it(monkeypatch):
    seen = []

    def sheet(pictures, captions):
        seen.append((pictures, captions))
        return pictures[0]

    monkeypatch.setattr("glip_jax.cli.reports.drawing.contact_sheet", sheet)
    draw_batch(_batch(), VOCABULARY)
    (pictures, captions) = seen[0]
    assert captions == ["a red apples .", "(masked out) apple"]
    assert pictures[0].size == (128, 96), "padding beyond the size must be cut off"
    assert (np.asarray(pictures[0])[60] != 200).any()
    assert (np.asarray(pictures[1]) == 200).all()


def test_a_batch_becomes_one_picture():
    sheet = draw_batch(_batch(), VOCABULARY, limit=1)
    with Image.open(io.BytesIO(png(sheet))) as again:
        assert again.size == sheet.size


def test_curves():
    data = draw_curves({"loss": ([1, 2, 3], [3.0, float("nan"), 1.0]), "ema": ([], [])})
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.width > 600
    drawn = draw_curves({"loss": ([1, 2], [3.0, 1.0])}, "loss", "svg")
    assert b"<svg" in drawn and drawn == draw_curves({"loss": ([1, 2], [3.0, 1.0])}, "loss", "svg")
    with pytest.raises(ValueError, match="no curve has a point"):
        draw_curves({"loss": ([], [])})


def test_groups_stand_beside_one_another_in_panels():
    panels = {"cats AP50": {"a": [0.1, 0.2], "b": [0.3]}, "dogs AP50": {"a": [0.5, 0.5], "b": [0.6]}}
    drawn = draw_groups(panels, format="svg")
    assert drawn == draw_groups(panels, format="svg"), "the same values give the same bytes"
    wide, narrow = (Image.open(io.BytesIO(draw_groups(panels, columns))).size for columns in (2, 1))
    assert wide[0] > narrow[0] and wide[1] < narrow[1]
