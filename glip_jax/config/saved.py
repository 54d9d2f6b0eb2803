"""Settings and metrics as earlier versions saved them: their names today, and how saved settings compare with a `Config`.

`RENAMED_KEYS` is the one table of renamed keys. Every reader of a checkpoint, an exported folder, `evaluation.json`,
`metrics.jsonl` or a command line passes names through it, so old files and commands stay valid. The old names stay until
version 1.0.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from glip_jax.config.run import Config, ConfigError, flatten

__all__ = [
    "RENAMED_KEYS",
    "current_name",
    "current_names",
    "differences",
    "first_names",
    "renamed_hint",
    "resumed",
    "unflatten",
]

RENAMED_KEYS = {
    "data.crop.least_side": "data.crop.min_side",
    "data.crop.least_visible": "data.crop.min_visible",
    "data.sources.*.least_score": "data.sources.*.threshold",
    "train.hang_least": "train.hang_min",
    "least_visible": "min_visible",
    "dropped/boxes_unsure": "dropped/boxes_below_threshold",
    "source/*/dropped/boxes_unsure": "source/*/dropped/boxes_below_threshold",
}
"""Old name -> new name, `*` for any characters. Dotted names are settings, names with slashes metrics; `least_visible` is of
the style of synthetic scenes."""

_ADDED_KEYS = {
    "model.head.offset_bound": 0, "optimizer.name": "adamw", "optimizer.ema_ramp": False, "init_from.accept": [],
    "detection.token_scores": "mean", "model.trainable": ["*"], "model.lora.rank": 0, "model.lora.scale": 1.0,
    "model.prompts.names": 0, "model.prompts.tokens": 0, "model.head.deformable": True, "detection.sinks": 0,
    "detection.sink_start": "random", "detection.sink_seed": 0, "model.fusion.drop_path": 0.0, "data.captions.empty_probability": 0.0,
    "model.head.presence": False, "model.head.positions": False, "loss.presence_weight": 1.0, "model.text.mask": "padding", "model.text.separators": [101, 102, 1012],
    "data.captions.hard_by": "letters", "data.captions.dictionary": 0.0, "data.captions.synonym_cosine": 0.5, "data.captions.look_alikes": 0.0,
    "data.captions.descriptions.file": "", "data.captions.descriptions.use": "none", "data.captions.descriptions.probability": 0.5,
    "loss.description_weight": 0.0, "detection.name_decay": 0.0, "detection.name_decay_iou": 0.7, "detection.rivals": [],
}  # fmt: skip
"""Settings that saved runs may lack, with the value that describes what earlier versions did."""

_ADDED_AFTER_HASHES = (
    "optimizer.name", "optimizer.ema_ramp", "init_from.accept", "detection.token_scores", "model.trainable", "model.lora.rank",
    "model.lora.scale", "model.prompts.names", "model.prompts.tokens", "model.head.deformable", "detection.sinks",
    "detection.sink_start", "detection.sink_seed", "model.fusion.drop_path", "data.captions.empty_probability",
    "model.head.presence", "model.head.positions", "loss.presence_weight", "model.text.mask", "model.text.separators",
    "data.captions.hard_by", "data.captions.dictionary", "data.captions.synonym_cosine", "data.captions.look_alikes",
    "data.captions.descriptions.file", "data.captions.descriptions.use", "data.captions.descriptions.probability", "loss.description_weight",
    "detection.name_decay", "detection.name_decay_iou", "detection.rivals",
)  # fmt: skip
"""Those of them that earlier versions did not hash."""

_ADDED_TO_SETS = {"merge_names": False, "boxes": "", "crowds": "", "folders": "", "allow_drops": False, "orientation": "auto"}  # fmt: skip
"""Settings of `evaluation.sets.*` that earlier versions did not hash, with what these did."""

_ADDED_TO_SOURCES = {"complete": "own"}
"""The same of `data.sources.*`."""


def current_name(name: str) -> str:
    """Today's name of a setting or metric; `name` itself if it was not renamed."""
    return _renamed(name, RENAMED_KEYS)


def current_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings or metrics under today's names, in the same order."""
    return {current_name(name): value for name, value in saved.items()}


