"""Ablation on synthetic scenes, C: detection and grounding mixed. `scripts/ablate.sh` runs all four.

A: detection only, text and image are combined only in the scores; B: A with fusion; C: B with captions whose phrases have boxes;
T: C with captions that C labelled. Network, solver, steps and batch size are those of the demo, so all see equally many images.
"""

import dataclasses

from configs.demo import demo
from glip_jax.config import Config

__all__ = ["SCENES", "get_config"]

SCENES = "runs/ablations/scenes"


def get_config() -> Config:
    return dataclasses.replace(demo(SCENES), name="C")
