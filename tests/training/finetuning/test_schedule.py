"""Early stop and plateau on made sequences of AP, with 0.0 and ties: the default rules, and the original's."""

import math
from dataclasses import replace

import pytest

from glip_jax.cli.command_line import load_config
from glip_jax.config import Config, ConfigError
from glip_jax.training.finetuning.glip_recipes import (
    RECIPES,
    Shots,
    as_glip,
    glip_rules,
    read_shots,
    without_empty_images,
)
from glip_jax.training.finetuning.schedule import Plateau, Rules, Schedule

METRIC = "evaluation/valid/AP"
DEFAULT = Rules(METRIC, patience=3, plateau=1)
ORIGINAL = Rules(METRIC, patience=3, plateau=1, ties=True)


def _decided(rules, values, start=None):
    """Of each evaluation, at steps 10, 20, ...: (stop, cuts of the rate, best)."""
    schedule = Schedule(rules, start)
    made = [schedule(10 * i, {METRIC: value}) for i, value in enumerate(values, 1)]
    return schedule, [(m.stop, round(-math.log10(m.rate_factor)), m.best) for m in made]


@pytest.mark.parametrize(
    ("rules", "values", "start", "best_step", "stops", "cuts", "better"),
    [
        # An equal evaluation counts against the default rules; the original's reset their patience and take it as the best.
        (DEFAULT, [0.5, 0.5, 0.5, 0.5], None, 10, [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]),
        (ORIGINAL, [0.5, 0.5, 0.5, 0.5], None, 40, [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]),
        # 0.0 counts against the default rules. In the original it is a best at first, and the plateau never sees it.
        (DEFAULT, [0.0, 0.0, 0.0, 0.0], None, 10, [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]),
        (ORIGINAL, [0.0, 0.0, 0.0, 0.0], None, 40, [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]),
        (DEFAULT, [0.4, 0.0, 0.0, 0.0], None, 10, [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]),
        (ORIGINAL, [0.4, 0.0, 0.0, 0.0], None, 10, [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]),
        # A gain of less than 1e-4 of the best is none for the original's plateau, but one for its stop.
        (DEFAULT, [0.5, 0.50001, 0.50002], None, 30, [0, 0, 0], [0, 0, 0], [1, 1, 1]),
        (ORIGINAL, [0.5, 0.50001, 0.50002], None, 30, [0, 0, 0], [0, 0, 1], [1, 1, 1]),
        # The result before training is to be beaten by default, and unknown to the original.
        (DEFAULT, [0.5, 0.6, 0.6], 0.6, 0, [0, 0, 1], [0, 1, 1], [0, 0, 0]),
        (DEFAULT, [0.5, 0.7, 0.6], 0.6, 20, [0, 0, 0], [0, 0, 0], [0, 1, 0]),
        (ORIGINAL, [0.5, 0.6, 0.6], 0.7, 30, [0, 0, 0], [0, 0, 0], [1, 1, 1]),
        # After a cut the count begins anew; no number is no gain.
        (DEFAULT, [0.5, math.nan, 0.4, 0.6, 0.5, 0.5], None, 40, [0] * 6, [0, 0, 1, 1, 1, 2], [1, 0, 0, 1, 0, 0]),
        (ORIGINAL, [0.5, math.nan, 0.4, 0.6, 0.5, 0.5], None, 40, [0] * 6, [0, 0, 1, 1, 1, 2], [1, 0, 0, 1, 0, 0]),
    ],
)  # fmt: skip
def test_each_rule_on_a_made_sequence(rules, values, start, best_step, stops, cuts, better):
    schedule, made = _decided(rules, values, start)
    assert made == list(zip(map(bool, stops), cuts, map(bool, better), strict=True))
    assert schedule.best_step == best_step


