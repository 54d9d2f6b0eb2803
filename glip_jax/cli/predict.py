"""The job `predict`: finds in images what a text or a list of names asks for.

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
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from glip_jax import UserError
from glip_jax.cli.command_line import CommandLineError, divided, flags
from glip_jax.cli.image_files import listed, measured, read_upright
from glip_jax.cli.query import Query, read_query
from glip_jax.cli.reports import drawing
from glip_jax.cli.saved_settings import chosen_settings, finite_parameters, fitting_parameters
from glip_jax.config import Config
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.inference import Detector, bucket
from glip_jax.io.checkpoint import latest_step
from glip_jax.io.errors import full_disk
from glip_jax.structures.batch import Detections

__all__ = ["Predict", "PredictError", "main", "predict"]

logger = logging.getLogger(__name__)

_UNFINISHED = ".unfinished"
_EXAMPLE = 'photo.jpg pictures/ --workdir=runs/demo --text="a green book . two red apples" --out=found'


class PredictError(UserError, ValueError):
    """An image, a folder or a setting that prediction cannot work with."""


@dataclass(frozen=True)
class Predict:
    """Find what words name in IMAGES (files, or folders of them) with the newest checkpoint of --workdir.

    Three ways to ask, one at a time:
      --text="a green book . two red apples"      phrases with " . " between them
      --text="a green book left of two apples"    a sentence; its noun phrases are found and asked for
      --names="green book,red apple"              a list of any length, as many prompts as it needs

    Writes OUT/predictions.json and OUT/pictures/, whole or not at all. A detection has a box (x1, y1, x2, y2, pixels of
    the image), a phrase (index into "phrases") and a score: the root of alignment (how well the place fits the words)
    times centerness (how central in its object it is). Settings are those the checkpoint was trained with;
    --config=FILE.py gives others, --config.detection.nms_iou=0.5 changes one.
    """

    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Images, or folders of images (not the folders in them); local or gs://."""
    workdir: str = ""
    """Folder of the run, with a checkpoint of `train`."""
    text: str = ""
    """Phrases with " . " between them, or a sentence."""
    names: str = ""
    """Names with commas between them."""
    names_file: str = ""
    """File with a name on each line; empty lines are passed over."""
    out: str = "predictions"
    """Folder to write into; made if it is not there."""
    least: float = 0.3
    """Least score of what is written and drawn."""
    step: int | None = None
    """Step of the checkpoint; default: the newest complete one."""


class Picture(NamedTuple):
    """An image file that can be looked at."""

    path: epath.Path
    height: int
    width: int
    turned: bool
    """Its EXIF orientation says that it is stored turned or mirrored; height and width are those it is shown with."""
    drawn: str
    """Name of the drawn picture."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what `predict` raises."""
    settings, own = divided(argv)
    job = flags(own, Predict, "predict", _EXAMPLE)
    with fitting_parameters():
        predict(job, settings, shlex.join(["python", "-m", "glip_jax", "predict", *argv]))
    return exit_codes.DONE


