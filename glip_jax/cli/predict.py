"""The job `predict`: detects in images what a text or a list of names describes.

OUT/predictions.json     the query's phrases (text, prompt, span), and per image its detections by index of the phrase
OUT/pictures/NAME.png    each image with its boxes
"""

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from glip_jax import UserError
from glip_jax.cli import checkpoint_argument
from glip_jax.cli.command_line import CommandLineError, flags, split_settings
from glip_jax.cli.query import Query, read_query
from glip_jax.cli.reports import drawing
from glip_jax.config import Config, PathStr
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io.errors import full_disk
from glip_jax.io.image_files import listed, measured, read_upright
from glip_jax.structures.batch import Detections

if TYPE_CHECKING:
    from glip_jax.inference import Detector

__all__ = ["Predict", "PredictError", "main", "predict"]

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished"
_EXAMPLE = 'photo.jpg pictures/ --checkpoint=runs/demo --text="a green book . two red apples" --out=found'


class PredictError(UserError, ValueError):
    """An image, a folder or a setting that prediction cannot work with."""


@dataclass(frozen=True)
class Predict:
    """Detect what a text or a list of names describes in IMAGES (files, or folders of them).

    One of three queries:
      --text="a green book . two red apples"      phrases with " . " between them
      --text="a green book left of two apples"    a sentence; its noun phrases become the query
      --names="green book,red apple"              a list of any length, as many prompts as it needs;
                                                  a name with a comma in double quotes: --names='"salt, pepper",cup'

    Writes OUT/predictions.json and OUT/pictures/, completely or not at all. A detection has a box (x1, y1, x2, y2, pixels
    of the image), a phrase (index into "phrases") and a score: the square root of alignment (how well the location matches
    the text) times centerness (how central in its object it is). Settings are those the checkpoint was trained with;
    --config=FILE.py gives others, --config.detection.nms_iou=0.5 changes one.
    """

    images: Annotated[tyro.conf.Positional[tuple[PathStr, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Images, or folders of images (not the folders in them); local or gs://."""
    checkpoint: PathStr = ""
    """WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, or a folder that `export` wrote; local or
    gs://."""
    workdir: PathStr = ""
    """The same as --checkpoint=WORKDIR."""
    text: str = ""
    """Phrases with " . " between them, or a sentence."""
    names: str = ""
    """Names with commas between them."""
    names_file: PathStr = ""
    """File with a name on each line, asked as it is there; empty lines are skipped."""
    out: PathStr = "predictions"
    """Folder to write into; made if it is not there."""
    threshold: float = 0.3
    """Lowest score of a detection that is written and drawn."""
    step: int | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""


class Picture(NamedTuple):
    """An image file whose header was read."""

    path: epath.Path
    height: int
    width: int
    exif_rotated: bool
    """Its EXIF orientation rotates or mirrors the stored pixels; height and width are those after that."""
    drawn: str
    """Name of the file with its detections drawn."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what `predict` raises."""
    settings, own = split_settings(argv)
    for option in ("--text", "--names", "--names-file"):
        given = [argument for argument in own if argument.partition("=")[0].replace("_", "-") == option]
        if len(given) > 1:
            raise CommandLineError(
                f"{option} is given {len(given)} times, and only one would be asked: give all in one"
            )
    job = flags(own, Predict, "predict", _EXAMPLE, {"--least": "--threshold"})
    with checkpoint_argument.fitting_parameters():
        predict(job, settings, shlex.join(["python", "-m", "glip_jax", "predict", *argv]))
    return exit_codes.DONE


def predict(job: Predict, settings: Sequence[str], command: str) -> dict[str, Any]:
    """Detects, draws and writes; returns the content of predictions.json.

    `settings`: the --config arguments. Everything that can be checked is checked before the checkpoint's arrays are
    read. Raises PredictError, ImageFileError, QueryError, CheckpointError, ConfigError or CommandLineError; nothing is written then.
    """
    from glip_jax.inference import Detector, bucket

    if not 0 <= job.threshold < 1:
        raise CommandLineError(f"--threshold={job.threshold}: expected 0 <= threshold < 1")
    if not job.images:
        raise CommandLineError(
            "no images: expected files or folders, e.g. predict photo.jpg --checkpoint=DIR --names=dog"
        )
    checkpoint = checkpoint_argument.open_named(job.checkpoint, job.workdir, job.step)
    config = checkpoint_argument.settings_of(checkpoint, settings, "predict")
    which = config.evaluation.parameters
    query = read_query(job.text, job.names, job.names_file, config)
    pictures = _pictures(job.images, config)
    for note in query.notes:
        logger.info(note)
    logger.info(f"{checkpoint_argument.describe(checkpoint)}, {which} parameters")
    enable_compilation_cache()
    with _unfinished(epath.Path(job.out)) as folder:
        begin = time.monotonic()
        detector = Detector(config, checkpoint.parameters(which), min(config.evaluation.batch_size, len(pictures)))
        images = _detect(detector, query, pictures, job.threshold, folder)
        content = {
            "command": command, "workdir": checkpoint.workdir, "step": checkpoint.step,
            "parameters": which,
            "settings": {"threshold": job.threshold, "detection": asdict(config.detection),
                         "short_side": config.evaluation.short_side, "long_side": config.evaluation.long_side},
            "query": query.kind, "names": list(query.names), "phrase_finder": query.finder, "prompts": [prompt.caption for prompt in query.prompts],
            "phrases": [phrase._asdict() for phrase in query.phrases], "images": images,
        }  # fmt: skip
        (folder / "predictions.json").write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False))
        logger.info(_table(content))
        seconds = time.monotonic() - begin
    shapes = len({bucket(picture.height, picture.width, config)[1] for picture in pictures})
    logger.info(
        f"images {len(pictures)}, shapes {shapes}, prompts {len(query.prompts)}, programs compiled or read from the "
        f"cache {sum(detector.compiled.values())}, {seconds:.1f} s\n"
        f"written: {job.out}/predictions.json, {job.out}/pictures/"
    )
    return content


def _pictures(given: Sequence[str], config: Config) -> list[Picture]:
    """The images of files and folders, their sizes read from their headers. Raises ImageFileError or PredictError for the first bad one."""
    from glip_jax.inference import bucket

    paths = []
    for name in given:
        images, skipped = listed(epath.Path(name))
        if skipped:
            logger.info(f"{name}: images {len(images)}, files with other endings skipped {skipped}")
        paths += images
    pictures, taken = [], set[str]()
    for path in paths:
        height, width, exif_rotated = measured(path)
        longest = max(bucket(height, width, config)[1])
        if longest > 2 * config.evaluation.long_side:
            raise PredictError(
                f"{path} has {width} x {height} pixels: too long and narrow, it would be resized to a side of "
                f"{longest} pixels where evaluation.long_side is {config.evaluation.long_side}; cut it into pieces"
            )
        names = (f"{path.stem}{f'_{number}' if number else ''}.png" for number in range(len(paths) + 1))
        drawn = next(name for name in names if name.casefold() not in taken)
        taken.add(drawn.casefold())
        pictures.append(Picture(path, height, width, exif_rotated, drawn))
    return pictures


@contextlib.contextmanager
def _unfinished(out: epath.Path) -> Iterator[epath.Path]:
    """A folder inside `out` whose content moves to `out` at the end, or vanishes if anything stops the job before."""
    folder, new = out / _UNFINISHED, not out.exists()
    try:
        if folder.exists():
            logger.info(f"{folder} was left by a killed run: removed")
            folder.rmtree()
        (folder / "pictures").mkdir(parents=True)
    except OSError as error:
        if full_disk(error):
            raise
        raise PredictError(f"--out={out} cannot be written ({error}): give another folder") from None
    try:
        yield folder
        (out / "pictures").mkdir(parents=True, exist_ok=True)
        for drawn in (folder / "pictures").iterdir():
            drawn.replace(out / "pictures" / drawn.name)
        # Last, so that where it lies everything that it names lies.
        (folder / "predictions.json").replace(out / "predictions.json")
    except BaseException:
        (out if new else folder).rmtree()
        raise
    folder.rmtree()


def _detect(
    detector: "Detector", query: Query, pictures: Sequence[Picture], threshold: float, folder: epath.Path
) -> list[dict[str, Any]]:
    """Runs the detector, batches of one canvas, and draws each picture into `folder`; entries in the order given."""
    canvases = [detector.canvas(picture.height, picture.width)[1] for picture in pictures]
    entries: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(pictures), desc="predict", unit="image", disable=len(pictures) <= detector.batch_size,
              mininterval=0.2 if sys.stderr.isatty() else 30.0) as bar:  # fmt: skip
        for canvas in sorted(set(canvases)):
            members = [index for index, own in enumerate(canvases) if own == canvas]
            for begin in range(0, len(members), detector.batch_size):
                group = members[begin : begin + detector.batch_size]
                images = [read_upright(pictures[index].path) for index in group]
                if query.kind == "names":
                    found = detector.categories(images, query.names)
                else:
                    found = detector.caption(images, [query.prompts[0]] * len(images))
                for index, image, detections in zip(group, images, found, strict=True):
                    entries[index] = _entry(pictures[index], detections, threshold)
                    _draw(image, entries[index], query, folder)
                bar.update(len(group))
    return [entries[index] for index in range(len(pictures))]


