"""Vectors of names for `data.captions.hard_by=meaning`: computed once, by the text encoder as it is when training begins."""

import io
import logging
from typing import Any
from zipfile import BadZipFile

import numpy as np
from etils import epath
from jaxtyping import Float32

from glip_jax.config import Config
from glip_jax.data.mixture import Mixture
from glip_jax.inference import Detector
from glip_jax.io.workdir import on_first_process, write_atomic
from glip_jax.structures.prompts import prompt_from_categories

__all__ = ["FILE", "give_vectors"]

logger = logging.getLogger(__name__)

FILE = "name_vectors.npz"
_LENGTH = 16
"""Tokens of most names; longer ones run at the length of the budget."""
_READ = (OSError, ValueError, KeyError, EOFError, BadZipFile)


def give_vectors(mixture: Mixture, params: Any, folder: epath.PathLike) -> None:
    """Gives `mixture` the vectors of its names from `name_vectors.npz` in `folder`, which is written by the first call.

    So a resumed run draws the same negatives, whatever the text encoder has learned since. `params`: of the network. All processes call it.
    """
    if not mixture.texts:
        return
    path = epath.Path(folder) / FILE
    states = _read(path, mixture.texts)
    on_first_process(lambda: None)  # before the file is written, all have looked for it
    if states is None:
        if path.exists():
            logger.info(f"note: {path} is of other names: made anew, by the text encoder as it is now")
        states = _states(mixture.config, params, mixture.texts)
        stream = io.BytesIO()
        np.savez(stream, names=np.array(mixture.texts), states=states)
        on_first_process(lambda: write_atomic(path, stream.getvalue()))
    mixture.use_vectors(states)


def _states(config: Config, params: Any, names: tuple[str, ...]) -> Float32[np.ndarray, "N C"]:
    """Mean of the encoder's last states over the tokens of each name, which is a prompt of its own."""
    detector = Detector(config, params)
    rows = []
    for name in names:
        prompt = prompt_from_categories([name])
        short = len(detector.tokenizer.encode(prompt.caption).ids) <= _LENGTH
        length = min(_LENGTH if short else config.model.text.max_tokens, config.model.text.max_tokens)
        tokenized, states = detector.text(prompt, length)
        (inside,) = tokenized.phrase_map
        rows.append(np.asarray(states, np.float32)[inside].mean(0))
    return np.stack(rows)


def _read(path: epath.Path, names: tuple[str, ...]) -> Float32[np.ndarray, "N C"] | None:
    """The states in a file of the same names, else None."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as saved:
            return saved["states"] if tuple(saved["names"].tolist()) == names else None
    except _READ:
        return None
