"""Attention sinks: tokens without a meaning behind those of a prompt, so that attention can choose nothing.

A prompt holds names only, and the softmax over its tokens gives all of the attention of every location to some of them. Of a
single name that is not in the image, much is found therefore. The sinks take that attention, and a location that fits a sink better than
every phrase gives no detection. Weights need not be trained for it ("Tractor-Dogs", ICLR 2026, applies it to five detectors, GLIP among them).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from glip_jax.config import Config
from glip_jax.inference.programs import programs
from glip_jax.inference.queries import check_query
from glip_jax.structures.batch import Prompt
from glip_jax.structures.prompts import Tokenizer, tokenize

__all__ = ["RANDOM", "sink_states", "sink_tokens"]

RANDOM = "random"
"""The `detection.sink_start` that is no text."""


def sink_tokens(config: Config, tokenizer: Tokenizer) -> list[int]:
    """Token ids of `detection.sink_start`, [CLS] and [SEP] included. Raises PromptError for a text that the vocabulary does not know."""
    text = config.detection.sink_start
    check_query([text], tokenizer, "detection.sink_start", what="text")
    tokenized = tokenize(Prompt(text, (((0, len(text)),),)), tokenizer, config.model.text.max_tokens)
    return tokenized.tokens[tokenized.mask].tolist()


def sink_states(params: Mapping[str, Any], config: Config, tokenizer: Tokenizer) -> Float[Array, "sinks D"]:
    """Text states of the sinks of `config.detection`.

    `random`: normally distributed numbers of `sink_seed`, scaled and shifted as the text encoder's last norm does with its states.
    Another `sink_start`: the mean state of that text's own tokens, the same for all sinks. Raises PromptError as `sink_tokens`.
    """
    detection, width = config.detection, config.model.text.width
    if detection.sink_start == RANDOM:
        norm = params["text"]["layers"]["output_norm"]
        numbers = np.random.default_rng(detection.sink_seed).standard_normal((detection.sinks, width), np.float32)
        return jnp.asarray(numbers) * jnp.asarray(norm["scale"][-1]) + jnp.asarray(norm["bias"][-1])
    tokens = np.asarray(sink_tokens(config, tokenizer), np.int32)
    encode = programs(config.model, detection).encode_text
    states = encode(params, tokens[None], np.ones((1, len(tokens)), bool))[0, 1:-1]
    return jnp.tile(states.astype(jnp.float32).mean(0), (detection.sinks, 1))
