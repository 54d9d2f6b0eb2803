"""The student of `scripts/self_training.sh`: as the teacher, plus the captions that the teacher labelled."""

import dataclasses

from configs.ablations.scenes_t import with_pseudo
from configs.self_training import teacher
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    return with_pseudo(dataclasses.replace(teacher.get_config(), name="student"), "runs/self_training/pseudo")