def first_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `current_names`: the names that each key had first, so that a hash over names survives a renaming.

    Settings that were added later are left out where they have the value of before.
    """
    inverse = {new: old for old, new in RENAMED_KEYS.items()}
    added = {name: _ADDED_KEYS[name] for name in _ADDED_AFTER_HASHES}
    added |= {n: _ADDED_TO_SETS.get(n.rpartition(".")[2]) for n in settings if n.startswith("evaluation.sets.")}
    added |= {n: value for n in settings if (value := _added_to_source(n)) is not None}
    return {
        _renamed(name, inverse): value
        for name, value in settings.items()
        if name not in added or _as_json(value) != added[name]
    }


def renamed_hint(text: str) -> str:
    """For an error message `text` that quotes an old field name, as in "unexpected keyword argument 'least_side'": the new
    name, as "; least_side is now min_side". Empty if there is none.
    """
    fields = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in RENAMED_KEYS.items() if "/" not in old}
    return next((f"; {old} is now {new}" for old, new in fields.items() if f"'{old}'" in text), "")


def differences(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Lines "field: saved value -> new value" for every setting in which `config` differs and that affects results.

    `saved` is `dict(flatten(...))` of the earlier run, possibly through JSON (tuples became lists) and with old names.
    """
    saved = _ADDED_KEYS | current_names(saved)
    runtime = {name for name, _ in flatten(config, affects_results=False)}
    new = dict(flatten(config, affects_results=True))
    lines = []
    for name in sorted(set(saved) - runtime | set(new)):
        if name.startswith(("evaluation.", "mesh.")):
            continue
        old_value, new_value = (
            _as_json(saved.get(name, _added_to_source(name) or "(absent)")),
            _as_json(new.get(name, "(absent)")),
        )
        if old_value != new_value:
            lines.append(f"{name}: {old_value} -> {new_value}")
    return lines


def resumed(saved: Mapping[str, Any], config: Config) -> Config:
    """`config` for resuming a run with the flat settings `saved`: without `optimizer.ema_ramp` where the run began without it.

    The default of that setting is not what earlier versions did, and the command that began a run resumes it.
    """
    if (_ADDED_KEYS | current_names(saved))["optimizer.ema_ramp"] or not config.optimizer.ema_ramp:
        return config
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema_ramp=False))


def unflatten(saved: Mapping[str, Any]) -> Config:
    """Inverse of `dict(flatten(config))`, also after JSON and with old names. Missing settings get the value that describes what
    the version without them did, or their default.

    Raises ConfigError for a setting that this version does not have.
    """
    saved = _ADDED_KEYS | current_names(saved)
    used: set[str] = set()

    def build(kind: Any, prefix: str) -> Any:
        hints, values = get_type_hints(kind), {}
        for item in dataclasses.fields(kind):
            name, hint = prefix + item.name, hints[item.name]
            below = [key for key in saved if key.startswith(f"{name}.")]
            if dataclasses.is_dataclass(hint):
                values[item.name] = build(hint, f"{name}.")
            elif get_origin(hint) is dict:
                values[item.name] = entries(get_args(hint)[1], f"{name}.", below)
            elif name in saved:
                used.add(name)
                values[item.name] = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        return kind(**values)

    def entries(kind: Any, prefix: str, names: list[str]) -> dict[str, Any]:
        rest = [name.removeprefix(prefix) for name in names]
        if not dataclasses.is_dataclass(kind):
            used.update(names)
            return {key: saved[prefix + key] for key in rest}
        # A key of the dict may contain dots: it ends where the name of a field follows.
        fields = "|".join(item.name for item in dataclasses.fields(kind))
        ends = re.compile(rf"(.+?)\.(?:{fields})(?:\.|$)")
        matches = (ends.match(name) for name in rest)
        keys = dict.fromkeys(match[1] for match in matches if match)
        return {key: build(kind, f"{prefix}{key}.") for key in keys}

    try:
        config = build(Config, "")
    except TypeError as error:  # a field without a default is missing
        raise ConfigError(f"has incomplete settings ({error})") from error
    unknown = sorted(set(saved) - used)
    if unknown:
        raise ConfigError(f"has settings that this version of glip_jax does not know ({', '.join(unknown)})")
    return config


def _added_to_source(name: str) -> Any:
    """What versions without the setting `name` of a source did; None for other settings."""
    return _ADDED_TO_SOURCES.get(name.rpartition(".")[2]) if name.startswith("data.sources.") else None


def _as_json(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name == old:
            return new
        before, star, after = old.partition("*")
        fits = star and len(name) > len(before) + len(after) and name.startswith(before) and name.endswith(after)
        if fits:
            return new.replace("*", name[len(before) : len(name) - len(after)])
    return name
