"""The job `predict`: detects in images what a text or a list of names describes.

OUT/predictions.json     the query's phrases (text, prompt, span), per image its detections by index of the phrase, and the
                         images that were left out, each with its reason
OUT/pictures/NAME.png    each image with its boxes
FILE, FILE_annotations   with --coco=FILE.json: the detections in COCO's results format, see `glip_jax.cli.coco_files`
OUT/unfinished/          the same two while the job runs, of the images that are done; left by a job that was stopped, and
                         continued by the same command. Process N of several has its own file there, predictions_N.json

Several processes (--distributed) share the images; the first gathers what all have found and writes predictions.json.
"""

import contextlib
import json
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from etils import epath
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from glip_jax.cli import checkpoint_argument, coco_files
from glip_jax.cli.command_line import CommandLineError, flags, split_settings
from glip_jax.cli.pictures import Picture, PredictError, ReadPicture, file_stamp, find_pictures, leave_out, read_picture
from glip_jax.cli.processes import ProcessArguments, checkpoint_fingerprint, fingerprints, run_joined, share_of
from glip_jax.cli.query import Query, read_query
from glip_jax.cli.reports import drawing
from glip_jax.cli.score_thresholds import score_thresholds
from glip_jax.config import PathStr
from glip_jax.config.ranges import BelowOne, FalseAlarms, Limit
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.evaluation.shares import Share
from glip_jax.io.claims import owned_workdir
from glip_jax.io.errors import full_disk
from glip_jax.io.image_files import ImageFileError
from glip_jax.io.workdir import write_atomic
from glip_jax.structures.batch import Detections

if TYPE_CHECKING:
    from glip_jax.inference import Detector

__all__ = ["Predict", "PredictError", "main", "predict"]

logger = logging.getLogger(__name__)

_UNFINISHED = "unfinished"
_SAVE_SHARE = 0.05
"""Share of the time that may be spent on writing what is done."""
_EXAMPLE = 'photo.jpg pictures/ --checkpoint=runs/demo --text="a green book . two red apples" --out=found'


