"""Parameters of a fine-tuned network: what a mode adds to those of its base, merged deltas, and weight interpolation."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float, Int, Shaped

from glip_jax.config import Config, LoraConfig, ModelConfig, PromptsConfig
from glip_jax.inference.queries import category_prompts
from glip_jax.io.assets import resolve
from glip_jax.models.glip import GLIP
from glip_jax.models.tuned_prompts import CLS, NONE, SEP, SEPARATOR, SPECIAL_ROWS
from glip_jax.structures import prompts
from glip_jax.weights.names import WeightError

__all__ = ["ADDED", "PromptTable", "interpolated", "merged", "prompt_table", "starting_parameters"]

ADDED = ("*_lora_a", "*_lora_b", "prompts/*", "head/description/*")
"""Patterns of parameters that fine-tuning, or a side loss of training, adds to a network."""


class PromptTable(NamedTuple):
    """The parameters `prompts/*`; see `glip_jax.models.tuned_prompts`. N: names and special rows."""

    tokens: Int[np.ndarray, "N L"]
    embeddings: Float[np.ndarray, "N L D"]
    """P0: states of BERT for the names in the prompts that hold them all."""
    deltas: Float[np.ndarray, "N L D"]
    """Zero."""


def starting_parameters(
    fresh: Mapping[str, Any], base: Mapping[str, Any], config: Config, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Parameters of step 0 of a fine-tuning: those of `base`, low-rank deltas of `fresh`, and the table of tuned prompts.

    Args:
        fresh: initial values of the network of `config`, nested dict; its dtypes and shardings are kept.
        base: parameters of the base, nested dict of numpy arrays.
        names: the names of the tuned prompts, where `config.model.prompts` has any.

    Raises WeightError where the base is of another network, PromptError for names that BERT cannot tell apart in a prompt.
    """
    leaves, given = _flat(fresh), _flat(base)
    if config.model.prompts.names and "prompts/tokens" not in given:
        given |= {f"prompts/{field}": value for field, value in prompt_table(config, base, names)._asdict().items()}
    missing = [path for path in leaves if path not in given and not _added(path)]
    wrong = [path for path in given if path not in leaves or leaves[path].shape != given[path].shape]
    if missing or wrong:
        raise WeightError(
            f"the base does not fit the network: it lacks {', '.join(missing[:3]) or 'nothing'} ({len(missing)} in all), and has "
            f"{', '.join(wrong[:3]) or 'nothing'} ({len(wrong)} in all) that the network has not, or in another shape"
        )

    def placed(path: str, leaf: Any) -> Any:
        if path not in given:
            return leaf
        value = np.asarray(given[path], leaf.dtype)
        return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value

    return _nested({path: placed(path, leaf) for path, leaf in leaves.items()})


def prompt_table(config: Config, params: Mapping[str, Any], names: Sequence[str]) -> PromptTable:
    """The table of tuned prompts for `names`, of the sizes `config.model.prompts`, with deltas of zero.

    P0 is what the text encoder of `params` gives for the prompts of all names, in their order, as evaluation asks them. The
    separator behind the last name of a prompt, where there is none, has its state with one more separator at the end; [CLS] and
    [SEP] have their mean over the prompts.

    Raises PromptError for names whose tokens depend on their neighbors, or that do not fit the sizes.
    """
    sizes, tokenizer = config.model.prompts, prompts.load_tokenizer(resolve(config.model.text.vocabulary))
    cls, *separator, sep = tokenizer.encode(config.data.captions.separator).ids
    rows = [[*tokenizer.encode(prompts.clean_name(name)).ids[1:-1], *separator] for name in names]
    if len(rows) != sizes.names or max(map(len, rows)) > sizes.tokens:
        raise prompts.PromptError(
            f"the table of tuned prompts is of {sizes.names} names of at most {sizes.tokens} tokens, these are {len(rows)} of at "
            f"most {max(map(len, rows))}"
        )
    shape = (sizes.names + SPECIAL_ROWS, sizes.tokens)
    table, states = np.full(shape, NONE, np.int32), np.zeros((*shape, config.model.text.width), np.float32)
    for number, row in [
        *enumerate(rows),
        *((sizes.names + n, r) for n, r in ((CLS, [cls]), (SEP, [sep]), (SEPARATOR, separator))),
    ]:
        table[number, : len(row)] = row
    encode, ends = _text_encoder(config.model, params), []
    for prompt, indices in category_prompts(names, tokenizer, config):
        longer = [cls, *(token for index in indices for token in rows[index]), sep]
        ids = [*longer[: len(longer) - 1 - len(separator)], sep]
        if ids != tokenizer.encode(prompt.caption).ids:
            raise prompts.PromptError(
                f"names have other tokens in the prompt {prompt.caption!r:.200} than alone: give them texts without marks at their ends"
            )
        encoded = encode(ids)
        # Where the token budget is used up, the state of [SEP] stands for the separator of the last name.
        behind = encode(longer)[-1 - len(separator) : -1] if len(longer) <= config.model.text.max_tokens else []
        along, begin = [*encoded[:-1], *(behind if len(behind) else encoded[-1:])], 1
        for index in indices:
            count = min(len(rows[index]), len(along) - begin)
            states[index, :count] = along[begin : begin + count]
            begin += len(rows[index])
        ends.append([encoded[0], encoded[-1]])
    states[[sizes.names + CLS, sizes.names + SEP], 0] = np.mean(ends, axis=0)
    return PromptTable(table, states, np.zeros_like(states))


