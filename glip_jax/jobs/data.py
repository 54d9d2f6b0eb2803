"""The job `data`: imports annotation files and their pictures into folders of shards."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from glip_jax import exits
from glip_jax.data import shards, sources
from glip_jax.data.records import RecordError
from glip_jax.jobs.command_line import CommandLineError, flags

__all__ = ["Coco", "Mdetr", "main"]

_EXAMPLE = "coco annotations.json --images=pictures --out=shards/mine (then `data coco --help`, `data mdetr --help`)"


@dataclass(frozen=True)
class _Import:
    """What every import needs."""

    annotations: tyro.conf.Positional[Path]
    """The annotation file."""
    images: Path
    """Folder of the pictures."""
    out: Path
    """Folder to make; a finished one is left as it is."""
    name: str = ""
    """Name of the source; default: the name of `out`."""
    licence: str = "unknown"
    """Under which terms the data may be used; kept in the manifest."""
    shards: int = 1
    """Number of files."""
    strict: bool = False
    """Stop at the first thing that would be dropped."""


@dataclass(frozen=True)
class Coco(_Import):
    """Import boxes with category names from a COCO (or LVIS) JSON.

    example: python -m glip_jax data coco instances_train2017.json --images=train2017 --out=shards/coco --shards=64
    """

    names: Path | None = None
    """JSON object with prompt text for category names, e.g. {"RBC": "red blood cell"}."""


@dataclass(frozen=True)
class Mdetr(_Import):
    """Import captions whose phrases have boxes from an MDETR-form JSON.

    example: python -m glip_jax data mdetr final_flickr_separateGT_train.json --images=flickr30k --out=shards/flickr
    """


_Job = (
    Annotated[Coco, tyro.conf.subcommand("coco", prefix_name=False)]
    | Annotated[Mdetr, tyro.conf.subcommand("mdetr", prefix_name=False)]
)


def main(argv: Sequence[str]) -> int:
    """Runs `data coco|mdetr ...`; returns one of `glip_jax.exits`, after one line where it is not 0.

    An import that is stopped leaves nothing but `.NAME.partial` at worst, which the same command removes.
    """
    try:
        return _import(flags(argv, _Job, "data", _EXAMPLE), argv)
    except (CommandLineError, sources.SourceError, shards.ShardError, RecordError) as error:
        print(f"data: {error}", file=sys.stderr)
        return exits.BAD_INPUT
    except OSError as error:
        if exits.full_disk(error):
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(
            f"data: {error.strerror or error}{place}: expected a file or folder that can be used; nothing is left half-made",
            file=sys.stderr,
        )
        return exits.BAD_INPUT


def _import(job: Coco | Mdetr, argv: Sequence[str]) -> int:
    done = shards.finished(job.out)
    if done is not None:
        print(f"{job.out} is finished ({done.records} records, made by: {done.command}); nothing is made twice")
        return exits.DONE
    source = _open(job)
    try:
        manifest = shards.write(
            (record for record in tqdm(source.records, "import", source.images, unit="image", disable=None)),
            job.out,
            name=job.name or job.out.name,
            names=source.names,
            licence=job.licence,
            source=str(job.annotations),
            command=shlex.join(["python", "-m", "glip_jax", "data", *argv]),
            shards=job.shards,
            drops=lambda: dict(source.report.dropped),
        )
    except shards.ShardError as error:
        dropped = source.report.dropped
        if not dropped or source.report.kept["images"]:
            raise
        reasons = ", ".join(
            f"{reason} {count} (first: {source.report.first[reason]})" for reason, count in dropped.items()
        )
        raise shards.ShardError(f"{error}; dropped: {reasons}") from None
    print(source.report.table())
    print(f"{job.out}: {manifest.records} records, {manifest.boxes} boxes, {len(manifest.names)} names")
    return exits.DONE


def _open(job: Coco | Mdetr) -> sources.Source:
    """The annotation file of the job, opened."""
    match job:
        case Coco():
            rename = None if job.names is None else _rename_map(job.names)
            return sources.coco(job.annotations, job.images, rename=rename, strict=job.strict)
        case Mdetr():
            return sources.mdetr(job.annotations, job.images, strict=job.strict)


def _rename_map(path: Path) -> dict[str, str]:
    """A JSON object of texts."""
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise sources.SourceError(f"--names {path} cannot be read as JSON ({error})") from None
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise sources.SourceError(
            f"--names {path}: expected an object of texts, name in the file -> text in the prompt"
        )
    return names
