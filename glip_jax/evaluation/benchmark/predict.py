"""The detector over the prompts of a set: blocks of images, resumable, shared by several processes; then the predictions file."""

import dataclasses
import functools
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from glip_jax import UserError
from glip_jax.config import Config
from glip_jax.evaluation.benchmark.blocks import Blocks, Cut, concatenated
from glip_jax.evaluation.benchmark.prompted import PromptedImage, PromptedSet, SharedPrompts, prediction_rows
from glip_jax.evaluation.benchmark.prompts import missing_images, mode_config, read_prompts
from glip_jax.evaluation.benchmark.results import CHUNKING, cut_path
from glip_jax.evaluation.benchmark.retrieval import best_of_names, narrowed, retrieval_mode, retrieved_names
from glip_jax.evaluation.benchmark.scoring import cut_annotations, file_hashes
from glip_jax.evaluation.benchmark.sets import BenchmarkError, BenchmarkSet, PromptMode, protocol, scored_annotations
from glip_jax.evaluation.chunking import Chunking, requested
from glip_jax.evaluation.shares import Share
from glip_jax.inference import pipelined
from glip_jax.io import assets
from glip_jax.io.image_files import ImageFileError, read_annotated
from glip_jax.io.paths import OutsideError, within
from glip_jax.io.provenance import score_settings
from glip_jax.io.retry import StorageError
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.prompts import load_tokenizer

__all__ = ["PromptDetector", "Run", "compare_chunks", "detect", "predict"]

logger = logging.getLogger(__name__)

_LVIS_CUT = Cut(per_class=10_000, per_image=300)
"""What fixed AP counts (Dave et al., Evaluating Large-Vocabulary Object Detectors) and what LVIS' own evaluation counts."""
_PARTS = 8
"""Prompts from which on the predictions of a set are written in parts, one a prompt."""
_NONE = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


class _Read(NamedTuple):
    """An image that was read."""

    pixels: UInt8[np.ndarray, "H W 3"]
    digest: str
    """SHA-256 of its file."""
    notes: tuple[str, ...]


