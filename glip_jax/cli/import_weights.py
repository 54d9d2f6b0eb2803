"""The job `import`: released or foreign weights of a whole GLIP become a checkpoint that every other job takes.

WORKDIR/checkpoints/0         the parameters; `train` makes the optimizer's state anew
WORKDIR/config.json           the settings, flat
WORKDIR/started_from.json     path, SHA-256, whose layout, what was ignored, counts

Whole or not at all: the checkpoint comes last and by one renaming.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro
from etils import epath

from glip_jax.cli.command_line import Arguments, CommandLineError, parse
from glip_jax.config import AssetStr, Config, ModelConfig, validate
from glip_jax.distributed import exit_codes
from glip_jax.io.assets import resolve

if TYPE_CHECKING:
    from glip_jax.weights.readers import Weights

__all__ = ["Import", "import_weights", "main"]

logger = logging.getLogger(__name__)

_EXAMPLE = "glip_tiny_model_o365_goldg_cc_sbu.pth --workdir=runs/glip_t --config=configs/glip_tiny.py"


@dataclass(frozen=True)
class Import(Arguments):
    """Read the weights in FILE into --workdir, for `train`, `evaluate`, `predict` and `export`.

    FILE is a .pth of microsoft/GLIP (A, B, C, T or L) or of mmdetection's GLIP, or a Hugging Face folder that `export`
    wrote. Every parameter is filled and every tensor used, or on a list of what may be ignored. Without --config=FILE.py
    the settings are those of the folder, or the network's sizes follow from the tensors; single ones may be given with
    --config.section.field=value.
    """

    file: tyro.conf.Positional[AssetStr] = ""
    """The weights: a local or gs:// path, or package:NAME/inner/file."""
    parameters: Literal["model", "model_ema"] = "model"
    """Which of a training checkpoint's two sets; GLIP's authors evaluate `model`."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what `import_weights` raises."""
    # Parsed twice: the settings below the command line's own depend on the file that it names.
    job = parse(argv, Import, "import", _EXAMPLE, settings=Config())
    given = any(argument == "--config" or argument.startswith("--config=") for argument in argv)
    import_weights(job, lambda found: job.config if given else parse(argv, Import, "import", settings=found).config)
    return exit_codes.DONE


def import_weights(job: Import, settings: Callable[[Config], Config]) -> Config:
    """Imports, logs what was used, ignored and counted; returns the settings of the checkpoint.

    `settings`: from the Config that belongs to the file to the one to use. Raises CommandLineError, CheckpointError
    for a folder that has a checkpoint, AssetError, TorchFileError, WeightError, ConfigError or NotSavedError.
    """
    from flax import traverse_util

    from glip_jax.io.checkpoint import CheckpointError, Checkpoints, Saved, is_workdir, latest_step
    from glip_jax.io.claims import owned_workdir
    from glip_jax.io.workdir import prepare, write_config, write_started_from
    from glip_jax.weights.meaning import check_meaning, vocabulary_of_folder
    from glip_jax.weights.names import WeightError, check_shapes, parameter_shapes
    from glip_jax.weights.readers import read_network
    from glip_jax.weights.sizes import variant

    if not job.file or not job.workdir:
        raise CommandLineError(f"expected a file and a folder to make, e.g. import {_EXAMPLE}")
    if latest_step(job.workdir) is not None:
        raise CheckpointError(
            f"--workdir={job.workdir} holds a checkpoint of step {latest_step(job.workdir)}: give a new folder"
        )
    if is_workdir(job.file):
        raise WeightError(
            f"{job.file} is a working folder of glip_jax, which needs no import: give it to other jobs as --checkpoint, or "
            "begin a run there with init_from.model"
        )
    weights, inferred = read_network(job.file, job.parameters)
    own = _own_settings(job.file, inferred)
    config = validate(settings(own))
    shapes = parameter_shapes(config.model)
    check_shapes(weights.values, shapes, f"{job.file}, {variant(inferred)},")
    vocabulary = vocabulary_of_folder(job.file)
    guessed = own.model is inferred
    for note in check_meaning(own.model, config, weights.values, job.file, vocabulary, inferred=guessed):
        logger.info(note)
    record = _record(weights, job.parameters)
    prepare(job.workdir)
    with owned_workdir(job.workdir), _all_or_nothing(job.workdir):
        write_config(job.workdir, config)
        write_started_from(job.workdir, record)
        with Checkpoints(job.workdir, 1) as checkpoints:
            checkpoints.save(0, Saved(traverse_util.unflatten_dict(weights.values, sep="/"), {}, {}), config)
            checkpoints.wait()
    _log_summary(weights, record, config, job.workdir)
    return config


def _own_settings(file: str, inferred: ModelConfig) -> Config:
    """Settings of a folder of our export, or the inferred network with everything else at its default."""
    from glip_jax.weights.readers import folder_config, open_export

    path = resolve(file)
    return open_export(file).config if "glip_jax" in folder_config(path) else Config(name=path.stem, model=inferred)


def _record(weights: "Weights", parameters: str) -> dict[str, Any]:
    source = {"setting": "import", "path": weights.origin, "layout": weights.layout, "parameters": parameters}
    from glip_jax.weights.pretrained import counts

    sizes = {path: value.size for path, value in weights.values.items()}
    return {
        "sources": [source | weights.proof | {"ignored": weights.ignored}],
        "parameters": {"loaded": counts(sizes), "new": {}, "left": {}},
    }


def _log_summary(weights: "Weights", record: dict[str, Any], config: Config, workdir: str) -> None:
    from glip_jax.weights.names import IGNORED
    from glip_jax.weights.pretrained import table
    from glip_jax.weights.sizes import variant

    logger.info(f"{weights.proof['file']} sha256 {weights.proof['sha256']}")
    logger.info(
        f"{weights.layout}: {variant(config.model)}, {sum(v.size for v in weights.values.values()):,} parameters"
    )
    logger.info(table({"loaded": record["parameters"]["loaded"]}))
    for rule, number in weights.ignored.items():
        logger.info(f"ignored: {number} x {rule} ({IGNORED[rule]})")
    logger.info(f"written: {workdir}, step 0; the vocabulary is expected in {config.model.text.vocabulary}")


@contextmanager
def _all_or_nothing(workdir: str) -> Iterator[None]:
    """Removes what this job made in `workdir` if anything stops it, Ctrl-C included."""
    from glip_jax.io.claims import LOCK

    folder = epath.Path(workdir)
    try:
        yield
    except BaseException:
        for name in ("config.json", "started_from.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / "checkpoints").rmtree(missing_ok=True)
        if all(path.name == LOCK for path in folder.iterdir()):
            folder.rmtree()
        raise
