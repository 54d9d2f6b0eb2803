r"""Synthetic scenes with all names in two styles, for names that no training scene shows; under an hour on two CPU cores.

The scenes are drawn first:

python -m glip_jax scenes --out=runs/scenes_large/scenes --count=20000 --captions=0 --styles fluent twemoji \
    --names.detection=0 --names.grounding=0 --names.captions=0 --names.unseen=0
scripts/pretrain.sh --config=configs/scenes_large.py --workdir=runs/scenes_large
python -m glip_jax evaluate --config=configs/scenes_large.py --workdir=runs/scenes_large
"""

import dataclasses

from configs.demo import demo
from glip_jax.config import CheckpointConfig, Config

__all__ = ["get_config"]


def get_config() -> Config:
    """447 names for detection, 90 more in grounding captions; 89 unseen names."""
    base = demo("runs/scenes_large/scenes")
    return dataclasses.replace(
        base,
        name="scenes_large",
        train=dataclasses.replace(base.train, steps=5000, log_every=50),
        checkpoint=CheckpointConfig(every=500, keep=2),
    )
