"""The typed settings of a run from what its checkpoint recorded, for jobs that are given a working folder only."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import flax.errors
import jax
import numpy as np

from glip_jax.cli.command_line import Arguments, parse
from glip_jax.config import Config, ConfigError, flatten
from glip_jax.config.saved import unflatten
from glip_jax.io.checkpoint import CheckpointError, restore_parameters, saved_config
from glip_jax.io.workdir import check_network

__all__ = ["chosen_settings", "finite_parameters", "fitting_parameters", "saved_settings"]


def saved_settings(workdir: str, step: int | None = None) -> Config:
    """Settings that a checkpoint of `workdir` (default: the newest complete one) was trained with.

    Settings that came after it have their default, which is what was done before they came. Raises CheckpointError
    without a checkpoint, ConfigError if it knows settings that this version does not.
    """
    saved = saved_config(workdir, step)
    try:
        return unflatten(saved)
    except ConfigError as error:
        raise ConfigError(f"the checkpoint in {workdir} {error}: give a file that fits it, --config=FILE.py") from error


def chosen_settings(workdir: str, step: int | None, arguments: Sequence[str], job: str) -> Config:
    """The checkpoint's settings, or those of --config=FILE.py, with what the command line changes.

    `arguments`: those that begin with --config. Raises CheckpointError if they describe another network than the
    checkpoint's, CommandLineError and ConfigError as `parse` and `saved_settings` do.
    """
    saved = saved_settings(workdir, step)
    config = parse(arguments, Arguments, job, settings=saved).config
    check_network(workdir, dict(flatten(saved)), config)
    return config


def finite_parameters(workdir: str, which: Literal["ema", "raw"], step: int | None) -> dict[str, Any]:
    """`restore_parameters`; CheckpointError also for parameters that are not finite, with which nothing is found."""
    params = restore_parameters(workdir, which, step)
    bad = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if not np.isfinite(leaf).all()]
    if bad:
        raise CheckpointError(
            f"{workdir}: {len(bad)} arrays are not finite, first {jax.tree_util.keystr(bad[0])}: the run diverged; give an earlier --step"
        )
    return params


@contextlib.contextmanager
def fitting_parameters() -> Iterator[None]:
    """Within it, flax's complaint about parameters of another network becomes a CheckpointError of one line."""
    try:
        yield
    except flax.errors.FlaxError as fault:
        line = str(fault).partition("\n")[0]
        raise CheckpointError(f"the checkpoint's parameters do not fit the network of its settings: {line}") from fault