def test_the_plateau_of_the_original_is_that_of_torch():
    torch = pytest.importorskip("torch")
    values = [0.0, 0.2, 0.2, 0.20001, 0.19, 0.0, 0.1, 0.3, 0.3, 0.1, 0.0, 0.2, 0.3, 0.29, 0.1, 0.1, 0.31, 0.0, 0.3]
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (1e-4, 1e-5, 5e-7)]
    optimizer = torch.optim.AdamW(groups)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=2, min_lr=1e-6)
    rules = glip_rules(0, METRIC)
    plateau = Plateau(rules)
    for value in values:
        plateau.add(value)
        if value:  # as the original's trainer
            theirs.step(value)
        factor = rules.factor**plateau.cuts
        ours = [rate * min(1.0, max(factor, rules.floor / rate)) for rate in (1e-4, 1e-5, 5e-7)]
        assert ours == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-9)
    assert plateau.cuts >= 3


def test_patience_and_a_missing_metric():
    _, made = _decided(Rules(METRIC, patience=0, factor=1.0), [0.5] + [0.1] * 20)
    assert not any(stop or cuts for stop, cuts, _ in made)
    with pytest.raises(ConfigError, match=r"decides by 'evaluation/valid/AP': the evaluation gave evaluation/val/AP"):
        Schedule(DEFAULT)(10, {"evaluation/val/AP": 0.5})
    rules = [(glip_rules(k, METRIC).patience, glip_rules(k, METRIC).plateau) for k in (0, 1, 10)]
    assert rules == [(4, 2), (8, 3), (8, 3)]


def test_the_recipes_of_the_original():
    assert [read_shots(str(k)).text for k in (1, 3, 5, 10, 0)] == [
        "1_200_8", "3_200_4", "5_200_2", "10_200_1", "0_200_1",
    ]  # fmt: skip
    assert read_shots("7_50_16") == Shots(7, 50, 16)
    assert read_shots("5").steps_per_epoch(33) == 17, "the last batch is filled up"
    for text in ("2", "3_200", "3_0_4", "a_200_1"):
        with pytest.raises(ConfigError, match="expected SHOTS_EPOCHS_COPIES"):
            read_shots(text)
    configs = {name: as_glip(Config(), recipe, read_shots("3"), 33) for name, recipe in RECIPES.items()}
    optimizers = {name: config.optimizer for name, config in configs.items()}
    assert {name: (o.rate, o.text_rate, o.decay) for name, o in optimizers.items()} == {
        "full": (1e-4, 1e-5, 0.05), "linear_prob": (1e-4, 0.0, 0.05), "language_prompt_v2": (0.05, 0.0, 0.25),
    }  # fmt: skip
    assert {name: config.model.backbone.frozen_stages for name, config in configs.items()} == {
        "full": 1, "linear_prob": 0, "language_prompt_v2": 0,
    }  # fmt: skip
    train, optimizer = configs["full"].train, configs["full"].optimizer
    assert (train.batch_size, train.evaluate_every, train.steps) == (4, 33, 200 * 33)
    assert (optimizer.warmup_steps, optimizer.milestones, optimizer.ema_decay, optimizer.clip_norm) == (0, (), 0.0, 1.0)
    with pytest.raises(ConfigError, match="0 images with a box"):
        as_glip(Config(), RECIPES["full"], read_shots("0"), 0)


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_the_written_configs_of_odinw_are_the_recipe(size):
    written = load_config(f"configs/finetune/odinw_{size}.py")
    made = as_glip(load_config(f"configs/glip_{size}.py"), RECIPES["full"], read_shots("0"), 448)
    assert (written.optimizer, written.model, written.train.steps) == (made.optimizer, made.model, made.train.steps)
    assert replace(written.data, sources={}) == replace(made.data, sources={})
    assert written.train.evaluate_every == made.train.evaluate_every == 112


def test_images_without_a_box_of_more_than_a_pixel_are_left_out():
    boxes = [(1, [0, 0, 2, 2]), (1, [0, 0, 1, 9]), (2, [0, 0, 1, 9]), (2, [0, 0, 9, 1])]
    coco = {
        "images": [{"id": i} for i in (1, 2, 3)], "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": image, "bbox": box} for image, box in boxes],
    }  # fmt: skip
    kept, dropped = without_empty_images(coco)
    assert (kept["images"], len(kept["annotations"]), kept["categories"], dropped) == (
        [{"id": 1}],
        2,
        coco["categories"],
        2,
    )
