"""What the server answers with: the detectors of a checkpoint, compiled for every canvas, and the queries that it caches."""

import asyncio
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from glip_jax import UserError
from glip_jax.cli.query import Query, QueryError, names_between_commas, query_of_names, query_of_text
from glip_jax.cli.serving.batching import Batcher
from glip_jax.cli.serving.images import pixels_of
from glip_jax.config import Config
from glip_jax.inference import Detector, bucket
from glip_jax.io import provenance
from glip_jax.io.cores import available_cores
from glip_jax.io.image_files import ImageFileError
from glip_jax.labeling.phrases.finders import LexiconPhraseFinder
from glip_jax.structures.batch import Prompt
from glip_jax.structures.canvas import canvas_size, resize

__all__ = ["Answer", "Limits", "Model", "Service", "UnknownLabelsError", "about", "serving_config"]

logger = logging.getLogger(__name__)

_VOCABULARIES = 256
"""Queries that are kept."""
_TEXT = 4000
"""Characters of a text; the model reads some hundred tokens, and finding phrases in more takes long."""
_CHARACTERS = 200_000
"""Characters of a list of names."""
_MEASURE = 2.0
"""Seconds for measuring how long a batch takes."""
_GAIN = 1.1
"""How much less time a batch must take than its images one by one."""


@dataclass(frozen=True)
class Limits:
    """What a request may be and take."""

    images: int = 16
    """Images of a request."""
    names: int = 1000
    """Names of a request."""
    bytes_: int = 32_000_000
    """Bytes of its body."""
    body_seconds: float = 30.0
    """Time to send it."""
    seconds: float = 60.0
    """Time until its answer, from when its body is there."""
    queue: int = 64
    """Requests, and images of all of them, at a time."""


class Model(NamedTuple):
    """What every answer says of the checkpoint."""

    name: str
    """WORKDIR: step STEP."""
    sha256: str
    """Of the parameters, as `Checkpoint.fingerprint` gives it."""
    threshold: float
    """Lowest score where a request gives none."""
    about: dict[str, Any]
    """`checkpoint` and `versions`, as in every answer."""


class Answer(NamedTuple):
    """What was found in an image."""

    width: int
    height: int
    """Pixels of the image, upright."""
    detections: list[dict[str, Any]]
    """`box` (x1, y1, x2, y2 in pixels), `name`, `phrase` (its index in what was asked) and `score`, by descending score."""
    notes: tuple[str, ...]
    """How the image was read."""


class UnknownLabelsError(UserError, LookupError):
    """An identifier of labels that are not kept, or not any more."""


def serving_config(config: Config) -> Config:
    """The config with canvases for every image: `data.aspects` and, where these do not hold the longest images, the two longest."""
    rule, multiple = config.evaluation, config.model.input.extent_multiple
    aspects = config.data.aspects
    for aspect in (rule.long_side / rule.short_side, rule.short_side / rule.long_side):
        need = canvas_size(rule.short_side, aspect, rule.long_side, multiple)
        known = (canvas_size(rule.short_side, own, rule.long_side, multiple) for own in aspects)
        if not any(canvas[0] >= need[0] and canvas[1] >= need[1] for canvas in known):
            aspects = (*aspects, aspect)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, aspects=aspects))


