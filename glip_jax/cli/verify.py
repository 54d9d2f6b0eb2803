"""The job `verify`: folders of shards against their manifests, checkpoints against their checksums."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from glip_jax.cli.command_line import CommandLineError, flags
from glip_jax.config import PathStr
from glip_jax.data import shards
from glip_jax.distributed import exit_codes
from glip_jax.io import gcs
from glip_jax.io.checkpoint_steps import checkpoint_folder, complete_steps, damage_of, is_workdir, unfinished

__all__ = ["Verify", "differing", "main"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verify:
    """Compare every byte of folders of shards with the SHA-256 of their manifests, and checkpoints with their checksums.

    Of shards in a bucket everything is read; of checkpoints there, the bucket's own MD5 is compared and nothing is read.
    """

    folders: Annotated[tyro.conf.Positional[tuple[PathStr, ...]], tyro.conf.arg(metavar="DIR ...")] = ()
    """Folders of shards, or working folders of `train`; local or gs://."""


def main(argv: Sequence[str]) -> int:
    """Runs `verify DIR ...`; returns 0, or 2 after a line for each file that is not what it should be.

    Raises CommandLineError or ShardError.
    """
    job = flags(argv, Verify, "verify", "shards/coco gs://BUCKET/shards/coco runs/demo")
    if not job.folders:
        raise CommandLineError("nothing to verify: expected folders of shards or working folders, local or gs://")
    wrong = [line for folder in job.folders for line in _verified(folder)]
    for line in wrong:
        logger.error(f"verify: {line}")
    return exit_codes.BAD_INPUT if wrong else exit_codes.DONE


def _verified(folder: str) -> list[str]:
    """What is wrong in a folder; prints what is not."""
    if not is_workdir(folder):
        begin = time.monotonic()
        wrong = differing(folder)
        manifest = shards.finished(folder)
        assert manifest is not None
        if not wrong:
            size = sum(shard["bytes"] for shard in manifest.shards)
            seconds = max(1e-3, time.monotonic() - begin)
            logger.info(
                f"{folder}: {len(manifest.shards) + 1} files as the manifest says, {manifest.records:,} records, "
                f"{size:,} bytes ({size / seconds / 1e6:.0f} MB/s)"
            )
        return wrong
    checkpoints, steps = checkpoint_folder(folder), complete_steps(folder)
    faults = {step: damage_of(checkpoints / str(step)) for step in steps}
    sound = [str(step) for step, fault in faults.items() if not fault]
    logger.info(f"{folder}: checkpoints as they were written: {', '.join(sound) or 'none'}")
    for path in unfinished(folder):
        logger.info(f"{path}: half-written; `train` removes it")
    return [f"{checkpoints / str(step)} is damaged ({fault})" for step, fault in faults.items() if fault]


def differing(folder: str) -> list[str]:
    """A line for each file of a folder of shards that is not as the manifest says, with a bar in a terminal."""
    size = sum(shard["bytes"] for shard in (shards.finished(folder) or _nothing(folder)).shards)
    with tqdm(desc=f"verify {Path(folder).name}", total=size, unit="B", unit_scale=True, disable=None) as bar:
        return list(shards.differing(folder, bar.update))


def _nothing(folder: str) -> shards.Manifest:
    raise shards.ShardError(f"{folder} {shards.why_unfinished(gcs.address(folder))}")
