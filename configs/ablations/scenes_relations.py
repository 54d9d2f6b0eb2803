"""Relations: positions, and captions only.

Half of the 12,000 captions have a relational phrase, four times as many as C sees. Draw the scenes first:

    python -m glip_jax scenes --out=runs/ablations/relations --count=24000 --captions=0 --validation=600 --seed=1
"""

import dataclasses

from configs.demo import demo
from glip_jax.config import Config

__all__ = ["get_config"]


def get_config() -> Config:
    base = demo("runs/ablations/relations")
    head = dataclasses.replace(base.model.head, positions=True)
    sources = {"grounding": base.data.sources["grounding"]}
    return dataclasses.replace(
        base,
        name="relations",
        model=dataclasses.replace(base.model, head=head),
        data=dataclasses.replace(base.data, sources=sources),
        train=dataclasses.replace(base.train, steps=3000),
        evaluation=dataclasses.replace(base.evaluation, sets={"phrases": base.evaluation.sets["phrases"]}),
    )
