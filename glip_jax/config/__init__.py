"""Every setting of glip_jax once: `run` (training, evaluation), `model`, `data`; `saved` reads recorded ones back."""

from glip_jax.config.run import *  # noqa: F403
from glip_jax.config.run import __all__ as __all__
