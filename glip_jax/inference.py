"""The Detector: images and prompts in, boxes out. Evaluation, labelling and prediction use it.

    detector = Detector(config, params)                          # or glip_jax.load_detector(WORKDIR or EXPORT)
    (found,) = detector(["shelf.jpg"], ["green book", "snail"])
    found.boxes, found.scores, found.names                       # xyxy in pixels, descending scores, one name per box

Results are batch invariant: each image is processed at its own extent, so its detections do not depend on the canvas or on the
other images of the batch. The Detector therefore groups images to save compilations.
"""

import contextlib
import functools
import logging
import os
import re
import unicodedata
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from glip_jax.config import Config, DetectionConfig, ModelConfig
from glip_jax.io import assets
from glip_jax.io.compiler_lines import without_slow_compile_alarms
from glip_jax.io.image_files import read_upright, upright
from glip_jax.io.paths import checked
from glip_jax.models.glip import GLIP, normalize
from glip_jax.models.postprocess import detect
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections, Prompt, TokenizedPrompt
from glip_jax.structures.canvas import canvas_size, pad_to_canvas, resize, target_size

__all__ = [
    "Detector", "ImageDetections", "bucket", "category_prompts", "check_characters", "check_query", "chunk", "phrase_spans",
    "sentence_spans",
]  # fmt: skip

logger = logging.getLogger(__name__)

_PHRASE_SLOTS = 8
"""Initial number of phrase slots of the compiled program; it doubles when a prompt has more phrases."""
_SEPARATOR = re.compile(r"(?<!\S)\.(?!\S)")
_CACHED_TEXTS = 256
"""Captions whose encoded states a Detector caches: 200 MB at 256 tokens of width 768."""


def category_prompts(
    names: Sequence[str], tokenizer: prompts.Tokenizer, config: Config
) -> list[tuple[Prompt, tuple[int, ...]]]:
    """Prompts for `names`: each with the indices in `names` of its phrases.

    A prompt holds as many consecutive names as `config.evaluation.chunk` and the token budget allow. Raises PromptError for a
    name that is empty after cleaning or exceeds the budget alone, and for an empty list.
    """
    if not names:
        raise prompts.PromptError("there are no names to detect: expected at least one")
    separator, budget = config.data.captions.separator, config.model.text.max_tokens
    chunks = chunk(names, tokenizer, budget, separator, config.evaluation.chunk)
    return [(prompts.prompt_from_categories([names[i] for i in part], separator), tuple(part)) for part in chunks]


def check_query(
    entries: Sequence[str], tokenizer: prompts.Tokenizer, where: str, clean: Callable[[str], str] = prompts.clean_name,
    what: str = "name",
) -> list[str]:  # fmt: skip
    """Checks names or phrases that a user asks for, and returns notes on what is not asked as it was typed.

    `clean`: their text in the prompt; `what`: "name" or "phrase". Raises PromptError, which begins with `where`, for an empty
    list, an entry that is empty or no text, characters that the model does not read, words of which the vocabulary knows
    nothing, and entries that are the same to the model.
    """
    if not entries:
        raise prompts.PromptError(f"{where}: there are no {what}s to detect: expected at least one")
    for number, entry in enumerate(entries, 1):
        which = f"{where}: {what} {number} of {len(entries)}"
        if not isinstance(entry, str):
            raise prompts.PromptError(f"{which} is {entry!r:.60}, {type(entry).__name__}: expected text")
        check_characters(which, entry)
        if not clean(entry).strip():
            left = f" ({entry!r}: parentheses are removed)" if entry.strip() else ""
            raise prompts.PromptError(f"{which} is empty{left}: give it a text or remove it")
    notes = prompts.check_names(entries, tokenizer, where, "remove it or say it otherwise", clean=clean, what=what)
    changed = [entry for entry in entries if "(" in entry and "(" not in clean(entry)]
    if changed:
        shown = prompts.listed([f"{entry} -> {clean(entry).strip()}" for entry in changed])
        notes.append(f"{where}: asked without what stands in parentheses, as in training: {shown}")
    return notes


def check_characters(where: str, text: str, allowed: str = "") -> None:
    """Raises PromptError for a character that tokenization drops: a control character or a broken encoding."""
    for character in text:
        broken = unicodedata.category(character) in ("Cc", "Cs") or character == "\ufffd"
        if broken and character not in allowed:
            raise prompts.PromptError(
                f"{where} ({prompts.listed([text])}) has the character U+{ord(character):04X}: a control character or a broken "
                "encoding, expected readable UTF-8 text"
            )