def predict(job: Predict, settings: Sequence[str], command: str) -> dict[str, Any]:
    """Finds, draws and writes; returns what predictions.json holds.

    `settings`: the --config arguments. Everything that can be checked is checked before the checkpoint's arrays are
    read. Raises PredictError, ImageFileError, QueryError, CheckpointError, ConfigError or CommandLineError; nothing is written then.
    """
    if not job.workdir:
        raise CommandLineError("no working folder: expected --workdir=DIR with a checkpoint of `train`")
    if not 0 <= job.least < 1:
        raise CommandLineError(f"--least={job.least}: expected 0 <= least < 1")
    if not job.images:
        raise CommandLineError("no images: expected files or folders, e.g. predict photo.jpg --workdir=DIR --names=dog")
    config = chosen_settings(job.workdir, job.step, settings, "predict")
    step = latest_step(job.workdir) if job.step is None else job.step
    query = read_query(job.text, job.names, job.names_file, config)
    pictures = _pictures(job.images, config)
    for note in query.notes:
        logger.info(note)
    logger.info(f"{job.workdir}: step {step}, {config.evaluation.parameters} parameters")
    enable_compilation_cache()
    with _unfinished(epath.Path(job.out)) as folder:
        begin = time.monotonic()
        params = finite_parameters(job.workdir, config.evaluation.parameters, job.step)
        detector = Detector(config, params, min(config.evaluation.batch_size, len(pictures)))
        images = _find(detector, query, pictures, job.least, folder)
        content = {
            "command": command, "workdir": job.workdir, "step": step, "parameters": config.evaluation.parameters,
            "settings": {"least": job.least, "detection": asdict(config.detection),
                         "short_side": config.evaluation.short_side, "long_side": config.evaluation.long_side},
            "query": query.kind, "phrase_finder": query.finder, "prompts": [prompt.caption for prompt in query.prompts],
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
    """The images of files and folders, their sizes read from their heads. Raises ImageFileError or PredictError for the first bad one."""
    paths = []
    for name in given:
        images, passed = listed(epath.Path(name))
        if passed:
            logger.info(f"{name}: images {len(images)}, files with other endings passed over {passed}")
        paths += images
    pictures, taken = [], set[str]()
    for path in paths:
        height, width, turned = measured(path)
        longest = max(bucket(height, width, config)[1])
        if longest > 2 * config.evaluation.long_side:
            raise PredictError(
                f"{path} has {width} x {height} pixels: too long and narrow, it would be looked at with a side of "
                f"{longest} pixels where evaluation.long_side is {config.evaluation.long_side}; cut it into pieces"
            )
        names = (f"{path.stem}{f'_{number}' if number else ''}.png" for number in range(len(paths) + 1))
        drawn = next(name for name in names if name.casefold() not in taken)
        taken.add(drawn.casefold())
        pictures.append(Picture(path, height, width, turned, drawn))
    return pictures


@contextlib.contextmanager
def _unfinished(out: epath.Path) -> Iterator[epath.Path]:
    """A folder inside `out` whose content moves to `out` at the end, or vanishes if anything stops the job before."""
    folder, new = out / _UNFINISHED, not out.exists()
    try:
        if folder.exists():
            logger.info(f"{folder} was left by a run that was killed: removed")
            folder.rmtree()
        (folder / "pictures").mkdir(parents=True)
    except OSError as error:
        if full_disk(error):
            raise
        raise PredictError(f"--out={out} cannot be written ({error}): give a folder of your own") from None
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


def _find(
    detector: Detector, query: Query, pictures: Sequence[Picture], least: float, folder: epath.Path
) -> list[dict[str, Any]]:
    """Looks at the pictures, those of one canvas together, draws each into `folder`; entries in the order given."""
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
                    entries[index] = _entry(pictures[index], detections, least)
                    _draw(image, entries[index], query, folder)
                bar.update(len(group))
    return [entries[index] for index in range(len(pictures))]


def _entry(picture: Picture, found: Detections, least: float) -> dict[str, Any]:
    """What predictions.json says of an image."""
    detections = [
        {
            "phrase": int(found.phrases[row]),
            "box": [round(float(value), 2) for value in found.boxes[row]],
            "score": round(float(found.scores[row]), 5),
            "alignment": round(float(found.alignment[row]), 5),
            "centerness": round(float(found.centerness[row]), 5),
        }
        for row in np.flatnonzero(found.scores >= least)
    ]
    return {
        "file": str(picture.path),
        "height": picture.height,
        "width": picture.width,
        "turned": picture.turned,
        "drawn": f"pictures/{picture.drawn}",
        "detections": detections,
    }


def _draw(image: UInt8[np.ndarray, "H W 3"], entry: dict[str, Any], query: Query, folder: epath.Path) -> None:
    """Draws best boxes last, so that they lie on top; small images enlarged until their words can be read."""
    marks = [
        drawing.Mark(
            tuple(d["box"]), f"{query.phrases[d['phrase']].text} {d['score']:.2f}", drawing.colour(d["phrase"])
        )
        for d in reversed(entry["detections"])
    ]
    scale = max(1.0, min(4.0, 640 / max(image.shape[:2])))
    (folder / entry["drawn"]).write_bytes(drawing.png(drawing.draw_boxes(image, marks, scale)))


def _table(content: dict[str, Any], images: int = 8, rows: int = 10) -> str:
    """What was found, for a reader: of few images each detection, of many each phrase."""
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
        lines.append(f"no score of {content['settings']['least']} or more: {shown}{more}")
    return "\n".join(lines)