class Service:
    """Detects for many clients; `compile` and `start` come first."""

    def __init__(
        self, config: Config, params: Any, model: Model, limits: Limits, batch_size: int = 0, devices: Sequence[Any] | None = None
    ) -> None:  # fmt: skip
        """`config`: from `serving_config`. `batch_size`: images per device and step; 0: evaluation.batch_size."""
        self.config, self.model, self.limits = config, model, limits
        # A name has a token at least and a separator.
        budget = config.model.text.max_tokens
        self.phrases = max(16, -(-(config.evaluation.chunk or budget // 2) // 8) * 8)
        """Phrases that a prompt may have."""
        padding = (budget, self.phrases)
        detector = Detector(config, params, batch_size or None, devices=devices, padding=padding)
        single = Detector(config, None, 1, texts_of=detector, devices=detector.devices[:1], padding=padding)
        self.batcher = Batcher(detector, single, limit=limits.queue)
        self.canvases: set[tuple[int, int]] = set()
        self._vocabularies: OrderedDict[Any, Query] = OrderedDict()
        self._named: OrderedDict[str, Query] = OrderedDict()
        self._lock = threading.Lock()
        self._finder = LexiconPhraseFinder()
        # Bytes of uploads and decoded images are large: no more of them at a time than there are cores.
        self._decoders = ThreadPoolExecutor(available_cores(), "decode")

    def compile(self, say: Callable[[str], None] = logger.info) -> None:
        """Compiles all programs: each canvas for one image and for a full batch. `say` gets a line for each canvas."""
        detector, single = self.batcher.detector, self.batcher.single
        shapes = _shapes(self.config)
        asked = [(Prompt("thing", (((0, 5),),)), np.arange(1))]
        for number, (canvas, shape) in enumerate(sorted(shapes.items()), 1):
            begin = time.monotonic()
            image = np.zeros((*shape, 3), np.uint8)
            for each in (single, detector):
                each.queries_async([image] * each.group_size, [asked] * each.group_size)()
            say(
                f"canvas {canvas[1]} x {canvas[0]}: compiled, or read from the cache, in {time.monotonic() - begin:.1f} s ({number} of {len(shapes)})"
            )
            if number == 1:
                ratio = _ratio(detector, single, image, asked)
                self.batcher.ratio = _GAIN * ratio
                say(f"a batch of {detector.group_size} takes {ratio:.1f} times as long as one image")
            self.canvases.add(canvas)

    def start(self) -> None:
        """Starts the thread of the detectors."""
        self.batcher.start()

    def stop(self) -> None:
        """Ends all threads, when what they have is done."""
        self.batcher.stop()
        self._decoders.shutdown()

    def query(self, names: str | Sequence[str] = "", text: str = "", labels: str = "") -> Query:
        """The query of one of the three: names (with commas between, or a list), a text, or an identifier of `keep`.

        Raises QueryError: none or several are given, too many, or what `query_of_names` and `query_of_text` refuse; UnknownLabelsError.
        """
        names = names if isinstance(names, str) else tuple(names)
        named = bool(names.strip()) if isinstance(names, str) else True
        given = [
            what for what, there in (("names", named), ("text", text.strip()), ("labels", labels.strip())) if there
        ]
        if len(given) != 1:
            raise QueryError(
                f"expected one of names, text and labels, found {' and '.join(given) or 'none of them, or empty ones'}"
            )
        if labels.strip():
            with self._lock:
                if labels not in self._named:
                    raise UnknownLabelsError(
                        f"labels {labels!r:.40} are not known, or not any more: set them again with POST /labels"
                    )
                self._named.move_to_end(labels)
                return self._named[labels]
        key = (names, text)
        with self._lock:
            if key in self._vocabularies:
                self._vocabularies.move_to_end(key)
                return self._vocabularies[key]
        found = self._read(names, text)
        with self._lock:
            _keep(self._vocabularies, key, found)
        return found

    def keep(self, names: str | Sequence[str]) -> tuple[str, Query]:
        """An identifier of a list of names, which `query` takes instead of them, and the query. Raises as `query`."""
        found = self.query(names)
        identifier = hashlib.sha256("\0".join(found.names).encode()).hexdigest()[:16]
        with self._lock:
            _keep(self._named, identifier, found)
        return identifier, found

    def _read(self, names: str | Sequence[str], text: str) -> Query:
        tokenizer = self.batcher.detector.tokenizer
        if text.strip():
            if len(text) > _TEXT:
                raise QueryError(f"text has {len(text)} characters: expected at most {_TEXT}; give names")
            found = query_of_text(text, self.config, "text", "names", self._finder, tokenizer)
        else:
            size = len(names) if isinstance(names, str) else sum(map(len, names))
            if size > _CHARACTERS:
                raise QueryError(f"names have {size} characters: expected at most {_CHARACTERS}")
            entries = names_between_commas(names, "names") if isinstance(names, str) else names
            if len(entries) > self.limits.names:
                raise QueryError(
                    f"{len(entries)} names: expected at most {self.limits.names}; ask in several requests, or start the server with --max-names"
                )
            found = query_of_names(entries, self.config, "names", tokenizer)
        most = max(len(prompt.spans) for prompt in found.prompts)
        if most > self.phrases:
            raise QueryError(
                f"text has {most} phrases: expected at most {self.phrases}; give names, which are asked in several prompts"
            )
        return found

    async def detect(
        self, images: Sequence[tuple[str, Callable[[], bytes]]], query: Query, threshold: float
    ) -> list[Answer]:
        """What is found in images, each with what messages call it and a function that reads its bytes.

        Raises ImageFileError for the first that is no image or does not fit a canvas, QueueFullError.
        """
        with self.batcher.places(len(images)):
            return await _all([self._one(name, read, query, threshold) for name, read in images])

    async def _one(self, name: str, read: Callable[[], bytes], query: Query, threshold: float) -> Answer:
        image = await asyncio.get_running_loop().run_in_executor(self._decoders, self._decoded, name, read)
        height, width, notes = image.height, image.width, image.notes
        future = self.batcher.submit(image.pixels, _prompts(query))
        scale = np.tile(np.divide((width, height), image.pixels.shape[1::-1]), 2)
        del image
        found = await asyncio.wrap_future(future)
        texts = query.names or [phrase.text for phrase in query.phrases]
        detections = [
            {
                "box": [round(float(side), 2) for side in box * scale],
                "name": texts[phrase],
                "phrase": int(phrase),
                "score": score,
            }
            for box, score, phrase in zip(found.boxes, (round(float(each), 4) for each in found.scores), found.phrases)
            if score >= threshold
        ]
        return Answer(width, height, detections, notes)

    def _decoded(self, name: str, read: Callable[[], bytes]) -> "_Decoded":
        """The pixels of an image, which fit a canvas that is compiled. Raises ImageFileError, which begins with `name`."""
        try:
            pixels, notes = pixels_of(read())
        except ImageFileError as error:
            raise ImageFileError(error.reason, name, error.kind) from None
        height, width = pixels.shape[:2]
        long_side, canvas = self.config.evaluation.long_side, bucket(height, width, self.config)[1]
        if max(canvas) > 2 * long_side:
            raise ImageFileError(
                f"has {width} x {height} pixels: too long and narrow for this model; cut it into pieces", name
            )
        if canvas not in self.canvases:
            # Because the short side is rounded first, the long one may be longer than the longest canvas.
            shrink = long_side / max(height, width)
            pixels = resize(pixels, (max(1, round(height * shrink)), max(1, round(width * shrink))))
        return _Decoded(pixels, height, width, notes)


class _Decoded(NamedTuple):
    """A decoded image."""

    pixels: UInt8[np.ndarray, "h w 3"]
    height: int
    width: int
    """Of the image; `pixels` has fewer where it would not fit a canvas."""
    notes: tuple[str, ...]


def about(name: str, step: int | None, sha256: str) -> dict[str, Any]:
    """`checkpoint` and `versions` of every answer."""
    versions = provenance.versions()
    own = "not installed"
    try:
        own = importlib.metadata.version("glip_jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout
        own = f"code {provenance.code()['files'][:12]}"
    kept = ("python", "jax", "jaxlib", "flax", "numpy", "pillow", "tokenizers", "device")
    return {
        "checkpoint": {"name": name, "step": step, "sha256": sha256},
        "versions": {"glip_jax": own} | {key: versions[key] for key in kept},
    }


async def _all(coroutines: Sequence[Any]) -> list[Any]:
    """The results of all; where one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


@functools.lru_cache(_VOCABULARIES)
def _prompts_of(prompts: tuple[Any, ...], numbers: tuple[int, ...]) -> list[tuple[Any, Any]]:
    order = np.asarray(numbers)
    return [(prompt, np.flatnonzero(order == number)) for number, prompt in enumerate(prompts)]


def _prompts(query: Query) -> list[tuple[Any, Any]]:
    """The prompts of a query, each with the numbers of its phrases; the same objects for the same query."""
    return _prompts_of(query.prompts, tuple(phrase.prompt for phrase in query.phrases))


def _keep(cache: OrderedDict[Any, Query], key: Any, query: Query) -> None:
    cache[key] = query
    cache.move_to_end(key)
    while len(cache) > _VOCABULARIES:
        cache.popitem(last=False)


def _shapes(config: Config) -> dict[tuple[int, int], tuple[int, int]]:
    """The canvases that images of up to 12 to 1 reach, each with the (height, width) of such an image."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    rule, multiple = config.evaluation, config.model.input.extent_multiple
    known = {canvas_size(rule.short_side, aspect, rule.long_side, multiple) for aspect in config.data.aspects}
    for ratio in np.geomspace(1 / 12, 12, 401):
        shape = (round(1000 * ratio), 1000) if ratio >= 1 else (1000, round(1000 / ratio))
        canvas = bucket(*shape, config)[1]
        if canvas in known:
            found.setdefault(canvas, shape)
    return found


def _ratio(detector: Detector, single: Detector, image: UInt8[np.ndarray, "H W 3"], asked: Any) -> float:
    """Seconds of a full batch divided by those of one image; the least of as many runs as a moment has room for, because other load only adds."""
    seconds: dict[Detector, list[float]] = {detector: [], single: []}
    closing = time.monotonic() + _MEASURE
    while not seconds[detector] or time.monotonic() < closing:
        for each, taken in seconds.items():
            begin = time.monotonic()
            each.queries_async([image] * each.group_size, [asked] * each.group_size)()
            taken.append(time.monotonic() - begin)
    return min(seconds[detector]) / min(seconds[single])
