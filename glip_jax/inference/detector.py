"""The Detector; see `glip_jax.inference`."""

import contextlib
import functools
import itertools
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image

from glip_jax.config import Config
from glip_jax.inference.pipeline import pipelined
from glip_jax.inference.postprocess import compete
from glip_jax.inference.programs import ROWS, STEPS, WHOLE, programs
from glip_jax.inference.queries import category_prompts, check_query, phrases_of
from glip_jax.inference.segments import SegmentStates
from glip_jax.inference.sinks import sink_states
from glip_jax.io import assets
from glip_jax.io.compiler_lines import without_slow_compile_alarms
from glip_jax.io.cores import available_cores
from glip_jax.io.image_files import read_upright, upright
from glip_jax.io.paths import checked
from glip_jax.models.descriptions import averaged, description_table
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections, Prompt, TokenizedPrompt
from glip_jax.structures.canvas import canvas_size, pad_to_canvas, resize, target_size
from glip_jax.structures.descriptions import DescriptionTable, read_descriptions

__all__ = ["Detector", "ImageDetections", "bucket"]

logger = logging.getLogger(__name__)

_STEPS = 32
"""Steps of a call of the program, and different prompts that it can hold: LVIS's 1,203 names are 31 prompts of 40."""
_CACHED_TEXTS = 512
"""Captions whose encoded states a Detector caches, where no call has more: 200 MB at 128 tokens of width 768."""


class ImageDetections(NamedTuple):
    """Detections of one image in order of descending score, as a call of the Detector returns them."""

    boxes: Float32[np.ndarray, "N 4"]
    """xyxy, pixels of the image after EXIF rotation."""
    scores: Float32[np.ndarray, " N"]
    """sqrt(alignment * centerness), in [0, 1]."""
    names: list[str]
    """Per box the name, or the phrase of the caption, that it was detected for."""


class _Request(NamedTuple):
    """A prompt that an image is asked for."""

    image: int
    """Index of the image in its group."""
    prompt: Prompt
    phrases: Any
    """Indices that its phrases get in the result."""


class _PendingCall(NamedTuple):
    """Requests that were dispatched to the devices."""

    detections: Detections
    """Device arrays [steps rows D ...], possibly not computed yet."""
    cells: list[tuple[tuple[int, int], int, Any, Float32[np.ndarray, "4"]]]
    """Per request: its step and row, index of the image, indices of the phrases of its prompt, scale from resized to image pixels."""


class _Parameters:
    """Parameters on the devices that use them, as arrays of meshes of the first one, two, ... of them, which share memory."""

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = devices
        self._copies: list[Any] = []
        self._placed: dict[Mesh, Any] = {}

    def use(self, params: Any) -> None:
        """Replaces the parameters; None: by none."""
        self._placed.clear()
        # Host arrays would be copied to the device in every call; those of training may be split over its mesh.
        self._copies = [] if params is None else [jax.device_put(params, self._devices[0])]

    @property
    def first(self) -> Any:
        """On the first device."""
        if not self._copies:
            raise ValueError("the detector has no parameters: give it some with `use`")
        return self._copies[0]

    def on(self, mesh: Mesh) -> Any:
        """On all devices of `mesh`."""
        if mesh not in self._placed:
            while len(self._copies) < mesh.size:
                self._copies.append(jax.device_put(self.first, self._devices[len(self._copies)]))
            sharding = NamedSharding(mesh, WHOLE)
            self._placed[mesh] = jax.tree.map(
                lambda *parts: jax.make_array_from_single_device_arrays(parts[0].shape, sharding, list(parts)),
                *self._copies[: mesh.size],
            )
        return self._placed[mesh]


