"""From predictions to detections, and the Detector that evaluation, labelling and prediction share.

A score never depends on the company an image keeps: every image runs at its own extent, whatever canvas and batch it
is put into, so images may be grouped freely to save compilations.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float32, UInt8
from PIL import Image, ImageOps

from glip_jax.config import Config
from glip_jax.io import assets
from glip_jax.models.glip import GLIP, normalize
from glip_jax.models.postprocess import detect
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections, Prompt, TokenizedPrompt
from glip_jax.structures.canvas import canvas_size, pad_to_canvas, resize, target_size

__all__ = ["Detector", "ImageDetections", "bucket", "category_prompts"]

_PHRASE_SLOTS = 8
"""Least number of phrases that a program is compiled for; it doubles when a prompt has more."""
_TEXTS_KEPT = 256
"""Captions whose states a Detector remembers: 200 MB at 256 tokens of width 768."""


def category_prompts(
    names: Sequence[str], tokenizer: prompts.Tokenizer, config: Config
) -> list[tuple[Prompt, tuple[int, ...]]]:
    """The prompts that ask for `names`, each with the indices in `names` of its phrases.

    As many consecutive names a prompt as `config.evaluation.chunk` and the token budget admit. Raises PromptError for
    a name that cleaning empties, or that alone exceeds the budget, and if there are no names.
    """
    if not names:
        raise prompts.PromptError("there are no names to ask for: expected at least one")
    separator, budget = config.data.captions.separator, config.model.text.max_tokens
    chunks = prompts.chunk(names, tokenizer, budget, separator, config.evaluation.chunk)
    return [(prompts.prompt_from_categories([names[i] for i in chunk], separator), tuple(chunk)) for chunk in chunks]


class ImageDetections(NamedTuple):
    """What a Detector found in one image, best first."""

    boxes: Float32[np.ndarray, "N 4"]
    """x1, y1, x2, y2 in pixels of the image, which is upright."""
    scores: Float32[np.ndarray, "N"]
    """sqrt(alignment x centerness), between 0 and 1."""
    names: list[str]
    """The name, or the phrase of the caption, that each box was found for."""


class _Begun(NamedTuple):
    """What a device was asked for."""

    found: Detections
    """Of a batch, on the device, perhaps not there yet."""
    asked: list[tuple[int, Any, Float32[np.ndarray, "4"]]]
    """Per row that holds an answer: whose image it is, the numbers of its prompt's phrases, and by how much boxes grow."""