def merged(params: Mapping[str, Any], config: Config) -> tuple[dict[str, Any], Config]:
    """The network without low-rank deltas: their products are added to the kernels, in float64."""
    if not config.model.lora.rank:
        return dict(params), config
    leaves = _flat(params)
    for path in fnmatch.filter(leaves, "*_lora_a"):
        stem = path.removesuffix("_lora_a")
        kernel = f"{stem}/kernel" if f"{stem}/kernel" in leaves else f"{stem}_kernel"
        first, second = (np.asarray(leaves.pop(f"{stem}_lora_{part}"), np.float64) for part in "ab")
        leaves[kernel] = (leaves[kernel] + config.model.lora.scale * (first @ second)).astype(np.float32)
    model = dataclasses.replace(config.model, lora=LoraConfig(), trainable=("*",))
    return _nested(leaves), dataclasses.replace(config, model=model)


def interpolated(base: Mapping[str, Any], tuned: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Weights between two networks (WiSE-FT, arXiv 2109.01903): (1 - share) base + share tuned; at 0 and 1 their very bits.

    What fine-tuning added counts as zero in the base: low-rank deltas and deltas of prompts are scaled by `share`.

    Raises WeightError where the base has a parameter that `tuned` lacks, or another shape of it.
    """
    start, end = _flat(base), _flat(tuned)
    wrong = [path for path in start if path not in end or np.shape(end[path]) != np.shape(start[path])]
    if wrong:
        raise WeightError(
            f"base and tuned parameters are of different networks: {len(wrong)} differ, first {min(wrong)}"
        )

    def one(path: str) -> Shaped[np.ndarray, "..."]:
        value = np.asarray(end[path])
        if share == 1 or not np.issubdtype(value.dtype, np.floating):
            return value
        if path not in start:
            return np.float32(share) * value if path.endswith(("_lora_b", "prompts/deltas")) else value
        origin = np.asarray(start[path])
        between = np.asarray((1 - share) * origin.astype(np.float64) + share * value.astype(np.float64))
        return origin if share == 0 else between.astype(value.dtype)

    return _nested({path: one(path) for path in end})


def _added(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in ADDED)


def _text_encoder(model: ModelConfig, params: Mapping[str, Any]) -> Any:
    """Function from token ids to states [T D] of the text encoder, compiled once for the length of the token budget."""
    network = GLIP(dataclasses.replace(model, prompts=PromptsConfig(), dtype="float32"))
    run = jax.jit(lambda params, tokens, mask: network.apply({"params": params}, tokens, mask, method="encode_text"))
    encoder = {"text": params["text"]}

    def encode(ids: Sequence[int]) -> Float[np.ndarray, "T D"]:
        tokens, mask = np.zeros((1, model.text.max_tokens), np.int32), np.zeros((1, model.text.max_tokens), bool)
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
        return np.asarray(run(encoder, tokens, mask))[0, : len(ids)]

    return encode


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(params, sep="/"))  # pyright: ignore[reportArgumentType]


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(leaves), sep="/")
