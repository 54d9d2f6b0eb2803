"""Every setting of glip_jax once: `run` (training, evaluation), `model`, `data`; `saved` reads the settings of earlier runs."""

from glip_jax.config import run as _run
from glip_jax.config import saved as _saved
from glip_jax.config.run import *  # noqa: F403
from glip_jax.config.saved import *  # noqa: F403

__all__ = [*_run.__all__, *_saved.__all__]  # pyright: ignore[reportUnsupportedDunderAll]
