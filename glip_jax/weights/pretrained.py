"""Initial parameters of a run from the files that `config.init_from` names, with a record of their origin.

Strict: every parameter that the rules of `init_from.load` and `init_from.skip` choose is loaded, or the run does not start; a
rule that matches no parameter is refused as a misspelling.
"""

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util
from jaxtyping import Shaped
from numpy import ndarray

from glip_jax.config import Config, InitFromConfig, ModelConfig
from glip_jax.io.checkpoint_steps import is_workdir
from glip_jax.weights.delta import is_delta
from glip_jax.weights.meaning import check_meaning, input_note, trained_in, vocabulary_of_folder
from glip_jax.weights.names import WeightError, check_shapes
from glip_jax.weights.readers import Weights, matches, read_backbone, read_network, read_text, read_workdir
from glip_jax.weights.tuned_parameters import ADDED

__all__ = ["counts", "initialize", "table"]

logger = logging.getLogger(__name__)

_PARTS = (
    "backbone",
    "pyramid",
    "text",
    "prompts",
    "head/tower/fusion",
    "head/tower/text",
    "head/tower/convolution",
    "head",
)
_SCOPES = {"model": "", "backbone": "backbone/", "text": "text/"}


def initialize(params: dict[str, Any], config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` with the values in the files of `config.init_from`, and a record of them as JSON values.

    Logs each file with its hash, and a table of the parameters that were loaded, are new, or were left in a file. Keeps the
    dtype and sharding of each parameter. Raises AssetError for files that do not exist, TorchFileError for unreadable ones
    and WeightError, naming parameters and both shapes, for those that do not fit.
    """
    rules = config.init_from
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    loaded: set[str] = set()
    left: dict[str, int] = {}
    known, sources, lines = set(leaves), [], []
    notes: list[str] = []
    for setting, weights, theirs, vocabulary, inferred in _read(config):
        offered = {path: value for path, value in weights.values.items() if _chosen(path, rules)}
        later = [name for name in ("backbone", "text") if setting == "model" and getattr(rules, name)]
        kept = [path for path in offered if path.partition("/")[0] not in later]
        notes += check_meaning(
            theirs, config, kept, f"init_from.{setting}={weights.origin}", vocabulary, inferred=inferred
        )
        _check(offered, leaves, setting, weights, rules)
        for path, value in offered.items():
            leaves[path] = _placed(value, leaves[path])
        loaded |= offered.keys()
        left |= {path: value.size for path, value in weights.values.items() if path not in offered}
        known |= weights.values.keys()
        source = {"setting": f"init_from.{setting}", "path": weights.origin, "layout": weights.layout, **weights.proof}
        sources.append(source | {"ignored": weights.ignored})
        lines += _lines(weights)
    _check_rules(rules, known)
    sizes = {path: leaf.size for path, leaf in leaves.items()}
    record = {
        "sources": sources,
        "parameters": {
            "loaded": counts({path: sizes[path] for path in sizes if path in loaded}),
            "new": counts({path: sizes[path] for path in sizes if path not in loaded}),
            "left": counts({path: size for path, size in left.items() if path not in loaded}),
        },
    }
    if rules.backbone and (note := input_note(config)):
        notes.append(note)
    if sources and jax.process_index() == 0:
        logger.info("\n".join([*lines, *notes, table(record["parameters"])]))
    return traverse_util.unflatten_dict(leaves, sep="/"), record


def counts(sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Number of arrays and of values for each part of the network, from the sizes of arrays by path."""
    found: dict[str, list[int]] = {}
    for part in _PARTS:
        inside = [size for path, size in sizes.items() if _part(path) == part]
        if inside:
            found[part] = [len(inside), sum(inside)]
    return found


def table(columns: Mapping[str, Mapping[str, list[int]]]) -> str:
    """A table of arrays and values of every part, a pair of columns for each of `columns`, with sums."""
    parts = [part for part in _PARTS if any(part in column for column in columns.values())]
    lines = ["arrays, values".ljust(24) + "".join(f"{name:>20}" for name in columns)]
    for part in [*parts, "all"]:
        cells = []
        for column in columns.values():
            rows = [column[name] for name in (parts if part == "all" else [part]) if name in column]
            arrays, values = (sum(row[i] for row in rows) for i in (0, 1))
            cells.append(f"{arrays:5} {values:14,}" if arrays else "-")
        lines.append(part.ljust(24) + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def _read(config: Config) -> Iterator[tuple[str, Weights, ModelConfig, epath.Path | None, bool]]:
    """Reads the files that the settings name; later ones overwrite earlier ones.

    With each the network that it was trained in, as far as that is known, the vocabulary beside it, and whether the network follows
    from the tensors.
    """
    init = config.init_from
    if init.model:
        weights, model, inferred = read_workdir(init.model), trained_in(init.model), False
        if weights is None:
            weights, found = read_network(init.model)
            model, inferred = model or found, model is None
        own = is_workdir(init.model) or is_delta(init.model)
        vocabulary = None if own else vocabulary_of_folder(init.model)
        yield "model", weights, model or config.model, vocabulary, inferred
    if init.backbone:
        weights = read_backbone(init.backbone, config.model, init.backbone_channels)
        yield "backbone", weights, config.model, None, False
    if init.text:
        yield "text", read_text(init.text, config.model), config.model, vocabulary_of_folder(init.text), False


def _check(
    offered: Mapping[str, Shaped[ndarray, "..."]],
    leaves: Mapping[str, Any],
    setting: str,
    weights: Weights,
    rules: InitFromConfig,
) -> None:
    """Raises WeightError unless `offered` is exactly what the rules choose, in the shapes of the network.

    What fine-tuning adds to a network may be missing.
    """
    wanted = {
        path
        for path in leaves
        if path.startswith(_SCOPES[setting]) and _chosen(path, rules) and not matches(path, (*weights.never, *ADDED))
    }
    expected = {path: leaf for path, leaf in leaves.items() if path in wanted or path in offered}
    try:
        check_shapes(offered, expected, f"init_from.{setting}={weights.origin}")
    except WeightError as error:
        raise WeightError(
            f"{error}: set the sizes of the file, or exclude these parameters with init_from.skip (patterns of "
            "their paths)"
        ) from None


def _check_rules(rules: InitFromConfig, known: Iterable[str]) -> None:
    for setting, patterns in (("load", rules.load), ("skip", rules.skip)):
        for pattern in patterns:
            if not any(matches(path, (pattern,)) for path in known):
                near = difflib.get_close_matches(pattern, known, n=1, cutoff=0.4)
                hint = f"; near: {near[0]}" if near else ""
                raise WeightError(
                    f"init_from.{setting} has {pattern!r}, which matches no parameter: expected paths with * for any run "
                    f"of characters, e.g. head/tower/fusion/*{hint}"
                )


def _chosen(path: str, rules: InitFromConfig) -> bool:
    return matches(path, rules.load) and not matches(path, rules.skip)


def _part(path: str) -> str:
    return next((part for part in sorted(_PARTS, key=len, reverse=True) if path.startswith(f"{part}/")), "head")


def _placed(value: Shaped[ndarray, "..."], leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)
    return jnp.asarray(value, leaf.dtype)


def _lines(weights: Weights) -> list[str]:
    """Lines about the file that was read, with its hash, and about ignored tensors."""
    lines = [f"pretrained: {weights.origin} step {weights.proof['step']} fingerprint {weights.proof['fingerprint']}"
             if "step" in weights.proof
             else f"pretrained: {weights.proof['file']} sha256 {weights.proof['sha256']}"]  # fmt: skip
    if weights.ignored:
        rules = ", ".join(f"{number} {rule}" for rule, number in weights.ignored.items())
        lines.append(f"  {weights.layout}; tensors that nothing needs: {rules}")
    return lines