class Detector:
    """Detects the phrases of prompts in images, with one set of parameters.

    A call takes paths or images and returns boxes with names. The methods below take RGB arrays UInt8[H W 3] of any size and
    return `Detections`: boxes xyxy in pixels of the array, descending scores in [0, 1], indices of phrases. Candidates below
    `config.detection.threshold` are left out.

    Features of an image are computed once for all its prompts, states of a caption once (the latest are cached). Every batch
    has `batch_size` images on each device, so each canvas is compiled once: for the image encoder, and for the head with the
    text. A call uses as many devices as it has batches; a canvas that ran on several devices stays on them.
    """

    def __init__(
        self, config: Config, params: Any, batch_size: int | None = None, texts_of: "Detector | None" = None,
        read_caption: Callable[[str], Prompt] | None = None, devices: Sequence[Any] | None = None, padding: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """Moves `params` (parameters of `GLIP`, nested dict) to the first device; nothing is compiled yet.

        Args:
            config: settings of the network, of post-processing and of evaluation (sizes, names per prompt).
            params: host or device arrays; None: `use` gives them later, or `texts_of` has them.
            batch_size: images per device; default: config.evaluation.batch_size. Fewer images cost as much as a full batch,
                so use 1 to process single images.
            texts_of: another detector, whose parameters and cache of encoded captions are shared, also after `use`.
            read_caption: converts a caption that the detector is called with to a prompt; default: phrases with " . " between.
            devices: devices of this process; default: all of them.
            padding: token length and phrase slots of every prompt, so that a canvas has one program whatever is asked; default: few
                different ones, as short as the prompts of an image allow.
        """
        self.config, self.batch_size = config, batch_size or config.evaluation.batch_size
        self.devices = tuple(jax.local_devices() if devices is None else devices)
        self.tokenizer = prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
        if config.model.text.mask == "phrase":
            prompts.check_separators(self.tokenizer, config.model.text.separators, config.data.captions.separator)
        self._read_caption, self._fixed = read_caption or phrases_of, padding
        self._texts: OrderedDict[tuple[Any, ...], Array] = OrderedDict() if texts_of is None else texts_of._texts
        # A tuned prompt (`models.tuned_prompts`) belongs to a name with the separator behind it.
        alone = config.model.text.mask == "phrase" and not config.model.prompts.names
        own = SegmentStates(config.model.text) if alone else None
        self._segments = own if texts_of is None else texts_of._segments
        self._tables: dict[str, DescriptionTable] = {} if texts_of is None else texts_of._tables
        self._tokenized: OrderedDict[str, TokenizedPrompt] = OrderedDict()
        self._chunks: tuple[tuple[str, ...], list[tuple[Prompt, tuple[int, ...]]]] = ((), [])
        self._most_texts = _CACHED_TEXTS
        self._counts: dict[tuple[int, int], int] = {}
        self._compiled: set[tuple[tuple[int, int], tuple[int, int], int]] = set()
        self._parameters = _Parameters(self.devices) if texts_of is None else texts_of._parameters
        self._checked: list[str] | None = None
        self._programs = programs(config.model, config.detection)
        self._traced = self._programs.traced.copy()
        if texts_of is None:
            self._parameters.use(params)

    @property
    def group_size(self) -> int:
        """Images of a call that keeps all devices busy: `batch_size` on each of them."""
        return self.batch_size * len(self.devices)

    @property
    def params(self) -> Any:
        """The parameters on the first device. Raises ValueError where there are none."""
        return self._parameters.first

    def use(self, params: Any) -> None:
        """Replaces the parameters, which have the same shapes; None frees the memory that they take on the devices.

        Nothing is compiled again. Captions are encoded again, also for the detectors that share their cache.
        """
        self._texts.clear()
        if self._segments is not None:
            self._segments.clear()
        self._tables.clear()
        self._parameters.use(params)

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

        def start(_: Sequence[Any], pixels: list[Any]) -> Callable[[], list[Detections]]:
            if not isinstance(query, Prompt):
                return self.categories_async(pixels, names)
            finish = self.detect_async(pixels, [[query]] * len(pixels))
            return lambda: [found for (found,) in finish()]

        results = []
        groups = (images[begin : begin + self.group_size] for begin in range(0, len(images), self.group_size))
        for _, _, found in pipelined(groups, _rgb, start):
            for each in found:
                chosen = each.scores >= threshold
                phrases = [names[phrase] for phrase in each.phrases[chosen]]
                results.append(ImageDetections(each.boxes[chosen], each.scores[chosen], phrases))
        return results

    def text(self, prompt: Prompt, length: int | None = None) -> tuple[TokenizedPrompt, Array]:
        """Tokens of a prompt and the encoded states of its caption, Float[T D], padded to `length` tokens (default: as for it alone).

        `detection.sinks` stand behind those. Raises PromptError if the prompt exceeds the token budget, which the sinks are no part of.
        """
        length = length or self._padding([prompt])[0]
        tokens, mask, phrase_map = (array[..., :length] for array in self._tokenize(prompt))

        def encode() -> Array:
            encoder = functools.partial(self._programs.encode_text, self.params)
            if self._segments is None:
                states = encoder(tokens[None], mask[None])[0]
            else:
                states = jnp.asarray(self._segments(tokens, mask, encoder))
            return self._with_sinks(self._with_descriptions(states, prompt, TokenizedPrompt(tokens, mask, phrase_map)))

        detection = self.config.detection
        sinks = (detection.sinks, detection.sink_start, detection.sink_seed)
        described = self.config.data.captions.descriptions
        # With descriptions the states depend on what the phrases are.
        mixed = (described.file, repr(prompt.spans)) if described.use == "mean" else ()
        states = _cached(self._texts, (prompt.caption, length, sinks, mixed), encode, self._most_texts)
        behind = (0, detection.sinks)
        phrase_map = np.pad(phrase_map, ((0, 0), behind))
        return TokenizedPrompt(np.pad(tokens, behind), np.pad(mask, behind, constant_values=True), phrase_map), states

    def _with_descriptions(
        self, states: Float[Array, "T D"], prompt: Prompt, tokenized: TokenizedPrompt
    ) -> Float[Array, "T D"]:
        """With `data.captions.descriptions.use` of `mean`: the states of described names averaged with those of their descriptions."""
        settings = self.config.data.captions.descriptions
        if settings.use != "mean":
            return states
        descriptions = read_descriptions(str(assets.resolve(settings.file)))
        if settings.file not in self._tables:
            self._tables[settings.file] = description_table(
                self.params, self.config.model, descriptions, self.tokenizer
            )
        return averaged(states[None], descriptions.token_rows(prompt, tokenized)[None], self._tables[settings.file])[0]

    def _with_sinks(self, states: Float[Array, "T D"]) -> Float[Array, "T_and_sinks D"]:
        if not self.config.detection.sinks:
            return states
        sinks = sink_states(self.params, self.config, self.tokenizer)
        return jnp.concatenate([states, sinks.astype(states.dtype)])

    def _tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        """The prompt at the length of the whole token budget."""
        budget = self.config.model.text.max_tokens
        key = repr(tuple(prompt))  # spans read from JSON are lists, which are not hashable
        return _cached(self._tokenized, key, lambda: prompts.tokenize(prompt, self.tokenizer, budget), self._most_texts)

    def _padding(self, asked: Sequence[Prompt]) -> tuple[int, int]:
        """Token length and phrase slots of the program for the prompts of an image: few different ones, so few programs.

        They depend on nothing else. Results of an image are the same to the last bit in other batches and after other calls.
        Raises PromptError for a prompt with more phrases than a fixed padding has slots.
        """
        if self._fixed is not None:
            most = max(len(prompt.spans) for prompt in asked)
            if most > self._fixed[1]:
                raise prompts.PromptError(
                    f"a prompt has {most} phrases, this detector takes at most {self._fixed[1]} in one: split it"
                )
            return self._fixed
        longest = max(int(self._tokenize(prompt).mask.sum()) for prompt in asked)
        unit = 32 if longest <= 64 else 16
        length = min(-(-longest // unit) * unit, self.config.model.text.max_tokens)
        return length, max(16, -(-max(len(prompt.spans) for prompt in asked) // 8) * 8)

    def categories(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]) -> list[Detections]:
        """Detections of category names, one entry per image; `phrases` are indices into `names`.

        Names that exceed the token budget of one prompt are split into several; each of these adds at most
        `config.detection.max_detections` detections. Names compete as `config.detection` says. Raises PromptError as `category_prompts`.
        """
        return self.categories_async(images, names)()

    def categories_async(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], names: Sequence[str]
    ) -> Callable[[], list[Detections]]:
        """Starts `categories` as `detect_async` starts `captions`."""
        if self._chunks[0] != tuple(names):
            self._chunks = tuple(names), category_prompts(names, self.tokenizer, self.config)
        chunks = [(prompt, np.asarray(indices)) for prompt, indices in self._chunks[1]]
        return self.queries_async(images, [chunks] * len(images))

    def queries_async(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], queries: Sequence[Sequence[tuple[Prompt, Any]]]
    ) -> Callable[[], list[Detections]]:
        """Starts images that are asked for different things, as `detect_async` does; one entry per image.

        `queries`: per image its prompts, each with the indices (numpy, integers) that its phrases get in the result. Prompts that are the
        same object are encoded once. A phrase with the index -1 is a rival: names compete with it (`compete`), its boxes are dropped.
        """
        finish = self._dispatch(images, queries)
        return lambda: [compete(_joined(parts), self.config.detection) for parts in finish()]

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
        self._most_texts = max(self._most_texts, len({id(prompt) for query in queries for prompt, _ in query}))
        pending: list[_PendingCall] = []
        wanted = min(len(self.devices), max(1, -(-len(images) // self.batch_size)))
        for canvas in sorted({canvas for _, canvas in plans}):
            # Spare devices cost no time. Their number only grows, by canvas, so that nothing is compiled where the same images
            # come a second time.
            count = self._counts[canvas] = max(self._counts.get(canvas, 1), wanted)
            mesh = Mesh(np.array(self.devices[:count]), ("images",))
            members = [i for i, (_, planned) in enumerate(plans) if planned == canvas and queries[i]]
            for begin in range(0, len(members), self.batch_size * count):
                group = members[begin : begin + self.batch_size * count]
                pending += self._dispatch_group(group, [images[i] for i in group], [plans[i][0] for i in group], canvas,
                                                [queries[i] for i in group], mesh)  # fmt: skip

        def finish() -> list[list[Detections]]:
            results: list[list[Detections]] = [[] for _ in images]
            for call in pending:
                detections = jax.tree.map(np.asarray, call.detections)
                for cell, image, indices, ratio in call.cells:
                    used = detections.phrases[cell] >= 0
                    kept = jax.tree.map(lambda field, cell=cell, used=used: field[cell][used], detections)
                    phrases = indices[kept.phrases].astype(np.int32)
                    results[image].append(kept._replace(boxes=kept.boxes * ratio, phrases=phrases))
            return results

        return finish

    def _dispatch_group(
        self, indices: list[int], images: list[Any], sizes: list[tuple[int, int]], canvas: tuple[int, int],
        queries: list[Sequence[tuple[Prompt, Any]]], mesh: Mesh,
    ) -> Iterator[_PendingCall]:  # fmt: skip
        """At most `batch_size` images of one canvas for each device: encodes them once, then runs all their prompts."""
        multiple, per_device = self.config.model.input.extent_multiple, self.batch_size
        # Image k is row k: each device has a batch that one device alone would have.
        pixels = np.zeros((per_device * mesh.size, *canvas, 3), np.uint8)
        size = np.full((len(pixels), 2), multiple, np.int32)
        resized = _resizers().map(resize, images, sizes)
        for k, (image, side) in enumerate(zip(resized, sizes, strict=True)):
            pixels[k], size[k] = pad_to_canvas(image, canvas), side
        match self.config.model.input.extent:
            case "image":
                extent = -(-size // multiple) * multiple
            case "batch":
                extent = np.tile(np.asarray(canvas, np.int32), (len(size), 1))
        params, rows_of_devices = self._parameters.on(mesh), NamedSharding(mesh, ROWS)
        sides = jax.device_put((size, extent), rows_of_devices)
        ratios = [
            np.tile(np.divide(image.shape[1::-1], own[::-1]), 2).astype(np.float32) for image, own in zip(images, sizes)
        ]
        paddings = [self._padding([prompt for prompt, _ in query]) for query in queries]
        encoded = None
        for padding in sorted(set(paddings)):
            # Per device: the first prompts of all its images, then the second. Features stay on their device.
            calls = [
                _calls([_Request(k, *queries[k][turn]) for turn in range(max(map(len, queries)))
                        for k in range(begin, min(begin + per_device, len(images))) if paddings[k] == padding and turn < len(queries[k])],
                       per_device)
                for begin in range(0, len(pixels), per_device)
            ]  # fmt: skip
            program = (canvas, padding, mesh.size)
            with contextlib.nullcontext() if program in self._compiled else without_slow_compile_alarms():
                if encoded is None:
                    placed = jax.device_put(pixels, rows_of_devices)
                    encoded = self._programs.encode_image(params, placed, *sides, mesh=mesh), *sides
                for parts in itertools.zip_longest(*calls, fillvalue=[]):
                    found, cells = self._ground(parts, params, encoded, padding, canvas, mesh)
                    yield _PendingCall(found, [(cell, indices[request.image], request.phrases, ratios[request.image])
                                               for cell, request in zip(cells, itertools.chain(*parts), strict=True)])  # fmt: skip
            self._compiled.add(program)

    def _ground(
        self, parts: Sequence[Sequence[_Request]], params: Any, images: tuple[Any, Array, Array], padding: tuple[int, int],
        canvas: tuple[int, int], mesh: Mesh,
    ) -> tuple[Detections, list[tuple[int, int]]]:  # fmt: skip
        """Dispatches one call of each device. Returns the detections, and the step and row of each request."""
        length, slots = padding[0] + self.config.detection.sinks, padding[1]
        cells: list[tuple[int, int]] = []
        steps = np.zeros(mesh.size, np.int32)
        # A row that is not in use runs the image that lies there.
        rows = np.tile(np.arange(self.batch_size, dtype=np.int32), (_STEPS, mesh.size))
        which = np.zeros_like(rows)
        rule = self.config.model.text
        kind = np.int32 if rule.mask == "phrase" else bool
        masks, maps = np.zeros((mesh.size, _STEPS, length), kind), np.zeros((mesh.size, _STEPS, slots, length), bool)
        states: list[Array] = []
        stacks: dict[tuple[int, ...], Array] = {}
        for device, part in enumerate(parts):
            # Prompts by identity; a device without requests holds any.
            asked = {id(request.prompt): request.prompt for request in part or next(filter(None, parts))}
            texts = [self.text(prompt, padding[0]) for prompt in asked.values()]
            for number, (tokenized, _) in enumerate(texts):
                ids = (tokenized.tokens, tokenized.mask, rule.separators)
                masks[device, number] = prompts.segment_ids(*ids) if rule.mask == "phrase" else tokenized.mask
                maps[device, number, : len(tokenized.phrase_map)] = tokenized.phrase_map
            if tuple(asked) not in stacks:
                stacks[tuple(asked)] = jnp.stack([own for _, own in texts] + [texts[0][1]] * (_STEPS - len(texts)))
            states.append(jax.device_put(stacks[tuple(asked)], mesh.devices[device]))
            numbers = {key: number for number, key in enumerate(asked)}
            for place, request in enumerate(part):
                step, column = divmod(place, self.batch_size)
                cells.append((step, device * self.batch_size + column))
                rows[cells[-1]], which[cells[-1]] = request.image % self.batch_size, numbers[id(request.prompt)]
            steps[device] = -(-len(part) // self.batch_size)
        of_devices = NamedSharding(mesh, ROWS)
        text = jax.make_array_from_single_device_arrays((mesh.size * _STEPS, *states[0].shape[1:]), of_devices, states)
        mask, phrase_map, steps = jax.device_put(
            (masks.reshape(-1, length), maps.reshape(-1, slots, length), steps), of_devices
        )
        rows, which = jax.device_put((rows, which), NamedSharding(mesh, STEPS))
        found = self._programs.ground(
            params, images, (text, mask, phrase_map), rows, which, steps, canvas=canvas, mesh=mesh
        )
        return found, cells


def _calls(requests: Sequence[_Request], batch_size: int) -> list[list[_Request]]:
    """Consecutive requests of a device, as many as a call can hold: `_STEPS` steps and as many different prompts."""
    calls: list[list[_Request]] = []
    different: set[int] = set()
    for request in requests:
        different.add(id(request.prompt))
        if not calls or len(calls[-1]) == _STEPS * batch_size or len(different) > _STEPS:
            calls.append([])
            different = {id(request.prompt)}
        calls[-1].append(request)
    return calls


@functools.cache
def _resizers() -> ThreadPoolExecutor:
    """Threads that resize images, as many as cores, of all detectors."""
    return ThreadPoolExecutor(available_cores(), "resize")


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


def _cached(cache: OrderedDict[Any, Any], key: Any, make: Callable[[], Any], most: int) -> Any:
    """The value of `key` from an LRU cache of `most` entries."""
    if key not in cache:
        cache[key] = make()
        while len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


def _joined(parts: list[Detections]) -> Detections:
    """The detections of several prompts, one prompt after the other."""
    return Detections(*(np.concatenate(fields) for fields in zip(*parts)))
