"""The fine-tuning recipes of the original code, for `--as-glip`: its command of ODinW and its three useful modes.

tools/finetune.py of github.com/microsoft/GLIP and "ODinW / Custom Dataset Fine-Tuning" of its README. What differs here: a loss that
is not finite stops the run (there it is set to 0), and bfloat16 or float32 stands for float16 with loss scaling. Its modes
`language_prompt_v1`, `v3` and `v4` are left out: the first tunes all of BERT, the others train what v1 and v2 do (glip-reference 5.6).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from glip_jax.config import Config, ConfigError, PackingConfig
from glip_jax.training.finetuning.schedule import Rules

__all__ = ["COPIES", "RECIPES", "Recipe", "Shots", "as_glip", "glip_rules", "read_shots", "without_empty_images"]

COPIES = {1: 8, 3: 4, 5: 2, 10: 1, 0: 1}
"""Copies of the training set in an epoch, by number of shots (0: all data), in the README's commands."""
_EPOCHS, _BATCH = 200, 4


class Shots(NamedTuple):
    """`k_200_copies` of the original: shots, maximum number of epochs, and copies of the training set in an epoch."""

    shots: int
    """0: all data."""
    epochs: int
    copies: int

    @property
    def text(self) -> str:
        """As the original writes it."""
        return f"{self.shots}_{self.epochs}_{self.copies}"

    def steps_per_epoch(self, images: int) -> int:
        """Batches of 4 that hold `images` training images as often as there are copies; the last one is filled up."""
        return math.ceil(images * self.copies / _BATCH)


@dataclass(frozen=True)
class Recipe:
    """What a mode of the original trains, and how."""

    tune: Literal["full", "linear", "prompt"]
    """The mode of fine-tuning that changes the same parameters."""
    rate: float
    text_rate: float
    decay: float
    frozen_stages: int = 0
    """First stages of the backbone that are frozen, with the patch embedding (its FREEZE_CONV_BODY_AT counts the embedding too)."""


RECIPES = {
    "full": Recipe("full", rate=1e-4, text_rate=1e-5, decay=0.05, frozen_stages=1),
    "linear_prob": Recipe("linear", rate=1e-4, text_rate=0.0, decay=0.05),
    "language_prompt_v2": Recipe("prompt", rate=0.05, text_rate=0.0, decay=0.25),
}
"""By the original's name of the mode."""


def read_shots(text: str) -> Shots:
    """`3_200_4`, or the number of shots alone, for which epochs and copies are those of the README.

    Raises ConfigError for other text.
    """
    if text.isdecimal() and int(text) in COPIES:
        return Shots(int(text), _EPOCHS, COPIES[int(text)])
    match = re.fullmatch(r"(\d+)_(\d+)_(\d+)", text)
    if match is None or not int(match[2]) or not int(match[3]):
        known = ", ".join(Shots(k, _EPOCHS, copies).text for k, copies in COPIES.items())
        raise ConfigError(f"shots are {text!r}: expected SHOTS_EPOCHS_COPIES of the original, such as {known}")
    return Shots(*(int(part) for part in match.groups()))


def glip_rules(shots: int, metric: str) -> Rules:
    """When the original stops and cuts: after 8 evaluations and at the 4th without a better one; with all data 4 and 3."""
    patience, plateau = (8, 3) if shots else (4, 2)
    return Rules(metric, patience=patience, plateau=plateau, factor=0.1, floor=1e-6, ties=True)


def without_empty_images(coco: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A training set in COCO's form without the images that the original leaves out, and their number.

    These have no box, or only boxes at most one pixel wide or high (`has_valid_annotation` in its data/datasets/coco.py).
    """
    valid = {entry["image_id"] for entry in coco["annotations"] if min(entry["bbox"][2:]) > 1}
    kept = {
        "images": [entry for entry in coco["images"] if entry["id"] in valid],
        "annotations": [entry for entry in coco["annotations"] if entry["image_id"] in valid],
    }
    return {**coco, **kept}, len(coco["images"]) - len(kept["images"])


def as_glip(config: Config, recipe: Recipe, shots: Shots, images: int) -> Config:
    """`config` with the recipe's optimizer, schedule and input; `images` are in the training set, empty ones left out.

    AdamW with batches of 4 at a constant rate, which `glip_rules` cuts; no warmup, no averages; gradients are clipped at norm 1; all names
    in every prompt, in their order; short side 800 and flips. It validates every epoch. Which parameters train is up to `recipe.tune`.

    Raises ConfigError without images.
    """
    if images < 1:
        raise ConfigError(
            f"the training set has {images} images with a box: expected at least 1 (GLIP leaves out empty images)"
        )
    epoch = shots.steps_per_epoch(images)
    optimizer = replace(
        config.optimizer, name="adamw", arguments={}, rate=recipe.rate, text_rate=recipe.text_rate, backbone_rate_factor=1.0,
        head_text_rate_factor=1.0, bias_rate_factor=2.0, decay=recipe.decay, bias_decay=0.0, decay_milestone_factor=1.0,
        beta1=0.9, beta2=0.999, epsilon=1e-8, warmup_steps=0, milestones=(), clip_norm=1.0, ema_decay=0.0, accumulate=1,
    )  # fmt: skip
    captions = replace(config.data.captions, mode="all_names", separator=". ", shuffle=False, packing=PackingConfig())
    data = replace(config.data, captions=captions, short_sides=(800,), long_side=1333, flip=0.5, flip_captions="as_is")
    backbone = config.model.backbone
    stages = max(backbone.frozen_stages, recipe.frozen_stages)
    return replace(
        config,
        model=replace(config.model, backbone=replace(backbone, frozen_stages=stages)),
        optimizer=optimizer,
        data=data,
        train=replace(config.train, steps=shots.epochs * epoch, batch_size=_BATCH, evaluate_every=epoch),
        evaluation=replace(config.evaluation, parameters="raw", short_side=800, long_side=1333),
    )
