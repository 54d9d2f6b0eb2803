"""Deltas: a fine-tuned network as what differs from its base, in a small folder.

    FOLDER/delta.safetensors    the parameters that differ from those of the base, or that it lacks
    FOLDER/delta.json           mode, names, settings of the run, and the base: its path and the fingerprint of its parameters

The base itself is not copied and stays as it is. Without the delta it gives its old results bit for bit.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from glip_jax.config import Config, first_names, flatten
from glip_jax.io.checkpoint_reader import Checkpoint, Which, fingerprint
from glip_jax.io.formats import explain_bytes
from glip_jax.io.provenance import score_settings
from glip_jax.io.workdir import CheckpointError, workdir_path, write_atomic
from glip_jax.weights.names import WeightError, check_shapes, parameter_shapes

__all__ = ["FORMAT", "is_delta", "open_delta", "save_delta"]

FORMAT = "glip_jax delta 1"
_SETTINGS, _ARRAYS = "delta.json", "delta.safetensors"
_OWN = ("model.lora.", "model.prompts.", "model.text.vocabulary", "model.text.max_tokens", "model.dtype")
"""Settings of the network in which a delta may differ from its base."""


def save_delta(
    folder: str, mode: str, params: Mapping[str, Any], config: Config, base: Checkpoint, which: Which,
    names: Sequence[str] = (),
) -> dict[str, int]:  # fmt: skip
    """Writes what differs in `params` from the base into `folder`.

    Args:
        mode: the mode of fine-tuning, for the record.
        params: parameters of the fine-tuned network, nested dict.
        config: settings of the run, whose network they are of.
        base: the checkpoint that the run began with, and `which` of its parameters.
        names: the names that were tuned.

    Returns:
        The number of `arrays` and of `values` that were written.

    Raises:
        WeightError: the base has parameters that the network lacks, or of other shapes.
    """
    begin = base.parameters(which)
    old, new = _flat(begin), {path: np.asarray(leaf) for path, leaf in _flat(params).items()}
    lost = sorted(path for path in old if path not in new or new[path].shape != old[path].shape)
    if lost:
        raise WeightError(
            f"{base.path} is no base of this network: {len(lost)} of its parameters differ, first {lost[0]}"
        )
    changed = {path: leaf for path, leaf in new.items() if path not in old or not np.array_equal(leaf, old[path])}
    data = safetensors.numpy.save({path: np.ascontiguousarray(leaf) for path, leaf in sorted(changed.items())})
    place = workdir_path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_atomic(place / _ARRAYS, data)
    where = str(base.path)
    local = "://" not in where
    # Last: a folder without it holds no delta.
    write_atomic(place / _SETTINGS, json.dumps({
        "format": FORMAT, "mode": mode, "names": list(names),
        "base": {
            "path": os.path.abspath(where) if local else where,
            "relative": os.path.relpath(where, str(place)) if local and "://" not in folder else "",
            "parameters": which, "fingerprint": fingerprint(begin),
        },
        "fingerprint": fingerprint(params), "arrays": len(changed), "sha256": hashlib.sha256(data).hexdigest(),
        "settings": dict(flatten(config)),
    }, indent=1))  # fmt: skip
    return {"arrays": len(changed), "values": sum(leaf.size for leaf in changed.values())}


def is_delta(path: str) -> bool:
    """Whether a folder holds a delta."""
    return (workdir_path(path) / _SETTINGS).exists()


def open_delta(path: str, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    """The fine-tuned network of a delta as a checkpoint without step and metrics; ema and raw are the same here.

    `open_base` opens the checkpoint that it began with, by its path. Parameters are read, and the base compared by its fingerprint,
    when they are asked for.

    Raises:
        CheckpointError: the base is not there, is of another network or has other parameters; both are named.
        WeightError: the files of the delta are damaged.
    """
    folder = workdir_path(path)
    try:
        saved = json.loads((folder / _SETTINGS).read_text())
        settings, origin = saved["settings"], saved["base"]
        where, which, expected = origin["path"], origin["parameters"], origin["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{folder / _SETTINGS} is no description of a delta ({error}): save it again") from error
    if saved.get("format") != FORMAT:
        raise WeightError(f"{folder / _SETTINGS} has the format {saved.get('format')!r}, expected {FORMAT!r}")
    beside = str(folder / origin["relative"]) if origin.get("relative") else ""
    if beside and not epath.Path(where).exists() and epath.Path(beside).exists():
        where = beside
    try:
        base = open_base(where)
    except (CheckpointError, WeightError) as error:
        raise CheckpointError(
            f"{path} is a delta on {where}, the base with the fingerprint {expected}, which cannot be opened ({error}): put the base "
            f"there, or its path into {folder / _SETTINGS}"
        ) from error
    result = Checkpoint(path, folder, None, settings, (), lambda _: _parameters(folder, saved, base, which, result))
    _check_network(path, result.config, base)
    return result


def _check_network(path: str, config: Config, base: Checkpoint) -> None:
    """Raises CheckpointError where the base is of another network than the one that was tuned."""

    def network(settings: Config) -> dict[str, Any]:
        found = first_names(score_settings(settings))
        return {n: v for n, v in found.items() if n.startswith("model.") and not n.startswith(_OWN)}

    tuned, now = network(config), network(base.config)
    differing = [
        f"{name}: {now.get(name)} -> {tuned.get(name)}"
        for name in sorted({*tuned, *now})
        if tuned.get(name) != now.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} is a delta on another network than that of {base.path} (base -> delta: {'; '.join(differing[:5])}): give the "
            "delta its own base"
        )


def _parameters(
    folder: epath.Path, saved: Mapping[str, Any], base: Checkpoint, which: Which, tuned: Checkpoint
) -> dict[str, Any]:
    """The parameters of the base with those of the delta in their place."""
    begin = base.parameters(which)
    found, expected = fingerprint(begin), saved["base"]["fingerprint"]
    if found != expected:
        raise CheckpointError(
            f"{folder} is a delta on parameters with the fingerprint {expected}; those of {base.path} ({which}) have {found}: the base "
            "was trained on or replaced, put the one that was tuned there"
        )
    file = folder / _ARRAYS
    data = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(data).hexdigest() != saved.get("sha256"):
        reason = explain_bytes(file) if data else "is missing or empty"
        raise WeightError(f"{file} is not as it was written ({reason or 'its SHA-256 differs'}): copy the folder again")
    values = {**_flat(begin), **safetensors.numpy.load(data)}
    check_shapes(values, parameter_shapes(tuned.config.model), str(folder))
    return traverse_util.unflatten_dict(values, sep="/")


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(params, sep="/"))  # pyright: ignore[reportArgumentType]