def _entry(picture: Picture, found: Detections, threshold: float) -> dict[str, Any]:
    """The entry of an image in predictions.json."""
    detections = [
        {
            "phrase": int(found.phrases[row]),
            "box": [round(float(value), 2) for value in found.boxes[row]],
            "score": round(float(found.scores[row]), 5),
            "alignment": round(float(found.alignment[row]), 5),
            "centerness": round(float(found.centerness[row]), 5),
        }
        for row in np.flatnonzero(found.scores >= threshold)
    ]
    return {
        "file": str(picture.path),
        "height": picture.height,
        "width": picture.width,
        "turned": picture.exif_rotated,
        "drawn": f"pictures/{picture.drawn}",
        "detections": detections,
    }


def _draw(image: UInt8[np.ndarray, "H W 3"], entry: dict[str, Any], query: Query, folder: epath.Path) -> None:
    """Draws the best boxes last, on top; small images are enlarged so that the text can be read."""
    marks = [
        drawing.Mark(tuple(d["box"]), f"{query.phrases[d['phrase']].text} {d['score']:.2f}", drawing.color(d["phrase"]))
        for d in reversed(entry["detections"])
    ]
    scale = max(1.0, min(4.0, 640 / max(image.shape[:2])))
    (folder / entry["drawn"]).write_bytes(drawing.png(drawing.draw_boxes(image, marks, scale)))


