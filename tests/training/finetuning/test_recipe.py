"""Settings of fine-tuning that follow from the data."""

import pytest

from glip_jax.config import Config, SourceConfig
from glip_jax.training.finetuning.recipe import canvas, every_steps, fitted, rate_factor, with_steps

PIXELS = 384 * 512
LYING, UPRIGHT = (480, 640), (640, 480)


@pytest.mark.parametrize(
    ("sizes", "boxes", "expected"),
    [
        ([LYING] * 9, [0.2], (384, 512, 0.75)),
        ([UPRIGHT] * 9, [0.2], (384, 512, 4 / 3)),
        ([LYING, UPRIGHT] * 9, [0.2], (448, 448, 1.0)),
        # One of a hundred has another shape: it is made smaller.
        ([LYING] * 99 + [UPRIGHT], [0.2], (384, 512, 0.75)),
        # Small boxes: as large as makes the median one 42 pixels, and at most 1.4 times as long.
        ([LYING] * 9, [0.01, 0.07, 0.5], (480, 608, 480 / 608)),
        ([LYING] * 9, [0.01], (576, 736, 576 / 736)),
        # Small images are not enlarged beyond 1.5.
        ([(240, 320)] * 9, [0.01], (384, 480, 0.8)),
        ([LYING] * 9, [], (384, 512, 0.75)),
    ],
)
def test_the_canvas_follows_from_sizes_and_boxes(sizes, boxes, expected):
    assert canvas(sizes, boxes, PIXELS) == pytest.approx(expected)


def test_the_data_decide_slots_tokens_and_captions():
    one, two = ({name: SourceConfig(name) for name in names} for names in (["own"], ["own", "replay0"]))
    whole = fitted(Config(), [LYING], [0.2], 17, 40, one, mirrored=False)
    assert whole.data.max_boxes == 32 and whole.data.flip == 0 and whole.model.text.max_tokens == 48
    assert whole.data.captions.mode == "all_names" and whole.data.short_sides == (whole.evaluation.short_side,)
    for own in (
        fitted(Config(), [LYING], [0.2], 5, 40, two, True),
        fitted(Config(), [LYING], [0.2], 5, 400, one, True),
    ):
        assert own.data.captions.mode == Config().data.captions.mode and own.model.text.max_tokens == 256


def test_steps_evaluations_and_rates():
    assert every_steps(10, 8) == 50 and every_steps(801, 8) == 101
    short = with_steps(Config(), 30, 50)
    assert short.train.evaluate_every == short.checkpoint.every == 30
    factors = [rate_factor(step, 100) for step in (0, 29, 30, 65, 99)]
    assert factors[:3] == [1, 1, 1] and factors[3] == pytest.approx(0.505) and 0.01 < factors[4] < 0.012
