"""The job `data`: imports annotation files and their pictures into folders of shards.

A format of annotations is a dataclass with its options in its module of `data/importers/`; what all share is in `importers/options.py`.
"""

import logging
import re
import shlex
from collections.abc import Sequence
from typing import Annotated

import tyro

from glip_jax import UserError
from glip_jax.cli.command_line import flags
from glip_jax.cli.ray_engine import ray_engine
from glip_jax.config import TextConfig
from glip_jax.data import shards
from glip_jax.data.importers.build import BuildPlan, build
from glip_jax.data.importers.caption_files import CaptionLines, CaptionTsv, Sbu, Webdataset
from glip_jax.data.importers.coco import Coco, Lvis, Objects365, Odinw
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.finished import differences, options_of, read_report
from glip_jax.data.importers.flickr30k import Flickr30k
from glip_jax.data.importers.label_studio import LabelStudio
from glip_jax.data.importers.labelme import Labelme
from glip_jax.data.importers.mdetr import CocoCaptions, Mdetr
from glip_jax.data.importers.odvg import Odvg
from glip_jax.data.importers.openimages import Openimages
from glip_jax.data.importers.options import BuildOptions
from glip_jax.data.importers.shared_build import build_shared
from glip_jax.data.importers.tfds import Tfds
from glip_jax.data.importers.tsv import Tsv
from glip_jax.data.importers.visual_genome import VisualGenome
from glip_jax.data.importers.voc import Voc
from glip_jax.data.importers.yolo import Yolo
from glip_jax.data.manifest import Manifest, ShardError
from glip_jax.distributed import exit_codes
from glip_jax.io.assets import AssetError, resolve
from glip_jax.io.formats import explain
from glip_jax.io.sharing import without_sharing
from glip_jax.io.task_results import is_begun, sweep
from glip_jax.structures.prompts import PromptError, check_names, load_tokenizer

__all__ = ["Format", "main", "vocabulary_notes"]

logger = logging.getLogger(__name__)

Format = (
    Annotated[Coco, tyro.conf.subcommand("coco", prefix_name=False)]
    | Annotated[Lvis, tyro.conf.subcommand("lvis", prefix_name=False)]
    | Annotated[Objects365, tyro.conf.subcommand("objects365", prefix_name=False)]
    | Annotated[Odinw, tyro.conf.subcommand("odinw", prefix_name=False)]
    | Annotated[Openimages, tyro.conf.subcommand("openimages", prefix_name=False)]
    | Annotated[VisualGenome, tyro.conf.subcommand("visual-genome", prefix_name=False)]
    | Annotated[Tfds, tyro.conf.subcommand("tfds", prefix_name=False)]
    | Annotated[Mdetr, tyro.conf.subcommand("mdetr", prefix_name=False)]
    | Annotated[Flickr30k, tyro.conf.subcommand("flickr30k", prefix_name=False)]
    | Annotated[Tsv, tyro.conf.subcommand("tsv", prefix_name=False)]
    | Annotated[CaptionTsv, tyro.conf.subcommand("caption-tsv", prefix_name=False)]
    | Annotated[CaptionLines, tyro.conf.subcommand("caption-lines", prefix_name=False)]
    | Annotated[Sbu, tyro.conf.subcommand("sbu", prefix_name=False)]
    | Annotated[CocoCaptions, tyro.conf.subcommand("coco-captions", prefix_name=False)]
    | Annotated[Webdataset, tyro.conf.subcommand("webdataset", prefix_name=False)]
    | Annotated[Voc, tyro.conf.subcommand("voc", prefix_name=False)]
    | Annotated[Yolo, tyro.conf.subcommand("yolo", prefix_name=False)]
    | Annotated[Odvg, tyro.conf.subcommand("odvg", prefix_name=False)]
    | Annotated[Labelme, tyro.conf.subcommand("labelme", prefix_name=False)]
    | Annotated[LabelStudio, tyro.conf.subcommand("label-studio", prefix_name=False)]
)
"""Every format: boxes with category names, captions whose phrases have boxes, captions without boxes."""

_EXAMPLE = "coco annotations.json --images=pictures --out=shards/mine (then `data coco --help` and so on)"


def main(argv: Sequence[str]) -> int:
    """Runs `data FORMAT ...`. Raises CommandLineError, SourceError, ShardError, RecordError, or OSError for a file.

    A build that is stopped leaves nothing but `.NAME.partial`, with which the same command goes on; one that is shared, OUT/.partial.
    """
    job: BuildOptions = flags(argv, Format, "data", _EXAMPLE)
    part, resources = job.static_part(), job.resources()
    done = shards.finished(job.out)
    if done is not None:
        if lines := differences(job, done, read_report(job.out), _earlier(job, done)):
            raise ShardError(
                f"{job.out} is finished, of something else (existing -> given: {'; '.join(lines)}): name another --out, or remove "
                "that folder to import again"
            )
        sweep(job.out)
        logger.info(f"{job.out} is finished ({done.records} records, made by: {done.command}); nothing is made twice")
        return exit_codes.DONE
    try:
        plan = BuildPlan(
            job.out, str(job.source), name=job.name, licence=job.licence, shards=job.shards, processes=job.processes,
            command=shlex.join(["python", "-m", "glip_jax", "data", *without_sharing(argv, ("--processes",))]), strict=job.strict,
            exclude=job.exclude, orientation=job.orientation, published=job.published, settings=options_of(job),
            allow_drops=job.allow_drops,
            chosen_drops=tuple(sorted(job.chosen_drops)),
        )  # fmt: skip
        if part is not None or job.ray or is_begun(job.out):
            engine = ray_engine(job, resources, by_core=True) if job.ray else None
            made = build_shared(plan, job.open, part, engine)
            if made is None:
                return exit_codes.DONE
            manifest, report = made
        else:
            manifest, report = build(plan, job.open)
    except (SourceError, ShardError) as error:
        found = explain(job.source, _name_of(job))
        if not found or found in str(error):
            raise
        raise type(error)(f"{error}; {job.source} {found}") from error
    logger.info(report.table())
    logger.info(f"{job.out}: {manifest.records} records, {manifest.boxes} boxes, {len(manifest.names)} names")
    for note in vocabulary_notes(manifest.names):
        logger.info(f"note: {note}")
    return exit_codes.DONE


def _name_of(job: BuildOptions) -> str:
    """The word for the format on the command line."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(job).__name__).lower()


def _earlier(job: BuildOptions, done: Manifest) -> BuildOptions | None:
    """The options of the command that made a finished folder; None where they cannot be read, as of an older version.

    Raises ShardError if that was no import.
    """
    words = shlex.split(done.command)
    if words[3:4] != ["data"]:
        raise ShardError(
            f"{job.out} is finished, but no import made it (but: {done.command or 'unknown'}): name another --out"
        )
    try:
        return flags(words[4:], Format, "data")
    except UserError:
        return None


def vocabulary_notes(names: Sequence[str]) -> list[str]:
    """Notes on names that the vocabulary of the released models, where it is on this machine, reads in part or not at all.

    Shards may be for another vocabulary, so nothing is refused; jobs whose config names one refuse.
    """
    vocabulary = TextConfig().vocabulary
    try:
        tokenizer = load_tokenizer(resolve(vocabulary))
    except (AssetError, PromptError):
        return []
    remedy = "give them English text with --names, or train with a vocabulary and encoder of that language"
    try:
        return check_names(names, tokenizer, f"read with {vocabulary}", remedy, "note")
    except PromptError as error:
        return [str(error)]