class Detector:
    """Finds what prompts name, with one set of parameters.

    Image features are computed once for all chunks of a prompt, text states once per caption (the latest are kept).
    Every step has `batch_size` images, so each canvas is compiled once: for the image side, and for the text beside it.
    """

    def __init__(
        self, config: Config, params: Any, batch_size: int | None = None, texts_of: "Detector | None" = None
    ) -> None:  # fmt: skip
        """`params` as in `GLIP`; `batch_size` images share one step (default: config.evaluation.batch_size).

        Fewer images than that cost as much as all of them: give 1 to look at single images. `texts_of`: another
        detector with the same parameters and text encoder, whose texts need not be encoded again.
        """
        self.config, self.batch_size = config, batch_size or config.evaluation.batch_size
        # Arrays of the host would travel to the device again with every step.
        self.params = jax.tree.map(jnp.asarray, params)
        self.tokenizer = prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
        self.compiled: Counter[str] = Counter()
        """Programs traced, and so compiled or read from the cache, by part: image, text, ground."""
        self.read_caption: Callable[[str], Prompt] = _phrases
        """Makes the prompt of a caption that the detector is called with."""
        self._texts: OrderedDict[str, Array] = OrderedDict() if texts_of is None else texts_of._texts
        self._tokenized: OrderedDict[str, TokenizedPrompt] = OrderedDict()
        self._chunks: tuple[tuple[str, ...], list[tuple[Prompt, tuple[int, ...]]]] = ((), [])
        self._slots = _PHRASE_SLOTS
        self._model = GLIP(config.model)
        self._encode_image = jax.jit(self._run_image)
        self._encode_text = jax.jit(self._run_text)
        self._ground = jax.jit(self._run_ground, static_argnames="canvas")

    # The bodies below run when jax traces them: once per shape, which is what `compiled` counts.

    def _run_image(self, params: Any, image: Array, size: Array, extent: Array) -> Any:
        self.compiled["image"] += 1
        pixels = normalize(image, size, self.config.model.input)
        return self._model.apply({"params": params}, pixels, extent, method="encode_image")

    def _run_text(self, params: Any, tokens: Array, mask: Array) -> Any:
        self.compiled["text"] += 1
        return self._model.apply({"params": params}, tokens[None], mask[None], method="encode_text")[0]

    def _run_ground(
        self, params: Any, levels: Any, size: Array, extent: Array, text: Array, mask: Array, phrase_map: Array,
        canvas: tuple[int, int],
    ) -> Detections:  # fmt: skip
        self.compiled["ground"] += 1
        found = self._model.apply({"params": params}, levels, extent, text, mask, method="ground")
        return detect(found, phrase_map, size, extent, canvas, self.config.model, self.config.detection)  # type: ignore[arg-type]

    def canvas(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size after resizing, and the canvas an image of that size runs on: see `bucket`."""
        return bucket(height, width, self.config)

    def __call__(
        self, images: Sequence[Any], query: Sequence[str] | str | Prompt, threshold: float = 0.3
    ) -> list[ImageDetections]:
        """Detects in every image what `query` names.

        Args:
            images: paths (local or gs://), PIL images, or RGB arrays uint8[H W 3]. Files and PIL images are turned upright
                by their EXIF orientation; boxes are in the pixels of the upright image.
            query: a list of names of any length; or a caption: phrases with " . " between them, or (of a detector of
                `glip_jax.load_detector`) a sentence, whose noun phrases are asked for; or a Prompt.
            threshold: lowest score that is returned.

        Returns:
            For each image its detections, best first.
        """
        if isinstance(query, str):
            query = self.read_caption(query)
        if isinstance(query, Prompt):
            names = [" ".join(query.caption[begin:end] for begin, end in spans) for spans in query.spans]
        else:
            names = list(query)
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
        """Tokens and encoded states of a prompt. Raises PromptError if it exceeds the token budget."""

        def encode() -> Array:
            return self._encode_text(self.params, tokenized.tokens, tokenized.mask)

        budget = self.config.model.text.max_tokens
        key = repr(tuple(prompt))  # spans that came from JSON are lists
        tokenized = _kept(self._tokenized, key, lambda: prompts.tokenize(prompt, self.tokenizer, budget))
        return tokenized, _kept(self._texts, prompt.caption, encode)

    def categories(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]) -> list[Detections]:
        """Detections of category names in RGB images: boxes in their own pixels, phrases index `names`, best first.

        Names that do not fit into one prompt run in chunks; each chunk may contribute `max_detections`.
        """
        if self._chunks[0] != tuple(names):
            self._chunks = tuple(names), category_prompts(names, self.tokenizer, self.config)
        chunks = [(prompt, np.asarray(own)) for prompt, own in self._chunks[1]]
        return [_merge(parts) for parts in self._begin(images, [chunks] * len(images))()]

    def caption(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Prompt]) -> list[Detections]:
        """Detections of each image's own prompt; phrases index the prompt's."""
        if len(images) != len(prompts_):
            raise ValueError(f"{len(images)} images and {len(prompts_)} prompts: give one prompt per image")
        return [found for (found,) in self.captions(images, [[prompt] for prompt in prompts_])]

    def captions(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Sequence[Prompt]]
    ) -> list[list[Detections]]:
        """Detections of each image's own prompts, any number of them; phrases index the prompt's.

        The features of an image are computed once for all its prompts, however many the other images have.
        """
        return self.detect_async(images, prompts_)()

    def detect_async(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Sequence[Prompt]]
    ) -> Callable[[], list[list[Detections]]]:
        """Like `captions`, without waiting: the device works on while the caller prepares the next images.

        What comes back waits for the detections and returns them; until then their images' features may lie on the
        device, so hold one or two of them, not all of a folder's.
        """
        if len(images) != len(prompts_):
            raise ValueError(f"{len(images)} images and prompts of {len(prompts_)}: give a list of prompts per image")
        return self._begin(images, [[(p, np.arange(len(p.spans))) for p in own] for own in prompts_])

    def _begin(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], queries: Sequence[Sequence[tuple[Prompt, Any]]]
    ) -> Callable[[], list[list[Detections]]]:
        """Runs images of one canvas together; `queries` holds each image's prompts, with the numbers of their phrases."""
        plans = [self.canvas(*image.shape[:2]) for image in images]
        begun: list[_Begun] = []
        # Empty slots are never found; their number only grows, so that few programs are compiled.
        most = max((len(prompt.spans) for query in queries for prompt, _ in query), default=1)
        while self._slots < most:
            self._slots *= 2
        for canvas in sorted({canvas for _, canvas in plans}):
            members = [i for i, (_, own) in enumerate(plans) if own == canvas and queries[i]]
            for begin in range(0, len(members), self.batch_size):
                group = members[begin : begin + self.batch_size]
                begun += self._begin_group(group, [images[i] for i in group], [plans[i][0] for i in group], canvas,
                                           [queries[i] for i in group])  # fmt: skip

        def finish() -> list[list[Detections]]:
            results: list[list[Detections]] = [[] for _ in images]
            for part in begun:
                found = jax.tree.map(np.asarray, part.found)
                for slot, (image, numbers, ratio) in enumerate(part.asked):
                    kept = jax.tree.map(lambda field, own=found.phrases[slot] >= 0, slot=slot: field[slot][own], found)
                    phrases = numbers[kept.phrases].astype(np.int32)
                    results[image].append(kept._replace(boxes=kept.boxes * ratio, phrases=phrases))
            return results

        return finish

    def _begin_group(
        self, places: list[int], images: list[Any], sizes: list[tuple[int, int]], canvas: tuple[int, int],
        queries: list[Sequence[tuple[Prompt, Any]]],
    ) -> Iterator[_Begun]:  # fmt: skip
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
        levels = self._encode_image(self.params, np.stack(pixels), size, extent)
        # First prompts first: where each image has as many, no features need to be moved.
        asked = [(row, *own[turn]) for turn in range(max(map(len, queries))) for row, own in enumerate(queries)
                 if turn < len(own)]  # fmt: skip
        for begin in range(0, len(asked), self.batch_size):
            part = asked[begin : begin + self.batch_size]
            rows = np.asarray([row for row, _, _ in part])
            rest = np.asarray([row for row in range(self.batch_size) if row not in rows], np.int64)
            rows = np.concatenate([rows, np.resize(rest, self.batch_size - len(part))]).astype(np.int64)
            texts = [self.text(prompt) for _, prompt, _ in part]
            texts += texts[-1:] * (self.batch_size - len(part))
            maps = np.stack([np.pad(t.phrase_map, ((0, self._slots - len(t.phrase_map)), (0, 0))) for t, _ in texts])
            states, mask = jnp.stack([s for _, s in texts]), np.stack([t.mask for t, _ in texts])
            moved = not np.array_equal(rows, np.arange(self.batch_size))
            own = _rows(levels, rows) if moved else levels
            found = self._ground(self.params, own, size[rows], extent[rows], states, mask, maps, canvas=canvas)
            ratios = [np.divide(images[row].shape[1::-1], size[row, ::-1]) for row, _, _ in part]
            yield _Begun(found, [(places[row], numbers, np.tile(ratio, 2).astype(np.float32))
                                 for (row, _, numbers), ratio in zip(part, ratios)])  # fmt: skip


@jax.jit
def _rows(levels: Any, rows: Array) -> Any:
    """The features of some images, also several times, as a batch."""
    return jax.tree.map(lambda level: level[rows], levels)


def bucket(height: int, width: int, config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size (height, width) after resizing, and the canvas: the smallest of the config's buckets that the image fits.

    An image that fits none gets a canvas of its own extent, and so a compiled program of its own.
    """
    rule, multiple = config.evaluation, config.model.input.extent_multiple
    size = target_size(height, width, rule.short_side, rule.long_side)
    extent = tuple(-(-side // multiple) * multiple for side in size)
    known = [canvas_size(rule.short_side, a, rule.long_side, multiple) for a in config.data.aspects]
    fitting = [c for c in known if c[0] >= extent[0] and c[1] >= extent[1]]
    return size, min(fitting, key=lambda c: c[0] * c[1]) if fitting else (extent[0], extent[1])


def _phrases(text: str) -> Prompt:
    """The prompt of phrases with " . " between them."""
    return prompts.prompt_from_categories([part.strip(" .") for part in text.split(" . ") if part.strip(" .")], " . ")


def _rgb(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels of a path, a PIL image or an array; ValueError for an array of another type or shape."""
    if isinstance(image, str | os.PathLike):
        with epath.Path(image).open("rb") as file, Image.open(file) as opened:
            return _rgb(opened)
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"an image is {array.dtype}{list(array.shape)}: expected a path, a PIL image or uint8[H W 3]")
    return array


def _kept(memory: OrderedDict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    """The value of `key`, made where it is not among the latest that are kept."""
    if key not in memory:
        memory[key] = make()
        if len(memory) > _TEXTS_KEPT:
            memory.popitem(last=False)
    memory.move_to_end(key)
    return memory[key]


def _merge(parts: list[Detections]) -> Detections:
    """The detections of an image's chunks, best first."""
    whole = Detections(*(np.concatenate(fields) for fields in zip(*parts)))
    order = np.argsort(-whole.scores, kind="stable")
    return Detections(*(field[order] for field in whole))
