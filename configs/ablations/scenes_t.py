"""T of the ablation on picture scenes: C with captions that a run of C labelled.

The labels are each seed's own: --config.data.sources.pseudo.path=DIR, as `scripts/ablate.sh` gives it.
"""

import dataclasses

from configs.ablations import scenes_c
from glip_jax.config import Config, SourceConfig

__all__ = ["get_config", "with_pseudo"]


def get_config() -> Config:
    return with_pseudo(dataclasses.replace(scenes_c.get_config(), name="T"), "runs/ablations/pseudo-0")


def with_pseudo(base: Config, path: str) -> Config:
    """`base` with the pseudo records in `path` as a third source."""
    pseudo = SourceConfig(path, weight=2.0)
    return dataclasses.replace(
        base, data=dataclasses.replace(base.data, sources={**base.data.sources, "pseudo": pseudo})
    )
