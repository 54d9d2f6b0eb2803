"""The typed settings of a run from what its checkpoint recorded."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

from glip_jax.config.run import Config, ConfigError

__all__ = ["unflatten"]


def unflatten(saved: Mapping[str, Any]) -> Config:
    """The Config of which `saved` is `dict(flatten(config))`, possibly through JSON; what it lacks has its default.

    Raises ConfigError for names that no setting has.
    """
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
        # A key may have dots of its own: it ends where a field's name follows.
        fields = "|".join(item.name for item in dataclasses.fields(kind))
        ends = re.compile(rf"(.+?)\.(?:{fields})(?:\.|$)")
        found = (ends.match(name) for name in rest)
        keys = dict.fromkeys(match[1] for match in found if match)
        return {key: build(kind, f"{prefix}{key}.") for key in keys}

    try:
        config = build(Config, "")
    except TypeError as error:  # a field without a default is not there
        raise ConfigError(f"has incomplete settings ({error})") from error
    unknown = sorted(set(saved) - used)
    if unknown:
        raise ConfigError(f"has settings that this version of glip_jax does not know ({', '.join(unknown)})")
    return config
