"""The job `data`: imports annotation files and their pictures into folders of shards.

A form of annotations is a dataclass with its options (`detection_forms`, `grounding_forms`, `caption_forms`); what all share is in
`build_options`.
"""

import shlex
import sys
from collections.abc import Sequence

from glip_jax import exits
from glip_jax.data import shards
from glip_jax.data.build import Plan, build
from glip_jax.data.entries import SourceError
from glip_jax.data.records import RecordError
from glip_jax.jobs.build_options import BuildOptions
from glip_jax.jobs.caption_forms import CaptionForm
from glip_jax.jobs.command_line import CommandLineError, flags
from glip_jax.jobs.detection_forms import DetectionForm
from glip_jax.jobs.grounding_forms import GroundingForm
from glip_jax.storage import StorageError

__all__ = ["main"]

_EXAMPLE = "coco annotations.json --images=pictures --out=shards/mine (then `data coco --help` and so on)"


def main(argv: Sequence[str]) -> int:
    """Runs `data FORM ...`; returns one of `glip_jax.exits`, after one line where it is not 0.

    A build that is stopped leaves nothing but `.NAME.partial`, with which the same command goes on.
    """
    try:
        return _import(flags(argv, DetectionForm | GroundingForm | CaptionForm, "data", _EXAMPLE), argv)
    except (CommandLineError, SourceError, shards.ShardError, RecordError) as error:
        print(f"data: {error}", file=sys.stderr)
        return exits.BAD_INPUT
    except StorageError:
        raise
    except OSError as error:
        if exits.full_disk(error):
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(
            f"data: {error.strerror or error}{place}: expected a file or folder that can be used; nothing is half-made",
            file=sys.stderr,
        )
        return exits.BAD_INPUT


def _import(job: BuildOptions, argv: Sequence[str]) -> int:
    done = shards.finished(job.out)
    if done is not None:
        print(f"{job.out} is finished ({done.records} records, made by: {done.command}); nothing is made twice")
        return exits.DONE
    plan = Plan(
        job.out, str(job.source), name=job.name, licence=job.licence, shards=job.shards, processes=job.processes,
        command=shlex.join(["python", "-m", "glip_jax", "data", *_deciding(argv)]), strict=job.strict,
        exclude=job.exclude, published=job.published,
    )  # fmt: skip
    manifest, report = build(plan, job.opened)
    print(report.table())
    print(f"{job.out}: {manifest.records} records, {manifest.boxes} boxes, {len(manifest.names)} names")
    return exits.DONE


def _deciding(argv: Sequence[str]) -> list[str]:
    """The arguments that decide the result: all but the number of processes."""
    kept, skip = [], False
    for argument in argv:
        if not skip and not argument.startswith("--processes="):
            skip = argument == "--processes"
            if not skip:
                kept.append(argument)
        else:
            skip = False
    return kept
