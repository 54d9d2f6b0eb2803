"""The checkpoint that a job reads, which --checkpoint names, and the settings that the job then has.

jax and the libraries of checkpoints are imported by the functions, so that a job's --help is quick.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from glip_jax.cli.command_line import Arguments, CommandLineError, parse
from glip_jax.config import Config, flatten

if TYPE_CHECKING:
    from glip_jax.io.checkpoint import Checkpoint

__all__ = ["describe", "fitting_parameters", "open_named", "settings_of"]


def open_named(checkpoint: str, workdir: str, step: int | None) -> "Checkpoint":
    """Opens what --checkpoint names (WORKDIR, WORKDIR/checkpoints/STEP, an exported folder or a delta), or --workdir in its place.

    Raises CommandLineError if both or neither are given, CheckpointError or WeightError for a checkpoint that cannot be read.
    """
    if checkpoint and workdir:
        raise CommandLineError(
            f"--checkpoint={checkpoint} and --workdir={workdir} both name a checkpoint: give one of them"
        )
    if not checkpoint and not workdir:
        raise CommandLineError(
            "no checkpoint: expected --checkpoint=WORKDIR of `train`, WORKDIR/checkpoints/STEP, or a folder of `export` or a delta"
        )
    from glip_jax.weights.readers import open_checkpoint_or_export

    return open_checkpoint_or_export(checkpoint or workdir, step)


def describe(checkpoint: "Checkpoint") -> str:
    """`WORKDIR: step STEP`, or the folder of an export or a delta."""
    from glip_jax.weights.delta import is_delta

    if checkpoint.step is not None:
        return f"{checkpoint.workdir}: step {checkpoint.step}"
    return f"{checkpoint.workdir}: {'a delta on its base' if is_delta(checkpoint.workdir) else 'exported'}"


def settings_of(checkpoint: "Checkpoint", arguments: Sequence[str], job: str) -> Config:
    """The checkpoint's settings, or those of --config=FILE.py, with what the command line changes.

    `arguments`: those that begin with --config. Raises CheckpointError if they describe another network than the
    checkpoint's, CommandLineError and ConfigError as `parse` does.
    """
    from glip_jax.io.workdir import check_network

    saved = checkpoint.config
    config = parse(arguments, Arguments, job, settings=saved).config
    check_network(checkpoint.workdir, dict(flatten(saved)), config)
    return config


@contextlib.contextmanager
def fitting_parameters() -> Iterator[None]:
    """Within it, flax's error about parameters of another network becomes a CheckpointError of one line."""
    import flax.errors

    from glip_jax.io.workdir import CheckpointError

    try:
        yield
    except flax.errors.FlaxError as error:
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"the checkpoint's parameters do not fit the network of its settings: {line}") from error