def chunk(
    names: Sequence[str], tokenizer: prompts.Tokenizer, max_tokens: int, separator: str = ". ", limit: int = 0
) -> list[list[int]]:
    """Splits category names into prompts: lists of consecutive indices, each as long as the token budget allows.

    The `prompt_from_categories` of a list has at most `max_tokens` tokens ([CLS] and [SEP] included) and, if `limit` > 0, at
    most `limit` names. Deterministic. Raises PromptError for a name that exceeds the budget alone.
    """

    def count(indices: list[int]) -> int:
        return len(tokenizer.encode(prompts.prompt_from_categories([names[i] for i in indices], separator).caption).ids)

    chunks: list[list[int]] = []
    for index, name in enumerate(names):
        full = not chunks or (limit > 0 and len(chunks[-1]) >= limit)
        if not full and count([*chunks[-1], index]) <= max_tokens:
            chunks[-1].append(index)
            continue
        alone = count([index])
        if alone > max_tokens:
            raise prompts.PromptError(
                f"category {index} ({name!r}) alone takes {alone} tokens with [CLS] and [SEP], the budget is "
                f"{max_tokens}: shorten the name or raise model.text.max_tokens"
            )
        chunks.append([index])
    return chunks


class ImageDetections(NamedTuple):
    """Detections of one image in order of descending score, as a call of the Detector returns them."""

    boxes: Float32[np.ndarray, "N 4"]
    """xyxy, pixels of the image after EXIF rotation."""
    scores: Float32[np.ndarray, " N"]
    """sqrt(alignment * centerness), in [0, 1]."""
    names: list[str]
    """Per box the name, or the phrase of the caption, that it was detected for."""


class _PendingBatch(NamedTuple):
    """A batch that was dispatched to the device."""

    detections: Detections
    """Device arrays, possibly not computed yet."""
    rows: list[tuple[int, Any, Float32[np.ndarray, "4"]]]
    """Per row in use: index of the image, indices of the phrases of its prompt, scale from resized to image pixels."""


class _Programs:
    """The jitted parts of the network. Detectors of the same settings share them, so that none traces what another has."""

    def __init__(self, model: ModelConfig, detection: DetectionConfig) -> None:
        self.model, self.detection, self.network = model, detection, GLIP(model)
        self.traced: Counter[str] = Counter()
        self.encode_image = jax.jit(self._encode_image)
        self.encode_text = jax.jit(self._encode_text)
        self.ground = jax.jit(self._ground, static_argnames="canvas")

    # These run when jax traces them: once per shape. So `traced` counts programs.

    def _encode_image(self, params: Any, image: Array, size: Array, extent: Array) -> Any:
        self.traced["image"] += 1
        pixels = normalize(image, size, self.model.input)
        return self.network.apply({"params": params}, pixels, extent, method="encode_image")

    def _encode_text(self, params: Any, tokens: Array, mask: Array) -> Any:
        self.traced["text"] += 1
        return self.network.apply({"params": params}, tokens[None], mask[None], method="encode_text")[0]

    def _ground(
        self, params: Any, levels: Any, size: Array, extent: Array, text: Array, mask: Array, phrase_map: Array,
        canvas: tuple[int, int],
    ) -> Detections:  # fmt: skip
        self.traced["ground"] += 1
        predictions = self.network.apply({"params": params}, levels, extent, text, mask, method="ground")
        return detect(predictions, phrase_map, size, extent, canvas, self.model, self.detection)  # type: ignore[arg-type]


_programs = functools.lru_cache(maxsize=8)(_Programs)