@runtime_checkable
class PromptDetector(Protocol):
    """The part of `glip_jax.inference.Detector` that a benchmark needs."""

    @property
    def group_size(self) -> int:
        """Images of a call that keeps all devices busy."""
        ...

    def canvas(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Resized size and canvas of an image."""
        ...

    def detect_async(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Sequence[Prompt]], /
    ) -> Callable[[], list[list[Detections]]]:
        """Starts the detection; the function that it returns waits for one `Detections` per image and prompt."""
        ...


@dataclass(frozen=True)
class Run:
    """What all sets of a benchmark share."""

    data: str
    """Folder of the files of the sets."""
    workdir: epath.Path
    config: Config
    """Settings of the checkpoint; sets change those that they fix (`ask_config`)."""
    detector: Callable[[Config], PromptDetector]
    """The detector with other settings."""
    about: Mapping[str, Any]
    """The checkpoint, for results.json; its hashes.parameters decides whether detections that are there are of it."""
    share: Share
    order: int | None = None
    """Seed of a shuffled order of the category names; None: by id."""
    other_counts: bool = False
    """Annotation files of other versions are noted, not refused."""


def predict(run: Run, item: BenchmarkSet, mode: PromptMode, folder: epath.Path | None = None) -> None:
    """Detects a set in one prompt mode, and writes its predictions to `folder` (default: WORKDIR/SET/MODE); what is there is not made
    again.

    Every process detects its blocks, then process 0 merges them. Of a mode with `retrieved` names the blocks of the cheap pass stay in
    `folder`/retrieval. Raises BenchmarkError, in all processes, for files that cannot be used and for detections of another checkpoint.
    """
    folder = folder or run.workdir / item.name / mode.name
    names = None
    if mode.retrieved:
        prompted, blocks = _detected(
            run, item, retrieval_mode(mode), folder / "retrieval", cut=Cut(per_image=mode.retrieved)
        )
        names = retrieved_names(prompted, blocks.rows())
    prompted, blocks = _detected(run, item, mode, folder, names)
    if run.share.index == 0:
        _write(run, prompted, blocks)


def compare_chunks(run: Run, item: BenchmarkSet, mode: PromptMode, chunking: Chunking) -> None:
    """Detects a set with its names in prompts of other sizes and orders, and writes predictions to WORKDIR/SET/chunking/MODE_CHUNK_ORDER.

    The prompts of `mode` come first, as the reference; where the predictions of the set are of these prompts and images, they are
    it. `results.collect` scores what is there. Raises as `predict`.
    """
    images = chunking.images or run.config.evaluation.max_images
    evaluation = dataclasses.replace(run.config.evaluation, max_images=images)
    for chunk, seed in dict.fromkeys([(mode.chunk, run.order), *requested(chunking)]):
        if (chunk, seed, images) != (mode.chunk, run.order, run.config.evaluation.max_images):
            other = dataclasses.replace(run, order=seed, config=dataclasses.replace(run.config, evaluation=evaluation))
            order = "by_id" if seed is None else f"seed_{seed}"
            folder = run.workdir / item.name / CHUNKING / f"{mode.name}_{chunk}_{order}"
            predict(other, item, dataclasses.replace(mode, chunk=chunk), folder)


def _detected(
    run: Run, item: BenchmarkSet, mode: PromptMode, folder: epath.Path, names: Mapping[Any, Sequence[Any]] | None = None,
    cut: Cut | None = None,
) -> tuple[PromptedSet, Blocks]:  # fmt: skip
    """A set whose detections are all in the blocks of `folder`. Raises BenchmarkError in all processes.

    `names`: by id of the image, its names; None: those of the mode. `cut`: only the best detection of each name is kept, within this
    cut; None: that of the set.
    """
    fault, prompted, blocks = "", None, None
    try:
        prompted, blocks = _opened(run, item, mode, folder, names, cut)
        if blocks.done is None:
            chosen = None if cut is None else best_of_names
            detect(run.detector(mode_config(run.config, mode)), prompted, blocks, run.share, chosen=chosen)
    except StorageError:
        raise
    except UserError as error:
        fault = str(error)
    # In all processes, or the others would wait for one that has gone on to the next set.
    if faults := [each for each in run.share.gather(fault) if each]:
        raise BenchmarkError(faults[0])
    assert prompted is not None
    assert blocks is not None
    return prompted, blocks


def _opened(
    run: Run, item: BenchmarkSet, mode: PromptMode, folder: epath.Path, names: Mapping[Any, Sequence[Any]] | None, cut: Cut | None
) -> tuple[PromptedSet, Blocks]:  # fmt: skip
    """The prompts of a set, and its blocks in `folder`. Raises BenchmarkError or PromptError."""
    config = mode_config(run.config, mode)
    tokenizer = load_tokenizer(assets.resolve(config.model.text.vocabulary))
    prompted = read_prompts(item, run.data, mode, tokenizer, config, run.order, run.other_counts)
    if not prompted.images:
        raise BenchmarkError(f"{prompted.annotations} lists no images: expected at least one")
    total, limit = len(prompted.images), config.evaluation.max_images or len(prompted.images)
    prompted = dataclasses.replace(prompted, images=prompted.images[:limit])
    if names is not None:
        prompted = narrowed(prompted, names, tokenizer, config)
    if absent := missing_images(prompted):
        raise BenchmarkError(
            f"{len(absent)} of {len(prompted.images)} images of {item.name} are missing or empty in {prompted.folder}, the first is "
            f"{absent[0]}: a download that stopped?"
        )
    files = file_hashes(item, run.data)
    settings = score_settings(config)
    if config.model.input.extent == "image":
        del settings["evaluation.batch_size"]  # scores do not depend on it
    used = {
        **protocol(item, mode, run.order), "images": "all" if limit >= total else limit,
        "counts": "as published" if prompted.as_published else "other",
    }  # fmt: skip
    if isinstance(prompted.images, SharedPrompts):
        used["prompts_per_image"] = len(prompted.images[0].prompts)
    plan = {
        "parameters": run.about["hashes"]["parameters"],
        "settings": settings,
        "files": {role: file["sha256"] for role, file in files.items()},
        "order": run.order,
        **({"retrieved": [mode.retrieved, mode.retrieval_side]} if mode.retrieved else {}),
        "about": {
            "checkpoint": run.about, "protocol": used, "counts": dict(prompted.counts), "notes": list(prompted.notes), "files": files,
            "longest_prompt": max(len(q.keys) for image in prompted.images[:100] for q in image.image_prompts),
            "prompts": _prompts(prompted.images), "names": list(prompted.names.values()),
            "processes": run.share.count,
        },
    }  # fmt: skip
    blocks = _blocks(folder, prompted, plan) if cut is None else Blocks(folder, plan, len(prompted.images), 1, cut)
    if run.share.index == 0 and blocks.done is None:
        for note in prompted.notes:
            _note(f"note: {item.name}: {note}")
        blocks.begin()
    return prompted, blocks


@functools.lru_cache(maxsize=1024)
def _note(text: str) -> None:
    """Logs a note, the same one once in a process: several prompt modes read the same files."""
    logger.info(text)


def _prompts(images: Sequence[PromptedImage]) -> int:
    """Number of prompts of all images."""
    if isinstance(images, SharedPrompts):
        return len(images) * len(images[0].prompts)
    return sum(len(image.prompts) for image in images)


def _blocks(folder: epath.Path, prompted: PromptedSet, plan: Mapping[str, Any]) -> Blocks:
    """The blocks of a set in `folder`. Raises BenchmarkError if detections of another `plan` are there."""
    item, mode = prompted.item, prompted.mode
    lvis = any(metric.module == "lvis" for metric in item.metrics)
    cut = _LVIS_CUT if lvis else Cut(0, mode.boxes_per_image)
    prompts = len(prompted.images[0].prompts)
    parts = prompts if prompts >= _PARTS and isinstance(prompted.images, SharedPrompts) else 1
    return Blocks(folder, plan, len(prompted.images), parts, cut)


def _order(images: Sequence[PromptedImage]) -> Any:
    """Int[N]: the order of detection, by shape. Images of similar shape share a batch; as annotated, much of it would be padding."""
    shapes = [(image.height or 1) / max(image.width or 1, 1) for image in images]
    return np.argsort(np.asarray(shapes), kind="stable")


def detect(
    detector: PromptDetector,
    prompted: PromptedSet,
    blocks: Blocks,
    share: Share,
    progress: bool = True,
    chosen: Callable[[Any], Any] | None = None,
) -> None:
    """Detects the blocks of this process that are not there yet, and writes each when it is complete.

    `chosen`: the rows of a block that are kept; None: all.

    Raises BenchmarkError for an image that is missing, damaged or of another size than annotated: numbers on the others would be
    those of another set.
    """
    order, own_blocks = _order(prompted.images), share.of(range(blocks.count))
    groups = list(_groups(detector, prompted, blocks, order, blocks.pending(own_blocks)))
    total, left = sum(len(blocks.members(block)) for block in own_blocks), sum(map(len, groups))
    notes, found, digests = Counter[str](), defaultdict[int, list[Any]](list), dict[int, str]()
    begin, interval = time.monotonic(), 0.2 if sys.stderr.isatty() else 30.0

    def read(member: tuple[int, int]) -> _Read:
        return _read(prompted, prompted.images[member[1]])

    def start(group: Sequence[tuple[int, int]], images: Sequence[_Read]) -> Callable[[], list[list[Detections]]]:
        prompts = [prompted.images[image].prompts for _, image in group]
        return detector.detect_async([image.pixels for image in images], prompts)

    with tqdm(total=total, initial=total - left, desc=f"{prompted.item.name} {blocks.folder.name}", unit="image",
              disable=not progress, mininterval=interval, maxinterval=interval) as bar:  # fmt: skip
        for group, images, detections in pipelined(groups, read, start):
            block = group[0][0]
            for (_, image), one, prompts in zip(group, images, detections, strict=True):
                digests[image] = one.digest
                notes.update(one.notes)
                found[block] += [(image, prompt, each) for prompt, each in enumerate(prompts)]
            own = [int(order[position]) for position in blocks.members(block)]
            if all(image in digests for image in own):
                rows = concatenated(iter(sorted(found.pop(block), key=lambda entry: entry[:2])))
                end = time.monotonic()
                rows = rows if chosen is None else chosen(rows)
                blocks.write(block, rows, [digests.pop(image) for image in own], end - begin)
                begin = end
            bar.update(len(group))
    if notes:
        logger.info("; ".join(f"{prompted.item.name}: noted {what} {count}" for what, count in notes.items()))


def _groups(
    detector: PromptDetector, prompted: PromptedSet, blocks: Blocks, order: Any, pending: Sequence[int]
) -> Iterator[list[tuple[int, int]]]:
    """(block, index of the image) of what the detector is called with: images of one block, and of one canvas if their size is known."""
    for block in pending:
        by_canvas = defaultdict[Any, list[tuple[int, int]]](list)
        for position in blocks.members(block):
            image = int(order[position])
            height, width = prompted.images[image][2:4]
            canvas = detector.canvas(height, width)[1] if height and width else None
            by_canvas[canvas].append((block, image))
        for members in by_canvas.values():
            for begin in range(0, len(members), detector.group_size):
                yield members[begin : begin + detector.group_size]


def _read(prompted: PromptedSet, image: PromptedImage) -> _Read:
    try:
        path = within(prompted.folder, image.file)
        pixels, digest, notes = read_annotated(path, (image.height, image.width), "auto")
    except (ImageFileError, OutsideError) as error:
        raise BenchmarkError(f"{prompted.item.name}, image {image.id}: {error}") from None
    annotated = (image.height or pixels.shape[0], image.width or pixels.shape[1])
    if annotated != pixels.shape[:2]:
        raise BenchmarkError(
            f"{prompted.item.name}: {path} has {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), the annotations say "
            f"{annotated[0]} x {annotated[1]}: boxes would not fit; use the images that were annotated"
        )
    return _Read(pixels, digest, notes)


def _write(run: Run, prompted: PromptedSet, blocks: Blocks) -> None:
    """Merges the blocks into the predictions in the form of the set, and cuts its annotations if only some images were asked."""
    if blocks.done is None and prompted.images and blocks.protocol["images"] != "all":
        for role in {"annotations", *(metric.file for metric in prompted.item.metrics)}:
            path = scored_annotations(prompted.item, run.data, role, run.workdir / "annotations")
            cut_annotations(prompted, str(path), cut_path(prompted.item, blocks.folder, role))
    mapping = prompted.item.form == "expressions"

    def write(path: epath.Path, rows: Any) -> None:
        aside = path.parent / f"{path.name}.unfinished" if "://" not in str(path) else path
        with aside.open("w") as file:
            file.write("{" if mapping else "[")
            separator = "\n"
            for entry in _entries(prompted, rows, blocks.parts > 1):
                if mapping:
                    key = json.dumps(str(entry["id"]))
                    text = f"{key}: {json.dumps({name: value for name, value in entry.items() if name != 'id'})}"
                else:
                    text = json.dumps(entry)
                file.write(f"{separator}{text}")
                separator = ",\n"
            file.write("\n}" if mapping else "\n]")
        if aside is not path:
            aside.replace(path)

    blocks.merge(_order(prompted.images), [image.file for image in prompted.images], _files_by_id(prompted), write)


def _files_by_id(prompted: PromptedSet) -> dict[str, str]:
    """The file of each image by the ids of the predictions: of expressions, or of images (Flickr30k: without the sentence)."""
    match prompted.item.form:
        case "expressions":
            return {
                str(image_prompt.id): image.file for image in prompted.images for image_prompt in image.image_prompts
            }
        case "flickr":
            return {
                str(image_prompt.id[0]): image.file for image in prompted.images for image_prompt in image.image_prompts
            }
        case _:
            return {str(image.id): image.file for image in prompted.images}


def _entries(prompted: PromptedSet, rows: Any, one_prompt: bool) -> Iterator[dict[str, Any]]:
    """The entries of the predictions file of all images; `rows` are sorted by image, and with `one_prompt` all of one prompt."""
    edges = np.searchsorted(rows["image"], np.arange(len(prompted.images) + 1))
    if one_prompt:
        for index in np.flatnonzero(np.diff(edges)).tolist():
            image, own = prompted.images[index], rows[edges[index] : edges[index + 1]]
            image = image._replace(image_prompts=(image.image_prompts[int(own["prompt"][0])],))
            yield from prediction_rows(prompted.item, image, [Detections(own["box"], own["score"], own["phrase"])])
        return
    for index, image in enumerate(prompted.images):
        own = rows[edges[index] : edges[index + 1]]
        found = [_NONE] * len(image.prompts)
        for prompt in np.unique(own["prompt"]).tolist():
            each = own[own["prompt"] == prompt]
            found[prompt] = Detections(each["box"], each["score"], each["phrase"])
        yield from prediction_rows(prompted.item, image, found)
