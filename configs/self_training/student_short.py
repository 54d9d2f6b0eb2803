"""The student in a short form: `scripts/self_training.sh --short`."""

import dataclasses

from configs.ablations.scenes_t import with_pseudo
from configs.self_training import teacher_short
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = dataclasses.replace(teacher_short.get_config(), name="student-short")
    # All scores are low after 8 steps.
    return with_pseudo(base, "runs/self_training-short/pseudo", threshold=0.0)
