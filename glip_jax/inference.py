"""From predictions to detections, and the Detector that evaluation, labelling and prediction share.

A score never depends on the company an image keeps: every image runs at its own extent, whatever canvas and batch it
is put into, so images may be grouped freely to save compilations.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from glip_jax import assets, prompts
from glip_jax import boxes as box
from glip_jax.config import Config, DetectionConfig, ModelConfig
from glip_jax.data.transforms import canvas_size, place, resize, target_size
from glip_jax.models.extents import inside, level_size
from glip_jax.models.glip import GLIP, normalize
from glip_jax.structures import Detections, Predictions, Prompt, TokenizedPrompt

__all__ = ["Detector", "detect"]


def _suppress(
    boxes: Float[Array, "M 4"], scores: Float[Array, " M"], phrases: Int[Array, " M"], config: DetectionConfig
) -> tuple[Int[Array, " D"], Bool[Array, " D"]]:
    """The best detections in order, each suppressing what overlaps it under the same phrase.

    Greedy from the best on, so the first `max_detections` survivors are those of a full suppression. Ties: lowest
    index. Returns indices and which of them are real.
    """

    def body(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        alive, chosen, real = state
        best = jnp.argmax(alive)
        same = phrases == phrases[best]
        gone = same & (box.iou(boxes, boxes[best][None]) > config.nms_iou)
        real = real.at[i].set(alive[best] > 0)
        alive = jnp.where(gone, 0.0, alive).at[best].set(0.0)
        return alive, chosen.at[i].set(best), real

    count = min(config.max_detections, scores.shape[0])
    start = (scores, jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))
    _, chosen, real = jax.lax.fori_loop(0, count, body, start)
    return chosen, real


def detect(
    predictions: Predictions,
    phrase_map: Bool[Array, "B P T"],
    size: Int[Array, "B 2"],
    extent: Int[Array, "B 2"],
    canvas: tuple[int, int],
    model: ModelConfig,
    config: DetectionConfig,
) -> Detections:
    """Scores, decodes, clips and suppresses (glip-reference 2.10), exact and of fixed shape.

    A phrase's score at a location is the mean probability of its tokens; the final score is the root of that times
    the centerness. Boxes are in pixels of the resized image, clipped to `size`; rows that hold nothing have phrase -1.
    """
    anchors = box.anchors(canvas, model.pyramid.strides, model.anchors.sizes)
    share = phrase_map / jnp.maximum(phrase_map.sum(-1, keepdims=True), 1)

    def one(part: Predictions, share: Array, size: Array, extent: Array) -> Detections:
        phrases, found, begin = share.shape[0], [], 0
        for stride in model.pyramid.strides:
            height, width = box.level_shape(canvas, stride)
            end = begin + height * width
            own = inside(level_size(extent[None], stride), height, width).reshape(-1)
            score = jnp.matmul(jax.nn.sigmoid(part.logits[begin:end]), share.T, precision=jax.lax.Precision.HIGHEST)
            candidate = (score > config.threshold) & own[:, None]
            score = score * jax.nn.sigmoid(part.centerness[begin:end, None])
            score = jnp.where(candidate, score, 0.0).reshape(-1)
            best, index = jax.lax.top_k(score, min(config.candidates_per_level, score.shape[0]))
            found.append((jnp.sqrt(best), index // phrases + begin, index % phrases))
            begin = end
        scores, where, phrase = (jnp.concatenate(parts) for parts in zip(*found))
        boxes = box.decode(part.deltas[where], jnp.asarray(anchors)[where])
        boxes = box.clip(boxes, size.astype(jnp.float32)[None])
        chosen, real = _suppress(boxes, scores, phrase, config)
        return Detections(
            jnp.where(real[:, None], boxes[chosen], 0.0),
            jnp.where(real, scores[chosen], 0.0),
            jnp.where(real, phrase[chosen], -1).astype(jnp.int32),
        )

    return jax.vmap(one)(predictions, share, size, extent)


class Detector:
    """Finds what prompts name, with one set of parameters.

    Image features are computed once for all chunks of a prompt, text states once per prompt (kept by caption).
    """

    def __init__(self, config: Config, params: Any, batch_size: int | None = None) -> None:
        """`params` as in `GLIP`; `batch_size` images share one step (default: config.evaluation.batch_size)."""
        self.config, self.params = config, params
        self.batch_size = batch_size or config.evaluation.batch_size
        text = config.model.text
        self.tokenizer = prompts.load_tokenizer(assets.resolve(text.vocabulary))
        self._texts: dict[str, tuple[TokenizedPrompt, Array]] = {}
        self._model = GLIP(config.model)
        self._encode_image = jax.jit(self._run_image)
        self._encode_text = jax.jit(
            lambda params, tokens, mask: self._model.apply({"params": params}, tokens, mask, method="encode_text")
        )
        self._ground = jax.jit(self._run_ground, static_argnames="canvas")

    def _run_image(self, params: Any, image: Array, size: Array, extent: Array) -> Any:
        pixels = normalize(image, size, self.config.model.input)
        return self._model.apply({"params": params}, pixels, extent, method="encode_image")

    def _run_ground(
        self, params: Any, levels: Any, size: Array, extent: Array, text: Array, mask: Array, phrase_map: Array,
        canvas: tuple[int, int],
    ) -> Detections:  # fmt: skip
        found = self._model.apply({"params": params}, levels, extent, text, mask, method="ground")
        return detect(found, phrase_map, size, extent, canvas, self.config.model, self.config.detection)  # type: ignore[arg-type]

    def canvas(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Size after resizing, and the canvas an image of that size runs on: the smallest of the config's that fits.

        An image that fits none gets a canvas of its own extent.
        """
        rule, multiple = self.config.evaluation, self.config.model.input.extent_multiple
        size = target_size(height, width, rule.short_side, rule.long_side)
        extent = tuple(-(-side // multiple) * multiple for side in size)
        known = [canvas_size(rule.short_side, a, rule.long_side, multiple) for a in self.config.data.aspects]
        fitting = [c for c in known if c[0] >= extent[0] and c[1] >= extent[1]]
        return size, min(fitting, key=lambda c: c[0] * c[1]) if fitting else (extent[0], extent[1])

    def text(self, prompt: Prompt) -> tuple[TokenizedPrompt, Array]:
        """Tokens and encoded states of a prompt. Raises PromptError if it exceeds the token budget."""
        tokenized = prompts.tokenize(prompt, self.tokenizer, self.config.model.text.max_tokens)
        if prompt.caption not in self._texts:
            states = self._encode_text(self.params, tokenized.tokens[None], tokenized.mask[None])
            self._texts[prompt.caption] = tokenized, states[0]
        return tokenized, self._texts[prompt.caption][1]

    def categories(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]) -> list[Detections]:
        """Detections of category names in RGB images: boxes in their own pixels, phrases index `names`, best first.

        Names that do not fit into one prompt run in chunks; each chunk may contribute `max_detections`.
        """
        limit = self.config.evaluation.chunk
        separator = self.config.data.captions.separator
        budget = self.config.model.text.max_tokens
        chunks = prompts.chunk(names, self.tokenizer, budget, separator, limit)
        queries = [
            [(prompts.prompt_from_categories([names[i] for i in chunk], separator), np.asarray(chunk))] * len(images)
            for chunk in chunks
        ]
        return self._find(images, queries)

    def caption(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], prompts_: Sequence[Prompt]) -> list[Detections]:
        """Detections of each image's own prompt; phrases index the prompt's."""
        if len(images) != len(prompts_):
            raise ValueError(f"{len(images)} images and {len(prompts_)} prompts: give one prompt per image")
        return self._find(images, [[(prompt, np.arange(len(prompt.spans))) for prompt in prompts_]])

    def _find(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], queries: Sequence[Sequence[tuple[Prompt, Any]]]
    ) -> list[Detections]:
        """Runs images of one canvas together; `queries` holds, per pass, each image's prompt and phrase numbers."""
        plans = [self.canvas(*image.shape[:2]) for image in images]
        results: list[list[Detections]] = [[] for _ in images]
        for canvas in sorted({canvas for _, canvas in plans}):
            members = [i for i, (_, own) in enumerate(plans) if own == canvas]
            for begin in range(0, len(members), self.batch_size):
                group = members[begin : begin + self.batch_size]
                self._find_group([images[i] for i in group], [plans[i][0] for i in group], canvas,
                                 [[query[i] for i in group] for query in queries],
                                 [results[i] for i in group])  # fmt: skip
        return [_merge(parts) for parts in results]

    def _find_group(
        self, images: list[Any], sizes: list[tuple[int, int]], canvas: tuple[int, int],
        queries: list[list[tuple[Prompt, Any]]], results: list[list[Detections]],
    ) -> None:  # fmt: skip
        multiple = self.config.model.input.extent_multiple
        spare = self.batch_size - len(images) if len(images) > 1 else 0
        pixels = [place(resize(image, size), canvas) for image, size in zip(images, sizes)]
        pixels += [np.zeros((*canvas, 3), np.uint8)] * spare
        size = np.asarray([*sizes, *[(multiple, multiple)] * spare], np.int32)
        match self.config.model.input.extent:
            case "image":
                extent = -(-size // multiple) * multiple
            case "batch":
                extent = np.tile(np.asarray(canvas, np.int32), (len(size), 1))
        levels = self._encode_image(self.params, np.stack(pixels), size, extent)
        for query in queries:
            texts = [self.text(prompt) for prompt, _ in query]
            texts += texts[-1:] * spare
            slots = 2 ** int(np.ceil(np.log2(max(len(t.phrase_map) for t, _ in texts))))
            maps = np.stack([np.pad(t.phrase_map, ((0, slots - len(t.phrase_map)), (0, 0))) for t, _ in texts])
            states, mask = jnp.stack([s for _, s in texts]), np.stack([t.mask for t, _ in texts])
            found = self._ground(self.params, levels, size, extent, states, mask, maps, canvas=canvas)
            found = jax.tree.map(np.asarray, found)
            for row, (image, (_, numbers)) in enumerate(zip(images, query)):
                real = found.phrases[row] >= 0
                ratio = np.asarray([image.shape[1] / size[row, 1], image.shape[0] / size[row, 0]] * 2, np.float32)
                boxes, scores = found.boxes[row][real] * ratio, found.scores[row][real]
                results[row].append(Detections(boxes, scores, numbers[found.phrases[row][real]].astype(np.int32)))


def _merge(parts: list[Detections]) -> Detections:
    """The detections of an image's chunks, best first."""
    boxes, scores, phrases = (np.concatenate(fields) for fields in zip(*parts))
    order = np.argsort(-scores, kind="stable")
    return Detections(boxes[order], scores[order], phrases[order])
