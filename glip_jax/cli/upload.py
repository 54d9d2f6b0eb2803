"""The job `upload`: a finished folder of shards into a bucket, compared with its manifest before."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from glip_jax.cli.command_line import CommandLineError, flags
from glip_jax.cli.verify import differing
from glip_jax.config import PathStr
from glip_jax.data import shards
from glip_jax.distributed import exit_codes
from glip_jax.io import gcs

__all__ = ["Upload", "main"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """Send a finished folder of shards to a bucket: manifest last, each file compared by MD5, none sent twice.

    The folder is compared with its manifest (SHA-256) before anything is sent. After a kill the same command goes on: what is
    there with the same bytes is left.
    """

    folder: Annotated[tyro.conf.Positional[PathStr], tyro.conf.arg(metavar="DIR")] = ""
    """A local folder that `data` or `label` made."""
    target: Annotated[tyro.conf.Positional[PathStr], tyro.conf.arg(metavar="gs://BUCKET/shards/NAME")] = ""
    """Where its files go."""


def main(argv: Sequence[str]) -> int:
    """Runs `upload DIR gs://BUCKET/shards/NAME`. Raises CommandLineError or ShardError."""
    job = flags(argv, Upload, "upload", "shards/coco gs://BUCKET/shards/coco")
    if not job.folder or not job.target:
        raise CommandLineError("expected a folder and where it goes: upload DIR gs://BUCKET/shards/NAME")
    if gcs.is_remote(job.folder) or not gcs.is_remote(job.target):
        raise CommandLineError(f"upload {job.folder} {job.target}: expected a local folder, then gs://BUCKET/FOLDER")
    _upload(job)
    return exit_codes.DONE


def _upload(job: Upload) -> None:
    wrong = differing(job.folder)
    if wrong:
        raise shards.ShardError(f"{wrong[0]}{_more(wrong)}: nothing was sent")
    existing = shards.finished(job.target)
    ours = shards.finished(job.folder)
    if existing is not None and existing != ours:
        fields = [
            each.name
            for each in dataclasses.fields(existing)
            if getattr(existing, each.name) != getattr(ours, each.name)
        ]
        raise shards.ShardError(
            f"{job.target} is another finished folder (its manifest differs in {', '.join(fields)}): shards are never changed; "
            "remove it or name another folder"
        )
    begin, files = time.monotonic(), shards.files_of(job.folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    shards.check_target(job.target, files)
    sent = gcs.upload_files(files, job.target, last="manifest.json")
    seconds = max(1e-3, time.monotonic() - begin)
    gone = sum(sizes[name] for name in sent)
    logger.info(
        f"{job.target}: {len(files)} files, {sum(sizes.values()):,} bytes; sent {len(sent)} ({gone:,} bytes, "
        f"{gone / seconds / 1e6:.1f} MB/s), {len(files) - len(sent)} were there"
    )


def _more(lines: Sequence[str]) -> str:
    return f" (and {len(lines) - 1} more files)" if len(lines) > 1 else ""