class Detector:
    """Detects the phrases of prompts in images, with one set of parameters.

    A call takes paths or images and returns boxes with names. The methods below take RGB arrays UInt8[H W 3] of any size and
    return `Detections`: boxes xyxy in pixels of the array, descending scores in [0, 1], indices of phrases. Candidates below
    `config.detection.threshold` are left out.

    Features of an image are computed once for all its prompts, states of a caption once (the latest are cached). Every batch
    has `batch_size` images, so each canvas is compiled once: for the image encoder, and for the head with the text.
    """

    def __init__(
        self, config: Config, params: Any, batch_size: int | None = None, texts_of: "Detector | None" = None,
        read_caption: Callable[[str], Prompt] | None = None,
    ) -> None:  # fmt: skip
        """Moves `params` (parameters of `GLIP`, nested dict) to the device; nothing is compiled yet.

        Args:
            config: settings of the network, of post-processing and of evaluation (sizes, names per prompt).
            params: host or device arrays.
            batch_size: images per batch; default: config.evaluation.batch_size. Fewer images cost as much as a full batch,
                so use 1 to process single images.
            texts_of: another detector with the same parameters, whose cache of encoded captions is shared.
            read_caption: converts a caption that the detector is called with to a prompt; default: phrases with " . " between.
        """
        self.config, self.batch_size = config, batch_size or config.evaluation.batch_size
        # Host arrays would be copied to the device in every call.
        self.params = jax.tree.map(jnp.asarray, params)
        self.tokenizer = prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
        self._read_caption = read_caption or _phrases
        self._texts: OrderedDict[str, Array] = OrderedDict() if texts_of is None else texts_of._texts
        self._tokenized: OrderedDict[str, TokenizedPrompt] = OrderedDict()
        self._chunks: tuple[tuple[str, ...], list[tuple[Prompt, tuple[int, ...]]]] = ((), [])
        self._slots = _PHRASE_SLOTS
        self._compiled: set[tuple[tuple[int, int], int]] = set()
        self._checked: list[str] | None = None
        self._programs = _programs(config.model, config.detection)
        self._traced = self._programs.traced.copy()

    @property
    def compiled(self) -> Counter[str]:
        """Number of programs that were traced, and compiled or read from the compilation cache, by part: image, text, ground."""
        return self._programs.traced - self._traced

    def canvas(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Resized size and canvas of an image, (height, width) in pixels; see `bucket`."""
        return bucket(height, width, self.config)

    def __call__(
        self, images: Sequence[Any], query: Sequence[str] | str | Prompt, threshold: float = 0.3
    ) -> list[ImageDetections]:
        """Detects in every image what `query` names.

        Args:
            images: paths (local or gs://), PIL images, or RGB arrays UInt8[H W 3]. Files and PIL images are rotated by their EXIF
                orientation; boxes are in pixels of the rotated image.
            query: a list of names of any length, each asked as it is typed, with commas and full stops; or a caption: phrases
                separated by " . ", or, for a detector from `glip_jax.load_detector`, a sentence, whose noun phrases are detected
                (else, what stands between full stops: "a cat. a dog."); or a Prompt.
            threshold: minimum score of returned detections.

        Returns:
            One ImageDetections per image.

        Raises:
            PromptError: names that are empty, not text, unknown to the vocabulary, or the same to the model; see `check_query`.
        """
        if isinstance(images, str | os.PathLike):
            raise ValueError(f"images is one path, {os.fspath(images)!r}: expected a list, [{os.fspath(images)!r}]")
        if isinstance(query, str):
            if not query.strip():
                raise prompts.PromptError(f"the query is {query!r}: expected a list of names or a text")
            query = self._read_caption(query)
        if isinstance(query, Prompt):
            names = [" ".join(query.caption[begin:end] for begin, end in spans) for spans in query.spans]
        else:
            names = list(query)
            if self._checked != names:
                for note in check_query(names, self.tokenizer, "query"):
                    logger.warning(f"note: {note}")
                self._checked = names
        results = []
        for begin in range(0, len(images), self.batch_size):
            group = [_rgb(image) for image in images[begin : begin + self.batch_size]]
            if isinstance(query, Prompt):
                found = self.caption(group, [query] * len(group))
            else:
                found = self.categories(group, names)
            for each in found:
                chosen = each.scores >= threshold
                phrases = [names[phrase] for phrase in each.phrases[chosen]]
                results.append(ImageDetections(each.boxes[chosen], each.scores[chosen], phrases))
        return results

    def text(self, prompt: Prompt) -> tuple[TokenizedPrompt, Array]:
        """Tokens of a prompt and the encoded states of its caption, Float[T D]. Raises PromptError if it exceeds the token budget."""

        def encode() -> Array:
            return self._programs.encode_text(self.params, tokenized.tokens, tokenized.mask)

        budget = self.config.model.text.max_tokens
        key = repr(tuple(prompt))  # spans read from JSON are lists, which are not hashable
        tokenized = _cached(self._tokenized, key, lambda: prompts.tokenize(prompt, self.tokenizer, budget))
        return tokenized, _cached(self._texts, prompt.caption, encode)

    def categories(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]) -> list[Detections]:
        """Detections of category names, one entry per image; `phrases` are indices into `names`.

        Names that exceed the token budget of one prompt are split into several; each of these adds at most
        `config.detection.max_detections` detections. Raises PromptError as `category_prompts`.
        """
        if self._chunks[0] != tuple(names):
            self._chunks = tuple(names), category_prompts(names, self.tokenizer, self.config)
        chunks = [(prompt, np.asarray(indices)) for prompt, indices in self._chunks[1]]
        return [_merge(parts) for parts in self._dispatch(images, [chunks] * len(images))()]

    def caption(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Prompt]) -> list[Detections]:
        """Detections of one prompt per image; `phrases` are indices into the phrases of that prompt.

        Raises ValueError if the numbers of images and prompts differ, PromptError if a prompt exceeds the token budget.
        """
        if len(images) != len(prompts_):
            raise ValueError(f"{len(images)} images and {len(prompts_)} prompts: give one prompt per image")
        return [detections for (detections,) in self.captions(images, [[prompt] for prompt in prompts_])]

    def captions(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Sequence[Prompt]]
    ) -> list[list[Detections]]:
        """Detections of any number of prompts per image: per image one entry per prompt.

        `phrases` are indices into the phrases of the prompt. Features of an image are computed once for all its prompts.
        Raises as `caption`.
        """
        return self.detect_async(images, prompts_)()

    def detect_async(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Sequence[Prompt]]
    ) -> Callable[[], list[list[Detections]]]:
        """Starts `captions` on the device and returns a function that waits for the result and returns it.

        The caller can prepare the next images meanwhile. Features of the images stay in device memory until the function
        has returned, so keep one or two calls pending, not a whole folder.
        """
        if len(images) != len(prompts_):
            raise ValueError(f"{len(images)} images and prompts of {len(prompts_)}: give a list of prompts per image")
        return self._dispatch(images, [[(p, np.arange(len(p.spans))) for p in given] for given in prompts_])

    def _dispatch(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], queries: Sequence[Sequence[tuple[Prompt, Any]]]
    ) -> Callable[[], list[list[Detections]]]:
        """Runs the images canvas by canvas; `queries`: per image its prompts, each with the indices that its phrases get."""
        plans = [self.canvas(*image.shape[:2]) for image in images]
        pending: list[_PendingBatch] = []
        # Empty phrase slots are never detected; their number only grows, so that few programs are compiled.
        needed = max((len(prompt.spans) for query in queries for prompt, _ in query), default=1)
        while self._slots < needed:
            self._slots *= 2
        for canvas in sorted({canvas for _, canvas in plans}):
            members = [i for i, (_, planned) in enumerate(plans) if planned == canvas and queries[i]]
            for begin in range(0, len(members), self.batch_size):
                group = members[begin : begin + self.batch_size]
                ready = (canvas, self._slots) in self._compiled
                with contextlib.nullcontext() if ready else without_slow_compile_alarms():
                    pending += self._dispatch_group(group, [images[i] for i in group], [plans[i][0] for i in group], canvas,
                                                    [queries[i] for i in group])  # fmt: skip
                self._compiled.add((canvas, self._slots))

        def finish() -> list[list[Detections]]:
            results: list[list[Detections]] = [[] for _ in images]
            for batch in pending:
                detections = jax.tree.map(np.asarray, batch.detections)
                for row, (image, indices, ratio) in enumerate(batch.rows):
                    used = detections.phrases[row] >= 0
                    kept = jax.tree.map(lambda field, row=row, used=used: field[row][used], detections)
                    phrases = indices[kept.phrases].astype(np.int32)
                    results[image].append(kept._replace(boxes=kept.boxes * ratio, phrases=phrases))
            return results

        return finish

    def _dispatch_group(
        self, indices: list[int], images: list[Any], sizes: list[tuple[int, int]], canvas: tuple[int, int],
        queries: list[Sequence[tuple[Prompt, Any]]],
    ) -> Iterator[_PendingBatch]:  # fmt: skip
        """At most `batch_size` images of one canvas: encodes them once, then runs all their prompts."""
        multiple = self.config.model.input.extent_multiple
        spare = self.batch_size - len(images)
        pixels = [pad_to_canvas(resize(image, size), canvas) for image, size in zip(images, sizes)]
        pixels += [np.zeros((*canvas, 3), np.uint8)] * spare
        size = np.asarray([*sizes, *[(multiple, multiple)] * spare], np.int32)
        match self.config.model.input.extent:
            case "image":
                extent = -(-size // multiple) * multiple
            case "batch":
                extent = np.tile(np.asarray(canvas, np.int32), (len(size), 1))
        levels = self._programs.encode_image(self.params, np.stack(pixels), size, extent)
        # The first prompts of all images, then the second: if all have equally many, no features are gathered.
        requests = [(row, *given[turn]) for turn in range(max(map(len, queries))) for row, given in enumerate(queries)
                 if turn < len(given)]  # fmt: skip
        for begin in range(0, len(requests), self.batch_size):
            part = requests[begin : begin + self.batch_size]
            rows = np.asarray([row for row, _, _ in part])
            rest = np.asarray([row for row in range(self.batch_size) if row not in rows], np.int64)
            rows = np.concatenate([rows, np.resize(rest, self.batch_size - len(part))]).astype(np.int64)
            texts = [self.text(prompt) for _, prompt, _ in part]
            texts += texts[-1:] * (self.batch_size - len(part))
            maps = np.stack([np.pad(t.phrase_map, ((0, self._slots - len(t.phrase_map)), (0, 0))) for t, _ in texts])
            states, mask = jnp.stack([s for _, s in texts]), np.stack([t.mask for t, _ in texts])
            in_order = np.array_equal(rows, np.arange(self.batch_size))
            features = levels if in_order else _gathered(levels, rows)
            found = self._programs.ground(
                self.params, features, size[rows], extent[rows], states, mask, maps, canvas=canvas
            )
            ratios = [np.divide(images[row].shape[1::-1], size[row, ::-1]) for row, _, _ in part]
            yield _PendingBatch(found, [(indices[row], phrases, np.tile(ratio, 2).astype(np.float32))
                                        for (row, _, phrases), ratio in zip(part, ratios)])  # fmt: skip


@jax.jit
def _gathered(levels: Any, rows: Array) -> Any:
    """Features of the images `rows`, in this order; a row may repeat."""
    return jax.tree.map(lambda level: level[rows], levels)


def bucket(height: int, width: int, config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Resized size and canvas of an image, (height, width) in pixels: the smallest canvas of the config that the image fits.

    An image that fits none gets a canvas of its own extent, and with it its own compiled program.
    """
    rule, multiple = config.evaluation, config.model.input.extent_multiple
    size = target_size(height, width, rule.short_side, rule.long_side)
    extent = tuple(-(-side // multiple) * multiple for side in size)
    known = [canvas_size(rule.short_side, a, rule.long_side, multiple) for a in config.data.aspects]
    fitting = [c for c in known if c[0] >= extent[0] and c[1] >= extent[1]]
    return size, min(fitting, key=lambda c: c[0] * c[1]) if fitting else (extent[0], extent[1])


def phrase_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the phrases of "a dog . a red cup" without the spaces around; a dot at the end is allowed.

    Empty if no separator stands between words: then the text is a caption. An empty span is a phrase that is missing.
    """
    edges = [0, *(edge for match in _SEPARATOR.finditer(text) for edge in match.span()), len(text)]
    spans = []
    for begin, end in zip(edges[::2], edges[1::2]):
        piece = text[begin:end]
        lead = len(piece) - len(piece.lstrip())
        spans.append((begin + lead, begin + lead + len(piece.strip())))
    if spans[-1][0] == spans[-1][1]:
        spans.pop()
    return spans if len(spans) > 1 else []


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Spans of what stands between full stops: " . " if there is one (`phrase_spans`), else "a cat. a dog."; without any, all."""
    stops = [match.span() for match in re.finditer(r"\.(?!\S)", text)]
    edges = [0, *(edge for stop in stops for edge in stop), len(text)]
    pieces = [(begin, end) for begin, end in zip(edges[::2], edges[1::2]) if text[begin:end].strip()]
    stripped = [(end - len(text[begin:end].lstrip()), begin + len(text[begin:end].rstrip())) for begin, end in pieces]
    return phrase_spans(text) or stripped


def _phrases(text: str) -> Prompt:
    """The prompt of a text whose phrases stand between full stops. Raises PromptError for one without a phrase."""
    spans = sentence_spans(text)
    if not spans:
        raise prompts.PromptError(f"the text {text!r} names nothing: expected phrases with full stops between them")
    return Prompt(text, tuple((span,) for span in spans))


def _rgb(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a path, a PIL image or an array. Raises ImageFileError for a bad file, ValueError for an array of another type or shape."""
    if isinstance(image, str | os.PathLike):
        return read_upright(epath.Path(checked(image)))[0]
    if isinstance(image, Image.Image):
        return upright(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image is {array.dtype}{list(array.shape)}: expected a path, a PIL image or uint8[H W 3]")
    return array


def _cached(cache: OrderedDict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    """The value of `key` from an LRU cache of `_CACHED_TEXTS` entries."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > _CACHED_TEXTS:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def _merge(parts: list[Detections]) -> Detections:
    """Concatenated detections of several prompts, in order of descending score."""
    whole = Detections(*(np.concatenate(fields) for fields in zip(*parts)))
    order = np.argsort(-whole.scores, kind="stable")
    return Detections(*(field[order] for field in whole))