def _table(content: dict[str, Any], images: int = 8, rows: int = 10) -> str:
    """The detections as text: of few images each detection, of many a line for each phrase."""
    texts = [phrase["text"] for phrase in content["phrases"]]
    width = min(40, max(map(len, texts)))
    lines = []
    if len(content["images"]) <= images:
        for entry in content["images"]:
            found = entry["detections"]
            lines.append(f"{entry['file']} ({entry['width']} x {entry['height']}): {len(found)} found")
            lines += [
                f"  {texts[d['phrase']]:{width}}  {d['score']:.2f} = sqrt({d['alignment']:.2f} x {d['centerness']:.2f})"
                f"  at {', '.join(f'{value:.0f}' for value in d['box'])}"
                for d in found[:rows]
            ]
            lines += [f"  … {len(found) - rows} more in predictions.json"] if len(found) > rows else []
    else:
        every = [(d["phrase"], d["score"], n) for n, entry in enumerate(content["images"]) for d in entry["detections"]]
        for index, text in enumerate(texts):
            own = [(score, n) for phrase, score, n in every if phrase == index]
            if own:
                best, where = max(own, key=lambda item: item[0]), len({n for _, n in own})
                file = content["images"][best[1]]["file"]
                lines.append(f"{text:{width}}  {len(own)} in {where} images, best {best[0]:.2f} in {file}")
    absent = sorted(set(range(len(texts))) - {d["phrase"] for e in content["images"] for d in e["detections"]})
    if absent:
        shown = ", ".join(texts[index] for index in absent[:20])
        more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
        lines.append(f"no score of {content['settings']['threshold']} or more: {shown}{more}")
    return "\n".join(lines)
