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

from glip_jax.data import shards, sources
from glip_jax.data.records import RecordError

__all__ = ["Coco", "Mdetr", "main"]


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
    """Import boxes with category names from a COCO (or LVIS) JSON."""

    names: Path | None = None
    """JSON object with prompt text for category names, e.g. {"RBC": "red blood cell"}."""


@dataclass(frozen=True)
class Mdetr(_Import):
    """Import captions whose phrases have boxes from an MDETR-form JSON."""


_Job = (
    Annotated[Coco, tyro.conf.subcommand("coco", prefix_name=False)]
    | Annotated[Mdetr, tyro.conf.subcommand("mdetr", prefix_name=False)]
)


def main(argv: Sequence[str]) -> int:
    """Runs `data coco|mdetr ...`; returns 0, or 2 after one line about what is wrong with the input."""
    job = tyro.cli(_Job, prog="python -m glip_jax data", args=list(argv))
    try:
        done = shards.finished(job.out)
        if done is not None:
            print(f"{job.out} is finished ({done.records} records, made by: {done.command}); nothing is made twice")
            return 0
        source = _open(job)
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
    except (sources.SourceError, shards.ShardError, RecordError, OSError) as error:
        print(f"data: {error}", file=sys.stderr)
        return 2
    print(source.report.table())
    print(f"{job.out}: {manifest.records} records, {manifest.boxes} boxes, {len(manifest.names)} names")
    return 0


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
