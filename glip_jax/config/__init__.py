"""Every setting of glip_jax once: `run` (training, evaluation), `model`, `data`; `saved` reads the settings of earlier runs."""

from glip_jax.config import data as _data
from glip_jax.config import model as _model
from glip_jax.config import run as _run
from glip_jax.config import saved as _saved
from glip_jax.config.data import *  # noqa: F403
from glip_jax.config.model import *  # noqa: F403
from glip_jax.config.run import *  # noqa: F403
from glip_jax.config.saved import *  # noqa: F403

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *_data.__all__,
    *_model.__all__,
    *_run.__all__,
    *_saved.__all__,
]