@dataclass(frozen=True)
class Predict(ProcessArguments):
    """Detect what a text or a list of names describes in IMAGES (files, videos, or folders of images).

    One of three queries:
      --text="a green book . two red apples"      phrases with " . " between them
      --text="a green book left of two apples"    a sentence; its noun phrases become the query
      --names="green book,red apple"              a list of any length, as many prompts as it needs;
                                                  a name with a comma in double quotes: --names='"salt, pepper",cup'

    Writes OUT/predictions.json and OUT/pictures/. Images of a folder that cannot be used (damaged, too large, too narrow) are
    left out, and named in the output and in predictions.json; a file that is named itself is refused. While the job runs, what
    is done is in OUT/unfinished/: if it is stopped, the same command goes on from there. A detection has a box (x1, y1, x2, y2, pixels
    of the image), a phrase (index into "phrases") and a score: the square root of alignment (how well the location matches
    the text) times centerness (how central in its object it is). All devices work; several processes (--distributed) share the
    images. Settings are those the checkpoint was trained with;
    --config=FILE.py gives others, --config.detection.nms_iou=0.5 changes one.
    """

    images: Annotated[tyro.conf.Positional[tuple[PathStr, ...]], tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Images, videos, or folders of images (not the folders in them, nor videos); local or gs://. Videos need requirements-video.txt."""
    checkpoint: PathStr = ""
    """WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, a folder that `export` wrote, or a delta; local or
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
    threshold: BelowOne | None = None
    """Lowest score of a detection that is written and drawn; default: the one of --false-alarms=0.05 if `evaluate` has measured absent names
    with this checkpoint, else 0.3."""
    false_alarms: FalseAlarms | None = None
    """Take the threshold at which the report of `evaluate` has at most this many false alarms per image and absent name: 0.01, 0.05, 0.25
    or what `evaluate --false-alarms` was given. Names of which it saw enough have their own."""
    report: PathStr = ""
    """The evaluation.json with the thresholds; default: the one in the folder of the checkpoint."""
    step: Limit | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""
    every: Limit = 0
    """Of a video every n-th frame is detected in, from the first on; 0: one a second. A frame has its number and its time in the output."""
    coco: PathStr = ""
    """FILE.json: write the detections in COCO's results format too, and FILE_annotations.json with images, categories and boxes;
    local or gs://. Detections of other images are not overwritten."""


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
    command = shlex.join(["python", "-m", "glip_jax", "predict", *argv])

    def facts() -> dict[str, str]:
        own = {name: value for name, value in asdict(job).items() if name not in ("index", "patience", "heartbeat")}
        asked = {f"--{name.replace('_', '-')}": repr(value) for name, value in own.items()} | {
            "settings": repr(settings)
        }
        return fingerprints(None) | asked | checkpoint_fingerprint(job.checkpoint or job.workdir, job.step)

    def work(share: Share) -> int:
        with checkpoint_argument.fitting_parameters():
            predict(job, settings, command, share)
        return exit_codes.DONE

    return run_joined("predict", job, facts, lambda cluster: work(share_of(cluster)))


def predict(job: Predict, settings: Sequence[str], command: str, share: Share | None = None) -> dict[str, Any]:
    """Detects, draws and writes; returns the content of predictions.json.

    `settings`: the --config arguments. `share`: the part of this process where several predict together. Everything that can be checked is checked before the checkpoint's arrays are
    read. Raises PredictError, ImageFileError, QueryError, CheckpointError, ConfigError or CommandLineError.
    """
    from glip_jax.inference import Detector, bucket

    share = share or Share()
    if not job.images:
        raise CommandLineError(
            "no images: expected files or folders, e.g. predict photo.jpg --checkpoint=DIR --names=dog"
        )
    checkpoint = checkpoint_argument.open_named(job.checkpoint, job.workdir, job.step)
    config = checkpoint_argument.settings_of(checkpoint, settings, "predict")
    which = config.evaluation.parameters
    query = read_query(job.text, job.names, job.names_file, config)
    texts, alone = [phrase.text for phrase in query.phrases], len(query.prompts) == len(query.phrases)
    least = score_thresholds(job.threshold, job.false_alarms, job.report, checkpoint, config, texts, alone)
    pictures, left_out = find_pictures(job.images, config, share.first, job.every)
    if job.coco:
        folder = _folder(pictures)
        names = [_file_name(picture.path, picture.drawn if picture.video else "", folder) for picture in pictures]
        coco_files.check_target(job.coco, folder, names)
    for note in query.notes if share.first else ():
        logger.info(note)
    if share.first:
        logger.info(f"{checkpoint_argument.describe(checkpoint)}, {which} parameters; {least.text()}")
    enable_compilation_cache()
    about = {
        "command": command, "workdir": checkpoint.workdir, "step": checkpoint.step,
        "parameters": which,
        "settings": {"threshold": least.threshold, "thresholds": least.chosen and list(least.of_phrases), "chosen": least.chosen,
                     "detection": asdict(config.detection),
                     "short_side": config.evaluation.short_side, "long_side": config.evaluation.long_side},
        "query": query.kind, "phrase_finder": query.finder, "prompts": [prompt.caption for prompt in query.prompts],
        "phrases": [phrase._asdict() for phrase in query.phrases],
    }  # fmt: skip
    with _results(epath.Path(job.out), about, pictures, left_out, share) as results:
        begin = time.monotonic()
        detector = Detector(config, checkpoint.parameters(which), min(config.evaluation.batch_size, len(pictures)))
        _detect(detector, query, pictures, np.array(least.of_phrases, np.float32), results)
        results.gather()
        content = results.content()
        left_out = content["left_out"]
        if not content["images"]:
            raise PredictError(
                f"no image could be read, of {len(left_out)}; the first: {' '.join(left_out[0].values())}"
            )
        if not share.first:
            return content
        logger.info(_table(content))
        seconds = time.monotonic() - begin
    if job.coco:
        _write_coco(job.coco, content, _folder(pictures))
    shapes = len({bucket(picture.height, picture.width, config)[1] for picture in pictures})
    logger.info(
        f"images {len(content['images'])}, shapes {shapes}, prompts {len(query.prompts)}, programs compiled or read from the "
        f"cache {sum(detector.compiled.values())}, {seconds:.1f} s\n"
        f"written: {job.out}/predictions.json, {job.out}/pictures/"
    )
    notes = Counter(note for entry in content["images"] for note in entry.get("notes", ()))
    for note, count in notes.items():
        logger.info(f"noted {note}: {count}")
    if left_out:
        total = len(content["images"]) + len(left_out)
        logger.warning(f"left out {len(left_out)} of {total} images, each with its reason in predictions.json")
    return content


class _Results:
    """What is done so far, in OUT/unfinished: at the start and by this process; after `gather` by all."""

    def __init__(
        self, folder: epath.Path, about: dict[str, Any], pictures: Sequence[Picture], left_out: Sequence[dict[str, str]],
        share: Share,
    ) -> None:  # fmt: skip
        self.folder, self.left_out, self.total, self.share = folder, list[dict[str, str]](), len(pictures), share
        self._about, self._pictures, self._unusable = about, pictures, left_out
        self._file = "predictions.json" if share.first else f"predictions_{share.index}.json"
        self._done: dict[str, dict[str, Any]] = {}
        self._stamps: dict[str, list[int]] = {}
        self._next = 0.0
        if share.first:
            self._resume()

    def agree(self) -> None:
        """Takes what process 0 has found done, so that all share the same rest; all call it before one writes."""
        self._done, self._stamps = self.share.gather((self._done, self._stamps))[0]

    def _resume(self) -> None:
        """Takes what an earlier start of the same command has done, of files that did not change since.

        Raises PredictError for the results of another command.
        """
        for path in sorted(self.folder.glob("predictions*.json")) if self.folder.exists() else ():
            try:
                saved = json.loads(path.read_text())
                done, stamps = {entry["drawn"]: entry for entry in saved["images"]}, saved["stamps"]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
            now = json.loads(json.dumps(self._about))
            other = [key for key in now if key != "command" and saved.get(key) != now[key]]
            if done and other:
                raise PredictError(
                    f"{self.folder} holds {len(done)} images of another command, which was stopped ({saved.get('command')}; other: "
                    f"{', '.join(other)}): give that command again to finish it, give another --out, or remove that folder"
                )
            for picture in self._pictures:
                entry, stamp = done.get(f"pictures/{picture.drawn}"), stamps.get(picture.drawn)
                if entry is not None and entry["file"] == str(picture.path) and stamp == file_stamp(picture.path):
                    self.add(picture, entry, stamp)
        if self._done:
            logger.info(f"{self.folder}: going on after {len(self._done)} of {self.total} images")

    def has(self, picture: Picture) -> bool:
        """Whether the image is done."""
        return picture.drawn in self._done

    def add(self, picture: Picture, entry: dict[str, Any], stamp: list[int]) -> None:
        """Adds the entry of an image, whose drawing is written."""
        self._done[picture.drawn], self._stamps[picture.drawn] = entry, stamp

    def content(self) -> dict[str, Any]:
        """The content of predictions.json, images in the order given."""
        images = [self._done[picture.drawn] for picture in self._pictures if self.has(picture)]
        return {**self._about, "images": images, "left_out": [*self._unusable, *self.left_out]}

    def gather(self) -> None:
        """Takes what the other processes have done; all call it."""
        parts = self.share.gather((self._done, self.left_out))
        self._done = {drawn: entry for done, _ in parts for drawn, entry in done.items()}
        self.left_out = [entry for _, left_out in parts for entry in left_out]

    def save(self) -> None:
        """Writes what is done, unless that was a short time ago."""
        begin = time.monotonic()
        if begin >= self._next:
            self.write(complete=False)
            end = time.monotonic()
            self._next = end + (end - begin) / _SAVE_SHARE

    def write(self, complete: bool) -> None:
        """Writes the file of this process into the folder."""
        content = self.content() | {"complete": complete} | ({} if complete else {"stamps": self._stamps})
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        write_atomic(self.folder / self._file, text)


@contextlib.contextmanager
def _results(
    out: epath.Path,
    about: dict[str, Any],
    pictures: Sequence[Picture],
    left_out: Sequence[dict[str, str]],
    share: Share,
) -> Iterator[_Results]:
    """The results in OUT/unfinished, which process 0 moves to OUT at the end; if anything stops the job before, they stay there.

    Raises CheckpointError if another job writes into `out`.
    """
    new, folder = not out.exists(), out / _UNFINISHED
    try:
        out.mkdir(parents=True, exist_ok=True)
        with owned_workdir(str(out), flag="--out") if share.first else contextlib.nullcontext():
            results = _Results(folder, about, pictures, left_out, share)
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            results.agree()
            try:
                yield results
                if not share.first:
                    return
                results.write(complete=True)
            except BaseException:
                _keep(results)
                raise
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            for entry in results.content()["images"]:
                (folder / entry["drawn"]).replace(out / entry["drawn"])
            # Last, so that where it lies everything that it names lies.
            (folder / "predictions.json").replace(out / "predictions.json")
            folder.rmtree()
    except OSError as error:
        if full_disk(error) or folder.exists():
            raise
        raise PredictError(f"--out={out} cannot be written ({error}): give another folder") from None
    finally:
        if new and share.first and out.exists() and not any(out.iterdir()):
            out.rmtree()


def _keep(results: _Results) -> None:
    """Keeps what is done of a job that was stopped, and says so; removes the folder if that is nothing."""
    done = len(results.content()["images"])
    if not done:
        if results.share.count == 1:
            results.folder.rmtree()
        return
    with contextlib.suppress(OSError):  # a full disk: what was written last stays
        results.write(complete=False)
    logger.warning(
        f"{done} of {results.total} images are done, in {results.folder}; the same command goes on from there"
    )


def _detect(
    detector: "Detector", query: Query, pictures: Sequence[Picture], least: Float32[np.ndarray, " n"], results: _Results
) -> None:
    """Runs the detector on the share of this process, groups of one canvas, draws each image, and saves what is done as it comes."""
    from glip_jax.inference import pipelined

    todo = [picture for picture in pictures if not results.has(picture)]
    groups = list(results.share.groups(
        todo, lambda picture: detector.canvas(picture.height, picture.width)[1], detector.batch_size, detector.group_size
    ))  # fmt: skip
    own = sum(map(len, groups))

    def start(_: Sequence[Picture], read: list[ReadPicture | ImageFileError]) -> Callable[[], list[Detections]]:
        images = [each.pixels for each in read if isinstance(each, ReadPicture)]
        if query.kind == "names":
            return detector.categories_async(images, query.names)
        finish = detector.detect_async(images, [[query.prompts[0]]] * len(images))
        return lambda: [found for (found,) in finish()]

    done = len(pictures) - len(todo)
    with tqdm(total=done + own, initial=done, desc="predict", unit="image",
              disable=not results.share.first or len(pictures) <= detector.batch_size,
              mininterval=0.2 if sys.stderr.isatty() else 30.0) as progress:  # fmt: skip
        for group, read, found in pipelined(groups, read_picture, start):
            of_images = iter(found)
            for picture, each in zip(group, read, strict=True):
                if isinstance(each, ImageFileError):
                    leave_out(results.left_out, picture.path, each)
                    continue
                entry = _entry(picture, next(of_images), least, each)
                _draw(each.pixels, entry, query, results.folder)
                results.add(picture, entry, each.stamp)
            results.save()
            progress.update(len(group))


def _entry(picture: Picture, found: Detections, least: Float32[np.ndarray, " n"], read: ReadPicture) -> dict[str, Any]:
    """The entry of an image in predictions.json."""
    detections = [
        {
            "phrase": int(found.phrases[row]),
            "box": [round(float(value), 2) for value in found.boxes[row]],
            "score": round(float(found.scores[row]), 5),
            "alignment": round(float(found.alignment[row]), 5),
            "centerness": round(float(found.centerness[row]), 5),
        }
        for row in np.flatnonzero(found.scores >= least[found.phrases])
    ]
    return {
        "file": str(picture.path),
        **({"frame": picture.frame, "seconds": read.seconds} if picture.video else {}),
        "height": picture.height,
        "width": picture.width,
        "turned": picture.exif_rotated,
        "drawn": f"pictures/{picture.drawn}",
        **({"notes": list(read.notes)} if read.notes else {}),
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


def _folder(pictures: Sequence[Picture]) -> str:
    """The folder that all images lie in; "" if there are several."""
    folders = {str(picture.path.parent) for picture in pictures}
    return folders.pop() if len(folders) == 1 else ""


def _file_name(path: epath.Path, frame: str, folder: str) -> str:
    """The name of an image in COCO's files; a frame has that of its drawn image."""
    own = path.parent / frame if frame else path
    return own.name if folder else str(own)


def _write_coco(path: str, content: dict[str, Any], folder: str) -> None:
    """Writes the content of predictions.json as COCO's results; a category is a phrase, phrases of the same text are one."""
    texts = [phrase["text"] for phrase in content["phrases"]]
    ids = {text: number for number, text in enumerate(dict.fromkeys(texts), 1)}
    images = []
    for number, entry in enumerate(content["images"], 1):
        found, frame = entry["detections"], epath.Path(entry["drawn"]).name if "frame" in entry else ""
        name = _file_name(epath.Path(entry["file"]), frame, folder)
        about = {"id": number, "file_name": name, "height": entry["height"], "width": entry["width"]}
        about |= {key: entry[key] for key in ("frame", "seconds") if key in entry} | (
            {"video": entry["file"]} if frame else {}
        )
        boxes, scores = np.array([d["box"] for d in found]).reshape(-1, 4), [d["score"] for d in found]
        rows = coco_files.result_rows(number, boxes, scores, [ids[texts[d["phrase"]]] for d in found])
        images.append(coco_files.DetectedImage(about, rows))
    coco_files.write(path, folder, [{"id": number, "name": text} for text, number in ids.items()], images)


def _table(content: dict[str, Any], images: int = 8, rows: int = 10) -> str:
    """The detections as text: of few images each detection, of many a line for each phrase."""
    texts = [phrase["text"] for phrase in content["phrases"]]
    width = min(40, max(map(len, texts)))
    lines = []
    if len(content["images"]) <= images:
        for entry in content["images"]:
            found = entry["detections"]
            at = f" at {entry['seconds']:.2f} s" if "seconds" in entry else ""
            lines.append(f"{entry['file']}{at} ({entry['width']} x {entry['height']}): {len(found)} found")
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
        settings = content["settings"]
        least = "its threshold" if settings["thresholds"] else f"{settings['threshold']:g}"
        lines.append(f"no score of {least} or more: {shown}{more}")
    return "\n".join(lines)
